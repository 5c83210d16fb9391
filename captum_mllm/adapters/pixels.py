"""Pixels for several adapters: a picture as the processor would return it, windows, tiles."""

from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.functional import Box, join_tiles, resize_pixels, split_tiles
from captum_mllm.geometry import ImageGrid
from captum_mllm.pictures import to_eight_bits


def picture_pixels(
    picture: Any, settings: Any, size: tuple[int, int]
) -> Float[Tensor, "c height width"]:
    """A picture stretched to a size, rescaled and normalised by the image processor's settings.

    Args:
        picture: PIL picture.
        settings: the image processor.
        size: (height, width) of the result, pixels.

    Returns:
        (3, height, width), float32.
    """
    resized = as_rgb(picture).resize((size[1], size[0]), settings.resample)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).float()
    pixels = pixels.reshape(size[0], size[1], 3).permute(2, 0, 1)
    if settings.do_rescale:
        pixels = pixels * settings.rescale_factor
    if settings.do_normalize:
        mean, std = (
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
            for values in (settings.image_mean, settings.image_std)
        )
        pixels = (pixels - mean) / std
    return pixels


def as_pictures(images: Any) -> list[Any]:
    """One picture or several as a list.

    Args:
        images: a PIL picture or a list of them.

    Raises:
        TypeError: paths or arrays.

    Example:
        >>> from PIL import Image
        >>> len(as_pictures(Image.new("RGB", (2, 2))))
        1
    """
    pictures = list(images) if isinstance(images, list | tuple) else [images]
    for picture in pictures:
        if not hasattr(picture, "convert"):
            raise TypeError(
                f"images= takes PIL pictures, not {type(picture).__name__}: open paths by "
                f"PIL.Image.open(path), make arrays pictures by PIL.Image.fromarray(array)."
            )
    return pictures


def as_rgb(picture: Any) -> Any:
    """The picture in RGB; transparent parts as this version of transformers converts them.

    Args:
        picture: PIL picture; more than 8 bits become 8 by the rule of
            :func:`~captum_mllm.pictures.to_eight_bits`.
    """
    from PIL import Image
    from transformers.image_transforms import convert_to_rgb

    picture = to_eight_bits(picture)
    convert: Any = convert_to_rgb
    if "return_numpy" in signature(convert).parameters:  # 5.24 deprecates the other
        return Image.fromarray(convert(picture, return_numpy=True))
    return convert(picture)


def enlarged(grid: ImageGrid, scale: float) -> ImageGrid:
    """The grid that windows of an enlarged image form; the same grid for scales up to 1.

    Args:
        grid: the image's grid, of a model that takes one size only.
        scale: factor of height and width.

    Returns:
        The grid of the enlarged image.
    """
    if scale <= 1:
        return grid
    rows, cols = round(grid.rows * scale), round(grid.cols * scale)
    height, width = grid.height * rows // grid.rows, grid.width * cols // grid.cols
    return replace(grid, rows=rows, cols=cols, height=height, width=width)


def cut_window(
    pixels: Float[Tensor, "c h w"], box: Box, size: tuple[int, int]
) -> Float[Tensor, "c height width"]:
    """A window of an image, enlarged to a size: the image is resized, then cropped.

    Args:
        pixels: (c, h, w).
        box: (left, upper, right, lower) of the window in fractions of the image.
        size: (height, width) of the window, pixels.

    Returns:
        The window (c, height, width).

    Example:
        >>> import torch
        >>> cut_window(torch.ones(3, 8, 8), (0.5, 0.0, 1.0, 0.5), (8, 8)).shape
        torch.Size([3, 8, 8])
    """
    left, upper, right, lower = box
    height, width = round(size[0] / (lower - upper)), round(size[1] / (right - left))
    large = resize_pixels(pixels[None], (height, width))[0]
    top, start = round(upper * height), round(left * width)
    return large[:, top : top + size[0], start : start + size[1]]


def tiles_to_canvas(
    tiles: Float[Tensor, "tiles c h w"], layout: tuple[int, int]
) -> Float[Tensor, "1 c height width"]:
    """Join the tiles of an image, without its overview.

    Args:
        tiles: the tiles row by row, then the overview if there is one.
        layout: (down, across), the number of tiles.

    Returns:
        The image's canvas (1, c, height, width).
    """
    return join_tiles(tiles[: layout[0] * layout[1]], layout)[None]


def canvas_to_tiles(
    tiles: Float[Tensor, "tiles c h w"],
    layout: tuple[int, int],
    canvas: Float[Tensor, "1 c height width"],
) -> Float[Tensor, "tiles c h w"]:
    """The same tiles with another canvas; the overview changes by the change of the canvas.

    Args:
        tiles: the tiles row by row, then the overview if there is one.
        layout: (down, across), the number of tiles.
        canvas: the new canvas; differentiable.

    Returns:
        The new tiles and overview (tiles, c, h, w).

    Example:
        >>> import torch
        >>> tiles = torch.rand(5, 3, 8, 8)  # 2 x 2 and an overview
        >>> torch.equal(canvas_to_tiles(tiles, (2, 2), tiles_to_canvas(tiles, (2, 2))), tiles)
        True
    """
    n = layout[0] * layout[1]
    change = canvas - tiles_to_canvas(tiles, layout)
    overview = [t[None] + resize_pixels(change, (t.shape[-2], t.shape[-1])) for t in tiles[n:]]
    return torch.cat([split_tiles(canvas[0], layout), *overview])


def resized(picture: Any, size: tuple[int, int]) -> Any:
    """A picture at another size, bicubic.

    Args:
        picture: PIL picture.
        size: (height, width), pixels.

    Example:
        >>> from PIL import Image
        >>> resized(Image.new("RGB", (8, 6)), (3, 4)).size
        (4, 3)
    """
    from PIL import Image

    return as_rgb(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def reframed(picture: Any, box: tuple[float, float, float, float]) -> Any:
    """A picture of the same size that shows a box of it, edge pixels repeated beyond its border.

    Args:
        picture: PIL picture.
        box: (left, upper, right, lower) in its pixels.

    Example:
        >>> from PIL import Image
        >>> reframed(Image.new("RGB", (8, 6)), (-2.0, 0.0, 2.0, 3.0)).size
        (8, 6)
    """
    from PIL import Image

    left, upper, right, lower = box
    margin = max(0.0, -left, -upper, right - picture.width, lower - picture.height)
    pad = int(np.ceil(margin))
    pixels = np.pad(np.array(as_rgb(picture)), ((pad, pad), (pad, pad), (0, 0)), "edge")
    moved = (left + pad, upper + pad, right + pad, lower + pad)
    return Image.fromarray(pixels).resize(picture.size, Image.Resampling.BICUBIC, moved)
