"""Log-odds on a scale from the blank image to the whole one."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def relative_log_odds(
    odds: Float[Tensor, "targets ..."],
    full: Float[Tensor, " targets"],
    blank: Float[Tensor, " targets"],
) -> Float64[Tensor, "targets ..."]:
    """``(o - o_blank) / (o_full - o_blank)``, cut to [0, 1].

    Where one patch of an object lets p jump to .99, p itself tells nothing of the rest; log-odds
    go on growing. The scale makes tokens of different certainty comparable.

    Args:
        odds: log-odds given changed images, see :func:`captum_mllm.functional.log_odds`.
        full: those given the whole images.
        blank: those given the baseline alone.

    Returns:
        Values in [0, 1], float64: 0 is no better than blank, 1 as good as the whole. All of a
        target are NaN where ``full <= blank``: its image does not support it, so that no map of
        it can be right or wrong.

    Reference:
        Ours; log-odds as what attributions should predict are ContextCite's (arXiv 2409.00729).

    Example:
        >>> odds, full, blank = torch.tensor([[2.0, 9.0]]), torch.tensor([4.0]), torch.tensor([0.0])
        >>> relative_log_odds(odds, full, blank).tolist()
        [[0.5, 1.0]]
        >>> relative_log_odds(odds, blank, full).tolist()
        [[nan, nan]]
    """
    shape = (-1, *[1] * (odds.ndim - 1))
    low, high = blank.double().reshape(shape), full.double().reshape(shape)
    span = torch.where(high > low, high - low, torch.nan)
    return ((odds.double() - low) / span).clamp(0, 1)
