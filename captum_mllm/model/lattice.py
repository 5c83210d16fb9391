"""From the place of each token in the picture to regular lattices of tokens.

Coordinates are pixels of the user's picture: x to the right, y down.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

_ALIKE = 0.25  # log ratio of extents within which tokens are of one kind
_SAME_SCALE = 0.1  # the same, for tiles that make up one view
_NEAR = 0.45  # of a cell: lines of one row or column lie closer than this
_RIM = 0.2  # of a cell, by which a token may stand out of the cell it fills


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """What each token shows of the picture: moments over the pixels that it owns.

    Args:
        tokens: (tokens,) their numbers, ascending.
        centre: (tokens, 2) mean x and y.
        extent: (tokens, 2) width and height of a uniform spread of the same variance.
        lower: (tokens, 2) smallest x and y.
        upper: (tokens, 2) largest x and y.
        painted: (tokens,) how many of its numbers show the picture.
        heard: (tokens,) how many numbers it owns, those of padding included.
        pixels: (tokens,) how many different points of the picture it shows.
        source: (tokens,) which tile of pixels it comes from, -1 where the pixels have no tiles.
    """

    tokens: NDArray[np.int64]
    centre: NDArray[np.float64]
    extent: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    painted: NDArray[np.int64]
    heard: NDArray[np.int64]
    pixels: NDArray[np.int64]
    source: NDArray[np.int64]

    @property
    def whole(self) -> NDArray[np.bool_]:
        """(tokens,): whether all that the token hears shows the picture; all, if none does."""
        whole = self.painted >= 0.999 * self.heard
        return whole if whole.any() else np.ones_like(whole)


def token_places(
    owner: Int64[Tensor, " numbers"],
    x: Float64[Tensor, " numbers"],
    y: Float64[Tensor, " numbers"],
    source: Int64[Tensor, " numbers"],
) -> TokenPlaces:
    """Moments of what each token owns.

    Args:
        owner: token of each number of the pixel inputs; negative for none.
        x: where in the picture it lies, pixels; NaN where it shows none of it.
        y: the same.
        source: tile that it belongs to.

    Returns:
        The places of all tokens that own a painted number.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.float64)
        >>> owner, tile = torch.tensor([0, 0, 7, 7]), torch.zeros(4, dtype=torch.long)
        >>> token_places(owner, x, 0 * x + 0.5, tile).centre.tolist()
        [[1.0, 0.5], [3.0, 0.5]]
    """
    seen = (owner >= 0) & ~x.isnan()
    tokens, index = owner[seen].unique(return_inverse=True)
    n = len(tokens)
    points = torch.stack([x[seen], y[seen]], 1)
    painted = torch.bincount(index, minlength=n)
    where = index[:, None].expand_as(points)
    centre = torch.zeros(n, 2, dtype=torch.float64).index_add_(0, index, points) / painted[:, None]
    square = (points - centre[index]) ** 2
    variance = torch.zeros(n, 2, dtype=torch.float64).index_add_(0, index, square)
    empty = torch.full((n, 2), torch.inf, dtype=torch.float64)
    lower = empty.scatter_reduce(0, where, points, "amin")
    upper = (-empty).scatter_reduce(0, where, points, "amax")
    heard = torch.bincount(owner[owner >= 0], minlength=int(tokens.max()) + 1 if n else 0)
    tile = torch.zeros(n, dtype=torch.int64).scatter_reduce(
        0, index, source[seen], "amax", include_self=False
    )
    return TokenPlaces(
        tokens.numpy(),
        centre.numpy(),
        (12 * variance / painted[:, None]).sqrt().clamp(min=1e-3).numpy(),
        lower.numpy(),
        upper.numpy(),
        painted.numpy(),
        heard[tokens].numpy(),
        _distinct(index, points, n),
        tile.numpy(),
    )


def _distinct(
    index: Int64[Tensor, " numbers"], points: Float64[Tensor, "numbers 2"], n: int
) -> NDArray[np.int64]:
    """How many different points each token shows: channels and repeated frames are one."""
    at = (points * 8).round().long()
    at -= at.amin(0) if len(at) else 0
    wide, high = (at.amax(0) + 1).tolist() if len(at) else (1, 1)
    distinct = ((index * high + at[:, 1]) * wide + at[:, 0]).unique()
    return torch.bincount(distinct // (wide * high), minlength=n).numpy()


@dataclass(frozen=True, eq=False)
class Lattice:
    """One regular grid of tokens in the picture.

    Args:
        tokens: (rows, cols) token of each cell, -1 where there is none.
        corner: x and y of the upper left corner.
        step: width and height of a cell.
        side: pixels along a cell as the vision encoder sees it.
    """

    tokens: NDArray[np.int64]
    corner: tuple[float, float]
    step: tuple[float, float]
    side: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, upper, right, lower) of the grid."""
        (rows, cols), (x, y), (dx, dy) = self.tokens.shape, self.corner, self.step
        return (x, y, x + cols * dx, y + rows * dy)

    def cell(self, row: int, col: int) -> tuple[float, float, float, float]:
        """(left, upper, right, lower) of one cell.

        Args:
            row: from the top, 0 first.
            col: from the left, 0 first.
        """
        x, y = self.corner[0] + col * self.step[0], self.corner[1] + row * self.step[1]
        return (x, y, x + self.step[0], y + self.step[1])


