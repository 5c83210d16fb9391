"""Counts of what a computation asks of a device: kernels, waits, bytes; no device is needed."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_KERNEL = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias", "resize_"}
_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}


class Counted(TorchDispatchMode):
    """Counts operations while the context lasts.

    Attributes:
        kernels: operations that compute or copy, by name: views and empty tensors are none.
        waits: those for which the host waits until the device is done, by name.
        live: bytes of tensors made within the context that are alive now.
        peak: the largest ``live``.
        made: bytes of all tensors made within the context.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.live = self.peak = self.made = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        makes = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        moved = bool(given) and any(t.device != given[0].device for t in makes)
        masked = name == "index" and any(t.dtype == torch.bool for t in given[1:])
        if name in _WAITS or masked or moved:
            self.waits[name] += 1
        if name == "_local_scalar_dense":
            return result
        if not func.is_view and name not in _NO_KERNEL and not name.split("_")[-1] == "empty" and not name.startswith(("empty", "new_empty")):
            self.kernels[name] += 1
        if not func.is_view:
            for tensor in makes:
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        """A storage that is new counts until nobody holds it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.made += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
