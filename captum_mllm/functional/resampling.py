"""Maps and pixels on other grids: upsampling, mass-preserving resize, merging of tiles and windows.

Two weights along an axis are all there is: :func:`upsample` and growing
:func:`resize_attributions` interpolate linearly; everything else weights cells by how much of them
covers a new cell (:func:`cell_overlap`).

- Levels: :func:`upsample`, :func:`resample_cells`, :func:`join_windows`, :func:`merge_views`.
- Sums: :func:`resize_attributions`, :func:`sum_cells`.
- Pixels: :func:`resize_pixels`. Where windows lie: :func:`window_boxes`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Box = tuple[float, float, float, float]
"""(left, upper, right, lower) in fractions of a canvas, each in [0, 1] inside it."""


WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
"""The box that is the whole canvas."""


def cell_overlap(
    old: int, new: int, start: float = 0.0, end: float = 1.0
) -> Float[Tensor, "new old"]:
    """How much of each new cell each old cell covers, along one axis.

    Args:
        old: number of equal cells from ``start`` to ``end``.
        new: number of equal cells from 0 to 1.
        start: where the old cells begin, default 0.
        end: where the old cells end, default 1.

    Returns:
        (new, old): shares of a new cell's length in [0, 1], float64.

    Reference:
        Ours.

    Example:
        >>> cell_overlap(4, 2).tolist()  # two of four cells in each half
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    old_edges = torch.linspace(start, end, old + 1, dtype=torch.float64) * new
    new_edges = torch.arange(new + 1, dtype=torch.float64)
    upper = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    lower = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    overlap = (upper - lower).clamp(min=0)
    overlap[overlap < 1e-6] = 0  # edges that should coincide differ by rounding
    return overlap


