"""Controls made from a mask: what a measure of maps must be able to tell apart."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from captum_mllm.functional import grid_mask
from captum_mllm.methods.controls import centre_map
from captum_mllm.model.baselines import blurred
from captum_mllm.validation import ArgumentError, check_number


def control_maps(
    mask: Bool[Tensor, "height width"],
    grid: tuple[int, int],
    *,
    cells: float = 1.0,
    seed: int = 0,
) -> dict[str, Float[Tensor, "height width"]]:
    """Maps of known quality: an object's mask, near misses of it, and maps that know nothing.

    A measure of faithfulness is worth as much as it separates these. Report the centre prior and
    the random map beside every method: photographs show their objects near the centre.

    Args:
        mask: the object on the model's canvas, bool, pixels.
        grid: (rows, cols) of the model's cells on that canvas.
        cells: how far the near misses miss, default 1: cells that the mask is eroded, dilated and
            shifted by, and half the standard deviation of the blur.
        seed: of the random map, default 0.

    Returns:
        "mask"; "eroded" and "dilated", by a rectangle (zeros where the object is too thin);
        "shifted", sideways, away from the nearer edge; "blurred"; "centre", a Gaussian; "random",
        uniform noise per cell. All (height, width) in [0, 1], float32.

    Raises:
        TypeError: ``mask`` is not a bool tensor of two axes.
        ValueError: a grid finer than the pixels, or ``cells`` not above 0.

    Reference:
        Ours.

    Example:
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[2:6, 1:5] = True
        >>> found = control_maps(mask, (8, 8))
        >>> {name: int(values.sum()) for name, values in found.items()}["eroded"]
        4
        >>> found["shifted"][2].tolist()
        [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        raise TypeError(
            f"mask must be a bool tensor (height, width) on the canvas, got "
            f"{getattr(mask, 'dtype', type(mask).__name__)} {tuple(getattr(mask, 'shape', ()))}."
        )
    check_number("cells", cells, "above 0", lambda c: 0 < c < float("inf"))
    height, width = mask.shape
    rows, cols = grid
    if not (1 <= rows <= height and 1 <= cols <= width):
        raise ArgumentError("grid", f"must be (rows, cols) within {tuple(mask.shape)}, got {grid}.")
    flat = mask.float().cpu()
    step = (round(cells * height / rows), round(cells * width / cols))
    sigma = cells * (height / rows + width / cols)  # two cells of mean size
    draw = torch.Generator().manual_seed(seed)
    noise = torch.rand(rows * cols, generator=draw)
    return {
        "mask": flat,
        "eroded": 1 - _dilated(1 - flat, step),
        "dilated": _dilated(flat, step),
        "shifted": _shifted(flat, step[1]),
        "blurred": blurred(flat, sigma),
        "centre": centre_map(height, width, 0.25),
        "random": noise[grid_mask((height, width), rows, cols)],
    }


def _dilated(mask: Tensor, step: tuple[int, int]) -> Tensor:
    """The largest value within a rectangle around each pixel; nothing comes in at the edges."""
    size = (2 * step[0] + 1, 2 * step[1] + 1)
    padded = F.pad(mask[None, None], (step[1], step[1], step[0], step[0]))
    return F.max_pool2d(padded, size, stride=1)[0, 0]


def _shifted(mask: Tensor, step: int) -> Tensor:
    """Moved to the right, or to the left where the object is nearer to the right edge."""
    columns = mask.amax(0).nonzero().flatten()
    left, right = (
        (int(columns[0]), mask.shape[1] - 1 - int(columns[-1])) if len(columns) else (0, 0)
    )
    return F.pad(mask, (step, -step) if right >= left else (-step, step))
