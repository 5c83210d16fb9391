"""The families of reference models, and untrained models of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from studies.training.families import Family
from studies.training.family_internvl import InternVL
from studies.training.family_llava import BiasedLlava, Llava, QuestionsLlava
from studies.training.family_qwen2vl import Qwen2VL

_ALL: tuple[Family, ...] = (Llava(), Qwen2VL(), InternVL(), BiasedLlava(), QuestionsLlava())
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def family_of(name: str) -> Family:
    """What is particular to a model's family.

    Args:
        name: One of `FAMILIES`.

    Raises:
        ValueError: No such model.
    """
    if name not in FAMILIES:
        raise ValueError(f"name={name!r} is unknown; there are {list(FAMILIES)}.")
    return FAMILIES[name]


def build_model(size: str = "small", name: str = "llava") -> Any:
    """Build an untrained model with tied embeddings.

    Args:
        size: One of the family's `sizes`: "small" is what is shipped, "tiny" for trials.
        name: One of `FAMILIES`.

    Returns:
        The model, float32, randomly initialised from torch's global generator.

    Raises:
        ValueError: No such model, or no such size of it.
    """
    return family_of(name).build_model(size)


def sha256(path: Path) -> str:
    """Hash of a file, as `sha256sum` prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