def upsample(
    maps: Float[Tensor, "*batch rows cols"], size: tuple[int, int]
) -> Float[Tensor, "*batch height width"]:
    """Resize maps by bilinear interpolation, pixel centres aligned (``align_corners=False``).

    Args:
        maps: maps on their grid.
        size: (height, width), in cells or pixels.

    Returns:
        The maps at that size (..., height, width); the same tensor if they already have it.

    Reference:
        Bilinear interpolation.

    Example:
        >>> import torch
        >>> upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4)).tolist()
        [[[0.0, 0.25, 0.75, 1.0]]]
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    # Two small matrix products take half the time of F.interpolate from a token grid to pixels.
    along_h = _bilinear_weights(maps.shape[-2], size[0]).to(maps)
    along_w = _bilinear_weights(maps.shape[-1], size[1]).to(maps)
    return along_h @ (maps @ along_w.T)


def _bilinear_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """Weights of linear interpolation along one axis: each unit vector, interpolated."""
    eye = torch.eye(old, dtype=torch.float64)[None]
    return F.interpolate(eye, size=new, mode="linear", align_corners=False)[0].T


def resize_attributions(
    attributions: Float[Tensor, "n c h w"],
    size: tuple[int, int],
    preserve: Literal["mass", "density"] = "mass",
) -> Float[Tensor, "n c height width"]:
    """Resize attributions and preserve their sum (mass) or their level (density).

    "density" is the usual bilinear resize (pixel centres aligned). "mass" is that times the area
    ratio, made exact: the weights are separable, cell overlap along an axis that shrinks, and along
    one that grows, linear interpolation averaged over each new cell instead of read at its centre.
    Each source cell distributes exactly its own value (columns sum to 1), and each new cell gets
    the same share of a flat attribution (rows sum to the ratio). The total is therefore preserved
    at any ratio, and flat stays flat; at ratios 2 and 1/2 both agree up to rounding.

    Args:
        attributions: (n, c, h, w), signed.
        size: (height, width) of the result.
        preserve: "mass" (default) for attributions that sum to a difference of outputs,
            "density" for maps whose level matters (Grad-CAM).

    Returns:
        Attributions (n, c, height, width); the same tensor if they already have that size.

    Raises:
        ValueError: ``preserve`` is unknown.

    Reference:
        Our reading: completeness has to survive the aggregation over scales.

    Example:
        >>> import torch
        >>> a = torch.rand(1, 1, 7, 7)
        >>> torch.allclose(resize_attributions(a, (5, 3)).sum(), a.sum())
        True
    """
    if preserve not in ("mass", "density"):
        raise ValueError(f"preserve must be one of mass, density, got {preserve!r}.")
    if tuple(attributions.shape[-2:]) == tuple(size):
        return attributions
    if preserve == "density":
        return F.interpolate(attributions, size=size, mode="bilinear", align_corners=False)
    along_h = _mass_weights(attributions.shape[-2], size[0]).to(attributions)
    along_w = _mass_weights(attributions.shape[-1], size[1]).to(attributions)
    return along_h @ attributions @ rearrange(along_w, "new old -> old new")


def _mass_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """Weights that resize an axis of ``old`` cells to ``new``; those of each old cell sum to 1."""
    if new <= old:
        weights = cell_overlap(old, new)
        return weights / weights.sum(0, keepdim=True)
    # Interpolation is the sum of one hat per old cell, flat beyond the first and last centre. Each
    # new cell gets the hat's integral over it: the difference of an antiderivative at its edges.
    edges = torch.arange(new + 1, dtype=torch.float64)[:, None] * old / new
    x = (edges - torch.arange(old, dtype=torch.float64) - 0.5).clamp(-1, 1)
    integral = torch.where(x < 0, (1 + x).square() / 2, 1 - (1 - x).square() / 2)
    integral[:, 0] = torch.where(x[:, 0] < 0, 0.5 + x[:, 0], integral[:, 0])
    integral[:, -1] = torch.where(x[:, -1] > 0, 0.5 + x[:, -1], integral[:, -1])
    return integral.diff(dim=0)


def resample_cells(
    maps: Float[Tensor, "*batch rows cols"], box: Box, size: tuple[int, int]
) -> Float[Tensor, "*batch height width"]:
    """Give each cell of a canvas the mean of the map's cells that cover it.

    The mean is weighted by the overlap in area. A part of the canvas cell that the map does not
    cover does not count, and a canvas cell that the map does not touch is 0.

    Args:
        maps: maps on a regular grid over ``box``.
        box: (left, upper, right, lower) of that grid in fractions of the canvas.
        size: (rows, cols) of the canvas's grid.

    Returns:
        Maps on the canvas's grid (..., rows, cols); the same tensor where nothing changes.

    Reference:
        Ours.

    Example:
        >>> import torch
        >>> resample_cells(torch.tensor([[1.0, 3.0]]), WHOLE, (1, 4)).tolist()
        [[1.0, 1.0, 3.0, 3.0]]
        >>> resample_cells(torch.tensor([[1.0, 3.0]]), WHOLE, (1, 1)).tolist()
        [[2.0]]
    """
    if box == WHOLE and tuple(maps.shape[-2:]) == size:
        return maps
    return join_windows([maps], [box], size)


def join_windows(
    maps: list[Float[Tensor, "*batch rows cols"]],
    boxes: list[Box],
    size: tuple[int, int],
) -> Float[Tensor, "*batch height width"]:
    """Join the maps of windows: a canvas cell takes the mean of all cells that cover it.

    The mean is weighted by the overlap in area; a canvas cell that no window reaches is 0.

    Args:
        maps: maps of each window, all of one shape.
        boxes: per window, (left, upper, right, lower) of its grid in fractions of the canvas.
        size: (rows, cols) of the canvas's grid.

    Returns:
        Maps on the canvas's grid (..., rows, cols).

    Reference:
        Ours.

    Example:
        >>> import torch
        >>> left, right = torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 7.0]])
        >>> boxes = [(0.0, 0.0, 2 / 3, 1.0), (1 / 3, 0.0, 1.0, 1.0)]
        >>> join_windows([left, right], boxes, (1, 3)).tolist()
        [[1.0, 4.0, 7.0]]
    """
    total: Tensor | float = 0.0
    covered: Tensor | float = 0.0
    for values, (left, upper, right, lower) in zip(maps, boxes, strict=True):
        along_h = cell_overlap(values.shape[-2], size[0], upper, lower).to(values)
        along_w = cell_overlap(values.shape[-1], size[1], left, right).to(values)
        total = total + along_h @ (values @ along_w.T)
        covered = covered + along_h.sum(1)[:, None] * along_w.sum(1)[None, :]
    covered = torch.as_tensor(covered)
    return torch.where(covered > 0, total / covered, 0.0)


def merge_views(
    views: list[Float[Tensor, "n ..."]],
    boxes: list[Box],
    shape: tuple[int, ...],
) -> Float[Tensor, "n ..."]:
    """Merge the maps of an image's views into one map of the image: the mean at every cell.

    A model with tiles sees an image twice: cut into tiles, and small as a whole (thumbnail, global
    or base image). Both are maps of the same image, so they are treated as two scales are: each is
    resampled to the canvas's grid (:func:`resample_cells`, so that a small change in one cell of a
    view shows in the canvas cells that it covers and in no other), then the mean is taken.

    Args:
        views: per view, maps on its own grid.
        boxes: per view, (left, upper, right, lower) of its grid in fractions of the canvas.
        shape: (rows, cols) of the canvas's grid, or (steps, rows, cols).

    Returns:
        The merged maps ``(n, *shape)``; the view itself if it is the only one and on that
        grid.

    Reference:
        Our reading; the mean is that of MSEA over scales.

    Example:
        >>> import torch
        >>> tiles, overview = torch.ones(1, 2, 2), torch.zeros(1, 1, 1)
        >>> merge_views([tiles, overview], [WHOLE, WHOLE], (2, 2)).tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """
    placed = [
        resample_cells(maps, box, (shape[-2], shape[-1]))
        for maps, box in zip(views, boxes, strict=True)
    ]
    return placed[0] if len(placed) == 1 else torch.stack(placed).mean(0)


def sum_cells(
    maps: Float[Tensor, "*batch rows cols"], box: Box, size: tuple[int, int]
) -> Float[Tensor, "*batch height width"]:
    """Give each cell of a canvas the sum of the map's cells that lie in it.

    A cell of the map that lies in several canvas cells distributes its value by area; what lies
    outside the canvas is lost. This is for attributions, whose sum means something;
    :func:`resample_cells` preserves the level instead.

    Args:
        maps: maps on a regular grid over ``box``.
        box: (left, upper, right, lower) of that grid in fractions of the canvas.
        size: (rows, cols) of the canvas's grid.

    Returns:
        Maps on the canvas's grid (..., rows, cols).

    Reference:
        Ours.

    Example:
        >>> import torch
        >>> sum_cells(torch.tensor([[1.0, 3.0]]), WHOLE, (1, 1)).tolist()
        [[4.0]]
    """
    left, upper, right, lower = box
    (old_rows, old_cols), (rows, cols) = maps.shape[-2:], size
    along_h = cell_overlap(old_rows, rows, upper, lower) * old_rows / ((lower - upper) * rows)
    along_w = cell_overlap(old_cols, cols, left, right) * old_cols / ((right - left) * cols)
    return along_h.to(maps) @ (maps @ along_w.to(maps).T)


def window_boxes(cells: tuple[int, int], enlarged: tuple[int, int], n: int) -> list[Box]:
    """Windows of a model's native size over an enlarged image, n down and n across.

    The windows are evenly spaced from edge to edge and begin at whole cells of the enlarged grid.

    Args:
        cells: (rows, cols) that the model sees at once.
        enlarged: (rows, cols) of the enlarged image, no smaller.
        n: number of windows along each axis.

    Returns:
        n * n boxes (left, upper, right, lower) in fractions of the canvas, row by row.

    Reference:
        Our reading of a larger scale for models of one input size.

    Example:
        >>> window_boxes((2, 2), (3, 4), 2)[1]
        (0.5, 0.0, 1.0, 0.6666666666666666)
    """
    tops, lefts = (
        [round(i * (large - window) / max(n - 1, 1)) for i in range(n)]
        for window, large in zip(cells, enlarged, strict=True)
    )
    (rows, cols), (height, width) = cells, enlarged
    return [
        (left / width, top / height, (left + cols) / width, (top + rows) / height)
        for top in tops
        for left in lefts
    ]


def resize_pixels(
    pixels: Float[Tensor, "n c h w"], size: tuple[int, int]
) -> Float[Tensor, "n c height width"]:
    """Resize normalised pixels, bicubic with antialiasing, as image processors resize pictures.

    Args:
        pixels: (n, c, h, w), any floating dtype.
        size: (height, width) of the result.

    Returns:
        The resized pixels (n, c, height, width) in their dtype; the same tensor if they already
        have that size.

    Reference:
        Ours; the interpolation is that of transformers' image processors.

    Example:
        >>> import torch
        >>> resize_pixels(torch.ones(1, 3, 4, 4), (6, 2)).shape
        torch.Size([1, 3, 6, 2])
    """
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    resized = F.interpolate(
        pixels.float(), size=size, mode="bicubic", align_corners=False, antialias=True
    )
    return resized.to(pixels.dtype)
