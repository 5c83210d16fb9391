"""The layout of a model's image tokens, found by probing: no family is known by name.

1. *Paint* (:mod:`~captum_mllm.adapters.painting`): which point of the picture each number shows.
2. *Own*: with a vision encoder that mixes no positions (:mod:`~captum_mllm.model.locality`), a few
   backward passes tell which token hears each number (:mod:`~captum_mllm.functional.ownership`).
3. *Fit* regular grids (:mod:`~captum_mllm.model.lattice`).
4. *Check by painting*: parts of the user's picture are painted over, and exactly the tokens of
   those parts must change.
5. *Check under the true attention*: a token must hear its own place more than another, else its
   place says nothing (queries that look all over the picture).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.hooks import unchanged
from captum_mllm.adapters.layout import LayoutError, PictureLayout, PictureView, TokenLayout
from captum_mllm.adapters.painting import Painted, PixelSource, paint
from captum_mllm.functional import NOBODY, SEVERAL, owners, sign_codes
from captum_mllm.model.embedded import Embedded
from captum_mllm.model.lattice import Lattice, fit_lattices, token_places
from captum_mllm.model.probe_checks import Cost, Probe, check_attention, check_by_painting

_SHARED = 0.01  # of the gradients' energy at numbers that several tokens hear
_LOST = 0.02  # of the picture that no token hears


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
    probe = Probe(adapter, inputs, source, pictures, painted, Cost(calls=calls))
    with unchanged(adapter.model):
        owner, states = _own(probe, seed)
        tokens = _placeholders(probe, states)
        lattices = _lattices(probe, owner)
        layout = _layout(probe, tokens, lattices)
        check_by_painting(probe, lattices, seed)
        check_attention(probe, owner, lattices, seed)
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


def _own(probe: Probe, seed: int) -> tuple[Int64[Tensor, " numbers"], Embedded]:
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


def _placeholders(probe: Probe, states: Embedded) -> Int64[Tensor, " placeholders"]:
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


def _lattices(probe: Probe, owner: Int64[Tensor, " numbers"]) -> list[tuple[Lattice, ...]]:
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
        probe.notes += _unheard(painted, owner, here, lattices)
        found.append(lattices)
    return found


def _unheard(
    painted: Painted,
    owner: Int64[Tensor, " numbers"],
    here: Bool[Tensor, " numbers"],
    lattices: Sequence[Lattice],
) -> list[str]:
    """What of a picture reaches no token, though the processor shows it.

    A rim of a cell may be missing from the largest view, where another view shows it.
    """
    (left, upper, right, lower), (dx, dy) = lattices[0].box, lattices[0].step
    x, y = painted.x[here], painted.y[here]
    wide = max(left - float(x.min()), 0) + max(float(x.max()) - right, 0)
    high = max(upper - float(y.min()), 0) + max(float(y.max()) - lower, 0)
    if wide > 1.5 * dx or high > 1.5 * dy:
        return [f"the largest view leaves out {wide:.0f} x {high:.0f} pixels of the picture"]
    dx, dy = (max(view.step[axis] for view in lattices) / 4 for axis in (0, 1))
    bins = torch.stack([((y - upper) / dy).floor(), ((x - left) / dx).floor()], 1)
    shown, where = bins.unique(dim=0, return_inverse=True)
    heard = torch.zeros(len(shown), dtype=torch.bool)
    heard[where[owner[here] >= 0]] = True
    lost = 1 - float(heard.double().mean())
    return [f"{lost:.0%} of the picture's places reach no token"] if lost > _LOST else []


def _layout(
    probe: Probe, tokens: Int64[Tensor, " placeholders"], lattices: Sequence[Sequence[Lattice]]
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
