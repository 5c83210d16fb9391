"""The baseline that reads attention: from where a token is predicted, to the image's cells."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from captum_mllm.adapters import Adapter, find_adapter
from captum_mllm.capture import captured_forward
from captum_mllm.functional import merge_views
from captum_mllm.inputs import append_answer
from captum_mllm.methods.asked import Asked, over_answer
from captum_mllm.result import MLLMAttributionResult

SETTING = "_attn_implementation_internal"


def attention(asked: Asked, layer: int | None = None) -> MLLMAttributionResult:
    """Mean over heads of one layer's attention, from the position that predicts each token.

    Weights are those of the model's "eager" attention, which it is asked for during one forward
    and no longer; views are merged as the lens's are. Memory: (heads, tokens, tokens) of one layer
    at a time.

    Args:
        asked: the question.
        layer: of the language model, negative counts from the end; default None: the first layer
            of the last third (depth 32: layer 21, from 0), where the pictures of many models are
            looked at for content, neither for format (first layers) nor hardly at all (last).

    Raises:
        ValueError: no such layer; a family whose layers show no attention weights.

    Reference:
        Ours: raw attention is a common baseline; the choice of the layer is a convention.
    """
    adapter = find_adapter(asked.model)
    chosen = _layer(layer, len(adapter.layers))
    run = asked.run()
    full = append_answer(run.sample, run.answer_ids, adapter)
    n_given = len(run.sample.prompt_ids)
    text = run.trace.text_positions[run.trace.targets] - run.sample.padding
    with adapter.running(), _eager(adapter), _weights(adapter, chosen) as seen:
        captured_forward(adapter, full, run.sample.grids, rows=text[:0])
    weights = _checked(adapter, seen, n_given + len(run.answer_ids))
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
        raise ValueError(f"layer must be an int in {-depth}..{depth - 1}, got {layer!r}.")
    return layer % depth


@contextmanager
def _eager(adapter: Adapter) -> Iterator[None]:
    """The language model's attention computed with its weights at hand; the tower's as it is.

    Set past the property of that name, which would set it in further configs too.
    """
    configs = {id(c): c for c in (adapter.decoder.config, adapter.config.get_text_config())}
    before = [(config, vars(config).get(SETTING)) for config in configs.values()]
    if any(SETTING not in vars(config) for config in configs.values()):
        raise _unknown(adapter)
    try:
        for config, _ in before:
            vars(config)[SETTING] = "eager"
        yield
    finally:
        for config, value in before:
            vars(config)[SETTING] = value


@contextmanager
def _weights(adapter: Adapter, layer: int) -> Iterator[list[Any]]:
    """What the layer's attention gives beside its output, call by call."""
    module = getattr(adapter.layers[layer], "self_attn", None)
    if not isinstance(module, nn.Module):
        raise _unknown(adapter)
    seen: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[1] if isinstance(output, tuple) and len(output) > 1 else None)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _checked(adapter: Adapter, seen: list[Any], tokens: int) -> Tensor:
    """(heads, tokens, tokens) of the one sample."""
    weights = seen[0] if len(seen) == 1 else None
    if not isinstance(weights, Tensor) or tuple(weights.shape[2:]) != (tokens, tokens):
        raise _unknown(adapter)
    return weights[0]


def _unknown(adapter: Adapter) -> ValueError:
    return ValueError(
        f"method 'attention' does not know how {type(adapter.model).__name__} shows its attention "
        f"weights; take another method."
    )
