"""What must hold for every subject of the zoo, with torchvision and without."""

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from studies.zoo import Unavailable, subject

# The settings are for the classes as 5.24 has them.
needs_new_transformers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="made for transformers 5.24"
)

# Encoder-decoders want a start of the answer, or have an encoder that is no part of the sequence;
# two classes' own forward fails or draws random numbers.
NO_LOGITS = {
    *("pix2struct", "t5gemma2", "udop", "pp_formulanet", "florence2"),
    *("llama4", "diffusion_gemma"),
}


def noise(seed, size):
    """A picture of noise; size is (width, height)."""
    numbers = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def placeholders(one, inputs):
    return int((inputs["input_ids"] == one.image_token_id).sum())


@torch.no_grad()
def last_logits(one, inputs):
    return one.model(**inputs).logits[0, -1]


def check_kind(kind):
    """A kind is built, takes pictures of several shapes and hears them, or it says why not."""
    try:
        one = subject(kind)
    except Unavailable as error:
        pytest.skip(f"{kind}: {error}")
    assert sum(p.numel() for p in one.model.parameters()) < 130e6
    pictures = [noise(0, (60, 60)), noise(1, (60, 60)), noise(2, (90, 50)), noise(3, (50, 90))]
    inputs = [one.encode(picture) for picture in pictures]
    assert all(placeholders(one, each) or one.settings.tokens == 0 for each in inputs)
    names = [name for name in inputs[0] if name.endswith(("pixel_values", "patches", "images"))]
    assert names, f"{kind}: no pixels among {list(inputs[0])}"
    assert not torch.equal(inputs[0][names[0]], inputs[1][names[0]])
    if kind not in NO_LOGITS:
        logits = [last_logits(one, each) for each in inputs]
        assert all(bool(torch.isfinite(each).all()) for each in logits)
        assert (logits[0] - logits[1]).abs().max() > 1e-3, "the model must hear the picture"
