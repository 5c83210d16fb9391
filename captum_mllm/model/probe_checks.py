"""A layout that probing found, put to the test on the user's own pictures and model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.layout import LayoutError
from captum_mllm.adapters.painting import Painted, PixelSource
from captum_mllm.model.embedded import Embedded, Embedder
from captum_mllm.model.lattice import Lattice

_LOCAL = 1.5  # times as much as others a token must hear its own place
_CHECKED = 8  # tokens, each a backward pass, for that
_ROUNDS = 2  # of painting


@dataclass
class Cost:
    """What probing took."""

    forwards: int = 0
    backwards: int = 0
    calls: int = 0


@dataclass
class Probe:
    """One probing: what runs the model and the processor, and what it took so far."""

    adapter: Adapter
    inputs: Mapping[str, Tensor]
    source: PixelSource
    pictures: Sequence[Any]
    painted: Painted
    cost: Cost
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each picture."""
        return [(picture.height, picture.width) for picture in self.pictures]

    def embedder(self) -> Embedder:
        """Runs the model up to its language model."""
        return Embedder(self.adapter, self.inputs)


def check_by_painting(
    probe: Probe,
    lattices: Sequence[Sequence[Lattice]],
    seed: int,
) -> None:
    """Paint over random cells of the user's pictures: exactly their tokens must change."""
    draw = np.random.default_rng(seed)
    base = _embedded(probe, probe.pictures)
    wrong, checked = 0, 0
    for _ in range(_ROUNDS):
        masks = [
            _random_cells(size, views[0], draw)
            for size, views in zip(probe.sizes, lattices, strict=True)
        ]
        changed = _changed(probe, base, masks, draw)
        for mask, views in zip(masks, lattices, strict=True):
            for view in views:
                bad, n = _mismatches(view, mask, changed)
                wrong, checked = wrong + bad, checked + n
    if wrong:
        probe.notes.append(
            f"{wrong} of {checked} tokens did not follow their place when it was painted over"
        )


def _embedded(probe: Probe, pictures: Sequence[Any]) -> Float[Tensor, "tokens dim"]:
    made = probe.source(pictures)
    for key, value in made.items():
        if not value.is_floating_point() and not torch.equal(
            value, probe.inputs[key].cpu().to(value.dtype)
        ):
            raise LayoutError(f"{key} changes with what the picture shows, not only its size.")
    pixels = {key: made[key].float() for key in probe.painted.keys}
    probe.cost.calls += 1
    probe.cost.forwards += 1
    return probe.embedder().embed(pixels, local=True).embeddings


def _changed(
    probe: Probe,
    base: Float[Tensor, "tokens dim"],
    masks: Sequence[NDArray[np.bool_]],
    draw: np.random.Generator,
) -> NDArray[np.bool_]:
    """Which tokens change when parts of the pictures are painted over with noise."""
    from PIL import Image

    painted = []
    for picture, mask in zip(probe.pictures, masks, strict=True):
        pixels = np.array(picture)
        noise = draw.integers(0, 256, (int(mask.sum()), 3))
        # at least 64 levels from what is there, so that each painted cell does change
        there = pixels[mask].astype(int)
        noise = np.where(np.abs(noise - there) < 64, (there + 128) % 256, noise)
        pixels[mask] = noise
        painted.append(Image.fromarray(pixels))
    difference = (_embedded(probe, painted) - base).abs().amax(1)
    return (difference > 1e-5 * base.abs().max()).cpu().numpy()


def _random_cells(
    size: tuple[int, int], view: Lattice, draw: np.random.Generator
) -> NDArray[np.bool_]:
    """A mask over the picture of about half of a view's cells."""
    mask = np.zeros(size, bool)
    for row, col in np.argwhere(draw.random(view.tokens.shape) < 0.5).tolist():
        left, upper, right, lower = (max(0, round(edge)) for edge in view.cell(row, col))
        mask[upper:lower, left:right] = True
    return mask


