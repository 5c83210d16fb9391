"""Pictures changed where a map says so: ranking of pixels, baselines, changed frames."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.pictures import picture_pixels
from captum_mllm.functional import upsample
from captum_mllm.geometry import ImageGrid
from captum_mllm.inputs import Sample

Baseline = Literal["black", "mean", "blur"]
BASELINES: tuple[str, ...] = ("black", "mean", "blur")
BLUR = 0.1  # standard deviation of the blur in the shorter side of the frame
_LEVELS = 1e9  # values nearer than this share of the largest are ties: rounding of the upsampling


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


def pixel_ranks(
    maps: Sequence[Float[Tensor, "*frames rows cols"]], grids: Sequence[ImageGrid]
) -> tuple[Int64[Tensor, "*frames height width"], ...]:
    """Place of every pixel of all images in the order of their maps, 0 the highest.

    Args:
        maps: one map per image, on any grid; brought to pixels bilinearly.
        grids: the images' frames.

    Returns:
        Per image, ranks in its frame. Pixels of all images share one order; ties keep the order
        of the images, then row by row from the upper left. So a flat map scans from the top.
    """
    pixels = [
        upsample(values.detach().cpu().double(), (grid.height, grid.width))
        for values, grid in zip(maps, grids, strict=True)
    ]
    flat = torch.cat([values.flatten() for values in pixels])
    largest = flat.abs().max()
    levels = (flat / largest * _LEVELS).round() if largest > 0 else flat
    order = levels.sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    sizes = [prod(mask_shape(grid)) for grid in grids]
    pairs = zip(ranks.split(sizes), grids, strict=True)
    return tuple(own.reshape(mask_shape(grid)) for own, grid in pairs)


def step_sizes(pixels: int, steps: int) -> list[int]:
    """How many pixels are changed after each of 0..steps equal steps of area."""
    return [(2 * step * pixels + steps) // (2 * steps) for step in range(steps + 1)]


class ChangeablePictures:
    """The images of one sample, parts of which can be replaced by a baseline.

    Pixels are replaced in each picture's frame (:meth:`Adapter.frames`), whose baseline comes from
    that frame too. Where the model sees the picture a second time (overview: thumbnail, global or
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
        self._frames = adapter.frames(sample.kwargs, sample.grids)
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
        return self._adapter.with_frames(self._sample.kwargs, grids, made)


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


def read_maps(
    attribution: Any, grids: Sequence[ImageGrid], answer: Tensor, chosen: Sequence[int]
) -> list[tuple[Tensor, ...]]:
    """The maps of an attribution: one tuple (a map per image) per chosen token, or one for all.

    Args:
        attribution: see :func:`captum_mllm.metrics.insertion_deletion`.
        grids: the sample's images.
        answer: ids of the answer.
        chosen: positions in it.

    Raises:
        TypeError: neither a result nor tensors.
        ValueError: another number of images or tokens, NaN, or a result of another answer.
    """
    given = getattr(attribution, "grid_attr", attribution)
    given = tuple(given) if isinstance(given, tuple | list) else (given,)
    if any(not hasattr(maps, "shape") for maps in given):
        kinds = ", ".join(type(maps).__name__ for maps in given)
        raise TypeError(
            f"attribution must be a result of attribute, a tensor of maps, or a tuple of one "
            f"tensor per image; got {kinds}."
        )
    if len(given) != len(grids):
        raise ValueError(
            f"attribution must hold one tensor of maps per image ({len(grids)}), got {len(given)}."
        )
    pairs = zip(given, grids, strict=True)
    per_image = [_one_image(torch.as_tensor(maps), grid) for maps, grid in pairs]
    counts = {len(maps) for maps in per_image}
    if len(counts) > 1 or not counts <= {1, len(chosen), len(answer)}:
        raise ValueError(
            f"attribution must hold one map for the sequence, or one for each of {len(chosen)} "
            f"chosen tokens (or of {len(answer)} of the answer); got {sorted(counts)} maps."
        )
    rows = list(chosen) if counts == {len(answer)} else list(range(*counts))
    ids = getattr(attribution, "output_ids", None)
    if ids is not None:
        expected = answer.cpu() if len(ids) == len(answer) else answer.cpu()[list(chosen)]
        if not torch.equal(torch.as_tensor(ids).cpu(), expected):
            raise ValueError(
                f"attribution explains the ids {list(map(int, ids))}, but target and tokens are "
                f"{expected.tolist()}: pass the result's own output_ids as target."
            )
    return [tuple(maps[row] for maps in per_image) for row in rows]


def _one_image(maps: Tensor, grid: ImageGrid) -> Float[Tensor, "maps ..."]:
    axes = 3 if grid.steps else 2
    shape = tuple(maps.shape)
    maps = maps[None] if maps.ndim == axes else maps
    if maps.ndim != axes + 1 or 0 in maps.shape:
        wanted = "frames, rows, cols" if grid.steps else "rows, cols"
        raise ValueError(
            f"attribution must be (tokens, {wanted}) or ({wanted}) for each image, got {shape}."
        )
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("attribution holds NaN or infinite values; they can't be ranked.")
    if grid.steps and maps.shape[1] != grid.frames:
        if maps.shape[1] != grid.steps:
            raise ValueError(
                f"attribution must hold {grid.frames} frames of a video, got {maps.shape[1]}."
            )
        maps = maps.repeat_interleave(grid.frames // grid.steps, 1)
    return maps
