"""How a picture reaches a model: its size in pixels, and the tiles that it is cut into."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from captum_mllm.reference.render import draw, draw_masks
from captum_mllm.reference.scenes import SceneBatch

NATIVE = 112  # side of the pictures that every family reads without resizing
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Layout:
    """What a model reads of a picture.

    Args:
        height: Of the whole picture, in pixels as the model reads it; a scene is stretched to it.
        width: Likewise.
        grid: Rows and columns of tiles that the picture is cut into. More than one tile are
            followed by a thumbnail: the whole picture, squeezed to a tile's size.
        share: Share of a training batch that is drawn in this layout.
        thumbnail: Side in pixels to which the thumbnail is shrunk before it is enlarged to a
            tile's size again; None: not at all. Few pixels make the tiles worth reading.
    """

    height: int = NATIVE
    width: int = NATIVE
    grid: tuple[int, int] = (1, 1)
    share: float = 1.0
    thumbnail: int | None = None

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a tile."""
        return self.height // self.grid[0], self.width // self.grid[1]

    @property
    def tiles(self) -> int:
        """Number of tiles, a thumbnail included."""
        count = self.grid[0] * self.grid[1]
        return count + (count > 1)

    def cells(self, side: int) -> int:
        """Number of cells, a thumbnail's included.

        Args:
            side: Of a cell in pixels.
        """
        height, width = self.tile
        return self.tiles * (height // side) * (width // side)


def _cut(pictures: Tensor, layout: Layout) -> Tensor:
    """Cut into tiles: (batch, channels, height, width) to (batch, tiles, channels, ...)."""
    rows, columns = layout.grid
    return rearrange(pictures, "b c (r h) (k w) -> b (r k) c h w", r=rows, k=columns)


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)


def blur_thumbnails(pixels: Tensor, layout: Layout) -> Tensor:
    """Shrink thumbnails as the layout says, and enlarge them again.

    Args:
        pixels: (batch, tiles, 3, height, width), the thumbnails last.
        layout: Size and tiles.
    """
    if not layout.thumbnail:
        return pixels
    small = _resize(pixels[:, -1], (layout.thumbnail, layout.thumbnail))
    return torch.cat([pixels[:, :-1], _resize(small, layout.tile)[:, None]], 1)


def draw_layout(scenes: SceneBatch, layout: Layout, oversample: float = 1) -> Tensor:
    """Draw scenes as a model reads them, before the normalisation.

    Args:
        scenes: The scenes, on the device to draw on.
        layout: Size and tiles.
        oversample: As in `render.render`.

    Returns:
        Pixels in 0..1, (batch, tiles, 3, height, width).
    """
    pixels = draw(scenes, (layout.height, layout.width), oversample)
    tiles = _cut(pixels, layout)
    if layout.tiles == 1:
        return tiles
    pixels = _resize(pixels, layout.tile).clamp(0, 1)
    return blur_thumbnails(torch.cat([tiles, pixels[:, None]], 1), layout)


def draw_training(scenes: SceneBatch, layout: Layout, pick: random.Random) -> Tensor:
    """Draw a training batch: about a third at its size, the rest resized to it from another size.

    Args:
        scenes: The scenes, on the device to draw on.
        layout: Size and tiles.
        pick: Chooses how the pictures reach their size.

    Returns:
        Normalised pixels (batch, tiles, 3, height, width).
    """
    side = max(layout.height, layout.width)
    oversample = pick.choice((1, 1, 2, 2, NATIVE / side, 2 * NATIVE / side))
    return normalize(draw_layout(scenes, layout, oversample))


def normalize(pixels: Tensor) -> Tensor:
    """CLIP's normalisation of (..., 3, height, width) pixels in 0..1."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1)
    return (pixels - mean) / std


def layout_coverage(scenes: SceneBatch, layout: Layout, cell: int) -> Tensor:
    """Share of every cell that every object covers.

    Args:
        scenes: The scenes.
        layout: Size and tiles.
        cell: Side of a cell in pixels.

    Returns:
        float (batch, 4, cells): row by row within a tile, tile after tile, the thumbnail last.
    """
    tiles = _cut(draw_masks(scenes, (layout.height, layout.width)).float(), layout)
    if layout.tiles > 1:
        tiles = torch.cat([tiles, draw_masks(scenes, layout.tile).float()[:, None]], 1)
    pooled = F.avg_pool2d(tiles.flatten(0, 1), cell)
    return rearrange(pooled, "(b n) o h w -> b o (n h w)", n=layout.tiles)
