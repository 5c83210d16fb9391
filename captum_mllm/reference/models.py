"""Sizes of the reference models, and loading of the shipped ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from captum_mllm.reference.tokenizer import SPECIAL, pieces

IMAGE_SIZE, PATCH_SIZE = 112, 8
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    # width, layers, heads, width of the MLP
    "small": {"vision": (192, 4, 6, 768), "text": (192, 5, 6, 440)},
    "base": {"vision": (192, 5, 6, 768), "text": (256, 6, 8, 640)},
    "tiny": {"vision": (32, 1, 2, 64), "text": (32, 1, 2, 64)},
}
MODELS = ("llava",)


def build_model(size: str = "small") -> LlavaForConditionalGeneration:
    """Build an untrained LLaVA: CLIP tower, two-layer projector, LLaMA with tied embeddings.

    Args:
        size: One of `SIZES`.

    Returns:
        The model, float32, randomly initialised from torch's global generator.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; there are {sorted(SIZES)}.")
    (v_width, v_layers, v_heads, v_mlp), (t_width, t_layers, t_heads, t_mlp) = (
        SIZES[size]["vision"],
        SIZES[size]["text"],
    )
    ids = {name: SPECIAL.index(f"<{name}>") for name in ("s", "pad", "image")}
    eos = SPECIAL.index("</s>")
    vision = CLIPVisionConfig(
        hidden_size=v_width,
        num_hidden_layers=v_layers,
        num_attention_heads=v_heads,
        intermediate_size=v_mlp,
        projection_dim=v_width,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(pieces()),
        hidden_size=t_width,
        num_hidden_layers=t_layers,
        num_attention_heads=t_heads,
        num_key_value_heads=t_heads,
        intermediate_size=t_mlp,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=ids["s"],
        eos_token_id=eos,
        pad_token_id=ids["pad"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["image"],
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    generation: Any = model.generation_config
    generation.bos_token_id, generation.eos_token_id = ids["s"], eos
    generation.pad_token_id = ids["pad"]
    return model


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


def load(name: str = "llava", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a shipped model and its processor; needs no network.

    Args:
        name: One of `MODELS`.
        dtype: Type of the weights in memory; default float32 (they are stored as float16).

    Returns:
        Model (on the CPU, in eval mode) and processor.

    Example:
        >>> model, processor = load()
        >>> type(model).__name__, type(processor).__name__
        ('LlavaForConditionalGeneration', 'LlavaProcessor')
    """
    path = model_path(name)
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype or torch.float32, local_files_only=True
    )
    return model.eval(), AutoProcessor.from_pretrained(path, local_files_only=True)


def sha256(path: Path) -> str:
    """Hash of a file, as `sha256sum` prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
