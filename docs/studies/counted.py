"""What a computation asks of a device: kernels, waits of the host, bytes. A CPU shows them too."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_KERNEL = {"_unsafe_view", "alias", "detach", "lift_fresh", "empty", "empty_like", "new_empty"}
_NO_KERNEL |= {"empty_strided", "new_empty_strided", "_local_scalar_dense"}
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}
_COPIES = {"tolist", "numpy", "cpu"}  # to the host, which a CPU does without an operation


class Counts:
    """What was counted.

    Attributes:
        kernels: operations that compute or copy, by name: views and empty tensors are none.
        waits: those for which the host waits until the device is done, by name.
        live: bytes of the tensors made meanwhile that are alive now.
        peak: the largest ``live``; what a kernel takes for itself is not seen.
    """

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's memory, from now until nobody holds it.

        Args:
            tensor: of which the memory may be known already.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(args[1:])
        )
        self.counts.waits[name] += int(name in _WAITS or by_mask)
        if not func.is_view and name not in _NO_KERNEL:
            self.counts.kernels[name] += 1
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and not func.is_view:
                self.counts.note(one)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.counts.waits[name] += int(name in _COPIES)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what is asked of the device while the context lasts.

    Returns:
        A context manager that yields the counts.

    Example:
        >>> import torch
        >>> with counted() as counts:
        ...     x = (torch.ones(4) + 1)[:2].sum().item()
        >>> sum(counts.kernels.values()), dict(+counts.waits), counts.peak
        (3, {'_local_scalar_dense': 1}, 32)
    """
    counts = Counts()
    with _Operations(counts), _Functions(counts):
        yield counts
