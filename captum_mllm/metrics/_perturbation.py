"""Pictures changed where a map says so: ranking of pixels, baselines, views changed alike."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.picture_views import change_pictures
from captum_mllm.adapters.pictures import picture_pixels
from captum_mllm.functional import WHOLE, Box, upsample
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

    Every view of an image (its tiles put together, its overview) is changed alike: a pixel of a
    view takes the share of the frame's pixels below it that are replaced.

    Args:
        adapter: the model's adapter.
        sample: the prompt with its images.
        baseline: "black", "mean" (the picture's mean colour) or "blur".
        black: (channels, 1, 1): a black pixel in the model's units.
    """

    def __init__(self, adapter: Adapter, sample: Sample, baseline: str, black: Tensor) -> None:
        self._adapter, self._sample = adapter, sample
        self._fills: list[Tensor] = []
        means: dict[int, Tensor] = {}

        def read(image: int, view: Tensor, box: Box) -> Tensor:
            pixels = view.double()
            if image not in means:  # the largest view comes first
                others = [d for d in range(view.ndim) if d != view.ndim - 3]
                means[image] = pixels.mean(others)[:, None, None]
            if baseline == "black":
                fill = black
            elif baseline == "mean":
                fill = means[image]
            else:
                fill = blurred(pixels, _blur_width(sample.grids[image], box, view))
            self._fills.append(fill.to(view))
            return view

        change_pictures(adapter, sample.kwargs, sample.grids, read)

    def replaced(self, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inputs that hold or describe pixels, the baseline shown where a mask is 1.

        Args:
            masks: per image, bool of :func:`mask_shape`.

        Returns:
            Bit for bit the sample's own where no mask is set.
        """
        fills = iter(self._fills)

        def change(image: int, view: Tensor, box: Box) -> Tensor:
            size = (view.shape[-2], view.shape[-1])
            share = on_view(masks[image].double(), box, size).to(view)
            if masks[image].ndim == 3:
                share = share[:, None]  # frames, channels
            return view * (1 - share) + next(fills) * share

        return change_pictures(self._adapter, self._sample.kwargs, self._sample.grids, change)


def _blur_width(grid: ImageGrid, box: Box, view: Tensor) -> tuple[float, float]:
    """The blur's standard deviation in pixels of a view, down and across."""
    width = BLUR * min(grid.height, grid.width)
    left, upper, right, lower = box
    down = view.shape[-2] / (grid.height * (lower - upper))
    across = view.shape[-1] / (grid.width * (right - left))
    return width * down, width * across


def blurred(pixels: Float[Tensor, "*n h w"], sigma: tuple[float, float]) -> Tensor:
    """Gaussian blur; at the edges the weights inside the picture are scaled up to sum to 1.

    Args:
        pixels: pictures.
        sigma: standard deviations down and across, pixels.
    """
    along = []
    for length, width in zip(pixels.shape[-2:], sigma, strict=True):
        at = torch.arange(length, dtype=torch.float64)
        weights = (-0.5 * ((at[:, None] - at[None, :]) / width) ** 2).exp()
        along.append((weights / weights.sum(1, keepdim=True)).to(pixels))
    return along[0] @ pixels @ along[1].T


def on_view(
    mask: Float[Tensor, "*frames height width"], box: Box, size: tuple[int, int]
) -> Float[Tensor, "*frames h w"]:
    """A mask of the frame as a view shows it: mean over the frame's pixels under each of its own.

    Args:
        mask: on the frame.
        box: the part of the frame that the view shows, in fractions; beyond the frame its
            outermost pixels go on.
        size: (h, w) of the view, pixels.

    Returns:
        Shares in [0, 1]; the same tensor where the view is the frame.

    Example:
        >>> on_view(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), WHOLE, (1, 2)).tolist()
        [[0.5, 0.0]]
    """
    if box == WHOLE and tuple(mask.shape[-2:]) == size:
        return mask
    left, upper, right, lower = box
    down = _shares(mask.shape[-2], upper, lower, size[0]).to(mask)
    across = _shares(mask.shape[-1], left, right, size[1]).to(mask)
    return (down @ mask @ across.T).clamp(0, 1)


def _shares(old: int, start: float, end: float, new: int) -> Float[Tensor, "new old"]:
    """Of each of ``new`` pixels from start to end, the share that lies in each of ``old``."""
    edges = torch.linspace(start, end, new + 1, dtype=torch.float64) * old
    edges = torch.where((edges - edges.round()).abs() < 1e-6, edges.round(), edges)
    own = torch.arange(old + 1, dtype=torch.float64)
    own[0], own[-1] = min(0.0, float(edges[0])), max(float(old), float(edges[-1]))
    upper = torch.minimum(edges[1:, None], own[None, 1:])
    lower = torch.maximum(edges[:-1, None], own[None, :-1])
    overlap = (upper - lower).clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True)


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
