"""The layout of a model's image tokens, found by probing: no family is known by name.

1. *Paint* (:mod:`~captum_mllm.adapters.painting`): which point of the picture each number shows.
2. *Own*: with a vision encoder that mixes no positions (:mod:`~captum_mllm.model.locality`), a few
   backward passes tell which token hears each number (:mod:`~captum_mllm.functional.ownership`).
3. *Fit* regular grids (:mod:`~captum_mllm.functional.lattice`).
4. *Check by painting*: parts of the user's picture are painted over, and exactly the tokens of
   those parts must change.
5. *Check under the true attention*: a token must hear its own place more than another, else its
   place says nothing (queries that look all over the picture).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.layout import LayoutError, PictureLayout, PictureView, TokenLayout
from captum_mllm.adapters.painting import Painted, PixelSource, paint
from captum_mllm.functional import (
    NOBODY,
    SEVERAL,
    Lattice,
    fit_lattices,
    owners,
    sign_codes,
    token_places,
)
from captum_mllm.model.embedded import Embedded, Embedder

_SHARED = 0.01  # of the gradients' energy at numbers that several tokens hear
_LOST = 0.02  # of the picture that no token hears
_LOCAL = 1.5  # times as much as others a token must hear its own place
_CHECKED = 8  # tokens, each a backward pass, for that
_ROUNDS = 2  # of painting


@dataclass
class _Cost:
    """What probing took."""

    forwards: int = 0
    backwards: int = 0
    calls: int = 0


@dataclass
class _Probe:
    """One probing: what runs the model and the processor, and what it took so far."""

    adapter: Adapter
    inputs: Mapping[str, Tensor]
    source: PixelSource
    pictures: Sequence[Any]
    painted: Painted
    cost: _Cost
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each picture."""
        return [(picture.height, picture.width) for picture in self.pictures]

    def embedder(self) -> Embedder:
        """Runs the model up to its language model."""
        return Embedder(self.adapter, self.inputs)


def find_layout(
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    source: PixelSource,
    pictures: Sequence[Any],
    *,
    seed: int = 0,
) -> tuple[TokenLayout, Painted]:
    """Probe where the image tokens of a prompt lie in its pictures.

    Args:
        adapter: the model's adapter; only its modules are used.
        inputs: the model's inputs of one sample, on the model's device, without padding.
        source: calls the image processor as it was called for ``inputs``.
        pictures: PIL pictures, those of ``inputs``.
        seed: of what is drawn at random, default 0.

    Returns:
        The layout, with a note for each irregularity, and what each number of the inputs shows.

    Raises:
        LayoutError: the tokens have no places.

    Reference:
        Our reading.
    """
    sizes = [(picture.height, picture.width) for picture in pictures]
    painted, calls = paint(source, sizes)
    probe = _Probe(adapter, inputs, source, pictures, painted, _Cost(calls=calls))
    owner, states = _own(probe, seed)
    tokens = _placeholders(probe, states)
    lattices = _lattices(probe, owner)
    layout = _layout(probe, tokens, lattices)
    _check_by_painting(probe, lattices, layout, states, seed)
    _check_attention(probe, owner, lattices, seed)
    cost = probe.cost
    return TokenLayout(
        layout,
        tuple(int(i) for i in inputs["input_ids"][0, tokens].unique()),
        tuple(dict.fromkeys(probe.notes)),
        cost.forwards,
        cost.backwards,
        cost.calls,
    ), painted


# ---- which token hears which number ------------------------------------------------------------


def _own(probe: _Probe, seed: int) -> tuple[Int64[Tensor, " numbers"], Embedded]:
    """The token that each number belongs to, and what was run to find it."""
    noise = torch.Generator().manual_seed(seed)
    pixels = probe.painted.flat(probe.inputs).float()
    spread = probe.painted.white - probe.painted.black
    spread = float(spread[probe.painted.shows].abs().median())
    # Noise, so that no gradient vanishes by chance (a flat patch, a kink at 0).
    pixels = pixels + 0.05 * spread * torch.randn(pixels.shape, generator=noise).to(pixels)
    states = probe.embedder().embed(probe.painted.shaped(pixels), local=True, gradients=True)
    probe.cost.forwards += 1
    codes = sign_codes(len(states.embeddings))
    plain = states.gradient(torch.ones(len(states.embeddings)))
    coded = torch.stack([states.gradient(code) for code in codes])
    probe.cost.backwards += 1 + len(codes)
    if float(plain.abs().max()) == 0:
        raise LayoutError(
            f"no image token hears pixels of its own once attention between positions is off "
            f"({_mixed(states)}): tokens that look over the whole picture have no place in it."
        )
    owner = owners(plain, coded, len(codes[0])).cpu()
    energy = plain.cpu().double().square()
    shared = float(energy[owner == SEVERAL].sum() / energy[owner != NOBODY].sum())
    if shared > _SHARED:
        raise LayoutError(
            f"{shared:.0%} of what the image tokens hear is heard by several of them even with "
            f"attention between positions off ({_mixed(states)}): a resampler, a Q-former or other "
            f"mixing in the vision encoder leaves tokens without a place of their own."
        )
    return owner, states


def _mixed(states: Embedded) -> str:
    names = [name for name in states.mixed if name != "self-attention"]
    return "seen: " + ", ".join(names) if names else "no mixing that we know was seen"


