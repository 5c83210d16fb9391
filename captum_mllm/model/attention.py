"""The attention weights of one layer, as the model's eager attention computes them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captum_mllm.adapters import Adapter
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.forward import captured_forward, evaluating

_SETTING = "_attn_implementation_internal"


def attention_weights(
    adapter: Adapter, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], layer: int
) -> Float[Tensor, "heads tokens tokens"]:
    """Attention weights of one layer of the language model, in one forward.

    The model uses "eager" attention, which shows its weights, during this forward only.

    Args:
        adapter: the model's adapter.
        inputs: the model's inputs of one sample.
        grids: the images among them.
        layer: which layer of the language model, from 0.

    Returns:
        (heads, tokens, tokens): from each token (row) to each (column).

    Raises:
        ValueError: a family whose layers do not show attention weights.
    """
    tokens = inputs["input_ids"].shape[1]
    no_logits = torch.empty(0, dtype=torch.int64, device=adapter.device)
    with evaluating(adapter), _eager(adapter), _kept_weights(adapter, layer) as calls:
        captured_forward(adapter, inputs, grids, rows=no_logits)
    weights = calls[0] if len(calls) == 1 else None
    if not isinstance(weights, Tensor) or tuple(weights.shape[2:]) != (tokens, tokens):
        raise _unknown(adapter)
    return weights[0]


@contextmanager
def _eager(adapter: Adapter) -> Iterator[None]:
    """Compute the language model's attention with its weights at hand; the tower's is unchanged.

    Set past the property of that name, which would set it in further configs too.
    """
    configs = {id(c): c for c in (adapter.decoder.config, adapter.config.get_text_config())}
    before = [(config, vars(config).get(_SETTING)) for config in configs.values()]
    if any(_SETTING not in vars(config) for config in configs.values()):
        raise _unknown(adapter)
    try:
        for config, _ in before:
            vars(config)[_SETTING] = "eager"
        yield
    finally:
        for config, value in before:
            vars(config)[_SETTING] = value


@contextmanager
def _kept_weights(adapter: Adapter, layer: int) -> Iterator[list[Any]]:
    """Keep what the layer's attention returns in addition to its output, call by call."""
    module = getattr(adapter.layers[layer], "self_attn", None)
    if not isinstance(module, nn.Module):
        raise _unknown(adapter)
    calls: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        calls.append(output[1] if isinstance(output, tuple) and len(output) > 1 else None)

    handle = module.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def _unknown(adapter: Adapter) -> ValueError:
    return ValueError(
        f"method 'attention' does not know how {type(adapter.model).__name__} shows its attention "
        f"weights; take another method."
    )