def _mismatches(
    view: Lattice, mask: NDArray[np.bool_], changed: NDArray[np.bool_]
) -> tuple[int, int]:
    """Tokens that did not change although painted, or changed although not; and how many tell.

    Resampling blurs by about two and a half pixels of the encoder; a rim of that is left out.
    """
    rim = 2.5 / view.side
    inner, outer = max(0.25, min(0.45, rim)), max(0.25, rim)
    totals = np.pad(mask.astype(int).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    wrong = checked = 0
    for (row, col), token in np.ndenumerate(view.tokens):
        if token < 0:
            continue
        core, of = _painted_area(totals, _grown(view, row, col, -inner))
        near, _ = _painted_area(totals, _grown(view, row, col, outer))
        if of and core > 0.3 * of:
            checked += 1
            wrong += not changed[token]
        elif not near:
            checked += 1
            wrong += bool(changed[token])
    return wrong, checked


def _grown(view: Lattice, row: int, col: int, by: float) -> tuple[float, float, float, float]:
    """A cell, larger on each side by a share of itself."""
    left, upper, right, lower = view.cell(row, col)
    dx, dy = by * view.step[0], by * view.step[1]
    return (left - dx, upper - dy, right + dx, lower + dy)


def _painted_area(
    totals: NDArray[np.int64], box: tuple[float, float, float, float]
) -> tuple[int, int]:
    """Painted pixels in a box, and all of its pixels within the picture."""
    height, width = (n - 1 for n in totals.shape)
    left, right = (int(np.clip(round(edge), 0, width)) for edge in (box[0], box[2]))
    upper, lower = (int(np.clip(round(edge), 0, height)) for edge in (box[1], box[3]))
    if right <= left or lower <= upper:
        return 0, 0
    inside = totals[lower, right] - totals[upper, right] - totals[lower, left] + totals[upper, left]
    return int(inside), (right - left) * (lower - upper)


def check_attention(
    probe: Probe,
    owner: Int64[Tensor, " numbers"],
    lattices: Sequence[Sequence[Lattice]],
    seed: int,
) -> None:
    """Under the model's own attention a token must still hear its own place most.

    Raises:
        LayoutError: it does not: the places that were found say nothing.
    """
    states = probe.embedder().embed(
        probe.painted.shaped(probe.painted.flat(probe.inputs).float()), gradients=True
    )
    probe.cost.forwards += 1
    draw = np.random.default_rng(seed)
    ratios: list[float] = []
    for views in lattices:
        tokens = views[0].tokens[views[0].tokens >= 0]
        chosen = draw.choice(tokens, min(len(tokens), _CHECKED), replace=False)
        if len(chosen) > 1:
            ratios += _own_place(states, owner, chosen)
            probe.cost.backwards += len(chosen)
    if ratios and float(np.median(ratios)) < _LOCAL:
        raise LayoutError(
            f"under the model's own attention a token hears its own place {np.median(ratios):.2g} "
            f"times as much as other tokens hear that place (at least {_LOCAL} is expected): "
            f"tokens that look all over the picture, or whose place hangs on its content (queries, "
            f"resamplers, routers), have no place in it."
        )


def _own_place(
    states: Embedded, owner: Int64[Tensor, " numbers"], tokens: NDArray[np.int64]
) -> list[float]:
    """How much each token hears its own place, against the mean of the others there.

    Each token's gradient energy is divided by its sum first.
    """
    places = torch.stack([owner == int(token) for token in tokens]).double()
    shares = []
    for token in tokens:
        weights = torch.zeros(len(states.embeddings))
        weights[int(token)] = 1.0
        energy = states.gradient(weights).cpu().double().square()
        shares.append(places @ energy / energy.sum().clamp(min=1e-300))
    heard = torch.stack(shares)  # token x place
    own = heard.diag()
    others = (heard.sum(0) - own) / (len(tokens) - 1)
    return (own / others.clamp(min=1e-300)).tolist()
