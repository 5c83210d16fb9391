"""Maps and pixels on other grids: upsampling, mass-preserving resize, merging tiles and windows."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def upsample(
    maps: Float[Tensor, "*batch rows cols"], size: tuple[int, int]
) -> Float[Tensor, "*batch height width"]:
    """Bring maps to another size, bilinear, pixel centres aligned (``align_corners=False``).

    Args:
        maps: maps on their grid.
        size: (height, width), in cells or pixels.

    Returns:
        The maps at that size; the same tensor if they have it already.

    Reference:
        Bilinear interpolation.

    Example:
        >>> import torch
        >>> upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4)).tolist()
        [[[0.0, 0.25, 0.75, 1.0]]]
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    # Two small matrix products: half the time of F.interpolate from a token grid to pixels.
    along_h = _bilinear_weights(maps.shape[-2], size[0]).to(maps)
    along_w = _bilinear_weights(maps.shape[-1], size[1]).to(maps)
    return along_h @ (maps @ along_w.T)


def resize_attributions(
    attributions: Float[Tensor, "n c h w"],
    size: tuple[int, int],
    preserve: Literal["mass", "density"] = "mass",
) -> Float[Tensor, "n c height width"]:
    """Bring attributions to another size and keep their sum (mass) or their level (density).

    "density" is the usual bilinear resize (pixel centres aligned). "mass" is that times the area
    ratio, made exact: separable weights per axis, cell overlap where it shrinks and bilinear where
    it grows, each source cell handing out just its own value (columns sum to 1). So the total is
    kept at any ratio; at ratios 2 and 1/2 both ways agree to the last digit.

    Args:
        attributions: (n, c, h, w), signed.
        size: (height, width) to reach.
        preserve: "mass" (default) for attributions that sum to a difference of outputs,
            "density" for maps whose level matters (Grad-CAM).

    Returns:
        Attributions (n, c, height, width); the same tensor if they have that size already.

    Raises:
        ValueError: ``preserve`` is unknown.

    Reference:
        Our reading: so that completeness survives the aggregation over scales.

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
    """Weights that take an axis of ``old`` cells to ``new``; each old cell's sum to 1."""
    if new < old:
        edges_new = torch.linspace(0, old, new + 1, dtype=torch.float64)
        edges_old = torch.arange(old + 1, dtype=torch.float64)
        upper = torch.minimum(edges_new[1:, None], edges_old[None, 1:])
        lower = torch.maximum(edges_new[:-1, None], edges_old[None, :-1])
        weights = (upper - lower).clamp(min=0)
    else:
        weights = _bilinear_weights(old, new)
    return weights / weights.sum(0, keepdim=True)


def _bilinear_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """Weights of linear interpolation along one axis: each unit vector, interpolated."""
    eye = torch.eye(old, dtype=torch.float64)[None]
    return F.interpolate(eye, size=new, mode="linear", align_corners=False)[0].T


Box = tuple[float, float, float, float]
"""(left, upper, right, lower) in fractions of a frame, each in [0, 1] inside it."""


WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
"""The box that is the whole frame."""


def merge_views(
    views: list[Float[Tensor, "n ..."]],
    boxes: list[Box],
    shape: tuple[int, ...],
) -> Float[Tensor, "n ..."]:
    """Maps of one image's views, in the image's frame: the mean of the views at every cell.

    A model with tiles sees a picture twice: cut into tiles, and small as a whole (thumbnail,
    global or base image). Both are maps of the same picture, so they are treated as two scales
    are: each is brought to the frame's grid (:func:`resample_cells`: a frame cell takes the mean
    of what covers it, so a small change in one cell of a view shows in the frame's cells that it
    covers and in no other), then the mean is taken.

    Args:
        views: per view, maps on its own grid.
        boxes: per view, (left, upper, right, lower) of its grid in fractions of the frame.
        shape: (rows, cols) of the frame's grid, or (steps, rows, cols).

    Returns:
        The merged maps; bit for bit the view itself where there is one that fits.

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


def resample_cells(
    maps: Float[Tensor, "*batch rows cols"], box: Box, size: tuple[int, int]
) -> Float[Tensor, "*batch height width"]:
    """Each cell of a grid over the frame takes the mean of the map's cells that cover it.

    The mean is weighted by the overlap in area; a part of the frame cell that the map does not
    cover does not count, and a frame cell that it does not touch is 0.

    Args:
        maps: maps on a regular grid over ``box``.
        box: (left, upper, right, lower) of that grid in fractions of the frame.
        size: (rows, cols) of the frame's grid.

    Returns:
        Maps on the frame's grid; the same tensor where nothing changes.

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


