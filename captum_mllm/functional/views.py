"""Several views of one image (tiles, overview) brought into its one frame."""

import torch
from jaxtyping import Float
from torch import Tensor

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
