"""Direct logit attribution of a forward: what attention copies from each position into a logit."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.adapters import Adapter, View
from captum_mllm.adapters.head import head_matrix
from captum_mllm.functional import (
    attention_rows,
    head_contributions,
    head_outputs,
    merge_views,
    visible_keys,
)
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.attention import AttentionCall, observed_attention
from captum_mllm.model.inputs import Sample
from captum_mllm.model.write_paths import PROJECTION, FrozenNorm, WritePath

_SCRATCH = 2**24  # attention weights that are recomputed at a time


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


class _Recorder:
    """The sums, and what is needed to add a layer to them."""

    def __init__(
        self, adapter: Adapter, paths: tuple[WritePath | None, ...], rows: Tensor, ids: Tensor
    ) -> None:
        self._adapter, self._rows = adapter, rows
        self._paths = {path.attention: path for path in paths if path is not None}
        weight, bias = adapter.class_weights(ids)
        mean_weight, mean_bias = _mean_row(adapter)
        self._weight = weight.float() - mean_weight
        self._bias = None if bias is None or mean_bias is None else bias.float() - mean_bias
        self._like = torch.zeros_like(weight[:1])  # a state, for its width and dtype
        self._final = FrozenNorm.of(adapter.final_norm, self._like)
        self._directions = self._final.led_back(self._weight)
        self._sums: tuple[Tensor, Tensor] | None = None  # positive, signed
        self._layer: tuple[Tensor, Tensor] | None = None  # of a layer whose norm is to come
        self._errors: list[Tensor] = []
        self._calls, self._exact = 0, True
        self._scale = self._logits = torch.zeros(0)

    def on_attention(self, call: AttentionCall) -> None:
        """Compute the rows again and add the layer, or keep it for the norm after it."""
        path = self._paths.get(call.module)
        if path is None:
            return
        self._calls += 1
        self._exact &= call.output.dtype in (torch.float32, torch.float64)
        directions = self._directions
        if path.norm is not None:
            norm = FrozenNorm.of(path.norm, self._like.to(call.query.device))
            directions = norm.led_back(directions.to(call.query.device))
        device = call.query.device
        with torch.autocast(device.type, enabled=False):  # sums of many terms, in float32
            layer = self._contributions(call, path, directions.to(device))
        if path.norm is None:
            self._add(layer)
        else:
            self._layer = layer

    def on_norm(self, norm: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Multiply the layer by the scale that the norm gives what its attention wrote."""
        before, after = self._of_rows(args, kwargs, output)
        scale = FrozenNorm.of(norm, before[:1]).scales(before, after)[:, None]
        if self._layer is not None:
            self._add((self._layer[0] * scale, self._layer[1] * scale))
        self._layer = None

    def on_final_norm(self, _norm: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """The scale of everything, and the logits."""
        before, after = self._of_rows(args, kwargs, output)
        device = self._weight.device
        self._scale = self._final.scales(before.to(device), after.to(device))
        self._logits = (self._weight * after.to(device).float()).sum(1)
        if self._bias is not None:
            self._logits = self._logits + self._bias

    def _of_rows(self, args: Any, kwargs: Any, output: Tensor) -> tuple[Tensor, Tensor]:
        """What went into a norm and what came out, at the rows; on the output's device."""
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        rows = self._rows.to(output.device)
        return given.to(output.device)[0, rows], output[0, rows]

    def finish(self) -> Contributions:
        """The sums, scaled; checked against what the kernels computed."""
        if self._sums is None or self._calls != len(self._paths):
            raise ValueError(
                f"model: {self._calls} of {len(self._paths)} attention layers were seen in one "
                f"forward; is a part of the model compiled, or replaced? Pass the plain model."
            )
        worst = float(torch.stack(self._errors).max())
        tolerance = 1e-3 if self._exact else 5e-2
        if not worst <= tolerance:
            raise ValueError(
                f"model: the attention of {type(self._adapter.model).__name__} computes something "
                f"else than softmax(q k) v under the mask that it is given (outputs differ by "
                f"{worst:.2g} of their largest value), so it can't be attributed; use LogitLens, "
                f"or another kernel (model.set_attn_implementation('eager'))."
            )
        scale = self._scale[:, None]
        return Contributions(self._sums[0] * scale, self._sums[1] * scale, self._logits)

    def _add(self, layer: tuple[Tensor, Tensor]) -> None:
        device = self._weight.device
        layer = (layer[0].to(device), layer[1].to(device))
        before = self._sums
        self._sums = layer if before is None else (before[0] + layer[0], before[1] + layer[1])

    def _contributions(
        self, call: AttentionCall, path: WritePath, directions: Float[Tensor, "rows dim"]
    ) -> tuple[Tensor, Tensor]:
        """Positive and signed contributions of one layer, (rows, positions) each."""
        matrix = head_matrix(path.projection, PROJECTION)[0].to(directions.device)
        heads = call.query.shape[1]
        led_back = directions @ matrix.float()
        led_back = led_back.unflatten(1, (heads, -1)).transpose(0, 1)
        rows, n_keys = self._rows.to(call.query.device), call.key.shape[2]
        step = max(1, _SCRATCH // (heads * n_keys))
        parts = []
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            weights = _weights(call, some)
            output = head_outputs(weights, call.value[0]).transpose(0, 1)
            kernel = call.output[0, some].float()
            largest = kernel.abs().max().clamp(min=1e-20)
            self._errors.append(((output - kernel).abs().max() / largest).to(self._weight.device))
            each = head_contributions(weights, call.value[0], led_back[:, start : start + step])
            parts.append((each.clamp(min=0).sum(0), each.sum(0)))
        return torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts])


def _weights(call: AttentionCall, rows: Tensor) -> Float[Tensor, "heads rows keys"]:
    """Attention weights of some rows of a kernel's call, from what the kernel was given."""
    settings, mask = call.settings, call.mask
    if isinstance(mask, Tensor) and mask.ndim != 4:
        mask = None  # of padding, as flash attention takes it: a sample has none
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"model: its attention takes its mask as {type(mask).__name__}, of which single rows "
            f"can't be read; use another kernel (model.set_attn_implementation('sdpa'))."
        )
    causal = settings.get("is_causal")
    if causal is None:
        causal = getattr(call.module, "is_causal", True)
    n_keys = call.key.shape[2]
    visible, bias = visible_keys(
        rows, n_keys, mask, causal=bool(causal), window=settings.get("sliding_window")
    )
    if (further := settings.get("position_bias")) is not None:
        further = further[0][:, rows].float()
        bias = further if bias is None else bias + further
    scaling = settings.get("scaling")
    return attention_rows(
        call.query[0][:, rows],
        call.key[0],
        call.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        visible,
        bias,
        softcap=settings.get("softcap"),
        sinks=settings.get("s_aux"),
    )


def _mean_row(adapter: Adapter) -> tuple[Float[Tensor, " dim"], Float[Tensor, ""] | None]:
    """Mean over the vocabulary of the LM head's rows, and of its bias."""
    weight, bias = adapter.class_weights(slice(None))
    mean = weight.mean(0, dtype=torch.float32).to(adapter.device)
    return mean, None if bias is None else bias.float().mean().to(adapter.device)
