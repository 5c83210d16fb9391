"""Wrappers around a model, and weights that are not where they are used.

``accelerate`` *dispatches* a model: parts of it run on several devices, or their weights stay on
the CPU or on disk and are loaded only for each call (*offloaded*; in between they are ``meta``
tensors, which have a shape and no values). It replaces the ``forward`` of each such module and
keeps its settings in the module's ``_hf_hook``, an ``accelerate.hooks.ModelHook``. Neither
``accelerate`` nor ``peft`` is imported: their objects are recognised by their attributes.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from captum_mllm.adapters.interrupts import uninterrupted

_PLAIN_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_OWN_FORWARD = {
    "POLY": "picks its adapters by a task_ids argument",
    "XLORA": "weighs its adapters by a forward of its own",
}
"""PEFT methods whose wrapper does more than call the model, and what it does."""


def unwrap(model: Any) -> Any:
    """The transformers model inside wrappers that don't change what it computes.

    A PEFT model (``PeftModel``) holds the transformers model with the adapters' layers in place, so
    its forward includes them. ``DataParallel`` and ``DistributedDataParallel`` split batches, and
    we run single samples.

    Args:
        model: the user's model.

    Returns:
        The inner model; anything else unchanged.

    Raises:
        ValueError: a wrapper changes the model's inputs (prompt learning) or shards its weights
            (FSDP): the inner model alone would compute something else.

    Example:
        >>> from torch import nn
        >>> inner = nn.Linear(2, 3)
        >>> unwrap(nn.DataParallel(inner)) is inner and unwrap(inner) is inner
        True
    """
    while True:
        if isinstance(model, _PLAIN_WRAPPERS):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            _refuse_changed_inputs(model)
            model = model.get_base_model()
        else:
            break
    if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(model).__mro__):
        raise ValueError(
            "model: its weights are sharded over processes (FullyShardedDataParallel). "
            "Save its full state and load it into a plain model to explain it."
        )
    return model


def _refuse_changed_inputs(model: Any) -> None:
    """Raise if a PEFT wrapper does more than call the model in it."""
    active = getattr(model, "active_adapters", None) or [model.active_adapter]
    for name in [active] if isinstance(active, str) else active:
        config = model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False):
            why = "puts learned tokens or key-values in front of the inputs"
        elif kind in _OWN_FORWARD:
            why = _OWN_FORWARD[kind]
        elif getattr(config, "alora_invocation_tokens", None):
            why = "turns on within the prompt (alora_invocation_tokens)"
        else:
            continue
        raise ValueError(
            f"model: its PEFT adapter {name!r} ({kind}) {why}, so that positions and maps of the "
            f"inner model would not be those of the whole model. Adapters within the layers (LoRA "
            f"and its variants, IA3) work; or pass the base model, without the adapter."
        )


@uninterrupted
def loaded(module: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of a module and of its parts while the context lasts.

    They are on the device of the module's inputs; afterwards they are ``meta`` tensors again, and
    tensors taken from them keep their values. No effect where nothing is offloaded.

    Args:
        module: a part of the model, not running at the moment.

    Example:
        >>> from torch import nn
        >>> with loaded(nn.Linear(2, 3)):
        ...     pass
    """
    with ExitStack() as stack:
        for part in module.modules():
            hook = getattr(part, "_hf_hook", None)
            if hook is not None and any(tensor.is_meta for tensor in _own_tensors(part)):
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield


@uninterrupted
def tables_loaded(tower: nn.Module) -> Iterator[None]:
    """Load the tower's offloaded embedding tables whenever it runs while the context lasts.

    To interpolate position embeddings, a tower reads the table's weight itself instead of calling
    the table, and only the table's forward would load it.

    Args:
        tower: the vision encoder.

    Example:
        >>> from torch import nn
        >>> with tables_loaded(nn.Sequential(nn.Embedding(3, 2))):
        ...     pass
    """
    tables = [part for part in tower.modules() if isinstance(part, nn.Embedding)]
    held = ExitStack()

    def load(_module: nn.Module, _args: Any) -> None:
        for table in tables:
            held.enter_context(loaded(table))

    def release(_module: nn.Module, _args: Any, _output: Any) -> None:
        held.close()

    with held, ExitStack() as hooks:
        hooks.callback(tower.register_forward_pre_hook(load).remove)
        hooks.callback(tower.register_forward_hook(release, always_call=True).remove)
        yield


def input_device(model: Any) -> torch.device:
    """The device of the model's inputs: where its input embeddings are computed.

    ``model.device`` is that of the first weight, which is ``meta`` if that weight is offloaded, and
    another device if the vision encoder is elsewhere.

    Args:
        model: a transformers model, unwrapped.

    Raises:
        ValueError: the model has no weights (they are on the meta device).

    Example:
        >>> from torch import nn
        >>> class Model(nn.Embedding):
        ...     def get_input_embeddings(self):
        ...         return self
        >>> input_device(Model(3, 2))
        device(type='cpu')
    """
    embeddings = model.get_input_embeddings()
    for part in embeddings.modules():
        device = _execution_device(part)
        if device is not None:
            return device
    for tensor in embeddings.parameters():
        if not tensor.is_meta:
            return tensor.device
    # Offloaded as part of a larger block, whose hook loads all of it.
    for part in model.modules():
        device = _execution_device(part)
        if device is not None:
            return device
    raise ValueError(
        "model: its input embeddings are on the meta device, which has shapes and no values: load "
        "the weights (from_pretrained), or dispatch the model with accelerate."
    )


def _execution_device(module: nn.Module) -> torch.device | None:
    """The device that accelerate runs the module on, or None."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))
