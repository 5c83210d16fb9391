"""A linear layer as a plain matrix, however it is stored: offloaded, adapted (PEFT), quantised."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captum_mllm.adapters.devices import loaded
from captum_mllm.adapters.hooks import without_gradients

Matrix = tuple[Float[Tensor, "vocabulary dim"], Float[Tensor, " vocabulary"] | None]


@dataclass(frozen=True)
class Role:
    """What a linear layer is to the method that reads its matrix, for error messages.

    Args:
        name: what it is called.
        reader: the method.
        quantised: what to do where its weights are quantised.
    """

    name: str
    reader: str
    quantised: str


LM_HEAD = Role(
    "LM head",
    "the logit lens",
    "Leave the LM head unquantised, as transformers does by default: llm_int8_skip_modules="
    "['lm_head'] (bitsandbytes), modules_to_not_convert=['lm_head'] (others)",
)
"""The layer whose matrix every lens reads."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MERGE = "Merge the adapter into the weights (merge_and_unload() or merge_adapter())"


def head_matrix(head: nn.Module, role: Role = LM_HEAD) -> Matrix:
    """Matrix W and bias b of a linear layer that computes ``W h + b``, as its forward uses them.

    - Plain layers: their own weight, no copy.
    - Offloaded (accelerate): the weights, loaded again by each call to the device of the head's
      inputs.
    - PEFT: ``W + sum of B A * scaling`` over the active LoRA adapters; the trained copy of
      ``modules_to_save``, the trained rows of ``trainable_token_indices``; the layer's own weight
      while adapters are disabled or merged.
    - Quantised: the float matrix that the forward multiplies with, where there is one (tensors with
      ``dequantize()``, such as torchao's and quanto's; bitsandbytes' 4 bits).

    Whether the head really computes that map is not checked here; compare with its own logits.

    Args:
        head: the LM head, or another linear layer; not running at the moment.
        role: what the layer is, for error messages; default the LM head.

    Returns:
        W (vocabulary, dim) and b (vocabulary,) or None, in their own dtypes, without gradients.

    Raises:
        ValueError: there is no such matrix; the message says why and what to do.

    Example:
        >>> from torch import nn
        >>> head = nn.Linear(2, 3, bias=False)
        >>> weight, bias = head_matrix(head)
        >>> weight.data_ptr() == head.weight.data_ptr(), weight.requires_grad, bias
        (True, False, None)
    """
    if _is_plain(head):
        weight: Any = head.weight
        return weight.detach(), None if head.bias is None else head.bias.detach()  # type: ignore[union-attr, operator]
    with without_gradients(), loaded(head):
        return _matrix(head, type(head).__name__, role)


def head_size(head: nn.Module) -> int:
    """Number of ids that an LM head scores; nothing is loaded or computed if its shape tells.

    Args:
        head: the LM head.

    Raises:
        ValueError: the size is not known.

    Example:
        >>> from torch import nn
        >>> head_size(nn.Linear(2, 3))
        3
    """
    weight: Any = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.dtype in _FLOATS:
        return int(weight.shape[0])
    size = getattr(head, "out_features", None)
    if isinstance(size, int) and not isinstance(weight, Tensor):
        return size
    return int(head_matrix(head)[0].shape[0])


def _is_plain(head: nn.Module) -> bool:
    """Whether a layer holds its matrix as it is: every layer is asked for it in every forward."""
    if type(head) is not nn.Linear or "_hf_hook" in vars(head):
        return False
    parts = [part for part in head._parameters.values() if part is not None]
    return all(type(p) is nn.Parameter and p.dtype in _FLOATS and not p.is_meta for p in parts)


def _matrix(head: Any, name: str, role: Role) -> Matrix:
    if hasattr(head, "token_adapter") and hasattr(head, "original_module"):
        return _with_trained_rows(head, name, role)
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        return _matrix(_saved_copy(head), name, role)
    if hasattr(head, "base_layer") and hasattr(head, "active_adapters"):
        return _adapted(head, name, role)
    bias = getattr(head, "bias", None)
    if bias is not None and not isinstance(bias, Tensor):
        why = "its bias is packed with its quantised weight"
        raise _no_matrix(name, role, why, role.quantised)
    return _floats(
        getattr(head, "weight", None), name, role
    ), None if bias is None else bias.detach()


