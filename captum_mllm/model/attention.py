"""The attention weights of one layer, as the model's eager attention shows them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from captum_mllm.adapters import Adapter

SETTING = "_attn_implementation_internal"


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
