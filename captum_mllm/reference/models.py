"""The shipped reference models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_mllm.adapters.image_only import load_image_only

MODELS = ("llava", "qwen2vl", "internvl", "biased")
_IMAGE_ONLY = ("qwen2vl", "internvl")  # their full processors need torchvision


def model_path(name: str = "llava") -> Path:
    """Folder of a shipped model: weights, configuration, tokenizer, processor, card, figures.

    Args:
        name: One of `MODELS`.

    Returns:
        A folder for `AutoProcessor.from_pretrained` and the like.

    Raises:
        ValueError: No such model.

    Example:
        >>> model_path("llava").name
        'llava'
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r} is unknown; there are {list(MODELS)}.")
    return Path(__file__).parent / "models" / name


def load(
    name: str = "llava", dtype: torch.dtype | None = None, folder: Path | None = None
) -> tuple[Any, Any]:
    """Load a shipped model and its processor; needs no network.

    Args:
        name: One of `MODELS`. Processors of "qwen2vl" and "internvl" read images alone, no videos.
        dtype: Type of the weights in memory; default float32 (they are stored as float16).
        folder: Of another training of that family; default: the shipped one.

    Returns:
        Model (on the CPU, in eval mode) and processor.

    Raises:
        ValueError: No such model.

    Example:
        >>> model, processor = load()
        >>> type(model).__name__, type(processor).__name__
        ('LlavaForConditionalGeneration', 'LlavaProcessor')
    """
    path = folder or model_path(name)
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype or torch.float32, local_files_only=True, trust_remote_code=False
    )
    if name in _IMAGE_ONLY:
        return model.eval(), load_image_only(path)
    own = {"local_files_only": True, "trust_remote_code": False}
    return model.eval(), AutoProcessor.from_pretrained(path, **own)
