"""Attributions of pixels brought to the cells of the model's grid."""

from jaxtyping import Float
from torch import Tensor

from captum_mllm.bridge import TokenLogProb
from captum_mllm.functional import WHOLE, Box, resample_cells, sum_cells
from captum_mllm.geometry import ImageGrid
from captum_mllm.methods.request import Request
from captum_mllm.model.runner import Run


def scored(request: Request, run: Run) -> TokenLogProb:
    """The log-probabilities of the run's answer as a function of pixels."""
    return TokenLogProb(request.model, request.inputs, run.answer_ids, request.processor)


def canvases_of(f: TokenLogProb) -> tuple[Tensor, ...]:
    """The canvases of all images, as a tuple even where there is only one."""
    return f.pixels if isinstance(f.pixels, tuple) else (f.pixels,)


def shown_by(grid: ImageGrid) -> Box:
    """Where the canvas lies on an image's grid, in fractions of the grid.

    They coincide, except where the canvas shows the whole picture and the grid a part of it.

    Args:
        grid: the image's grid.

    Example:
        >>> shown_by(ImageGrid(1, 1, 2, 2, picture=(4, 3), box=(1.0, 1.0, 3.0, 3.0)))
        (-0.5, -0.5, 1.0, 1.5)
    """
    if grid.picture is None or grid.box is None:
        return WHOLE
    return box_on_grid(grid.box, grid.picture)


def box_on_grid(box: Box, size: tuple[int, int]) -> Box:
    """Where a whole picture lies on a grid that shows a box of it, in fractions of the grid.

    Args:
        box: (left, upper, right, lower), pixels of the picture.
        size: (height, width) of the picture, pixels.
    """
    left, upper, right, lower = box
    wide, high = right - left, lower - upper
    return (-left / wide, -upper / high, (size[1] - left) / wide, (size[0] - upper) / high)


def cell_sums(
    attribution: Float[Tensor, "n *frames c h w"], grid: ImageGrid
) -> Float[Tensor, "n *steps rows cols"]:
    """The attribution of each cell: the sum over its pixels, channels (and frames of a step).

    Args:
        attribution: of a canvas's pixels.
        grid: the image's grid.
    """
    summed = sum_cells(attribution.float().sum(-3), shown_by(grid), (grid.rows, grid.cols))
    return summed.unflatten(1, (grid.steps, -1)).sum(2) if grid.steps else summed


def cell_means(
    attribution: Float[Tensor, "n *frames c h w"], grid: ImageGrid
) -> Float[Tensor, "n *steps rows cols"]:
    """The level of each cell: the mean over its pixels, channels (and frames of a step).

    Args:
        attribution: of a canvas's pixels.
        grid: the image's grid.
    """
    level = resample_cells(attribution.float().mean(-3), shown_by(grid), (grid.rows, grid.cols))
    return level.unflatten(1, (grid.steps, -1)).mean(2) if grid.steps else level
