"""Calibration: the same ranking of cells, with values that a threshold can separate."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Calibration = float | Literal["adaptive"]
"""How far :func:`calibrate` lets a map fall: in standard deviations, or by the map's height."""


def calibrate(
    maps: Float[Tensor, "targets cells"], tau: Calibration = 1.5
) -> Float[Tensor, "targets cells"]:
    """Sharpen each map around its peak: ``max * exp((M - max) / (tau * std))``.

    With ``tau="adaptive"`` the divisor is 0.4 times the peak's height above the map's mean: the
    mean falls to 8 % of the peak, whatever the map's shape. A standard deviation says little
    about how far the peak stands out: where few cells are bright it is small, and a fixed number
    of them cuts the object too small; where a map is broad it is large, and leaves the plateau.

    The function is strictly increasing in M, so the ranking of the cells does not change. The peak
    keeps its height, so maps of different tokens stay comparable (a function word's dark map stays
    dark) and [0, 1] stays [0, 1]. It is positively homogeneous: a map that is c > 0 times another
    remains so.

    The lowest value falls no further than to ``exp(-60)`` of the peak: where it would (a cell of
    thousands stands 90 standard deviations above the rest), the divisor is a 60th of the map's
    range. Beyond that, float32 would end, and with it the ranking of all other cells. Where the
    map's dtype ends sooner (float16; a peak below 1e-12), no value falls below its smallest
    normal number. It is computed in float64; float32 maps get float32 values, in which cells may
    tie that differ in their last digits.

    Logit-lens maps are broad: a plateau surrounds the object, and Otsu's threshold on the raw
    values assigns the plateau to the object. Standard deviations below the peak separate the two.

    Upsample maps *before* this: interpolating the calibrated cells of a coarse grid does change
    the ranking of the pixels.

    Args:
        maps: maps >= 0 over the cells of all images; one spread spans them all.
        tau: how far below the peak a value falls to 1/e of it, in (population) standard deviations
            of the map; > 0, default 1.5. Or "adaptive".

    Returns:
        Calibrated maps, >= 0; a constant map is left unchanged.

    Raises:
        ValueError: ``tau`` is a number that is not above 0.

    Reference:
        Ours; TAM and the paper threshold the values as they are.

    Example:
        >>> import torch
        >>> calibrate(torch.tensor([[1.0, 0.5, 0.0, 0.5], [0.2, 0.2, 0.2, 0.2]]))[:, :2]
        tensor([[1.0000, 0.3895],
                [0.2000, 0.2000]])
    """
    if tau != "adaptive" and not tau > 0:
        raise ValueError(f"tau must be above 0, or 'adaptive', got {tau}.")
    # In float64, since float32 rounds away what distinguishes a large map's many dim cells, and
    # relative to the peak, since the squares of a low level's deviations would be 0.
    exact = maps.double()
    peak = exact.amax(1, keepdim=True)
    unit = exact / torch.where(peak > 0, peak, torch.ones_like(peak))
    top = unit.amax(1, keepdim=True)
    if tau == "adaptive":
        spread = 0.4 * (top - unit.mean(1, keepdim=True))
    else:
        spread = tau * unit.std(1, keepdim=True, correction=0)
    deepest = (peak / torch.finfo(maps.dtype).tiny).log().clamp(1, _DEEPEST)
    spread = torch.maximum(spread, (top - unit.amin(1, keepdim=True)) / deepest)
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    return torch.where(spread > 0, peak * ((unit - top) / safe).exp(), exact).to(maps.dtype)


_DEEPEST = 60.0
"""No value falls below ``exp(-60)``, 1e-26 of the peak: float32 ends at ``exp(-87)``."""
