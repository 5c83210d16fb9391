"""Layers of attention whose contributions are computed together and added up."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.functional import attention_rows, head_contributions

_SCRATCH = 2**22  # attention weights that are recomputed at a time
_HELD = 2**22  # bytes of keys and values that are kept, to compute layers together


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast while it lasts: sums of many terms are computed in float32.

    Args:
        device: where they are computed.
    """
    mixed = torch.is_autocast_enabled(device.type)
    return _not_mixed(device.type) if mixed else nullcontext()


@uninterrupted
def _not_mixed(kind: str) -> Iterator[None]:
    with torch.autocast(kind, enabled=False):
        yield


@dataclass(frozen=True, eq=False)
class Layer:
    """What the contributions of a layer are computed from.

    Args:
        number: which layer.
        query: of the rows.
        key: of all positions.
        value: of all positions.
        led_back: directions led back through the output projection.
        by_kernel: what each head wrote in these directions according to the kernel's output.
        bias: what is added to the scores, -inf for a key that is not visible.
        scaling: factor of the scores.
        softcap: bound of the scores, or None.
        sinks: logits that take part in the softmax, or None.
    """

    number: int
    query: Float[Tensor, "heads rows dim"]
    key: Float[Tensor, "groups keys dim"]
    value: Float[Tensor, "groups keys width"]
    led_back: Float[Tensor, "heads rows width"]
    by_kernel: Float[Tensor, "heads rows"]
    bias: Float[Tensor, "#heads rows keys"]
    scaling: float
    softcap: float | None
    sinks: Float[Tensor, " heads"] | None

    @property
    def can_share(self) -> bool:
        """Whether layers can be computed together with it, as if they had more heads."""
        return len(self.bias) == 1 and self.sinks is None

    def is_like(self, other: "Layer") -> bool:
        """Whether the two can be computed together.

        Args:
            other: another layer.
        """

        def kind(layer: Layer) -> tuple[Any, ...]:
            tensors = (layer.query, layer.key, layer.value)
            shapes = [(t.shape, t.dtype, t.device) for t in tensors]
            return (*shapes, id(layer.bias), layer.scaling, layer.softcap)

        return self.can_share and other.can_share and kind(self) == kind(other)


class LayerSums:
    """Adds up the contributions of layers, as many at once as need little memory.

    A forward of some hundred tokens waits for the host that launches its kernels. Layers that are
    kept and added together cost about as many kernels as one; few keys and values, grouped ones
    above all, let many be kept. Nothing here waits for the device.
    """

    def __init__(self) -> None:
        self._held: list[Layer] = []
        self._sums: dict[torch.device, tuple[Tensor, ...]] = {}  # positive, signed
        self._ones: dict[tuple[int, torch.device], Tensor] = {}
        self._read: list[tuple[int, Tensor, Tensor]] = []  # layer, sums by head; by the kernel

    @property
    def last(self) -> Layer | None:
        """The layer that was kept last, unless it was added."""
        return self._held[-1] if self._held else None

    def hold(self, layer: Layer) -> None:
        """Keep a layer until it is added; those that can't be added with it are added now.

        Args:
            layer: what its contributions are computed from.
        """
        if self._held and not layer.is_like(self._held[0]):
            self.add()
        self._held.append(layer)

    def scale_last(self, scale: Float[Tensor, " rows"]) -> None:
        """Multiply what the last layer writes.

        Args:
            scale: > 0, per row.
        """
        layer = self._held[-1]
        scale = scale.to(layer.by_kernel)
        self._held[-1] = replace(
            layer,
            led_back=layer.led_back * scale[:, None].to(layer.led_back.dtype),
            by_kernel=layer.by_kernel * scale,
        )

    def settle(self) -> None:
        """Add the layers that are kept, unless one more fits in."""
        layer, count = self._held[-1], len(self._held) + 1
        heads, rows, _ = layer.query.shape
        fits = count * heads * rows * layer.key.shape[1] <= _SCRATCH
        fits &= count * (layer.key.nbytes + layer.value.nbytes) <= _HELD
        if fits and layer.can_share:
            self._held[-1] = replace(layer, query=layer.query.clone())  # not those of all tokens
        else:
            self.add()

    def add(self) -> None:
        """Add up the contributions of the layers that are kept, as if they were one."""
        layers, self._held = self._held, []
        if layers:
            with full_precision(layers[0].query.device):
                self._add(layers)

    def _add(self, layers: Sequence[Layer]) -> None:
        query, key, value, led_back = (
            parts[0] if len(layers) == 1 else torch.cat(parts)
            for parts in zip(*((n.query, n.key, n.value, n.led_back) for n in layers), strict=True)
        )
        one, (heads, rows, _), device = layers[0], query.shape, query.device
        if device not in self._sums:
            self._sums[device] = torch.zeros(2, rows, key.shape[1], device=device).unbind()
        if (heads, device) not in self._ones:  # a matrix product adds up heads and the sum so far
            self._ones[heads, device] = torch.ones(1, heads, device=device)
        step = max(1, _SCRATCH // (heads * key.shape[1]))
        for start in range(0, rows, step):
            some = slice(start, start + step)
            weights = attention_rows(
                query[:, some],
                key,
                one.scaling,
                bias=one.bias[:, some],
                softcap=one.softcap,
                sinks=one.sinks,
            )
            each = head_contributions(weights, value, led_back[:, some])
            del weights
            read = each.sum(-1).split(one.query.shape[0])
            self._read += [
                (layer.number, ours, layer.by_kernel[:, some])
                for layer, ours in zip(layers, read, strict=True)
            ]
            positive, signed = (total[some].view(1, -1) for total in self._sums[device])
            signed.addmm_(self._ones[heads, device], each.view(heads, -1))
            positive.addmm_(self._ones[heads, device], each.clamp_(min=0).view(heads, -1))

    def totals(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The positive and the signed contributions of all layers; None if there were none.

        Args:
            device: where they are wanted.
        """
        self.add()
        if not self._sums:
            return None
        positive, signed = (
            torch.stack([sums[n].to(device) for sums in self._sums.values()]).sum(0) for n in (0, 1)
        )
        return positive, signed

    def differences(self, device: torch.device) -> tuple[list[int], Float[Tensor, " parts"]]:
        """How far what the heads read differs from what their kernels did, relative to the latter.

        Args:
            device: where it is wanted.

        Returns:
            Per layer and part of its rows: the layer's number, the difference.
        """
        groups: defaultdict[tuple[int, ...], list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for number, ours, kernel in self._read:
            groups[tuple(ours.shape)].append((number, ours.to(device), kernel.to(device)))
        numbers, errors = [], []
        for group in groups.values():
            ours = torch.stack([one for _, one, _ in group])
            kernel = torch.stack([one for _, _, one in group]).float()
            largest = kernel.abs().amax((1, 2)).clamp(min=1e-20)
            numbers += [number for number, _, _ in group]
            errors.append((ours - kernel).abs().amax((1, 2)) / largest)
        return numbers, torch.cat(errors)
