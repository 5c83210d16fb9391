"""Direct logit attribution of a forward: what attention copies from each position into a logit."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.adapters import Adapter, View
from captum_mllm.adapters.head import head_matrix
from captum_mllm.functional import (
    added_to_scores,
    attention_rows,
    head_contributions,
    merge_views,
    visible_keys,
)
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.attention import AttentionCall, observed_attention
from captum_mllm.model.inputs import Sample
from captum_mllm.model.write_paths import PROJECTION, FrozenNorm, WritePath

_SCRATCH = 2**23  # attention weights that are recomputed at a time
_HELD = 2**23  # bytes of keys and values that are kept, to compute layers together
_BLOCK, _ROWS = 2**15, 2**7  # rows of the LM head: in a block, in a part of its sum


@dataclass(frozen=True, eq=False)
class Contributions:
    """What the attention of all layers writes from each position into some logits.

    Logits are centred: the mean over the vocabulary is subtracted, which no softmax notices.
    The scales of the norms are those of the forward (frozen).

    Args:
        positive: (rows, positions): sum over layers and heads of the positive contributions.
        signed: (rows, positions): sum over layers and heads of all contributions.
        logits: (rows,): the centred logits themselves.
    """

    positive: Float[Tensor, "rows positions"]
    signed: Float[Tensor, "rows positions"]
    logits: Float[Tensor, " rows"]

    @property
    def rest(self) -> Float[Tensor, " rows"]:
        """The remainder: the predicting position's own embedding, MLPs, other layers, biases."""
        return self.logits - self.signed.sum(1)

    def select(self, rows: Int64[Tensor, " chosen"]) -> "Contributions":
        """Those of some rows.

        Args:
            rows: their numbers.

        Returns:
            The contributions to these rows' logits, in that order.
        """
        return Contributions(self.positive[rows], self.signed[rows], self.logits[rows])


def image_maps(
    adapter: Adapter, sample: Sample, values: Float[Tensor, "rows positions"]
) -> tuple[Float[Tensor, "rows ..."], ...]:
    """Contributions of the images' positions on their grids, added up over tiles and overview.

    Args:
        adapter: tells the views that an image's tokens form.
        sample: where the images' tokens are.
        values: one per position.

    Returns:
        Per image (rows, grid rows, cols), per video with a steps axis before them: contribution
        per cell. The cells of a map add up to the contributions of the image's tokens, newline and
        class tokens aside; within a few percent where a view's edges don't fall on those of the
        image (LLaVA-NeXT, whose tiles are cropped).
    """
    maps = []
    for where, grid in zip(sample.image_positions, sample.grids, strict=True):
        views = adapter.views(grid)
        shown = [_per_cell(values[:, where], view, grid) for view in views]
        merged = merge_views(shown, [view.box for view in views], grid.shape)
        maps.append(len(views) * merged)
    return tuple(maps)


def _per_cell(
    values: Float[Tensor, "rows tokens"], view: View, grid: ImageGrid
) -> Float[Tensor, "rows ..."]:
    """Values of a view's tokens as values per cell of the image: an overview's token spans many."""
    left, upper, right, lower = view.box
    cells = grid.rows * grid.cols * (right - left) * (lower - upper)
    density = view.tokens.shape[-1] * view.tokens.shape[-2] / cells
    at = view.tokens.flatten().to(values.device)
    return values[:, at].unflatten(1, view.tokens.shape) * density


@contextmanager
def recorded_contributions(
    adapter: Adapter,
    paths: tuple[WritePath | None, ...],
    rows: Int64[Tensor, " rows"],
    ids: Int64[Tensor, " rows"],
) -> Iterator[list[Contributions]]:
    """Add up the contributions to some predictions while a forward runs.

    The kernel in use computes the output; of the rows alone, attention is computed again, layer by
    layer, and nothing is kept but sums.

    Args:
        adapter: the model's adapter, already ``evaluating``.
        paths: see :func:`~captum_mllm.model.write_paths.write_paths`.
        rows: positions whose predictions are explained.
        ids: the predicted token of each.

    Returns:
        A context manager that yields a list, which holds the contributions once it is left.

    Raises:
        ValueError: a layer attended otherwise than its kernel was told (a mask or a setting that
            is not known here), or an output projection whose matrix can't be read.
    """
    recorder = _Recorder(adapter, paths, rows, ids)
    found: list[Contributions] = []
    with ExitStack() as stack:
        stack.enter_context(observed_attention(adapter, recorder.on_attention))
        norms = [path.norm for path in paths if path is not None and path.norm is not None]
        for norm in norms:
            hook = norm.register_forward_hook(recorder.on_norm, with_kwargs=True)
            stack.callback(hook.remove)
        hook = adapter.final_norm.register_forward_hook(recorder.on_final_norm, with_kwargs=True)
        stack.callback(hook.remove)
        yield found
    found.append(recorder.finish())


