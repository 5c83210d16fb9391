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

Baseline = Literal["black", "mean", "blur"]


BASELINES: tuple[str, ...] = ("black", "mean", "blur")


BLUR = 0.1  # standard deviation of the blur in the shorter side of the frame


def mask_shape(grid: ImageGrid) -> tuple[int, ...]:
    """(height, width) of an image's frame, (frames, height, width) of a video's."""
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


class ChangeablePictures:
    """The images of one sample, parts of which can be replaced by a baseline.

    Pixels are replaced on each picture's canvas (:meth:`Adapter.canvases`), from which its baseline
    comes too. Where the model sees the picture a second time (overview: thumbnail, global or
    base image), the overview follows: it changes by what the frame changes, resized. So it is not
    the baseline itself where all is replaced: what the processor's resizing of the picture did
    otherwise than resizing the frame stays in it (tests hold how much, for each such family).

    Args:
        adapter: the model's adapter.
        sample: the prompt with its images.
        baseline: "black", "mean" (the picture's mean colour) or "blur".
        black: (channels, 1, 1): a black pixel in the model's units.
    """

    def __init__(self, adapter: Adapter, sample: Sample, baseline: str, black: Tensor) -> None:
        self._adapter, self._sample = adapter, sample
        self._frames = adapter.canvases(sample.kwargs, sample.grids)
        self._fills = [_fill(frame, baseline, black) for frame in self._frames]

    def replaced(self, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inputs that hold pixels, the baseline shown where a mask is set.

        Args:
            masks: per image, bool of :func:`mask_shape`.

        Returns:
            Bit for bit the sample's own where no mask is set.
        """
        grids, made = self._sample.grids, []
        for mask, grid, frame, fill in zip(masks, grids, self._frames, self._fills, strict=True):
            size = (frame.shape[-2], frame.shape[-1])
            shown = on_frame(mask, grid, size).unsqueeze(-3).to(frame.device)  # for all channels
            made.append(torch.where(shown, fill, frame))
        return self._adapter.with_canvases(self._sample.kwargs, grids, made)


def _fill(frame: Float[Tensor, "1 *n c h w"], baseline: str, black: Tensor) -> Tensor:
    """What replaced pixels of a frame show; it broadcasts to the frame."""
    pixels = frame.double()
    if baseline == "black":
        fill = black
    elif baseline == "mean":
        fill = pixels.movedim(-3, 0).flatten(1).mean(1)[:, None, None]
    else:
        fill = blurred(pixels, BLUR * min(frame.shape[-2:]))
    return fill.to(frame)


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


def on_frame(
    mask: Bool[Tensor, "*frames height width"], grid: ImageGrid, size: tuple[int, int]
) -> Bool[Tensor, "*frames h w"]:
    """A mask on an image's grid, in the frame that the adapter gives of it.

    The two are the same but where the frame shows the whole picture and the grid another part of
    it: the frame's pixels beyond the grid go with its outermost ones.

    Args:
        mask: of :func:`mask_shape`.
        grid: the image's.
        size: (h, w) of the frame, pixels.

    Example:
        >>> grid = ImageGrid(1, 1, 2, 2, picture=(4, 2), box=(0.0, 1.0, 2.0, 3.0))
        >>> on_frame(torch.tensor([[True, True], [False, False]]), grid, (4, 2))[:, 0].tolist()
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


NOTHING = ("blur", "black")


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
