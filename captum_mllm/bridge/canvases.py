"""Canvases of other sizes, and attributions brought from canvas to picture and back."""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.functional import resize_attributions, resize_pixels
from captum_mllm.geometry import (
    ImageGeometry,
    ImageGrid,
    Preprocessing,
    maps_to_picture,
    picture_geometry,
)
from captum_mllm.model.inputs import Sample, rescaled_inputs
from captum_mllm.validation import picture_size

Size = tuple[int, int]


def canvas_sizes(adapter: Adapter, sample: Sample) -> tuple[Size, ...]:
    """(height, width) of each image's canvas."""
    return tuple(_size(canvas) for canvas in adapter.canvases(sample.kwargs, sample.grids))


def split_inputs(
    inputs: tuple[Any, ...], expected: Sequence[Tensor], tokens: int
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Split the tensors that captum passes into canvases and embeddings.

    Args:
        inputs: the tensors; those of three axes are embeddings.
        expected: the sample's canvases.
        tokens: number of tokens of prompt and answer.

    Raises:
        TypeError: an input is not a tensor.
        ValueError: shapes that fit neither canvases nor embeddings.
    """
    if any(not isinstance(value, Tensor) for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise TypeError(f"inputs must be tensors (f.pixels, f.embeddings), got {kinds}.")
    canvases = tuple(value for value in inputs if value.ndim > 3)
    rest = [value for value in inputs if value.ndim <= 3]
    if canvases and [c.shape[1:-2] for c in canvases] != [c.shape[1:-2] for c in expected]:
        raise ValueError(
            f"inputs must hold one canvas per image, shapes "
            f"{[('N', *c.shape[1:]) for c in expected]} as .pixels gives them (or resized), got "
            f"{[tuple(c.shape) for c in canvases]}."
        )
    if len(rest) > 1 or any(v.ndim != 3 or v.shape[1] != tokens for v in rest):
        raise ValueError(
            f"inputs must be canvases of four axes, or embeddings (N, {tokens} tokens, width) as "
            f".embeddings gives them, got {[tuple(value.shape) for value in rest]}."
        )
    lengths = {len(value) for value in inputs}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"inputs must be of one batch length >= 1, got {sorted(lengths)}.")
    return canvases, rest[0] if rest else None


def sample_at_size(
    adapter: Adapter, sample: Sample, canvases: tuple[Tensor, ...], base: Sequence[Size]
) -> tuple[Sample, tuple[Tensor, ...]]:
    """The sample whose images are as large as the canvases, and these at exactly its size.

    Args:
        adapter: the model's adapter.
        sample: prompt and answer at the base scale.
        canvases: one per image, (n, ..., height, width); or none.
        base: sizes of the sample's canvases.

    Returns:
        The sample and the canvases unchanged, if they are of the base sizes; otherwise the sample
        with the nearest grids that the model accepts, and the canvases resized to those.

    Raises:
        ValueError: canvases that are not the sample's, rescaled; a model of one size.
    """
    sizes = [_size(canvas) for canvas in canvases]
    if not canvases or sizes == list(base):
        return sample, canvases
    scale = sqrt(sum(h * w for h, w in sizes) / sum(h * w for h, w in base))
    triples = zip(sizes, base, sample.grids, strict=True)
    if any(
        abs(h - old_h * scale) > grid.height / grid.rows
        or abs(w - old_w * scale) > grid.width / grid.cols
        for (h, w), (old_h, old_w), grid in triples
    ):  # to within a cell, to which models round
        raise ValueError(
            f"inputs hold canvases of {sizes} pixels, which are not the images of {list(base)} "
            f"pixels by one factor: resize all sides of all canvases alike."
        )
    if adapter.fixed_size:
        raise ValueError(
            f"inputs hold canvases of {sizes} pixels, but this model takes images of {list(base)} "
            f"only: attribute at that size. For several scales of such a model use MSEA(model), "
            f"which runs the model on windows of the enlarged image."
        )
    grids = tuple(adapter.scaled_grid(grid, scale) for grid in sample.grids)
    pixels = adapter.rescale_pixels(sample.kwargs, grids)
    scaled = rescaled_inputs(sample.kwargs, sample, grids, pixels, adapter)
    pairs = zip(canvases, canvas_sizes(adapter, scaled), strict=True)
    return scaled, tuple(_resized(canvas, size) for canvas, size in pairs)


def to_picture(
    attribution: Float[Tensor, "n c h w"],
    grid: ImageGrid,
    size: Any,
    rule: Preprocessing | None,
    geometry: ImageGeometry | None,
) -> Float[Tensor, "n height width"]:
    """An attribution of a canvas or of a grid's cells, summed over channels, in picture pixels.

    Args:
        attribution: (n, channels, h, w).
        grid: the image's.
        size: (height, width) of the picture, or the picture.
        rule: how the processor crops and resizes a picture, or None.
        geometry: the box that the canvas shows, in place of ``rule``.

    Raises:
        TypeError: ``attribution`` is not a tensor.
        ValueError: another shape; the place of the canvas in the picture is not known.
    """
    if not isinstance(attribution, Tensor):
        raise TypeError(
            f"attribution must be the tensor of one image, got {type(attribution).__name__}: of "
            f"several images take one after the other, to_image(attribution[i], size, i)."
        )
    if attribution.ndim != 4:
        raise ValueError(
            f"attribution must be (n, channels, height, width), got {tuple(attribution.shape)}."
        )
    size = picture_size(size)
    if geometry is None:
        if grid.picture is not None and _size(attribution) != (grid.rows, grid.cols):
            # Such a canvas shows the whole picture, its cells may not.
            high, wide = grid.picture
            grid = replace(grid, box=ImageGeometry.stretched(high, wide).box)
        geometry = picture_geometry(grid, size, rule)
    return maps_to_picture(attribution.detach().sum(1), geometry, size)


def to_canvas(
    maps: Float[Tensor, "targets rows cols"], grid: ImageGrid, canvas: Float[Tensor, "1 c h w"]
) -> Float[Tensor, "targets c h w"]:
    """Maps on a grid as attributions of a canvas's pixels; the sum of each map is preserved.

    Args:
        maps: one map per token, on any grid over what the image's grid shows.
        grid: the image's.
        canvas: the image's.

    Raises:
        ValueError: maps of another shape, or of a video.
    """
    if maps.ndim != 3 or canvas.ndim != 4:
        raise ValueError(
            f"maps must be (targets, rows, cols) of an image, got {tuple(maps.shape)}."
        )
    size, channels = _size(canvas), canvas.shape[1]
    if grid.picture is None or grid.box is None:
        wide = resize_attributions(maps[:, None], size)
    else:  # the canvas shows the whole picture, of which the maps show a part
        by_h, by_w = size[0] / grid.picture[0], size[1] / grid.picture[1]
        left, upper, right, lower = grid.box
        box = ImageGeometry((left * by_w, upper * by_h, right * by_w, lower * by_h))
        wide = maps_to_picture(maps, box, size)[:, None]
        total = wide.sum((-2, -1), keepdim=True)
        factor = maps.sum((-2, -1))[:, None, None, None] / torch.where(total == 0, 1, total)
        wide = wide * factor
    return (wide / channels).expand(-1, channels, -1, -1).contiguous()


def _size(canvas: Tensor) -> Size:
    return canvas.shape[-2], canvas.shape[-1]


def _resized(canvases: Tensor, size: Size) -> Tensor:
    """Canvases (n, ..., height, width) resized as image processors do; differentiable."""
    if _size(canvases) == size:
        return canvases
    flat = canvases.flatten(0, -4)
    return resize_pixels(flat, size).unflatten(0, canvases.shape[:-3])