def _placeholders(probe: _Probe, states: Embedded) -> Int64[Tensor, " placeholders"]:
    """Positions of all tokens with the ids of those whose embedding hangs on the pixels.

    Raises:
        LayoutError: these ids stand for text too, or no embedding hangs on pixels.
    """
    other = {
        key: value + 0.4 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        for key, value in probe.painted.shaped(probe.painted.flat(probe.inputs).cpu()).items()
    }
    again = probe.embedder().embed(other, local=True)
    probe.cost.forwards += 1
    moved = (again.embeddings - states.embeddings).abs().amax(1)
    heard = moved > 1e-5 * again.embeddings.abs().max()
    ids = probe.inputs["input_ids"][0]
    placeholders = torch.isin(ids, ids[heard])
    silent = int((placeholders & ~heard).sum())
    if silent > len(ids) // 2:
        raise LayoutError("tokens that hear pixels have the ids of text tokens.")
    return placeholders.nonzero()[:, 0]


# ---- grids -------------------------------------------------------------------------------------


def _lattices(probe: _Probe, owner: Int64[Tensor, " numbers"]) -> list[tuple[Lattice, ...]]:
    """The grids of each picture; notes what does not fit."""
    painted, found = probe.painted, []
    for k in range(len(probe.sizes)):
        here = painted.picture == k
        own = owner.where(here | (painted.picture < 0), NOBODY)
        places = token_places(own, painted.x.where(here, torch.nan), painted.y, painted.tile)
        if not len(places.tokens):
            raise LayoutError(f"no token hears anything of picture {k}.")
        lattices, notes = fit_lattices(places)
        probe.notes += notes
        probe.notes += _unheard(painted, owner, here, lattices[0])
        found.append(lattices)
    return found


def _unheard(
    painted: Painted,
    owner: Int64[Tensor, " numbers"],
    here: Bool[Tensor, " numbers"],
    lattice: Lattice,
) -> list[str]:
    """What of a picture reaches no token, though the processor shows it.

    A rim of a cell may be missing from the largest view, where another view shows it.
    """
    (left, upper, right, lower), (dx, dy) = lattice.box, lattice.step
    x, y = painted.x[here], painted.y[here]
    wide = max(left - float(x.min()), 0) + max(float(x.max()) - right, 0)
    high = max(upper - float(y.min()), 0) + max(float(y.max()) - lower, 0)
    if wide > 1.5 * dx or high > 1.5 * dy:
        return [f"the largest view leaves out {wide:.0f} x {high:.0f} pixels of the picture"]
    bins = torch.stack([((y - upper) / dy * 4).floor(), ((x - left) / dx * 4).floor()], 1)
    shown, where = bins.unique(dim=0, return_inverse=True)
    heard = torch.zeros(len(shown), dtype=torch.bool)
    heard[where[owner[here] >= 0]] = True
    lost = 1 - float(heard.double().mean())
    return [f"{lost:.0%} of the picture's places reach no token"] if lost > _LOST else []


def _layout(
    probe: _Probe, tokens: Int64[Tensor, " placeholders"], lattices: Sequence[Sequence[Lattice]]
) -> tuple[PictureLayout, ...]:
    """The grids by index among each picture's placeholders."""
    positions = tokens.tolist()
    owned = [sorted({int(t) for v in views for t in v.tokens.flat if t >= 0}) for views in lattices]
    if outside := {t for picture in owned for t in picture} - set(positions):
        raise LayoutError(f"{len(outside)} tokens with places are no placeholders.")
    runs = _runs(positions)
    pictures, begin = [], 0
    for k, views in enumerate(lattices):
        last = k == len(lattices) - 1
        # What hears nothing and directly follows a picture's token (new lines) belongs to it.
        end = len(positions) if last else _end(runs, positions, owned[k], owned[k + 1])
        mine = positions[begin:end]
        if owned[k][0] < mine[0] or owned[k][-1] > mine[-1]:
            raise LayoutError(f"the tokens of picture {k} stand among those of another picture.")
        index = {position: i for i, position in enumerate(mine)}
        pictures.append(
            PictureLayout(
                probe.sizes[k],
                tuple(
                    PictureView(
                        tuple(tuple(index.get(int(t), -1) for t in row) for row in view.tokens),
                        view.box,
                        view.side,
                    )
                    for view in views
                ),
                tuple(len(run) for run in _runs(mine)),
            )
        )
        begin = end
    return tuple(pictures)


def _runs(positions: Sequence[int]) -> list[list[int]]:
    """Unbroken runs."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


def _end(
    runs: Sequence[Sequence[int]],
    positions: Sequence[int],
    mine: Sequence[int],
    following: Sequence[int],
) -> int:
    """How many placeholders stand up to the last one of a picture."""
    run = next(run for run in runs if mine[-1] in run)
    last = min(run[-1], following[0] - 1)
    return positions.index(last) + 1


# ---- checks ------------------------------------------------------------------------------------


def _check_by_painting(
    probe: _Probe,
    lattices: Sequence[Sequence[Lattice]],
    layout: Sequence[PictureLayout],
    states: Embedded,
    seed: int,
) -> None:
    """Paint over random cells of the user's pictures: exactly their tokens must change."""
    del layout, states
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


def _embedded(probe: _Probe, pictures: Sequence[Any]) -> Float[Tensor, "tokens dim"]:
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
    probe: _Probe,
    base: Float[Tensor, "tokens dim"],
    masks: Sequence[NDArray[np.bool_]],
    draw: np.random.Generator,
) -> NDArray[np.bool_]:
    """Which tokens change when parts of the pictures are painted over with noise."""
    from PIL import Image

    painted = []
    for picture, mask in zip(probe.pictures, masks, strict=True):
        pixels = np.array(picture.convert("RGB"))
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
    for row, col in np.argwhere(draw.random(view.tokens.shape) < 0.5):
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


def _check_attention(
    probe: _Probe,
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
