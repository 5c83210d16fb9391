"""What the methods on pixels share: the function, what stands for nothing, cells from pixels."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from captum_mllm.bridge import TokenLogProb
from captum_mllm.functional import WHOLE, Box, resample_cells, sum_cells
from captum_mllm.geometry import ImageGrid
from captum_mllm.methods.asked import Asked
from captum_mllm.metrics._perturbation import BLUR, black_pixel, blurred
from captum_mllm.runner import Run

NOTHING = ("blur", "black")


def scored(asked: Asked, run: Run) -> TokenLogProb:
    """The log-probabilities of the run's answer as a function of pixels."""
    return TokenLogProb(asked.model, asked.inputs, run.answer_ids, asked.processor)


def frames_of(f: TokenLogProb) -> tuple[Tensor, ...]:
    """The pictures' frames, a tuple of one too."""
    return f.pixels if isinstance(f.pixels, tuple) else (f.pixels,)


def nothing(
    frames: Sequence[Float[Tensor, "1 *n c h w"]], kind: Any, processor: Any
) -> tuple[Tensor, ...]:
    """Frames that show none of their picture: what attributions compare with.

    "blur", the default of the methods, is near the pictures that the model was trained on, needs
    no knowledge of the normalisation, and leaves no colour without a say; against "black", what is
    black in the picture can't count. Both are those of
    :func:`captum_mllm.metrics.insertion_deletion`.

    Args:
        frames: of the pictures.
        kind: "blur" (Gaussian, standard deviation 0.1 of the frame's shorter side) or "black".
        processor: tells what black is.

    Raises:
        ValueError: another kind; black without a processor.
    """
    if kind not in NOTHING:
        raise ValueError(f"baseline must be one of {', '.join(NOTHING)}, got {kind!r}.")
    if kind == "black":
        black = black_pixel(processor)
        return tuple(black.to(frame).expand_as(frame).clone() for frame in frames)
    return tuple(
        blurred(frame.double(), BLUR * min(frame.shape[-2:])).to(frame) for frame in frames
    )


def shown_by(grid: ImageGrid) -> Box:
    """Where the picture's frame of pixels lies on an image's grid, in fractions of the grid.

    The same but where the frame shows the whole picture and the grid another part of it.

    Args:
        grid: the image's.

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
        attribution: of a frame's pixels.
        grid: the image's.
    """
    summed = sum_cells(attribution.float().sum(-3), shown_by(grid), (grid.rows, grid.cols))
    return summed.unflatten(1, (grid.steps, -1)).sum(2) if grid.steps else summed


def cell_means(
    attribution: Float[Tensor, "n *frames c h w"], grid: ImageGrid
) -> Float[Tensor, "n *steps rows cols"]:
    """The level of each cell: the mean over its pixels, channels (and frames of a step).

    Args:
        attribution: of a frame's pixels.
        grid: the image's.
    """
    level = resample_cells(attribution.float().mean(-3), shown_by(grid), (grid.rows, grid.cols))
    return level.unflatten(1, (grid.steps, -1)).mean(2) if grid.steps else level
