"""Which adapter serves which model class."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from captum_mllm.adapters.base import Adapter
from captum_mllm.adapters.devices import unwrap
from captum_mllm.adapters.discovered import DiscoveredAdapter

_REGISTRY: dict[str, type[Adapter]] = {}
_A = TypeVar("_A", bound=type[Adapter])


def register_adapter(*model_classes: str) -> Callable[[_A], _A]:
    """Class decorator that registers an adapter for model classes and their subclasses.

    Args:
        model_classes: names of ``transformers`` classes; names, so that nothing is imported.

    Returns:
        The decorator; it returns the class unchanged.

    Example:
        >>> from captum_mllm.adapters import LlavaAdapter, register_adapter
        >>> @register_adapter("MyLlavaForConditionalGeneration")
        ... class MyAdapter(LlavaAdapter): ...
    """

    def register(adapter: _A) -> _A:
        for name in model_classes:
            _REGISTRY[name] = adapter
        return adapter

    return register


def registered_classes() -> tuple[str, ...]:
    """Names of the model classes that have an adapter, sorted.

    Returns:
        The names, as passed to :func:`register_adapter`.
    """
    return tuple(sorted(_REGISTRY))


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter for a model, by its class or the nearest registered base class.

    A class without one gets a :class:`~captum_mllm.adapters.DiscoveredAdapter`, which finds the
    layout of its image tokens at the first pictures.

    Args:
        model: the user's model.

    Returns:
        A new adapter around the model.

    Raises:
        TypeError: not a torch module.
        ValueError: no adapter is registered for it and it can't be probed, or it is compiled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a transformers model (torch.nn.Module) or, for wrappers, an "
            f"attribution method; got {type(model).__name__}."
        )
    refuse_compiled(model)
    model = unwrap(model)
    for cls in type(model).__mro__:
        if cls.__name__ in _REGISTRY:
            return _REGISTRY[cls.__name__](model)
    if _can_be_probed(model):
        return DiscoveredAdapter(model)
    raise ValueError(
        f"model: no adapter for {type(model).__name__}, and it lacks the methods that probing "
        f"needs (get_decoder, get_input_embeddings, get_output_embeddings, config). Registered: "
        f"{', '.join(registered_classes())}. To add one, subclass captum_mllm.adapters.Adapter and "
        f"decorate it with @register_adapter({type(model).__name__!r})."
    )


def _can_be_probed(model: Any) -> bool:
    """Whether it is a transformers model of any class, with a language model and its head."""
    names = ("get_decoder", "get_input_embeddings", "get_output_embeddings")
    return hasattr(model, "config") and all(callable(getattr(model, n, None)) for n in names)


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` compiled the module, its call or its forward."""
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        return True
    forward = module.forward
    disabled = getattr(forward, "_torchdynamo_disable", False)  # torch.compiler.disable
    return hasattr(forward, "_torchdynamo_orig_callable") and not disabled


def refuse_compiled(model: nn.Module) -> None:
    """Raise on torch.compile: hooks set later don't fire, or get traced into the user's graph.

    Args:
        model: the user's model; it is checked again before each run.

    Raises:
        ValueError: the model or one of its modules is compiled.
    """
    for name, module in model.named_modules():
        if not _is_compiled(module):
            continue
        where = f"its module {name!r}" if name else "it"
        raise ValueError(
            f"model: {where} is compiled (torch.compile), and forward hooks do not fire reliably "
            f"in compiled modules. Pass the uncompiled model (model._orig_mod where you kept "
            f"only torch.compile's return value)."
        )
