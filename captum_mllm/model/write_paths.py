"""How each layer's attention writes into the residual stream, found by running it once."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.head import Role, head_matrix
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.model.attention import AttentionCall, observed_attention

_ROUNDINGS = 8  # of a layer's sum
_TOKENS = 5  # of the run that finds the paths
PROJECTION = Role(
    "output projection of attention",
    "direct logit attribution",
    "Load the weights unquantised, or quantised so that they can be dequantised (bitsandbytes' 4 "
    "bits, torchao, quanto); LogitLens needs the LM head alone",
)


@dataclass(frozen=True, eq=False)
class WritePath:
    """What lies between one layer's attention kernel and the residual stream.

    Args:
        attention: the attention layer, as the kernel knows it.
        projection: the output projection.
        norm: the norm after it (Gemma 2 and 3), or None.
    """

    attention: nn.Module
    projection: nn.Module
    norm: nn.Module | None


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm as a linear map once the scale of each input is fixed: ``gain * x * s + offset``.

    Args:
        gain: (dim,) factor of each coordinate.
        offset: (dim,) what is added, or None.
        centred: whether the mean over the coordinates is subtracted first (LayerNorm).
    """

    gain: Float[Tensor, " dim"]
    offset: Float[Tensor, " dim"] | None
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, like: Float[Tensor, "rows dim"]) -> "FrozenNorm":
        """Read gain, offset and kind off a norm by what it makes of three vectors.

        Args:
            norm: an RMSNorm or a LayerNorm of any class.
            like: states of the norm's width, dtype and device.
        """
        return cls.of_each([norm], [like])[0]

    @classmethod
    def of_each(
        cls, norms: Sequence[nn.Module], like: Sequence[Float[Tensor, "rows dim"]]
    ) -> list["FrozenNorm"]:
        """Read several norms; the host waits once for each kind of ``like``.

        Args:
            norms: RMSNorms or LayerNorms of any class.
            like: per norm, states of its width, dtype and device.
        """
        kinds: defaultdict[Any, list[int]] = defaultdict(list)
        for n, states in enumerate(like):
            kinds[states.shape[-1], states.dtype, states.device].append(n)
        found: dict[int, FrozenNorm] = {}
        for numbers in kinds.values():
            alike = cls._of_a_kind([norms[n] for n in numbers], like[numbers[0]])
            found |= dict(zip(numbers, alike, strict=True))
        return [found[n] for n in range(len(norms))]

    @classmethod
    def _of_a_kind(cls, norms: Sequence[nn.Module], like: Tensor) -> list["FrozenNorm"]:
        """Read norms of one width, dtype and device."""
        signs = torch.ones_like(like[:1])
        signs[:, 1::2] = -1
        probes = torch.cat([torch.zeros_like(signs), signs, torch.ones_like(signs)])[:, None]
        # The bare forward: hooks on the norm are meant for the model's states.
        made = torch.stack([norm.forward(probes)[:, 0].to(like.device) for norm in norms]).float()
        offset, alternating, constant = made.unbind(1)
        gain = (alternating - offset) * signs.float()
        centred = (constant - offset).abs().amax(1) <= 1e-2 * gain.abs().amax(1)
        flags = torch.stack([centred, offset.any(1)], 1).tolist()
        return [
            cls(gain[n], offset[n] if shifts else None, centres)
            for n, (centres, shifts) in enumerate(flags)
        ]

    def scales(
        self, before: Float[Tensor, "rows dim"], after: Float[Tensor, "rows dim"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, ""]]:
        """The scale s of each state, by least squares.

        Args:
            before: states that went into the norm.
            after: what came out.

        Returns:
            The scales, and the largest difference between the norm's output and the linear map's,
            relative to its largest value: what rounding leaves of 0, unless the norm is not linear
            for a fixed scale. Nothing waits for the device here.
        """
        linear = self.gain.to(before.device) * self._centre(before.float())
        shown = after.float()
        if self.offset is not None:
            shown = shown - self.offset.to(after.device)
        size = torch.linalg.vecdot(linear, linear).clamp(min=1e-30)
        scale = torch.linalg.vecdot(linear, shown) / size
        beyond = torch.addcmul(shown, linear, scale[:, None], value=-1)
        worst, largest = (torch.linalg.vector_norm(each, torch.inf) for each in (beyond, shown))
        return scale, worst / largest.clamp(min=1e-30)

    def led_back(self, directions: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Directions at the norm's output as directions at its input, for a scale of 1.

        Args:
            directions: one per row.
        """
        return self._centre(directions * self.gain.to(directions.device))

    def _centre(self, states: Tensor) -> Tensor:
        return states - states.mean(-1, keepdim=True) if self.centred else states


_Known = tuple[tuple[Any, ...], tuple[WritePath | None, ...]]
_FOUND: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def write_paths(adapter: Adapter) -> tuple[WritePath | None, ...]:
    """The write path of each layer of the language model; None where it has no softmax attention.

    Found by one run of the language model over a few random states, and kept until a part of the
    model, its forward or its hooks are replaced: the output projection is the layer that gets the
    kernel's output as it is; a norm after it gets the projection's output as it is. The layer's
    output must be its input, what attention wrote and what one other part wrote, added up.

    Args:
        adapter: the model's adapter, already ``evaluating``.

    Returns:
        One per layer.

    Raises:
        ValueError: a layer whose attention writes in another way (a gate, a factor).
    """
    parts = tuple(
        (id(m), type(m), id(vars(m).get("forward")), *m._forward_hooks, *m._forward_pre_hooks)
        for layer in adapter.layers
        for m in layer.modules()
    )
    known = _FOUND.get(adapter.model)
    if known is None or known[0] != parts:
        seen = _run(adapter)
        paths = tuple(_path(adapter, n, layer, seen) for n, layer in enumerate(adapter.layers))
        known = _FOUND[adapter.model] = (parts, paths)
    return known[1]


@dataclass(eq=False)
class _Seen:
    """What went into and out of every part of the layers in one run.

    All of it is kept, so that no two tensors share an address by chance.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)


