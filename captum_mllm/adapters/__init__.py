"""Adapters: everything that differs between families of models, and nothing else.

``register_adapter`` adds one. Families that share a layout share a base: :class:`PatchGridAdapter`
(one patch per cell) and :class:`TileAdapter` (square tiles and an overview).
"""

from captum_mllm.adapters.base import Adapter, View
from captum_mllm.adapters.discovered import DiscoveredAdapter
from captum_mllm.adapters.gemma3 import Gemma3Adapter
from captum_mllm.adapters.hooks import interpolated_positions
from captum_mllm.adapters.idefics import IdeficsAdapter
from captum_mllm.adapters.internvl import InternVLAdapter
from captum_mllm.adapters.layout import LayoutError, PictureLayout, PictureView, TokenLayout
from captum_mllm.adapters.llava import LlavaAdapter
from captum_mllm.adapters.llava_next import LlavaNextAdapter
from captum_mllm.adapters.paligemma import PaliGemmaAdapter
from captum_mllm.adapters.patch_grid import PatchGridAdapter
from captum_mllm.adapters.qwen_vl import Qwen3VLAdapter, QwenVLAdapter
from captum_mllm.adapters.registry import (
    find_adapter,
    refuse_compiled,
    register_adapter,
    registered_classes,
)
from captum_mllm.adapters.tiles import TileAdapter

__all__ = [
    "Adapter",
    "DiscoveredAdapter",
    "Gemma3Adapter",
    "IdeficsAdapter",
    "InternVLAdapter",
    "LayoutError",
    "LlavaAdapter",
    "LlavaNextAdapter",
    "PaliGemmaAdapter",
    "PatchGridAdapter",
    "PictureLayout",
    "PictureView",
    "Qwen3VLAdapter",
    "QwenVLAdapter",
    "TileAdapter",
    "TokenLayout",
    "View",
    "find_adapter",
    "interpolated_positions",
    "refuse_compiled",
    "register_adapter",
    "registered_classes",
]
