"""The attention of the language model: its weights, and a look at every call of its kernel."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.forward import captured_forward, evaluating

_SETTING = "_attn_implementation_internal"
_OURS = "captum_mllm_"  # begins the names of observed kernels


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of an attention kernel, and what it returned.

    Args:
        module: the attention layer.
        query: (1, heads, queries, dim), after rotary embedding.
        key: (1, groups, keys, dim), after rotary embedding.
        value: (1, groups, keys, dim).
        mask: what the kernel is given as the mask, in the form that it takes, or None.
        settings: the kernel's keyword arguments (``scaling``, ``sliding_window``, ...).
        output: (1, queries, heads, dim).
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    settings: Mapping[str, Any]
    output: Tensor


_OBSERVER: ContextVar[Callable[[AttentionCall], None] | None] = ContextVar("observer", default=None)


@uninterrupted
def observed_attention(
    adapter: Adapter, observer: Callable[[AttentionCall], None]
) -> Iterator[None]:
    """Show an observer every attention call of the language model while the context lasts.

    The kernel that the model is set to (SDPA, flash, eager, one from the hub) computes the output,
    with the mask that is made for it; the vision encoder's attention is not shown.

    Args:
        adapter: the model's adapter, already ``evaluating``.
        observer: gets each call right after the kernel has returned.

    Raises:
        ValueError: the model's config has no attention setting.
    """
    token = _OBSERVER.set(observer)
    try:
        with _setting(adapter, _observed_name):
            yield
    finally:
        _OBSERVER.reset(token)


def _observed_name(kernel: str | None) -> str:
    """The registered name under which a kernel is run and observed."""
    kernel = kernel or "eager"
    if kernel == "flex_attention":
        raise ValueError(
            "model: flex attention takes its mask as an object, of which single rows can't be "
            "read; use another kernel (model.set_attn_implementation('sdpa'))."
        )
    if kernel.startswith(_OURS):
        raise ValueError(
            "model: its attention is observed already, by another call on the same model; run one "
            "after the other."
        )
    name = f"{_OURS}{kernel}"  # keeps "flash" in it, which transformers looks for
    transformers.AttentionInterface.register(name, partial(_observed, kernel))
    masks = transformers.AttentionMaskInterface()
    if kernel in masks:
        transformers.AttentionMaskInterface.register(name, masks[kernel])
    return name


def _observed(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **settings: Any,
) -> Any:
    """Run a kernel by its name and show the call to the observer."""
    # Flash kernels read the setting again, and would look for one of our name.
    config: dict[str, Any] = vars(getattr(module, "config", None) or SimpleNamespace())
    ours = config.get(_SETTING)
    try:
        if ours is not None:
            config[_SETTING] = kernel
        result = _kernel(kernel, module)(module, query, key, value, attention_mask, **settings)
    finally:
        if ours is not None:
            config[_SETTING] = ours
    if observer := _OBSERVER.get():
        observer(AttentionCall(module, query, key, value, attention_mask, settings, result[0]))
    return result


def _kernel(name: str, module: nn.Module) -> Callable[..., Any]:
    """The function that a layer would call: eager attention is that of its own source file."""
    for cls in type(module).__mro__:
        source = vars(sys.modules.get(cls.__module__, object))
        if name == "eager" and "eager_attention_forward" in source:
            return source["eager_attention_forward"]
        if name != "eager" and "ALL_ATTENTION_FUNCTIONS" in source:
            return source["ALL_ATTENTION_FUNCTIONS"][name]
    raise ValueError(
        f"model: the source of its attention layer {type(module).__name__} does not hold the "
        f"attention function {name!r}; set another one (model.set_attn_implementation('sdpa'))."
    )


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
    eager = _setting(adapter, lambda _: "eager")
    with evaluating(adapter), eager, _kept_weights(adapter, layer) as calls:
        captured_forward(adapter, inputs, grids, rows=no_logits)
    weights = calls[0] if len(calls) == 1 else None
    if not isinstance(weights, Tensor) or tuple(weights.shape[2:]) != (tokens, tokens):
        raise _unknown(adapter)
    return weights[0]


@uninterrupted
def _setting(adapter: Adapter, changed: Callable[[str | None], str]) -> Iterator[None]:
    """Change the language model's attention setting for the context; the tower's is unchanged.

    Set past the property of that name, which would set it in further configs too.
    """
    configs = {id(c): c for c in (adapter.decoder.config, adapter.config.get_text_config())}
    if any(_SETTING not in vars(config) for config in configs.values()):
        raise _unknown(adapter)
    before = [(config, vars(config)[_SETTING]) for config in configs.values()]
    names = [changed(value) for _, value in before]
    try:
        for (config, _), name in zip(before, names, strict=True):
            vars(config)[_SETTING] = name
        yield
    finally:
        for config, value in before:
            vars(config)[_SETTING] = value


@uninterrupted
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Let every part of a model use SDPA where its kernel is neither SDPA nor eager.

    Other kernels (flash) do not take float32, and are not seen by torch's functions.

    Args:
        model: the user's model, already ``evaluating``.
    """
    owners = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): vars(config) for config in owners if hasattr(config, "__dict__")}
    before = [
        (config, config[_SETTING])
        for config in configs.values()
        if config.get(_SETTING) not in (None, "eager", "sdpa")
    ]
    try:
        for config, _ in before:
            config[_SETTING] = "sdpa"
        yield
    finally:
        for config, name in before:
            config[_SETTING] = name


@uninterrupted
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
        f"model: we do not know how {type(adapter.model).__name__} shows its attention; "
        f"take another method."
    )
