"""Maps of many words in one grey picture of 8 bits, as a page holds them once.

A tile is one word's map with its border cells repeated once around it, so that a browser that
interpolates inside the tile does what :func:`captum_mllm.functional.upsample` does and nothing of
the next tile comes in. Tiles stand in columns, so that no side exceeds what browsers draw.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from captum_mllm.functional import WHOLE, resample_cells

MOST_CELLS = 64
"""Cells along a map's longer side, at most; a finer map is averaged."""

_MOST_SIDE = 4096  # pixels; browsers on phones draw no larger pictures


@dataclass(frozen=True)
class Atlas:
    """Maps of words over one picture, in 8 bits.

    Args:
        rows: of each map.
        cols: of each map.
        down: how many tiles stand in a column, from the top; the next column is right of it.
        across: how many columns there are.
        source: the grey picture as a data URL (PNG), 255 for the largest value.
    """

    rows: int
    cols: int
    down: int
    across: int
    source: str


def make_atlas(maps: Float[Tensor, "words rows cols"], top: float) -> Atlas:
    """Quantise maps, and put them into one picture.

    Args:
        maps: one map per word, at least one.
        top: value that is written as 255; values below 0 are written as 0.

    Returns:
        The atlas; each value is off by at most ``top / 510`` where maps are not averaged.

    Example:
        >>> atlas = make_atlas(torch.rand(3, 4, 5), 1.0)
        >>> atlas.rows, atlas.cols, atlas.down, atlas.source[:22]
        (4, 5, 3, 'data:image/png;base64,')
    """
    levels = to_levels(_small(maps), top)
    words, rows, cols = levels.shape
    tiles = np.pad(levels, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = max(1, min(words, _MOST_SIDE // (rows + 2)))
    across = -(-words // down)
    canvas = np.zeros((across, down, rows + 2, cols + 2), np.uint8)
    canvas.reshape(across * down, rows + 2, cols + 2)[:words] = tiles
    sheet = canvas.transpose(1, 2, 0, 3).reshape(down * (rows + 2), across * (cols + 2))
    return Atlas(rows, cols, down, across, grey_png(sheet))


def to_levels(values: Float[Tensor, "..."], top: float) -> UInt8[np.ndarray, "..."]:
    """Values as whole numbers 0 to 255.

    Args:
        values: any; below 0 counts as 0.
        top: the value of 255; 0 where all are 0.
    """
    if top <= 0:
        return np.zeros(tuple(values.shape), np.uint8)
    share = (values.detach().double() / top).clamp(0, 1)
    return (share * 255).round().to(torch.uint8).cpu().numpy()


def grey_png(levels: UInt8[np.ndarray, "height width"]) -> str:
    """A grey picture as a data URL.

    Args:
        levels: its pixels.
    """
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(levels, "L").save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _small(maps: Tensor) -> Tensor:
    longest = max(maps.shape[-2:])
    if longest <= MOST_CELLS:
        return maps
    size = tuple(max(1, round(side * MOST_CELLS / longest)) for side in maps.shape[-2:])
    return resample_cells(maps.float(), WHOLE, size)  # type: ignore[arg-type]
