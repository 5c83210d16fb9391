"""Calibration: the same ranking of cells, with values that a threshold can part."""

import torch
from jaxtyping import Float
from torch import Tensor


def calibrate(
    maps: Float[Tensor, "targets cells"], tau: float = 1.5
) -> Float[Tensor, "targets cells"]:
    """Sharpen each map around its peak: ``max * exp((M - max) / (tau * std))``.

    Strictly increasing in M, so no ranking of cells changes; the peak keeps its height, so that
    maps of different tokens stay comparable (a function word's dark map stays dark) and [0, 1]
    stays [0, 1]. A map that is c times another's is so afterwards (c > 0).

    Logit-lens maps are broad: a plateau surrounds the object, and Otsu's threshold on the raw
    values puts the plateau to the object. Standard deviations below the peak part the two.

    Bring maps to a finer grid *before* this: interpolating the calibrated cells of a coarse grid
    does change the ranking of the pixels.

    Args:
        maps: maps >= 0 over the cells of all images; one deviation spans them all.
        tau: > 0, in standard deviations (population) of the map: how far below the peak a value
            falls to 1/e of it; default 1.5.

    Returns:
        Calibrated maps, >= 0; a flat map as it is.

    Raises:
        ValueError: ``tau`` is not above 0.

    Reference:
        Ours; TAM and the paper threshold the values as they are.

    Example:
        >>> import torch
        >>> calibrate(torch.tensor([[1.0, 0.5, 0.0, 0.5], [0.2, 0.2, 0.2, 0.2]]))[:, :2]
        tensor([[1.0000, 0.3895],
                [0.2000, 0.2000]])
    """
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}.")
    peak = maps.amax(1, keepdim=True)
    spread = tau * maps.std(1, keepdim=True, correction=0)
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    return torch.where(spread > 0, peak * ((maps - peak) / safe).exp(), maps)
