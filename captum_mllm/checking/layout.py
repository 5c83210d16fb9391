"""Which token shows which part of the picture: found by repainting, compared with the adapter.

One cell of the picture is repainted at a time, the picture goes through the user's own processor,
and the embeddings that the language model gets are compared with those of the picture as it was.
No layout is assumed while measuring: where a cell's own token is not the one that changes most,
the layout is wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.adapters import View
from captum_mllm.adapters.processors import read_preprocessing
from captum_mllm.checking.report import Finding
from captum_mllm.checking.subject import NotTriedError, Subject
from captum_mllm.functional import Box
from captum_mllm.geometry import ImageGeometry, ImageGrid, picture_geometry
from captum_mllm.model.observing import language_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

PAINTED = 12  # cells repainted at least, and cells of each tile at least
OF_A_TILE = 3
MOST = 36
HITS = 0.5  # share of repainted cells whose own token must respond most, of hundreds of tokens
RANK = 0.85  # mean share of tokens that must respond less than the cell's own, in each tile
RULE = 0.5  # share of repainted cells that a wrong layout must explain to be named
_ADVICE = (
    "Maps of this model lie in wrong places. Use the adapter and the processor of the model's own "
    "class; write an adapter for another layout (CONTRIBUTING.md, 'A new family of models')."
)


@dataclass(frozen=True)
class Place:
    """A cell of a view.

    Args:
        view: number of the view.
        row: of the cell.
        col: of the cell.
    """

    view: int
    row: int
    col: int


@dataclass(frozen=True)
class Painting:
    """What one repainted cell showed in one view.

    Args:
        tile: (down, across) of the tile that the cell lies in.
        claimed: the cell whose token should respond.
        answered: the cell whose token responded most, of all views of equal standing.
        rank: share of the view's tokens that respond less than the claimed one.
        at: (x, y) of the cell's centre in pixels of the picture.
    """

    tile: tuple[int, int]
    claimed: Place
    answered: Place
    rank: float
    at: tuple[float, float]

    @property
    def hit(self) -> bool:
        """Whether the claimed token responded most."""
        return self.claimed == self.answered


def check_layout(subject: Subject) -> Finding:
    """Repaint cells of the picture and see which tokens change.

    Args:
        subject: the model under check.
    """
    grid, views = _still_image(subject)
    geometry = _geometry(subject, grid)
    cells = _cells(grid)
    before = language_inputs(subject.adapter, subject.inputs)
    where = subject.sample.image_positions[0].cpu()
    changes, kept = [], []
    for row, col in cells:
        box = _box(geometry, grid, row, col)
        painted = repaint(subject.picture, box)
        if painted is None:
            continue  # padding: no part of the picture
        inputs = subject.encode(painted)
        after = language_inputs(subject.adapter, inputs)
        if after.shape != before.shape:
            raise ValueError(
                f"processor: the same picture with a repainted cell makes {len(after)} tokens, "
                f"not {len(before)}."
            )
        changes.append((after - before)[where].norm(dim=1))
        kept.append((row, col))
    response = responses(torch.stack(changes))
    paintings = [
        painting
        for (row, col), of_cell in zip(kept, response, strict=True)
        for painting in _read(of_cell, views, grid, geometry, row, col)
    ]
    subject.pictures["Layout"] = draw_layout(subject.picture, grid, geometry, paintings)
    return _judge(paintings, len(kept), grid, views)


def responses(
    changes: Float[Tensor, "paintings tokens"],
) -> Float[Tensor, "paintings tokens"]:
    """How strongly each token responds to each painting, beyond what it does to most of them.

    Towers attend globally, and some tokens change with whatever is painted: of each token's
    changes, their median over the paintings is subtracted.

    Args:
        changes: norms of the embeddings' changes.

    Returns:
        The responses, in the embeddings' units.

    Example:
        >>> responses(torch.tensor([[9.0, 5.0], [9.0, 1.0], [9.0, 1.0]]))[0].argmax()
        tensor(1)
    """
    return changes - changes.median(dim=0).values


def repaint(picture: "Image", box: Box) -> "Image | None":
    """The picture with a box filled by the extreme colour that differs most from its own.

    Args:
        picture: a PIL picture.
        box: (left, upper, right, lower) in pixels; what lies outside the picture is left out.

    Returns:
        The repainted copy, or None if less than half of the box lies in the picture.
    """
    left, upper, right, lower = box
    inside = [max(left, 0), max(upper, 0), min(right, picture.width), min(lower, picture.height)]
    shown_w, shown_h = inside[2] - inside[0], inside[3] - inside[1]
    if shown_w <= 0 or shown_h <= 0 or shown_w * shown_h < 0.5 * (right - left) * (lower - upper):
        return None
    # Whole pixels within the box: a pixel that two cells share would change both.
    (x0, x1), (y0, y1) = _whole(inside[0], inside[2]), _whole(inside[1], inside[3])
    edges = (x0, y0, x1, y1)
    copy = picture.convert("RGB")
    mean = copy.crop(edges).resize((1, 1)).getpixel((0, 0))
    colour = tuple(0 if channel > 127 else 255 for channel in mean)  # type: ignore[union-attr]
    copy.paste(colour, edges)
    return copy


def _whole(low: float, high: float) -> tuple[int, int]:
    """The whole pixels between two edges, at least the one in the middle."""
    if floor(high) > ceil(low):
        return ceil(low), floor(high)
    middle = floor((low + high) / 2)
    return middle, middle + 1


# ---- where cells are ----------------------------------------------------------------------------


def _still_image(subject: Subject) -> tuple[ImageGrid, tuple[View, ...]]:
    grid = subject.sample.grids[0]
    if len(subject.sample.grids) != 1 or grid.steps:
        raise NotTriedError("The processor makes more than one image of a picture.")
    return grid, subject.adapter.views(grid)


def _geometry(subject: Subject, grid: ImageGrid) -> ImageGeometry:
    size = (subject.picture.height, subject.picture.width)
    try:
        rule = None if grid.box is not None else read_preprocessing(subject.processor)
    except ValueError as error:
        raise NotTriedError(
            f"What the processor does to a picture is not known: {error}",
            "Pass geometry= to to_image; check maps by eye on pictures that you know.",
        ) from error
    return picture_geometry(grid, size, rule)


def _cells(grid: ImageGrid) -> list[tuple[int, int]]:
    """Cells to repaint: some of each tile, in an order that depends on the grid alone."""
    draw = torch.Generator().manual_seed(0)
    order = [divmod(int(n), grid.cols) for n in torch.randperm(grid.cells, generator=draw)]
    tiles = grid.tiles[0] * grid.tiles[1]
    each = max(OF_A_TILE, -(-PAINTED // tiles))
    count: dict[tuple[int, int], int] = {}
    chosen = []
    for row, col in order:
        tile = _tile(grid, row, col)
        if count.get(tile, 0) < each:
            count[tile] = count.get(tile, 0) + 1
            chosen.append((row, col))
    return chosen[: max(MOST, 2 * tiles)]


def _tile(grid: ImageGrid, row: int, col: int) -> tuple[int, int]:
    down, across = grid.tiles
    return row * down // grid.rows, col * across // grid.cols


def _box(geometry: ImageGeometry, grid: ImageGrid, row: int, col: int) -> Box:
    """A cell in pixels of the picture."""
    left, upper, right, lower = geometry.box
    wide, high = (right - left) / grid.cols, (lower - upper) / grid.rows
    return (
        left + col * wide,
        upper + row * high,
        left + (col + 1) * wide,
        upper + (row + 1) * high,
    )


def _read(
    response: Float[Tensor, " tokens"],
    views: Sequence[View],
    grid: ImageGrid,
    geometry: ImageGeometry,
    row: int,
    col: int,
) -> list[Painting]:
    """What a repainted cell shows in each view."""
    y, x = (row + 0.5) / grid.rows, (col + 0.5) / grid.cols
    left, upper, right, lower = geometry.box
    at = (left + x * (right - left), upper + y * (lower - upper))
    found = []
    for n, view in enumerate(views):
        begin_x, begin_y, end_x, end_y = view.box
        in_x, in_y = (x - begin_x) / (end_x - begin_x), (y - begin_y) / (end_y - begin_y)
        if not (0 <= in_x < 1 and 0 <= in_y < 1):
            continue
        rows, cols = view.tokens.shape
        claimed = Place(n, int(in_y * rows), int(in_x * cols))
        tokens = view.tokens.flatten()
        own = response[tokens].masked_fill(tokens < 0, -torch.inf)  # cells without a token
        best = Place(n, *divmod(int(own.argmax()), cols))
        mine = own[claimed.row * cols + claimed.col]
        rank = float((own < mine).float().sum() / max(len(own) - 1, 1))
        found.append(Painting(_tile(grid, row, col), claimed, best, rank, at))
    return found


# ---- verdict ------------------------------------------------------------------------------------


def _judge(
    paintings: Sequence[Painting], cells: int, grid: ImageGrid, views: Sequence[View]
) -> Finding:
    if not paintings:
        raise NotTriedError("No cell lies in the picture.")
    hits = _hits(paintings)
    rank = _mean_rank(paintings)
    deaf = _deaf_tiles(paintings)
    figures = {"cells": cells, "hits": hits, "mean_rank": rank, "deaf_tiles": deaf}
    shape = f"{grid.rows} x {grid.cols} cells"
    if grid.tiles != (1, 1):
        shape += f" in {grid.tiles[0]} x {grid.tiles[1]} tiles"
    if len(views) > 1:
        shape += f" and {len(views) - 1} overview"
    found = (
        f"{shape}; {cells} cells of the picture repainted: in {hits:.0%} of "
        f"{len(paintings)} views of them the token of that very cell changed most (mean rank "
        f"{rank:.3f}; by chance {1 / views[0].tokens.numel():.1%} and .5)."
    )
    rules = []
    for n, view in enumerate(views):
        own = [p for p in paintings if p.claimed.view == n]
        rule, share = _best_rule(own, *view.tokens.shape)
        explained = share > _hits(own) or _mean_rank(own) < RANK
        if own and (explained or (n == 0 and _hits(own) < HITS)):
            rules.append(rule if share >= RULE else "")
    if not rules and not deaf:
        return Finding("layout", "passed", found, "", figures)
    why = next(filter(None, rules), "") or _tiles_in_words(paintings, grid, deaf)
    return Finding("layout", "failed", f"{found} {why}", _ADVICE, figures)


def _hits(paintings: Sequence[Painting]) -> float:
    return sum(painting.hit for painting in paintings) / max(len(paintings), 1)


def _mean_rank(paintings: Sequence[Painting]) -> float:
    return sum(painting.rank for painting in paintings) / max(len(paintings), 1)


def _deaf_tiles(paintings: Sequence[Painting]) -> list[tuple[int, int]]:
    """Tiles in which no repainted cell shows in its place."""
    by_tile: dict[tuple[int, int], list[Painting]] = {}
    for painting in (p for p in paintings if p.claimed.view == 0):
        by_tile.setdefault(painting.tile, []).append(painting)
    return [
        tile
        for tile, own in sorted(by_tile.items())
        if _mean_rank(own) < RANK and not any(p.hit for p in own)
    ]


def _best_rule(paintings: Sequence[Painting], rows: int, cols: int) -> tuple[str, float]:
    """The wrong layout that explains most of what responded, in words, and how much of it."""
    last_row, last_col = rows - 1, cols - 1
    rules: dict[str, Callable[[Place], tuple[int, int]]] = {
        "Rows and columns are exchanged.": lambda c: divmod(c.col * rows + c.row, cols),
        "Rows and columns are exchanged in the layout.": lambda c: (
            (c.row * cols + c.col) % rows,
            (c.row * cols + c.col) // rows,
        ),
        "The layout is mirrored left to right.": lambda c: (c.row, last_col - c.col),
        "The layout is upside down.": lambda c: (last_row - c.row, c.col),
        "The layout is turned by 180 degrees.": lambda c: (last_row - c.row, last_col - c.col),
    }
    for shift in (-2, -1, 1, 2):
        rules[f"The tokens are off by {abs(shift)}."] = lambda c, shift=shift: divmod(
            c.row * cols + c.col + shift, cols
        )
    shares = {
        rule: sum((p.answered.row, p.answered.col) == place(p.claimed) for p in paintings)
        / max(len(paintings), 1)
        for rule, place in rules.items()
    }
    best = max(shares, key=lambda rule: shares[rule])
    return best, shares[best]


def _tiles_in_words(
    paintings: Sequence[Painting], grid: ImageGrid, deaf: Sequence[tuple[int, int]]
) -> str:
    """Whether the tokens of whole tiles are exchanged."""
    high, wide = max(grid.rows // grid.tiles[0], 1), max(grid.cols // grid.tiles[1], 1)
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = {tile: [] for tile in deaf}
    for painting in (p for p in paintings if p.claimed.view == 0 and p.tile in pairs):
        claimed, there = painting.claimed, painting.answered
        if (there.row % high, there.col % wide) == (claimed.row % high, claimed.col % wide):
            pairs[painting.tile].append(_tile(grid, there.row, there.col))
    swapped = {
        tile: max(set(seen), key=seen.count) for tile, seen in pairs.items() if len(seen) > 1
    }
    if swapped:
        text = ", ".join(f"what is in tile {old} shows in {new}" for old, new in swapped.items())
        return f"Tiles are swapped; (down, across) from 0: {text}."
    if deaf and grid.tiles != (1, 1):
        return f"Tiles {', '.join(map(str, deaf))} (down, across; from 0) never respond in place."
    return "No simple rule (exchanged, mirrored, shifted, swapped tiles) explains it."


# ---- drawing ------------------------------------------------------------------------------------


def draw_layout(
    picture: "Image", grid: ImageGrid, geometry: ImageGeometry, paintings: Sequence[Painting]
) -> "Image":
    """The layout over the picture: grid, repainted cells, and a line to where a token responded.

    Args:
        picture: the picture.
        grid: the image's grid.
        geometry: where it lies in the picture.
        paintings: what was found; only those of the first view are drawn.
    """
    from PIL import Image, ImageDraw

    factor = max(1.0, 512 / max(picture.size))
    size = (round(picture.width * factor), round(picture.height * factor))
    drawn = Image.blend(picture.convert("RGB").resize(size), Image.new("RGB", size, "white"), 0.35)
    draw = ImageDraw.Draw(drawn)
    for row in range(grid.rows):
        for col in range(grid.cols):
            box = [edge * factor for edge in _box(geometry, grid, row, col)]
            draw.rectangle(box, outline=(120, 130, 140))
    for painting in (p for p in paintings if p.claimed.view == 0):
        claimed, answered = painting.claimed, painting.answered
        colour = (0, 130, 60) if painting.hit else (200, 30, 30)
        box = [edge * factor for edge in _box(geometry, grid, claimed.row, claimed.col)]
        draw.rectangle(box, outline=colour, width=3)
        if not painting.hit:
            there = [edge * factor for edge in _box(geometry, grid, answered.row, answered.col)]
            ends = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
            ends += [(there[0] + there[2]) / 2, (there[1] + there[3]) / 2]
            draw.line(ends, fill=colour, width=2)
            draw.ellipse([ends[2] - 4, ends[3] - 4, ends[2] + 4, ends[3] + 4], fill=colour)
    return drawn
