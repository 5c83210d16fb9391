"""MSEA: maps of several scales, weighted and aggregated."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Aggregation = Literal["mean", "median"]
"""How maps of several scales become one; see :func:`aggregate`."""


AGGREGATIONS: tuple[str, ...] = ("mean", "median")
"""All values of :data:`Aggregation`."""


def aggregate(
    stack: Float[Tensor, "scales ..."],
    how: Aggregation = "mean",
    weights: Float[Tensor, "scales ..."] | None = None,
) -> Float[Tensor, "..."]:
    """Aggregate maps of several scales into one.

    Args:
        stack: the maps, already on one grid.
        how: "mean" (default, the paper's) or "median" (of an even number: the mean of the middle
            two).
        weights: weights >= 0 for "mean": one per scale, or one per scale and map, (scales, maps)
            for a stack (scales, maps, ...); None for equal.

    Returns:
        One map of the shape of each.

    Raises:
        ValueError: ``how`` is unknown; weights given with "median", of another number than the
            scales, negative or all 0.

    Reference:
        Multi-scale explanation aggregation: the mean is the paper's, the rest ours.

    Example:
        >>> import torch
        >>> aggregate(torch.tensor([[1.0, 0.0], [3.0, 4.0]])).tolist()
        [2.0, 2.0]
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {how!r}.")
    if not len(stack):
        raise ValueError("stack is empty: give the maps of at least one scale.")
    if weights is not None:
        _check_scale_weights(weights, how, tuple(stack.shape))
    if len(stack) == 1:
        return stack[0]  # bit for bit: one scale is the base itself
    wide = torch.promote_types(stack.dtype, torch.float32)  # shares in float16 do not sum to 1
    if how == "median":
        ordered, last = stack.sort(dim=0).values, len(stack) - 1
        if len(stack) % 2:
            return ordered[last // 2]
        lower, upper = (ordered[at].to(wide) for at in (last // 2, last - last // 2))
        return (lower / 2 + upper / 2).to(stack.dtype)  # the sum could overflow
    weights = stack.new_ones(len(stack)) if weights is None else weights
    weights = weights.to(torch.promote_types(weights.dtype, wide))
    share = (weights / weights.sum(0)).to(wide)
    share = share.reshape(*weights.shape, *[1] * (stack.ndim - weights.ndim))
    return (share * stack).sum(0).to(stack.dtype)


def _check_scale_weights(weights: Tensor, how: str, shape: tuple[int, ...]) -> None:
    if how == "median":
        raise ValueError("aggregation 'median' takes no weights; use 'mean'.")
    given = tuple(weights.shape)
    if given not in (shape[:1], shape[:2]):
        raise ValueError(
            f"weights must hold one value per scale ({shape[0]}), or per scale and map "
            f"{shape[:2]}, got {given}."
        )
    if bool((weights < 0).any()) or not bool((weights.sum(0) > 0).all()):
        raise ValueError(f"weights must be >= 0 and not all 0, got {weights.tolist()}.")


def rank_correlation(
    a: Float[Tensor, "classes cells"], b: Float[Tensor, "classes cells"]
) -> Float[Tensor, " classes"]:
    """Spearman's rank correlation of two maps, class by class; tied values share their mean rank.

    Values that differ by rounding tie: interpolation gives a plateau back with its last bits
    changed, and their order means nothing. Compared is in steps of 64 roundings (64 times the
    dtype's epsilon) of each map's largest magnitude.

    Args:
        a: maps.
        b: maps of the same cells.

    Returns:
        Correlations (classes,) in [-1, 1], float64; 0 where a map is constant.

    Reference:
        Spearman's rho; its use on scales (:func:`adaptive_weights`) is ours.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
        >>> rank_correlation(a, -a).round(decimals=6).tolist()
        [-1.0, 0.0]
    """
    left, right = (_centred_ranks(maps) for maps in (a, b))
    scale = left.norm(dim=1) * right.norm(dim=1)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((left * right).sum(1) / safe).clamp(-1, 1)


def _centred_ranks(maps: Float[Tensor, "classes cells"]) -> Float[Tensor, "classes cells"]:
    """Ranks of the cells minus their mean; equal values share the mean of their ranks."""
    peak = maps.abs().amax(1, keepdim=True)
    unit = maps.double() / torch.where(peak > 0, peak, torch.ones_like(peak)).double()
    steps = (unit / (64 * torch.finfo(maps.dtype).eps)).round()
    ordered = steps.sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, steps, right=False)
    up_to = torch.searchsorted(ordered, steps, right=True)
    return (below + up_to).double() / 2 - maps.shape[1] / 2


def adaptive_weights(
    agreement: Float[Tensor, "scales classes"],
    consistency: Float[Tensor, " scales"] | None = None,
) -> Float[Tensor, "scales classes"]:
    """Weight of each scale's map: ``w_s = c_s * max(0.01, rho_s)^2``.

    A scale whose map ranks the cells differently from the base scale's map, or at which the model
    would give a different answer, explains something else and counts little.

    Args:
        agreement: rho, rank correlation of each scale's map with the base scale's (1 for the base
            itself), per class.
        consistency: c in [0, 1], how well the model still predicts the answer at each scale, or
            None (default) for 1.

    Returns:
        Weights > 0 (0 where c is 0), not normalised.

    Reference:
        Ours.

    Example:
        >>> import torch
        >>> adaptive_weights(torch.tensor([[1.0], [0.5], [-0.3]]))[:, 0]
        tensor([1.0000e+00, 2.5000e-01, 1.0000e-04])
    """
    weights = agreement.clamp(min=0.01).square()
    return weights if consistency is None else weights * consistency.to(weights)[:, None]