def sum_cells(
    maps: Float[Tensor, "*batch rows cols"], box: Box, size: tuple[int, int]
) -> Float[Tensor, "*batch height width"]:
    """Each cell of a grid over the frame takes the sum of the map's cells that lie in it.

    A map's cell on an edge hands out its value by area; what lies outside the frame is lost. For
    attributions, whose sum means something, where :func:`resample_cells` keeps the level.

    Args:
        maps: maps on a regular grid over ``box``.
        box: (left, upper, right, lower) of that grid in fractions of the frame.
        size: (rows, cols) of the frame's grid.

    Returns:
        Maps on the frame's grid.

    Reference:
        Ours.

    Example:
        >>> import torch
        >>> sum_cells(torch.tensor([[1.0, 3.0]]), WHOLE, (1, 1)).tolist()
        [[4.0]]
    """
    left, upper, right, lower = box
    (old_rows, old_cols), (rows, cols) = maps.shape[-2:], size
    along_h = _overlap(old_rows, upper, lower, rows) * old_rows / ((lower - upper) * rows)
    along_w = _overlap(old_cols, left, right, cols) * old_cols / ((right - left) * cols)
    return along_h.to(maps) @ (maps @ along_w.to(maps).T)


def window_boxes(cells: tuple[int, int], enlarged: tuple[int, int], n: int) -> list[Box]:
    """Windows of a model's own size over an enlarged image, n down and n across.

    Evenly spaced from edge to edge, at whole cells of the enlarged grid.

    Args:
        cells: (rows, cols) that the model sees at once.
        enlarged: (rows, cols) of the enlarged image, no smaller.
        n: windows along each axis.

    Returns:
        n * n boxes (left, upper, right, lower) in fractions of the frame, row by row.

    Reference:
        Our reading of a larger scale for models of one input size.

    Example:
        >>> window_boxes((2, 2), (3, 4), 2)[1]
        (0.5, 0.0, 1.0, 0.6666666666666666)
    """
    tops, lefts = (
        [round(i * (large - own) / max(n - 1, 1)) for i in range(n)]
        for own, large in zip(cells, enlarged, strict=True)
    )
    (rows, cols), (height, width) = cells, enlarged
    return [
        (left / width, top / height, (left + cols) / width, (top + rows) / height)
        for top in tops
        for left in lefts
    ]


def join_windows(
    maps: list[Float[Tensor, "*batch rows cols"]],
    boxes: list[Box],
    size: tuple[int, int],
) -> Float[Tensor, "*batch height width"]:
    """Put maps of windows together: a frame cell takes the mean of all cells that cover it.

    Weighted by the overlap in area; 0 where no window reaches.

    Args:
        maps: maps of each window, all of one shape.
        boxes: per window, (left, upper, right, lower) of its grid in fractions of the frame.
        size: (rows, cols) of the frame's grid.

    Returns:
        Maps on the frame's grid.

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
        along_h = _overlap(values.shape[-2], upper, lower, size[0]).to(values)
        along_w = _overlap(values.shape[-1], left, right, size[1]).to(values)
        total = total + along_h @ (values @ along_w.T)
        covered = covered + along_h.sum(1)[:, None] * along_w.sum(1)[None, :]
    covered = torch.as_tensor(covered)
    return torch.where(covered > 0, total / covered, 0.0)


def _overlap(old: int, start: float, end: float, new: int) -> Float[Tensor, "new old"]:
    """How much of each of ``new`` cells over [0, 1] each of ``old`` from start to end covers."""
    old_edges = torch.linspace(start, end, old + 1, dtype=torch.float64) * new
    new_edges = torch.arange(new + 1, dtype=torch.float64)
    upper = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    lower = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    overlap = (upper - lower).clamp(min=0)
    overlap[overlap < 1e-6] = 0  # edges that should coincide differ by rounding
    return overlap


def resize_pixels(
    pixels: Float[Tensor, "n c h w"], size: tuple[int, int]
) -> Float[Tensor, "n c height width"]:
    """Resize normalised pixels, bicubic with antialiasing, as image processors resize pictures.

    Args:
        pixels: (n, c, h, w), any floating dtype.
        size: (height, width) to reach.

    Returns:
        The resized pixels in their dtype; the same tensor if they have that size already.

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
