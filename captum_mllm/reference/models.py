"""The reference models: building untrained ones, and loading the shipped ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from captum_mllm.reference.families import Family
from captum_mllm.reference.family_internvl import InternVL
from captum_mllm.reference.family_llava import BiasedLlava, Llava
from captum_mllm.reference.family_qwen2vl import Qwen2VL

_ALL: tuple[Family, ...] = (Llava(), Qwen2VL(), InternVL(), BiasedLlava())
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
MODELS = tuple(FAMILIES)


def family_of(name: str) -> Family:
    """What is particular to a model's family.

    Args:
        name: One of `MODELS`.

    Raises:
        ValueError: No such model.
    """
    if name not in FAMILIES:
        raise ValueError(f"name={name!r} is unknown; there are {list(MODELS)}.")
    return FAMILIES[name]


def build_model(size: str = "small", name: str = "llava") -> Any:
    """Build an untrained model with tied embeddings.

    Args:
        size: One of the family's `sizes`: "small" is what is shipped, "tiny" for trials.
        name: One of `MODELS`.

    Returns:
        The model, float32, randomly initialised from torch's global generator.

    Raises:
        ValueError: No such model, or no such size of it.
    """
    return family_of(name).build_model(size)


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
    return Path(__file__).parent / "models" / family_of(name).name


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

    Example:
        >>> model, processor = load()
        >>> type(model).__name__, type(processor).__name__
        ('LlavaForConditionalGeneration', 'LlavaProcessor')
    """
    path = folder or model_path(name)
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype or torch.float32, local_files_only=True
    )
    return model.eval(), family_of(name).load_processor(path)


def sha256(path: Path) -> str:
    """Hash of a file, as `sha256sum` prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