@dataclass(frozen=True, eq=False)
class _Layer:
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

    def is_like(self, other: "_Layer") -> bool:
        """Whether the two can be computed together.

        Args:
            other: another layer.
        """

        def kind(layer: _Layer) -> tuple[Any, ...]:
            tensors = (layer.query, layer.key, layer.value)
            shapes = [(t.shape, t.dtype, t.device) for t in tensors]
            return (*shapes, id(layer.bias), layer.scaling, layer.softcap)

        return self.can_share and other.can_share and kind(self) == kind(other)


class _Recorder:
    """The sums, and what is needed to add a layer to them.

    A forward of some hundred tokens waits for the host that launches its kernels. So a layer costs
    as few of them as can be: layers with few keys and values (grouped ones above all) are kept and
    added together, what layers share is made once, and nothing waits for the device until
    :meth:`finish`.
    """

    def __init__(
        self, adapter: Adapter, paths: tuple[WritePath | None, ...], rows: Tensor, ids: Tensor
    ) -> None:
        self._adapter, self._rows = adapter, rows
        where = self._where = rows.tolist()
        self._unbroken = where == list(range(where[0], where[0] + len(where)))
        self._paths = {path.attention: (n, path) for n, path in enumerate(paths) if path}
        self._numbers = {path.norm: n for n, path in self._paths.values() if path.norm}
        weight, bias = adapter.class_weights(ids)
        mean_weight, mean_bias = _mean_row(adapter)
        self._weight = weight.float() - mean_weight
        self._bias = None if bias is None or mean_bias is None else bias.float() - mean_bias
        self._norms = _frozen_norms((*self._numbers, adapter.final_norm), weight[:1])
        directions = self._norms[adapter.final_norm].led_back(self._weight)
        # Of length 1, so that they and their products fit into float16.
        self._size = directions.norm(dim=1, keepdim=True).clamp(min=1e-30)
        self._directions = directions / self._size
        self._shared: dict[Any, Any] = {}  # what layers share
        self._sums: dict[torch.device, tuple[Tensor, ...]] = {}  # positive, signed
        self._held: list[_Layer] = []  # layers that are not in the sums yet
        self._read: list[tuple[int, Tensor, Tensor]] = []  # layer, sums by head; by the kernel
        self._norm_errors: list[tuple[str, Tensor, bool]] = []
        self._calls, self._exact = 0, True
        self._scale = self._logits = torch.zeros(0)

    def on_attention(self, call: AttentionCall) -> None:
        """Gather what the layer's contributions are made of; its norm is still to come, if any."""
        if call.module not in self._paths:
            return
        number, path = self._paths[call.module]
        self._calls += 1
        self._exact &= call.output.dtype in (torch.float32, torch.float64)
        with _full_precision(call.query.device):
            self._hold(self._gathered(call, number, path))
            if path.norm is None:
                self._add_if_full()

    def on_norm(self, norm: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Multiply the layer by the scale that the norm gives what its attention wrote."""
        layer = self._held[-1] if self._held else None
        if layer is None or layer.number != self._numbers[norm]:
            return
        before, after = self._of_rows(args, kwargs, output)
        name = f"the norm after attention in layer {layer.number}"
        scale = self._scales(norm, name, before, after).to(layer.by_kernel)
        self._held[-1] = replace(
            layer,
            led_back=layer.led_back * scale[:, None].to(layer.led_back.dtype),
            by_kernel=layer.by_kernel * scale,
        )
        with _full_precision(output.device):
            self._add_if_full()

    def _gathered(self, call: AttentionCall, number: int, path: WritePath) -> "_Layer":
        """What a layer's contributions are computed from, of the rows alone."""
        device, value, settings = call.query.device, _single(call.value[0]), call.settings
        at = self._at(device)
        led_back = self._led_back(path, device).to(value.dtype)
        led_back = led_back.view(len(self._where), call.query.shape[1], -1)
        kernel = call.output[0, at].to(value.dtype).flatten(0, 1)
        by_kernel = kernel[:, None].bmm(led_back.flatten(0, 1)[..., None])
        bias, further = self._bias_of(call), settings.get("position_bias")
        if further is not None:
            bias = bias + further[0][:, at].float()
        scaling = settings.get("scaling")
        return _Layer(
            number=number,
            query=call.query[0][:, at],
            key=call.key[0],
            value=value,
            led_back=led_back.transpose(0, 1),
            by_kernel=by_kernel.view(len(self._where), -1).T,
            bias=bias,
            scaling=call.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=settings.get("softcap"),
            sinks=settings.get("s_aux"),
        )

    def _led_back(self, path: WritePath, device: torch.device) -> Float[Tensor, "rows width"]:
        """The directions led back through a layer's output projection, in its precision."""
        matrix = _single(head_matrix(path.projection, PROJECTION)[0].to(device))
        if path.norm is not None:
            directions = self._norms[path.norm].led_back(self._directions.to(device))
            return directions.to(matrix.dtype).mm(matrix)
        key = ("directions", device, matrix.dtype)
        if key not in self._shared:
            self._shared[key] = self._directions.to(device, matrix.dtype)
        return self._shared[key].mm(matrix)

    def _hold(self, layer: "_Layer") -> None:
        """Keep a layer until it is added; those that can't be added with it are added now."""
        if self._held and not layer.is_like(self._held[0]):
            self._add()
        self._held.append(layer)

    def _add_if_full(self) -> None:
        """Add the layers that are kept, unless one more would fit in."""
        layer, count = self._held[-1], len(self._held) + 1
        heads, rows, _ = layer.query.shape
        fits = count * heads * rows * layer.key.shape[1] <= _SCRATCH
        fits &= count * (layer.key.nbytes + layer.value.nbytes) <= _HELD
        if fits and layer.can_share:
            self._held[-1] = replace(layer, query=layer.query.clone())  # not those of all tokens
        else:
            self._add()

    def _add(self) -> None:
        """Add up the contributions of the layers that are kept, as if they were one."""
        layers, self._held = self._held, []
        query, key, value, led_back = (
            parts[0] if len(layers) == 1 else torch.cat(parts)
            for parts in zip(*((n.query, n.key, n.value, n.led_back) for n in layers), strict=True)
        )
        one, (heads, rows, _) = layers[0], query.shape
        step, device = max(1, _SCRATCH // (heads * key.shape[1])), query.device
        if device not in self._sums:
            self._sums[device] = torch.zeros(2, rows, key.shape[1], device=device).unbind()
        ones = self._share(("ones", heads, device), lambda: torch.ones(1, heads, device=device))
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
            signed.addmm_(ones, each.view(heads, -1))
            positive.addmm_(ones, each.clamp_(min=0).view(heads, -1))

    def _share(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What layers share, made once."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _at(self, device: torch.device) -> slice | Tensor:
        """The rows, as what a tensor on the device is indexed by."""
        if self._unbroken:  # a slice needs no kernel
            return slice(self._where[0], self._where[-1] + 1)
        return self._share(("rows", device), lambda: self._rows.to(device))

    def _bias_of(self, call: AttentionCall) -> Tensor:
        """What a call's mask adds to the scores of the rows: the layers share few masks."""
        mask, device = call.mask, call.query.device
        if isinstance(mask, Tensor) and mask.ndim != 4:
            mask = None  # of padding, as flash attention takes it: a sample has none
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(
                f"model: its attention takes its mask as {type(mask).__name__}, of which single "
                f"rows can't be read; use another kernel (model.set_attn_implementation('sdpa'))."
            )
        causal = call.settings.get("is_causal")
        causal = bool(getattr(call.module, "is_causal", True) if causal is None else causal)
        window, n_keys = call.settings.get("sliding_window"), call.key.shape[2]

        def make() -> tuple[Tensor, Any]:
            rows = self._rows.to(device)
            seen = visible_keys(rows, n_keys, mask, causal=causal, window=window)
            return added_to_scores(*seen), mask

        # The mask is kept with it: another one at its address would be taken for it.
        return self._share(("mask", n_keys, device, *_identity(mask, causal, window)), make)[0]

    def on_final_norm(self, norm: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """The scale of everything, and the logits."""
        before, after = self._of_rows(args, kwargs, output)
        device = self._weight.device
        self._scale = self._scales(norm, "the norm before the LM head", before, after).to(device)
        self._logits = (self._weight * after.to(device).float()).sum(1)
        if self._bias is not None:
            self._logits = self._logits + self._bias

    def _scales(self, norm: nn.Module, name: str, before: Tensor, after: Tensor) -> Tensor:
        """A norm's scales; how well they fit is kept for the end."""
        scale, error = self._norms[norm].scales(before, after)
        self._norm_errors.append((name, error, before.dtype in (torch.float32, torch.float64)))
        return scale

    def _of_rows(self, args: Any, kwargs: Any, output: Tensor) -> tuple[Tensor, Tensor]:
        """What went into a norm and what came out, at the rows; on the output's device."""
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        at = self._at(output.device)
        return given.to(output.device)[0, at], output[0, at]

    def finish(self) -> Contributions:
        """The sums, scaled; checked against what the kernels computed."""
        if self._held:
            with _full_precision(self._held[0].query.device):
                self._add()
        if not self._sums or self._calls != len(self._paths):
            raise ValueError(
                f"model: {self._calls} of {len(self._paths)} attention layers were seen in one "
                f"forward; is a part of the model compiled, or replaced? Pass the plain model."
            )
        self._check()
        device, scale = self._weight.device, self._scale[:, None] * self._size
        positive, signed = (
            sum(sums[n].to(device) for sums in self._sums.values()) * scale for n in (0, 1)
        )
        return Contributions(positive, signed, self._logits)

    def _check(self) -> None:
        """Raise where a norm or a layer computed something else; the host waits once for all."""
        device, kind = self._weight.device, type(self._adapter.model).__name__
        numbers, errors = _differences(self._read, device)
        fits = torch.stack([error.to(device) for _, error, _ in self._norm_errors])
        found = torch.cat([errors, fits]).tolist()
        for (name, _, exact), error in zip(self._norm_errors, found[len(numbers) :], strict=True):
            if not error <= (1e-3 if exact else 3e-2):
                raise ValueError(
                    f"model: {name} of {kind} is neither an RMSNorm nor a LayerNorm (its output "
                    f"differs by {error:.2g} of its largest value), so what attention writes can't "
                    f"be followed; use LogitLens."
                )
        for number, error in zip(numbers, found, strict=False):
            if not error <= (1e-3 if self._exact else 5e-2):
                raise ValueError(
                    f"model: the attention of layer {number} of {kind} computes something else "
                    f"than softmax(q k) v under the mask that it is given (outputs differ by "
                    f"{error:.2g} of their largest value), so it can't be attributed; use "
                    f"LogitLens, or another kernel (model.set_attn_implementation('eager'))."
                )


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: sums of many terms are computed in float32."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else nullcontext()


def _identity(mask: Tensor | None, causal: bool, window: int | None) -> tuple[Any, ...]:
    """What tells the masks of a forward apart, as long as each is kept."""
    if mask is None:
        return causal, window
    version = None if mask.is_inference() else mask._version
    return mask.data_ptr(), mask.dtype, mask.shape, mask.stride(), version


def _single(tensor: Tensor) -> Tensor:
    """Half precision as it is, all else in float32."""
    return tensor if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.float()


def _frozen_norms(
    norms: Sequence[nn.Module], like: Float[Tensor, "1 dim"]
) -> dict[nn.Module, FrozenNorm]:
    """Norms read once a forward, each where its weights are."""
    places = [next((p.device for p in norm.parameters()), like.device) for norm in norms]
    states = [torch.zeros_like(like, device=like.device if p.type == "meta" else p) for p in places]
    return dict(zip(norms, FrozenNorm.of_each(norms, states), strict=True))


def _differences(
    read: Sequence[tuple[int, Tensor, Tensor]], device: torch.device
) -> tuple[list[int], Float[Tensor, " calls"]]:
    """Per layer and part of its rows: how far what its heads read differs from the kernel's."""
    groups: defaultdict[tuple[int, ...], list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
    for number, ours, kernel in read:
        groups[tuple(ours.shape)].append((number, ours.to(device), kernel.to(device)))
    numbers, errors = [], []
    for group in groups.values():
        ours = torch.stack([one for _, one, _ in group])
        kernel = torch.stack([one for _, _, one in group]).float()
        largest = kernel.abs().amax((1, 2)).clamp(min=1e-20)
        numbers += [number for number, _, _ in group]
        errors.append((ours - kernel).abs().amax((1, 2)) / largest)
    return numbers, torch.cat(errors)


def _mean_row(adapter: Adapter) -> tuple[Float[Tensor, " dim"], Float[Tensor, ""] | None]:
    """Mean over the vocabulary of the LM head's rows, and of its bias.

    In two steps, because a GPU takes hundreds of MiB of scratch memory for one sum over so many
    rows; in blocks, because on a CPU a sum in float32 copies what it adds up.
    """
    weight, bias = adapter.class_weights(slice(None))
    even = len(weight) // _ROWS * _ROWS
    total = weight[even:].sum(0, dtype=torch.float32)
    for block in weight[:even].split(_BLOCK):
        total += block.unflatten(0, (-1, _ROWS)).sum(1, dtype=torch.float32).sum(0)
    mean = (total / len(weight)).to(adapter.device)
    return mean, None if bias is None else bias.float().mean().to(adapter.device)