@dataclass
class _Group:
    """Tokens of one kind (places in the table), and the extents of the tiles they fill."""

    members: list[int]
    tiles: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Axes:
    """Centre of the first cell, step and unevenness (in steps) along x and y."""

    first: NDArray[np.float64]
    step: NDArray[np.float64]
    uneven: float


def fit_lattices(places: TokenPlaces) -> tuple[tuple[Lattice, ...], tuple[str, ...]]:
    """The regular grids that tokens form, largest first, and what does not fit.

    Tokens of one extent form one grid. Tiles of one scale that lie side by side are joined; where
    tiles of one scale show the same place twice, each is a grid of its own.

    Args:
        places: of all tokens that show something of the picture.

    Returns:
        The grids, and a note for each irregularity; no note means an exact fit.

    Reference:
        Our reading.

    Example:
        >>> import torch
        >>> x, y = torch.meshgrid(torch.arange(4.0), torch.arange(2.0), indexing="xy")
        >>> owner = (y.long() * 2 + x.long() // 2).flatten()  # 2 x 2 tokens of 2 x 1 pixels
        >>> tile = torch.zeros(8, dtype=torch.long)
        >>> x, y = x.flatten().double() + 0.5, y.flatten().double() + 0.5
        >>> places = token_places(owner, x, y, tile)
        >>> (lattice,), notes = fit_lattices(places)
        >>> lattice.tokens.tolist(), [round(edge, 6) + 0.0 for edge in lattice.box], notes
        ([[0, 1], [2, 3]], [0.0, 0.0, 4.0, 2.0], ())
    """
    groups = _fill_gaps(places, _join_tiles(places, _kinds(places)))
    lattices: list[Lattice] = []
    notes: list[str] = []
    for group in groups:
        own, said = _lattices(places, group)
        lattices += own
        notes += said
    return tuple(sorted(lattices, key=lambda lattice: -lattice.tokens.size)), tuple(notes)


def _kinds(places: TokenPlaces) -> list[_Group]:
    """Tokens of one tile and of about one extent."""
    n, groups = len(places.tokens), []
    tiles = np.unique(places.source)
    # rows of patches are as many "tiles" as tokens: they say nothing
    tile_of = places.source if len(tiles) <= n / 3 else np.full(n, -1)
    for tile in np.unique(tile_of):
        members = np.flatnonzero(tile_of == tile).tolist()
        firm = [i for i in members if places.whole[i]] or members
        kinds: list[_Group] = []
        for i in firm:
            for kind in kinds:
                if _distance(places.extent[i], places.extent[kind.members[0]]) < _ALIKE:
                    kind.members.append(i)
                    break
            else:
                kinds.append(_Group([i]))
        for i in set(members) - set(firm):  # partly padding: it belongs where its neighbours do
            min(kinds, key=lambda k: min(abs(i - j) for j in k.members)).members.append(i)
        for kind in kinds:
            kind.members.sort()
            centres = places.centre[kind.members]
            kind.tiles.append((centres.min(0), centres.max(0)))
        groups += kinds
    return groups


def _distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return max(abs(log(a / b)) for a, b in zip(one, other, strict=True))


def _join_tiles(places: TokenPlaces, groups: Sequence[_Group]) -> list[_Group]:
    """Tiles of one scale that lie apart make one view; largest groups first."""
    joined: list[_Group] = []
    for group in groups:
        extent = np.median(places.extent[group.members], 0)
        (low, high), *_ = group.tiles
        for other in joined:
            same = _distance(extent, np.median(places.extent[other.members], 0)) < _SAME_SCALE
            margin = 0.3 * extent
            apart = all(
                (low > top + margin).any() or (high < bottom - margin).any()
                for bottom, top in other.tiles
            )
            if same and apart:
                other.members.extend(group.members)
                other.tiles.extend(group.tiles)
                break
        else:
            joined.append(group)
    return sorted(joined, key=lambda group: -len(group.members))


def _fill_gaps(places: TokenPlaces, groups: Sequence[_Group]) -> list[_Group]:
    """A few tokens of another extent (cut at the border) fill free cells of a larger grid."""
    kept: list[_Group] = []
    for group in groups:
        for other in kept:
            axes = _axes(places, other.members)
            large = np.median(places.extent[group.members], 0) > 1.25 * axes.step
            cells = _cells(places, group.members, axes)
            free = not set(cells) & set(_cells(places, other.members, axes))
            if large.any() or not free or len(set(cells)) < len(cells):
                continue
            if all(
                _stands_in(places, i, cell, axes)
                for i, cell in zip(group.members, cells, strict=True)
            ):
                other.members.extend(group.members)
                break
        else:
            kept.append(group)
    return kept


