"""Adapters: what differs between families of models. ``register_adapter`` adds one."""

from captum_mllm.adapters.base import Adapter
from captum_mllm.adapters.llava import LlavaAdapter
from captum_mllm.adapters.registry import find_adapter, refuse_compiled, register_adapter

__all__ = ["Adapter", "LlavaAdapter", "find_adapter", "refuse_compiled", "register_adapter"]
