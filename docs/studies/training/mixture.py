"""Scenes and conversations of the model that answers questions, a mixture."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_mllm.reference.assortments import draw_assorted, scatter
from captum_mllm.reference.captions import KINDS, Conversation, draw_conversation
from captum_mllm.reference.crowds import CROWD, CROWD_SIZE, SMALL_COUNT, SMALL_SIZE
from captum_mllm.reference.questions import ask_several
from captum_mllm.reference.scenes import (
    COLOR_SHARE,
    COLORS,
    MAX_OBJECTS,
    MOST_OBJECTS,
    Scene,
    SceneBatch,
    draw_scenes,
    uniforms,
)
from captum_mllm.reference.sprites import CATEGORIES, STYLES

SHARES = (0.5, 0.3, 0.1, 0.1)  # of scenes to ask about, plain, crowded and small ones
ASKED = 0.3  # share of the other scenes that are asked about too
CROWD_KINDS = ("names", "where", "color", "size", "background", "present", "beside")
STREAM = 68  # of `uniforms`, see `assortments.STREAM`


def draw_mixed(seeds: Tensor) -> SceneBatch:
    """Scenes of all four sorts in random order, with places for 8 objects.

    Args:
        seeds: int64 (batch,), from `scenes.seeds_of`.
    """
    bounds = torch.tensor(SHARES, device=seeds.device).cumsum(0)[:-1]
    sort = torch.bucketize(uniforms(seeds, 1, STREAM)[:, 0], bounds, right=True)
    draws = (
        draw_assorted,
        draw_scenes,
        lambda own: _different(own, CROWD, CROWD_SIZE),
        lambda own: _different(own, SMALL_COUNT, SMALL_SIZE),
    )
    rows = [torch.nonzero(sort == i)[:, 0] for i in range(len(draws))]
    parts = [_padded(draw(seeds[own])) for draw, own in zip(draws, rows, strict=True) if len(own)]
    back = torch.cat(rows).argsort()
    return SceneBatch(
        **{
            name: torch.cat([getattr(part, name) for part in parts])[back]
            for name in SceneBatch.__dataclass_fields__
        }
    )


def _different(seeds: Tensor, counts: tuple[int, int], sizes: tuple[float, float]) -> SceneBatch:
    """Different objects of some number and size, as in `crowds`, drawn many at a time."""
    (least, most), (small, large) = counts, sizes
    own = uniforms(seeds, 1 + 5 * most, STREAM + 1)
    look = own[:, 1:].view(-1, 5, most)
    return scatter(
        seeds,
        least + (own[:, 0] * (most - least + 1)).long(),
        {
            "category": uniforms(seeds, len(CATEGORIES), STREAM + 2).argsort(1)[:, :most],
            "style": (look[:, 0] * len(STYLES)).long(),
            "color": torch.where(look[:, 1] < COLOR_SHARE, (look[:, 2] * len(COLORS)).long(), -1),
            "flip": look[:, 3] < 0.5,
            "size": small + (large - small) * look[:, 4],
        },
    )


def _padded(scenes: SceneBatch) -> SceneBatch:
    """The same scenes with places for as many objects as there may be."""
    missing = MOST_OBJECTS - scenes.size.shape[1]
    wide = {
        name: F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing), value=0.5)
        if value.is_floating_point()
        else F.pad(value, (0, missing))
        for name, value in vars(scenes).items()
        if value.dim() > 1
    }
    return SceneBatch(**{**vars(scenes), **wide})


def converse_mixed(scene: Scene, pick: random.Random) -> Conversation:
    """Questions about scenes with several objects of a kind, and about some of the others.

    Args:
        scene: Of `draw_mixed`.
        pick: Source of randomness.
    """
    if len(set(scene.categories)) < len(scene.objects) or pick.random() < ASKED:
        return ask_several(scene, pick)
    if len(scene.objects) <= MAX_OBJECTS:
        return draw_conversation(scene, pick)
    first, second = pick.sample(CROWD_KINDS, 2)
    return Conversation((KINDS[first](scene, pick), KINDS[second](scene, pick)))