def _stands_in(places: TokenPlaces, i: int, cell: tuple[int, int], axes: _Axes) -> bool:
    """Whether what a token shows lies in a cell, but for a rim."""
    centre = axes.first + np.array([cell[1], cell[0]]) * axes.step
    reach = (0.5 + _RIM) * axes.step
    inside = (places.lower[i] > centre - reach) & (places.upper[i] < centre + reach)
    return bool(inside.all())


def _cells(places: TokenPlaces, members: Sequence[int], axes: _Axes) -> list[tuple[int, int]]:
    """Row and column of each token."""
    at = np.rint((places.centre[list(members)] - axes.first) / axes.step).astype(int)
    return [(int(row), int(col)) for col, row in at]


def _side(places: TokenPlaces, members: Sequence[int]) -> float:
    """Pixels along a cell, which is a square of the encoder's pixels."""
    return max(2.0, float(places.pixels[list(members)].max() ** 0.5))


def _axes(places: TokenPlaces, members: Sequence[int]) -> _Axes:
    """Least-squares lattice through the centres of a group's tokens."""
    firm = [i for i in members if places.whole[i]] or members
    side = _side(places, members)
    # n points in a row spread like (n - 1) / n of their cell, less what variance counts
    extent = np.median(places.extent[firm], 0) * side / (side**2 - 1) ** 0.5
    first, step, uneven = np.zeros(2), extent.copy(), 0.0
    for axis in (0, 1):
        lines = _lines(places.centre[firm, axis], float(extent[axis]))
        if len(lines) == 1:
            span = np.median(places.upper[firm, axis] - places.lower[firm, axis])
            first[axis], step[axis] = lines[0], max(float(span) * side / (side - 1), 1e-3)
            continue
        number = np.rint((lines - lines[0]) / np.median(np.diff(lines)))
        system = np.stack([number, np.ones_like(number)], 1)
        (step[axis], first[axis]), *_ = np.linalg.lstsq(system, lines, rcond=None)
        off = np.abs(system @ [step[axis], first[axis]] - lines).max() / step[axis]
        uneven = max(uneven, float(off))
    return _Axes(first, step, uneven)


def _lines(values: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Means of runs of values that lie less than about half a step apart."""
    ordered = np.sort(values)
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > _NEAR * step) + 1)
    return np.array([run.mean() for run in runs])


def _lattices(places: TokenPlaces, group: _Group) -> tuple[list[Lattice], list[str]]:
    """The grid of a group, or one grid for each of the tokens that share a cell."""
    axes = _axes(places, group.members)
    per_cell: dict[tuple[int, int], list[int]] = defaultdict(list)
    members = sorted(group.members)
    for i, cell in zip(members, _cells(places, members, axes), strict=True):
        per_cell[cell].append(i)
    low = np.min(list(per_cell), 0)
    rows, cols = np.max(list(per_cell), 0) - low + 1
    corner = axes.first + (low[::-1] - 0.5) * axes.step
    depth = max(map(len, per_cell.values()))
    found = []
    for k in range(depth):
        tokens = np.full((rows, cols), -1)
        for (row, col), here in per_cell.items():
            if len(here) > k:
                tokens[row - low[0], col - low[1]] = places.tokens[here[k]]
        x, y, dx, dy = (float(v) for v in (*corner, *axes.step))
        found.append(Lattice(tokens, (x, y), (dx, dy), _side(places, members)))
    return found, _notes(places, found, axes)


def _notes(places: TokenPlaces, found: Sequence[Lattice], axes: _Axes) -> list[str]:
    """What does not fit, in words."""
    notes = []
    if len(found) > 1:
        notes.append(f"{len(found)} tokens share a cell")
    if axes.uneven > 0.2:
        notes.append(f"rows or columns are uneven by {axes.uneven:.2f} of a cell")
    cells = sum(lattice.tokens.size for lattice in found)
    if missing := sum(int((lattice.tokens < 0).sum()) for lattice in found):
        notes.append(f"{missing} of {cells} cells of a view have no token")
    if (off := max(_outside(places, lattice) for lattice in found)) > 0.5:
        notes.append(f"a token shows pixels {off:.1f} cells outside of its cell")
    if not all(map(_in_raster_order, found)):
        notes.append("tokens do not follow one another row by row")
    return notes


def _outside(places: TokenPlaces, lattice: Lattice) -> float:
    """How far, in cells, the pixels of a token lie outside of its cell at most."""
    row_of = {int(token): i for i, token in enumerate(places.tokens)}
    worst, step = 0.0, np.array(lattice.step)
    for (row, col), token in np.ndenumerate(lattice.tokens):
        if token >= 0:
            i, box = row_of[int(token)], np.array(lattice.cell(row, col))
            over = np.maximum(box[:2] - places.lower[i], places.upper[i] - box[2:]) / step
            worst = max(worst, float(over.max()))
    return worst


def _in_raster_order(lattice: Lattice) -> bool:
    """Whether tokens ascend along each row and down each column, as rows and tiles do."""
    tokens = np.ma.masked_less(lattice.tokens, 0)
    return all(np.ma.filled(np.ma.diff(tokens, axis=axis) > 0, True).all() for axis in (0, 1))
