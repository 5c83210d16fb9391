"""Segments of a picture: masks for methods that perturb one segment at a time."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def grid_mask(size: tuple[int, int], rows: int, cols: int) -> Int64[Tensor, "height width"]:
    """Cut a picture into rows x cols rectangles of sizes as equal as whole pixels allow.

    Args:
        size: (height, width) of the picture, pixels.
        rows: rectangles along the height, 1..height.
        cols: rectangles along the width, 1..width.

    Returns:
        (height, width): index of each pixel's rectangle, row by row from 0.

    Raises:
        ValueError: ``rows`` or ``cols`` is below 1 or larger than the number of pixels.

    Reference:
        Our choice.

    Example:
        >>> grid_mask((2, 4), rows=1, cols=2).tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    height, width = size
    for name, count, pixels in (("rows", rows, height), ("cols", cols, width)):
        if not 1 <= count <= pixels:
            raise ValueError(f"{name} must lie in 1..{pixels} (the picture's pixels), got {count}.")
    down = torch.arange(height) * rows // height
    across = torch.arange(width) * cols // width
    return down[:, None] * cols + across[None, :]


def rank_mask(
    values: Float[Tensor, "height width"], segments: int
) -> Int64[Tensor, "height width"]:
    """Group pixels by rank into bands of equal area, the highest values first.

    Args:
        values: a map over the pixels of the picture, e.g. ``result.to_image(0, picture)[t]``.
        segments: number of bands, 1..pixels.

    Returns:
        (height, width): 0 for the band of the highest values to segments - 1 for the band of the
        lowest; equal values are ranked in reading order.

    Raises:
        ValueError: ``segments`` is below 1 or larger than the number of pixels.

    Reference:
        Our choice; insertion and deletion curves step through bands of equal area.

    Example:
        >>> import torch
        >>> rank_mask(torch.tensor([[0.1, 0.9], [0.5, 0.2]]), 2).tolist()
        [[1, 0], [0, 1]]
    """
    n = values.numel()
    if not 1 <= segments <= n:
        raise ValueError(f"segments must lie in 1..{n} (the map's pixels), got {segments}.")
    order = values.flatten().argsort(descending=True, stable=True)
    bands = torch.empty_like(order)
    bands[order] = torch.arange(n, device=order.device) * segments // n
    return bands.reshape(values.shape)
