"""The baseline that reads attention: from where a token is predicted, to the image's cells."""

from typing import Any

from captum_mllm.adapters import find_adapter
from captum_mllm.functional import merge_views
from captum_mllm.methods.registry import method
from captum_mllm.methods.request import Request, over_answer
from captum_mllm.model.attention import attention_weights
from captum_mllm.model.inputs import append_answer
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.validation import ArgumentError


@method("attention", kind="baseline")
def attention(request: Request, layer: int | None = None) -> MLLMAttributionResult:
    """Mean over heads of one layer's attention, from the position that predicts each token.

    The weights are those of the model's "eager" attention, which is switched on for one forward
    only; views are merged as the lens's are. Memory: (heads, tokens, tokens) of one layer at a
    time.

    Args:
        request: the request.
        layer: of the language model, negative counts from the end; default None: the first layer
            of the last third (depth 32: layer 21, from 0), where many models attend to an image's
            content; first layers attend to its format, last ones hardly to the image at all.

    Raises:
        ValueError: no such layer; a family whose layers don't return attention weights.

    Reference:
        Ours: raw attention is a common baseline; the choice of the layer is a convention.
    """
    adapter = find_adapter(request.model)
    chosen = _layer(layer, len(adapter.layers))
    run = request.run()
    full = append_answer(run.sample, run.answer_ids, adapter)
    text = run.trace.text_positions[run.trace.targets] - run.sample.padding
    weights = attention_weights(adapter, full, run.sample.grids, chosen)
    rows = weights.to(adapter.device).float().mean(0)[text - 1]
    maps = []
    for where, grid in zip(run.sample.image_positions, run.sample.grids, strict=True):
        views = adapter.views(grid)
        cells = [
            rows[:, where[view.tokens.flatten().to(where.device)]].unflatten(1, view.tokens.shape)
            for view in views
        ]
        maps.append(merge_views(cells, [view.box for view in views], grid.shape))
    return over_answer(run.trace, maps, "attention")


def _layer(layer: Any, depth: int) -> int:
    if layer is None:
        return depth * 2 // 3
    if not isinstance(layer, int) or isinstance(layer, bool) or not -depth <= layer < depth:
        raise ArgumentError("layer", f"must be an int in {-depth}..{depth - 1}, got {layer!r}.")
    return layer % depth
