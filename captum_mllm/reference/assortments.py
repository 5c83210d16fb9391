"""Scenes to ask about: several objects of a kind, off the picture's middle.

The rule: no object covers the middle. Every centre is at least `CLEAR` of the picture's side from
it, to the side or up and down, and no object is wider than twice that. A map that always points at
the middle then never wins.

All draws are hashes of (seed, number of the draw), as in `scenes`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_mllm.reference.scenes import (
    BACKGROUNDS,
    COLORS,
    Scene,
    SceneBatch,
    uniforms,
)
from captum_mllm.reference.sprites import CATEGORIES, STYLES

# which kind each object is of; a kind that comes once, and two that don't come equally often
GROUPS = (
    (0, 1, 1),
    (0, 1, 1, 2),
    (0, 1, 1, 1),
    (0, 1, 1, 1, 2),
    (0, 1, 1, 2, 2),
    (0, 0, 1, 1, 1, 2),
)
SMALL_SIDE, LARGE_SIDE = (0.20, 0.28), (0.40, 0.43)  # one or two objects are large
CLEAR = 0.22
SPOTS = 96  # candidate places for an object
STREAM = 59  # of `uniforms`: nothing else uses 59 to 62 and 67 to 70


def draw_assorted(seeds: Tensor) -> SceneBatch:
    """3-6 objects of 2 or 3 kinds: all tinted, those of a kind differently, one or two large.

    Args:
        seeds: int64 (batch,), from `scenes.seeds_of`.

    Returns:
        The scenes, on the seeds' device; objects run from left to right.
    """
    places, device = max(map(len, GROUPS)), seeds.device
    own = uniforms(seeds, 2 + 4 * places, STREAM)
    row = (own[:, 0] * len(GROUPS)).long()
    count = torch.tensor([len(group) for group in GROUPS], device=device)[row]
    padded = [group + (0,) * (places - len(group)) for group in GROUPS]
    kind = torch.tensor(padded, device=device)[row]
    earlier = torch.tensor(
        [[group[:i].count(group[i]) for i in range(places)] for group in padded], device=device
    )[row]
    names = uniforms(seeds, len(CATEGORIES), STREAM + 1).argsort(1)[:, :3]
    tints = uniforms(seeds, 3 * len(COLORS), STREAM + 2).view(-1, 3, len(COLORS)).argsort(2)
    tint = tints.gather(1, kind[..., None].expand(-1, -1, len(COLORS)))
    look = own[:, 2:].view(-1, 4, places)
    present = torch.arange(places, device=device) < count[:, None]
    rank = torch.where(present, look[:, 0], 2.0).argsort(1).argsort(1)
    large = rank < 1 + (own[:, 1:2] < 0.5).long()
    (small_from, small_to), (large_from, large_to) = SMALL_SIDE, LARGE_SIDE
    size = torch.where(
        large,
        large_from + (large_to - large_from) * look[:, 1],
        small_from + (small_to - small_from) * look[:, 1],
    )
    return scatter(
        seeds,
        count,
        {
            "category": names.gather(1, kind),
            "style": (look[:, 2] * len(STYLES)).long(),
            "color": tint.gather(2, earlier.clamp(max=len(COLORS) - 1)[..., None])[..., 0],
            "flip": look[:, 3] < 0.5,
            "size": size,
        },
        CLEAR,
    )


def scatter(seeds: Tensor, count: Tensor, looks: dict[str, Tensor], clear: float = 0) -> SceneBatch:
    """Give objects places one after the other, large ones first, each where it cuts others least.

    Args:
        seeds: int64 (batch,).
        count: int64 (batch,), number of objects.
        looks: "category", "style", "color", "flip" and "size" as in `SceneBatch`.
        clear: Least distance of a centre from the picture's middle, along x or y.

    Returns:
        The scenes; objects run from left to right.
    """
    batch, places = looks["size"].shape
    here = torch.arange(places, device=seeds.device) < count[:, None]
    first = torch.where(here, looks["size"], 0.0).argsort(dim=1, descending=True, stable=True)
    sizes, there = looks["size"].gather(1, first), here.gather(1, first)
    spots = uniforms(seeds, places * SPOTS * 2, STREAM + 3).view(batch, places, SPOTS, 2)
    margin = sizes[..., None, None] / 2
    spots = margin + spots * (1 - 2 * margin)
    centers = spots[:, :, 0].clone()
    for i in range(places):
        away = (spots[:, i, :, None] - centers[:, None, :i]).abs()  # (batch, spots, before, 2)
        reach = (sizes[:, i, None] + sizes[:, :i]) / 2
        cut = (reach[:, None, :, None] - away).clamp(min=0).prod(3)
        cut = cut / torch.minimum(sizes[:, i, None], sizes[:, :i])[:, None] ** 2
        cut = cut + (0.05 - away[..., 0]).clamp(min=0)  # "from left to right" is clear
        cost = (cut * there[:, None, :i]).sum(2)
        cost = cost + 99 * ((spots[:, i] - 0.5).abs().amax(2) < clear)
        best = cost.argmin(1)[:, None, None].expand(-1, 1, 2)
        centers[:, i] = spots[:, i].gather(1, best)[:, 0]
    x = torch.where(there, centers[..., 0], 2.0)
    order = x.argsort(1)
    by = first.gather(1, order)
    background = (uniforms(seeds, 1, STREAM + 8)[:, 0] * len(BACKGROUNDS)).long()
    return SceneBatch(
        seed=seeds,
        background=background,
        count=count,
        center=centers.gather(1, order[..., None].expand(-1, -1, 2)),
        **{name: value.gather(1, by) for name, value in looks.items()},
    )


def assort(seed: Tensor) -> Scene:
    """One scene of `draw_assorted`.

    Args:
        seed: int64 (1,), from `scenes.seeds_of`.
    """
    return draw_assorted(seed).scenes()[0]