def _saved_copy(wrapper: Any) -> nn.Module:
    """The module that PEFT's ``modules_to_save`` wrapper calls."""
    active, copies = wrapper.active_adapters, wrapper.modules_to_save
    if wrapper.disable_adapters or not active or any(name not in copies for name in active):
        return wrapper.original_module
    return copies[active[0]]


def _with_trained_rows(wrapper: Any, name: str, role: Role) -> Matrix:
    """Matrix of a layer with separately trained rows (PEFT's ``trainable_token_indices``)."""
    weight, bias = _matrix(wrapper.original_module, name, role)
    rows = wrapper.token_adapter
    if wrapper.disable_adapters or rows.merged or not wrapper.active_adapters:
        return weight, bias
    return rows.get_merged_weights(wrapper.active_adapters).detach(), bias


def _adapted(head: Any, name: str, role: Role) -> Matrix:
    """Matrix of a layer with PEFT adapters next to it."""
    weight, bias = _matrix(head.base_layer, name, role)
    if head.disable_adapters or head.merged or not head.active_adapters:
        return weight, bias
    if not hasattr(head, "lora_B"):
        raise _no_matrix(name, role, "its PEFT adapter is not a LoRA", _MERGE)
    for adapter in head.active_adapters:
        if adapter not in head.lora_B:
            continue
        # DoRA and others are more than an added matrix.
        if adapter in getattr(head, "lora_variant", ()) or _old_dora(head, adapter):
            raise _no_matrix(
                name, role, f"its adapter {adapter!r} is more than a plain LoRA", _MERGE
            )
        delta = head.get_delta_weight(adapter).detach().to(weight.device)
        # bfloat16 weights with float32 adapters: the forward adds in float32.
        weight = weight + delta
        offset = getattr(head.lora_B[adapter], "bias", None)
        if offset is not None:
            offset = offset.detach().to(weight.device) * head.scaling[adapter]
            bias = offset if bias is None else bias + offset
    return weight, bias


def _old_dora(head: Any, adapter: str) -> bool:
    """Whether an older PEFT, without variants, has DoRA there."""
    flags = getattr(head, "use_dora", None)
    return isinstance(flags, dict) and bool(flags.get(adapter))


def _floats(weight: Any, name: str, role: Role) -> Float[Tensor, "vocabulary dim"]:
    """The weight as a plain matrix of floats."""
    if not isinstance(weight, Tensor):
        raise _no_matrix(
            name,
            role,
            "it has no tensor as its weight (a wrapper, or packed quantised weights)",
            f"Unwrap it. {role.quantised}",
        )
    if weight.is_meta:
        raise _no_matrix(
            name,
            role,
            "its weight is on the meta device, which has no values",
            "Load the weights (from_pretrained), or offload them by accelerate",
        )
    state = getattr(weight, "quant_state", None)
    if state is not None:  # bitsandbytes, 4 bits
        return import_module("bitsandbytes.functional").dequantize_4bit(weight.data, state)
    if type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize().detach()  # torchao, quanto
    if hasattr(weight, "full_tensor"):
        raise _no_matrix(
            name,
            role,
            "its weight is sharded over processes (tensor parallel or FSDP)",
            "Load the model without tp_plan, with device_map='auto' if it is large",
        )
    if weight.ndim != 2 or weight.dtype not in _FLOATS:
        raise _no_matrix(
            name,
            role,
            f"its weight is {tuple(weight.shape)} of {weight.dtype}, quantised or packed in a way "
            f"that we can't undo, or with inputs quantised too",
            role.quantised,
        )
    return weight.detach()


def _no_matrix(name: str, role: Role, why: str, fix: str) -> ValueError:
    further = "; or register an adapter whose class_weights returns the true map"
    return ValueError(
        f"model: its {role.name} ({name}) is not the plain linear map W h + b that {role.reader} "
        f"assumes: {why}. {fix}{further if role is LM_HEAD else ''}."
    )
