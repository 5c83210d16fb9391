"""Direct logit attribution of a forward: what attention copies from each position into a logit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.adapters import Adapter, View
from captum_mllm.adapters.head import head_matrix
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.functional import added_to_scores, merge_views, visible_keys
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.attention import AttentionCall, observed_attention
from captum_mllm.model.inputs import Sample
from captum_mllm.model.layer_sums import Layer, LayerSums, full_precision
from captum_mllm.model.write_paths import PROJECTION, FrozenNorm, WritePath

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


@uninterrupted
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


class _Recorder:
    """What is gathered of each layer while the forward runs.

    What layers share is made once, and nothing waits for the device until :meth:`finish`.
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
        # Of length 1, so that they and their products fit into float16; squared at their own
        # level, since float32 ends at the square of 2e19.
        level = directions.norm(torch.inf, 1, keepdim=True).clamp(min=1e-37)
        directions = directions / level
        length = directions.norm(dim=1, keepdim=True).clamp(min=1e-30)
        self._size, self._directions = level * length, directions / length
        self._shared: dict[Any, Any] = {}  # what layers share
        self._layers = LayerSums()
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
        with full_precision(call.query.device):
            self._layers.hold(self._gathered(call, number, path))
            if path.norm is None:
                self._layers.settle()

    def on_norm(self, norm: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Multiply the layer by the scale that the norm gives what its attention wrote."""
        number, layer = self._numbers[norm], self._layers.last
        if layer is None or layer.number != number:
            return
        before, after = self._of_rows(args, kwargs, output)
        name = f"the norm after attention in layer {number}"
        with full_precision(output.device):
            self._layers.scale_last(self._scales(norm, name, before, after))
            self._layers.settle()

    def _gathered(self, call: AttentionCall, number: int, path: WritePath) -> Layer:
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
        return Layer(
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
        with full_precision(before.device):
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
        device = self._weight.device
        totals = self._layers.totals(device)
        if totals is None or self._calls != len(self._paths):
            raise ValueError(
                f"model: {self._calls} of {len(self._paths)} attention layers were seen in one "
                f"forward; is a part of the model compiled, or replaced? Pass the plain model."
            )
        self._check()
        scale = self._scale[:, None] * self._size
        return Contributions(totals[0] * scale, totals[1] * scale, self._logits)

    def _check(self) -> None:
        """Raise where a norm or a layer computed something else; the host waits once for all."""
        device, kind = self._weight.device, type(self._adapter.model).__name__
        numbers, errors = self._layers.differences(device)
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
