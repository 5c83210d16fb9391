"""Images that show nothing of their picture, whole or in part: black, mean colour, blur."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.pixels import picture_pixels
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.inputs import Sample
from captum_mllm.validation import check_choice

Baseline = Literal["black", "mean", "blur"]
BASELINES: tuple[str, ...] = ("black", "mean", "blur")
BLUR = 0.1  # standard deviation of the blur, in the shorter side of the canvas


def mask_shape(grid: ImageGrid) -> tuple[int, ...]:
    """(height, width) of an image's canvas, (frames, height, width) of a video's."""
    return (grid.frames, grid.height, grid.width) if grid.steps else (grid.height, grid.width)


def black_pixel(processor: Any) -> Float[Tensor, "c 1 1"]:
    """A black pixel as the image processor normalises it.

    Args:
        processor: a transformers processor with ``image_processor``, or that itself.

    Raises:
        ValueError: no image processor: black is then unknown.
    """
    from PIL import Image

    settings = getattr(processor, "image_processor", processor)
    if not hasattr(settings, "do_normalize"):
        raise ValueError(
            f"processor must be the model's processor, whose settings tell what a black pixel is "
            f"after normalisation; got {type(processor).__name__}."
        )
    return picture_pixels(Image.new("RGB", (1, 1)), settings, (1, 1))


def baseline_images(
    canvases: Sequence[Float[Tensor, "1 *n c h w"]], baseline: Any, processor: Any
) -> tuple[Tensor, ...]:
    """Canvases that show none of their image: what attributions are compared with.

    "blur" is near the images that the model was trained on, needs no knowledge of the
    normalisation, and every colour can count; against "black", what is black in the image can't.

    Args:
        canvases: of the images.
        baseline: "black", "mean" (the image's mean colour) or "blur" (Gaussian, standard deviation
            0.1 of the canvas's shorter side).
        processor: tells what black is; needed for "black" only.

    Returns:
        One canvas per image, of the same shape.

    Raises:
        ValueError: another baseline; black without a processor.
    """
    check_choice("baseline", baseline, BASELINES)
    black = black_pixel(processor) if baseline == "black" else None
    return tuple(_fill(c, baseline, black).expand_as(c).clone() for c in canvases)


class PerturbableImages:
    """The images of one sample, parts of which can be replaced by a baseline.

    Pixels are replaced on each image's canvas (:meth:`Adapter.canvases`), from which its baseline
    comes too. Where the model sees the image a second time (overview: thumbnail, global or base
    image), the overview follows: it changes by what the canvas changes, resized. So it is not the
    baseline itself where everything is replaced: the difference between the processor's resizing
    and a resized canvas remains in it (tests bound it for each such family).

    Args:
        adapter: the model's adapter.
        sample: the prompt with its images.
        baseline: one of `BASELINES`.
        black: (channels, 1, 1): a black pixel in the model's units.
    """

    def __init__(self, adapter: Adapter, sample: Sample, baseline: str, black: Tensor) -> None:
        self._adapter, self._sample = adapter, sample
        self._canvases = adapter.canvases(sample.kwargs, sample.grids)
        self._fills = [_fill(canvas, baseline, black) for canvas in self._canvases]

    def replaced(self, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inputs that hold pixels, with the baseline where a mask is set.

        Args:
            masks: per image, bool of :func:`mask_shape`.

        Returns:
            Replacements of the pixel inputs; bitwise the sample's own where no mask is set.
        """
        grids, canvases = self._sample.grids, []
        images = zip(masks, grids, self._canvases, self._fills, strict=True)
        for mask, grid, canvas, fill in images:
            size = (canvas.shape[-2], canvas.shape[-1])
            hidden = mask_on_canvas(mask, grid, size).unsqueeze(-3)  # for all channels
            canvases.append(torch.where(hidden.to(canvas.device), fill, canvas))
        return self._adapter.with_canvases(self._sample.kwargs, grids, canvases)


def _fill(canvas: Float[Tensor, "1 *n c h w"], baseline: str, black: Tensor | None) -> Tensor:
    """The baseline of a canvas; it broadcasts to the canvas."""
    pixels = canvas.double()
    if baseline == "mean":
        return pixels.movedim(-3, 0).flatten(1).mean(1)[:, None, None].to(canvas)
    if baseline == "blur" or black is None:
        return blurred(pixels, BLUR * min(canvas.shape[-2:])).to(canvas)
    return black.to(canvas)


def blurred(pixels: Float[Tensor, "*n h w"], sigma: float) -> Tensor:
    """Gaussian blur; at the edges the weights inside the picture are scaled up to sum to 1.

    Args:
        pixels: pictures.
        sigma: standard deviation, pixels.
    """
    along = []
    for length in pixels.shape[-2:]:
        at = torch.arange(length, dtype=torch.float64)
        weights = (-0.5 * ((at[:, None] - at[None, :]) / sigma) ** 2).exp()
        along.append((weights / weights.sum(1, keepdim=True)).to(pixels))
    return along[0] @ pixels @ along[1].T


def mask_on_canvas(
    mask: Bool[Tensor, "*frames height width"], grid: ImageGrid, size: tuple[int, int]
) -> Bool[Tensor, "*frames h w"]:
    """A mask over an image's grid, on the canvas that the adapter gives of it.

    The two differ only where the canvas shows the whole picture and the grid another part of it:
    the canvas's pixels beyond the grid go with the outermost ones.

    Args:
        mask: of :func:`mask_shape`.
        grid: the image's.
        size: (h, w) of the canvas, pixels.

    Example:
        >>> grid = ImageGrid(1, 1, 2, 2, picture=(4, 2), box=(0.0, 1.0, 2.0, 3.0))
        >>> upper = torch.tensor([[True, True], [False, False]])
        >>> mask_on_canvas(upper, grid, (4, 2))[:, 0].tolist()
        [True, True, False, False]
    """
    if grid.picture is None or grid.box is None:
        return mask
    left, upper, right, lower = grid.box
    down = _places(size[0], grid.picture[0], (upper, lower), grid.height)
    across = _places(size[1], grid.picture[1], (left, right), grid.width)
    return mask[..., down, :][..., across]


def _places(n: int, length: int, part: tuple[float, float], n_part: int) -> Int64[Tensor, " n"]:
    """Which of the ``n_part`` pixels of a part each of ``n`` pixels along a picture falls on."""
    centres = (torch.arange(n, dtype=torch.float64) + 0.5) * length / n
    places = (centres - part[0]) / (part[1] - part[0]) * n_part
    return places.floor().clamp(0, n_part - 1).long()
