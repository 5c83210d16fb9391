"""Our results as captum's, which its own plots draw."""

from typing import Any

import torch
from captum.attr import ImageMaskInput
from captum.attr import LLMAttributionResult as CaptumResult
from jaxtyping import Int64
from torch import Tensor

from captum_mllm.geometry import ImageGeometry
from captum_mllm.result import MLLMAttributionResult


def to_captum(
    result: MLLMAttributionResult,
    picture: Any = None,
    image: int = 0,
    *,
    geometry: ImageGeometry | None = None,
    processor: Any = None,
) -> CaptumResult:
    """A result as captum's ``LLMAttributionResult``: of its words, or of one of its images.

    Without a picture the features are the text tokens, as in ``token_attr``; with one, the cells
    of the image's grid, as an ``ImageMaskInput`` whose segments are the cells in pixels of the
    picture, and captum's ``plot_image_heatmap`` draws them (with many cells call it with
    ``border_width=0, show_legends=False``).

    Args:
        result: a result of ours.
        picture: the original PIL picture of the image, or None (default) for the words.
        image: which image, default the first.
        geometry: as for ``result.to_image``, where no processor tells the geometry.
        processor: as for ``result.to_image``.

    Returns:
        captum's result; ``output_probs`` and the values are ours, ``seq_attr`` their sum.

    Raises:
        TypeError: ``picture`` is no PIL picture.
        ValueError: a video; no text tokens; the geometry is not known.
        IndexError: no such image.

    Example:
        >>> from captum_mllm import LogitLens
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image> what is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> result = LogitLens(model, processor).attribute(inputs, target="there is a dog")
        >>> result.to_captum(picture).token_attr.shape  # 14 x 14 cells
        torch.Size([4, 196])
    """
    names = {"input_tokens": list(result.input_tokens), "output_tokens": list(result.output_tokens)}
    inp = None
    values = result.token_attr
    if picture is not None:
        inp, values = _cells(result, picture, image, geometry, processor)
        names["input_tokens"] = list(inp.values)
    return CaptumResult(
        **names,
        seq_attr=values.sum(0),
        token_attr=values,
        output_probs=result.output_probs,
        inp=inp,
    )


def _cells(
    result: MLLMAttributionResult,
    picture: Any,
    image: int,
    geometry: ImageGeometry | None,
    processor: Any,
) -> tuple[ImageMaskInput, Tensor]:
    """The picture with a segment per cell, and each target's value of each segment."""
    if not hasattr(picture, "convert"):
        raise TypeError(f"picture must be a PIL picture, got {type(picture).__name__}.")
    size = (picture.height, picture.width)
    where = result.geometry(image, size, geometry=geometry, processor=processor)
    grid, maps = result.grids[image], result.grid_attr[image]
    if grid.steps:
        raise ValueError(f"image {image} is a video, which captum's ImageMaskInput can't hold.")
    mask = cell_mask(where, size, (maps.shape[-2], maps.shape[-1]))
    values = torch.cat([maps.flatten(1), maps.new_zeros(len(maps), 1)], 1)
    # Cells smaller than a pixel may have none: captum knows only those that are in the mask.
    return ImageMaskInput(picture.convert("RGB"), mask), values[:, mask.unique()]


def cell_mask(
    geometry: ImageGeometry, size: tuple[int, int], shape: tuple[int, int]
) -> Int64[Tensor, "height width"]:
    """The cell of a grid that each pixel of a picture lies in.

    Args:
        geometry: the part of the picture that the grid covers.
        size: (height, width) of the picture, pixels.
        shape: rows and columns of the grid.

    Returns:
        (height, width): the cell's number, row by row from 0; rows * cols where there is none.

    Example:
        >>> cell_mask(ImageGeometry((0.0, 0.0, 2.0, 1.0)), (1, 3), (1, 2)).tolist()
        [[0, 1, 2]]
    """
    left, upper, right, lower = geometry.box
    (height, width), (rows, cols) = size, shape
    y = (torch.arange(height) + 0.5 - upper) / (lower - upper) * rows
    x = (torch.arange(width) + 0.5 - left) / (right - left) * cols
    inside = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < cols))[None, :]
    cells = y.floor().long()[:, None] * cols + x.floor().long()[None, :]
    return torch.where(inside, cells, rows * cols)
