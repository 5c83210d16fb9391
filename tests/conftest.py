"""Shared fixtures: tiny random LLaVAs with their real processor, and the shipped model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from jaxtyping import install_import_hook

# Shapes in the annotations of the formulas are checked at run time.
install_import_hook(
    ["captum_mllm.functional", "captum_mllm.trace", "captum_mllm.geometry", "captum_mllm.capture"],
    "beartype.beartype",
)

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_llava, tiny_processor

PROMPT = "USER: <image>\nwhat is here ? ASSISTANT:"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model():
    return tiny_llava()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))


@pytest.fixture
def inputs(processor, picture):
    return dict(processor(images=picture, text=PROMPT, return_tensors="pt"))


@pytest.fixture
def answer():
    return torch.tensor([20, 31, 20, 45, 7])


@pytest.fixture(scope="session")
def shipped():
    """The shipped reference model and its processor."""
    from captum_mllm.reference import load

    return load()