def _run(adapter: Adapter) -> _Seen:
    """Run the language model over a few random states."""
    seen = _Seen()
    table = adapter.model.get_input_embeddings()
    width = adapter.class_weights(slice(0, 1))[0].shape[-1]
    generator = torch.Generator().manual_seed(0)
    # Small, so that what the layers write is not lost in the rounding of their inputs.
    states = 0.01 * torch.randn(1, _TOKENS, width, generator=generator)
    dtype = next((p.dtype for p in table.parameters() if p.is_floating_point()), torch.float32)
    states = states.to(adapter.device, dtype)
    with observed_attention(adapter, seen.calls.append), _watched(adapter, seen):
        adapter.decoder(inputs_embeds=states, use_cache=False)
    return seen


@uninterrupted
def _watched(adapter: Adapter, seen: _Seen) -> Iterator[None]:
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        value = next(_tensors((*args, *kwargs.values())), None)
        if value is not None:
            seen.inputs[module] = value

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        value = next(_tensors(output if isinstance(output, tuple) else (output,)), None)
        if value is not None:
            seen.outputs[module] = value

    with ExitStack() as stack:
        for layer in adapter.layers:
            for part in layer.modules():
                hook = part.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(part.register_forward_hook(after).remove)
        yield


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor))


def _path(adapter: Adapter, number: int, layer: nn.Module, seen: _Seen) -> WritePath | None:
    """The write path of one layer."""
    parts = list(layer.modules())
    calls = [call for call in seen.calls if any(call.module is part for part in parts)]
    if not calls:
        return None
    if len(calls) > 1:
        raise _unknown(adapter, number, f"it calls attention {len(calls)} times")
    projection = _reader(parts, calls[0].output, seen)
    if projection is None:
        raise _unknown(
            adapter, number, "its attention output is changed (a gate) before its projection"
        )
    written = seen.outputs[projection]
    matrix, bias = head_matrix(projection, PROJECTION)
    states = seen.inputs[projection].float()
    ours = nn.functional.linear(
        states, matrix.to(states), None if bias is None else bias.to(states)
    )
    dtypes = {calls[0].output.dtype, written.dtype, getattr(projection, "weight", written).dtype}
    exact = dtypes <= {torch.float32, torch.float64}
    tolerance = 1e-3 if exact else 5e-2
    if not float((ours - written.float()).abs().max()) <= tolerance * float(ours.abs().max()):
        raise _unknown(adapter, number, "its output projection is not the linear map W x + b")
    norm = _reader([part for part in parts if part is not projection], written, seen)
    if norm is not None:
        written = seen.outputs[norm]
    after, before, wrote = (
        t.to(written.device).float() for t in (seen.outputs[layer], seen.inputs[layer], written)
    )
    others = [seen.outputs[m] for m in layer.children() if m in seen.outputs]
    others = [torch.zeros_like(after)] + [t.to(after) for t in others if t.shape == after.shape]
    rounding = _ROUNDINGS * torch.finfo(seen.outputs[layer].dtype).eps
    if not any(
        bool(
            (
                (after - before - wrote - one).abs() <= rounding * _sizes(after, before, wrote, one)
            ).all()
        )
        for one in others
    ):
        raise _unknown(
            adapter,
            number,
            "its output is not the sum of its input, what attention writes and what one other "
            "part writes",
        )
    return WritePath(calls[0].module, projection, norm)


def _sizes(*terms: Tensor) -> Tensor:
    """What rounding is relative to, element by element: one large coordinate hides no other."""
    return sum((term.abs() for term in terms), torch.full_like(terms[0], 1e-12))


def _reader(parts: list[nn.Module], tensor: Tensor, seen: _Seen) -> nn.Module | None:
    """The outermost part that gets a tensor as it is, and makes another one of it."""
    for part in parts:
        given, made = seen.inputs.get(part), seen.outputs.get(part)
        if given is None or made is None or made.data_ptr() == given.data_ptr():
            continue
        if given.data_ptr() == tensor.data_ptr() and given.numel() == tensor.numel():
            return part
    return None


def _unknown(adapter: Adapter, layer: int, why: str) -> ValueError:
    return ValueError(
        f"model: what attention writes in layer {layer} of {type(adapter.model).__name__} can't be "
        f"followed: {why}. Use LogitLens, which needs no attention."
    )
