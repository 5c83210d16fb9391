"""Random maps and pictures of the formulas' tests."""

import numpy as np
import pytest
import torch
from PIL import Image

from captum_mllm.functional import context_weights

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
EXACT = {"rtol": 0, "atol": 0}
over_seeds = pytest.mark.parametrize("seed", range(4))
SHAPES = [(1, 1, 1), (1, 3, 5), (4, 1, 7), (5, 6, 12), (3, 8, 2)]
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sparse(*shape, seed=0):
    """Maps as relu leaves them: many equal zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).clamp(min=0)


class Case:
    """Random maps, contexts, weights and relevance of one shape (targets, tokens, cells)."""

    def __init__(self, shape=(4, 6, 10), seed=0, dtype=torch.float64):
        targets, tokens, cells = shape
        g = torch.Generator().manual_seed(seed)

        def positive(*size):
            return torch.randn(*size, generator=g, dtype=dtype).clamp(min=0) * 3

        self.maps = positive(targets, cells)
        self.contexts = positive(tokens, cells)
        self.scores = positive(targets, tokens)
        self.mask = torch.rand(targets, tokens, generator=g) < 0.7
        self.weights = context_weights(self.scores, self.mask)
        self.relevance = torch.rand(targets, tokens, generator=g, dtype=dtype)

    @property
    def arc(self):
        return self.maps, self.contexts, self.weights, self.relevance


def as_picture(pixels):
    """Pixels (3, height, width) in [0, 1] as a PIL picture."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def as_pixels(picture):
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).double() / 255
