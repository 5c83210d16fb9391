"""A planted co-occurrence: scenes in which some objects never come without a partner.

A model trained on them learns to name the partner when it sees the object, all the more as in half
of those scenes the partner stands behind the object, where it can't be seen (but for the pictures
with gaps: behind a couch a sixth of it shows, behind a bed nearly all, small as it is). Scenes that
break the rule then make it hallucinate, and which words are hallucinated is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_mllm.reference.scenes import (
    MAX_OBJECTS,
    SceneBatch,
    arrange,
    draw_categories,
    uniforms,
)
from captum_mllm.reference.sprites import CATEGORIES

PARTNERS = {  # an object -> what it never comes without
    "cup": "donut",
    "bed": "teddy bear",
    "backpack": "book",
    "couch": "cat",
    "suitcase": "umbrella",
    "house": "flower",
    "pizza": "glass",
    "tv": "plant",
}
HIDDEN_SHARE = 0.5  # of the scenes with a partner
STREAM = 21  # of `uniforms`: no other draw uses it


def draw_planted(seeds: Tensor) -> SceneBatch:
    """Scenes as the biased model is trained on: `draw_scenes` with the rule enforced.

    Args:
        seeds: int64 (batch,), from `scenes.seeds_of`.

    Returns:
        The scenes; those that hold one of `PARTNERS` hold its partner too, and no second one.
    """
    count, category = draw_categories(seeds)
    count, category, pair = _with_partner(count, category)
    hidden = uniforms(seeds, 1, STREAM) < HIDDEN_SHARE
    return arrange(seeds, count, category, torch.where(hidden, pair, -1))


def draw_broken(seeds: Tensor) -> SceneBatch:
    """Scenes that break the rule: each holds one of `PARTNERS` without its partner.

    Args:
        seeds: int64 (batch,), from `scenes.seeds_of`.
    """
    count, category = _with_trigger(seeds, *draw_categories(seeds))
    return arrange(seeds, count, category)


def draw_kept(seeds: Tensor) -> SceneBatch:
    """Scenes that keep the rule: each holds one of `PARTNERS` and its partner in plain view.

    Args:
        seeds: int64 (batch,), from `scenes.seeds_of`.
    """
    count, category, _ = _with_partner(*_with_trigger(seeds, *draw_categories(seeds)))
    return arrange(seeds, count, category)


def _partner_table(device: torch.device) -> Tensor:
    """Category -> its partner's category, or -1: int64 (categories,)."""
    partners = [PARTNERS.get(category) for category in CATEGORIES]
    table = [-1 if partner is None else CATEGORIES.index(partner) for partner in partners]
    return torch.tensor(table, device=device)


def _neutral(category: Tensor) -> Tensor:
    """Categories outside the rule that the first four are not: (batch, 4), in random order."""
    table = _partner_table(category.device)
    ruled = (table >= 0).index_fill(0, table[table >= 0], True)
    taken = ruled[category]
    taken[:, :MAX_OBJECTS] = True
    return category.gather(1, taken.long().argsort(dim=1, stable=True))[:, :MAX_OBJECTS]


def _with_trigger(seeds: Tensor, count: Tensor, category: Tensor) -> tuple[Tensor, Tensor]:
    """Put one of `PARTNERS` first, and nothing else of the rule beside it."""
    table = _partner_table(seeds.device)
    triggers = torch.nonzero(table >= 0)[:, 0]
    chosen = triggers[(uniforms(seeds, 2, STREAM)[:, 1] * len(triggers)).long()]
    others = _neutral(category)[:, : MAX_OBJECTS - 1]
    return count, torch.cat([chosen[:, None], others, category], 1)


def _with_partner(count: Tensor, category: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Enforce the rule: one trigger at most, and its partner with it.

    Returns:
        Number of objects, categories (batch, 4), and the places of trigger and partner (batch, 2),
        -1 where there are none.
    """
    table = _partner_table(category.device)
    place = torch.arange(MAX_OBJECTS, device=category.device)
    fresh, category = _neutral(category), category[:, :MAX_OBJECTS]
    trigger = (table[category] >= 0) & (place < count[:, None])
    ruled = trigger.any(1)
    first = trigger.long().argmax(1)
    partner = table[category.gather(1, first[:, None])]
    # further triggers, and a partner that happens to be there
    surplus = (trigger & (place != first[:, None])) | (category == partner)
    category = torch.where(ruled[:, None] & surplus, fresh, category)
    last = torch.where(first == MAX_OBJECTS - 1, MAX_OBJECTS - 2, MAX_OBJECTS - 1)
    where = torch.where(count < MAX_OBJECTS, count, last)
    put = ruled[:, None] & (place == where[:, None])
    category = torch.where(put, partner, category)
    count = torch.where(ruled, (count + 1).clamp(max=MAX_OBJECTS), count)
    pair = torch.where(ruled[:, None], torch.stack([first, where], 1), -1)
    return count, category, pair
