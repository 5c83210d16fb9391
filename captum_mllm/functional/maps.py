"""Maps on a grid: the logit lens, the rank filter, aggregation over scales, resizing."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Aggregation = Literal["mean", "median", "geometric_mean"]
"""How maps of several scales become one; see :func:`aggregate`."""

AGGREGATIONS: tuple[str, ...] = ("mean", "median", "geometric_mean")
"""All values of :data:`Aggregation`."""


def lens_logits(
    hidden: Float[Tensor, "positions dim"],
    weight: Float[Tensor, "classes dim"],
    bias: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "classes positions"]:
    """Logit of each class at each position, in float32 (float64 stays float64).

    ``logit_i(v) = W_v . h_i + b_v``. Only the rows of the LM head that belong to the classes are
    used, so the cost is positions x classes, never positions x vocabulary.

    Args:
        hidden: hidden states after the final norm.
        weight: the LM head's rows of the classes.
        bias: the LM head's bias of the classes, or None.

    Returns:
        Logits (classes, positions), signed.

    Reference:
        Logit lens; the base of TAM and of the paper.

    Example:
        >>> import torch
        >>> lens_logits(torch.eye(2), torch.tensor([[2.0, -1.0]])).tolist()
        [[2.0, -1.0]]
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = weight.to(dtype) @ hidden.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)[:, None]


def rank_gaussian_filter(
    maps: Float[Tensor, "*batch rows cols"],
) -> Float[Tensor, "*batch rows cols"]:
    """3x3 filter that weights a window's values by their rank: robust to single hot cells.

    The nine values of a window are sorted ascending; rank r = 0..8 has the weight
    ``exp(-(r - 4)^2 / (2 sigma^2))``, normalised, with sigma the window's population standard
    deviation over its mean. Reflect padding (edge padding along an axis of one cell). 0 where the
    window's mean is not positive, the constant where the window is flat.

    Args:
        maps: maps >= 0, any number of leading axes.

    Returns:
        Filtered maps of the same shape.

    Reference:
        TAM, rank Gaussian filter (its released code yields NaN on a flat window).

    Example:
        >>> import torch
        >>> spike = torch.zeros(1, 5, 5)
        >>> spike[0, 2, 2] = 1.0
        >>> bool(rank_gaussian_filter(spike).max() < 0.2)
        True
    """
    rows, cols = maps.shape[-2:]
    flat = maps.reshape(-1, 1, rows, cols)
    flat = F.pad(flat, (0, 0, 1, 1), mode="reflect" if rows > 1 else "replicate")
    flat = F.pad(flat, (1, 1, 0, 0), mode="reflect" if cols > 1 else "replicate")
    low_to_high = _sort_nine(
        [flat[:, 0, y : y + rows, x : x + cols] for y in range(3) for x in range(3)]
    )
    # Relative to the window's peak: squares of 1e-30 or 1e30 leave the range of float32.
    peak = low_to_high[8]
    relative = torch.stack(low_to_high) / torch.where(peak > 0, peak, torch.ones_like(peak))
    mean = relative.mean(0)
    variance = (relative - mean).square().mean(0)
    tiny = torch.finfo(maps.dtype).tiny
    # A tiny sigma leaves all weight on the median, which is the constant of a flat window.
    sigma2 = (variance / mean.clamp(min=tiny).square()).clamp(min=tiny)
    nearest = (-0.5 / sigma2).exp()  # weight of ranks 3 and 5; that of 4 -+ d is its d^2-th power
    total, norm = low_to_high[4], torch.ones_like(nearest)
    for d in range(1, 5):
        weight = nearest ** (d * d)
        total = total + weight * (low_to_high[4 - d] + low_to_high[4 + d])
        norm = norm + 2 * weight
    return torch.where(mean > 0, total / norm, torch.zeros_like(total)).reshape(maps.shape)


_NETWORK = (
    *((0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7)),  # sort threes
    *((0, 3), (3, 6), (0, 3), (1, 4), (4, 7), (1, 4), (2, 5), (5, 8), (2, 5)),  # merge by column
    *((1, 3), (5, 7), (2, 6), (4, 6), (2, 4), (2, 3), (5, 6)),
)


def _sort_nine(planes: list[Tensor]) -> list[Tensor]:
    """Sort nine tensors elementwise, ascending: a sorting network, ten times torch.sort here."""
    planes = list(planes)
    for i, j in _NETWORK:
        low, high = planes[i], planes[j]
        planes[i], planes[j] = torch.minimum(low, high), torch.maximum(low, high)
    return planes


def aggregate(
    stack: Float[Tensor, "scales ..."],
    how: Aggregation = "mean",
    weights: Float[Tensor, "scales ..."] | None = None,
) -> Float[Tensor, "..."]:
    """Aggregate maps of several scales into one.

    Args:
        stack: the maps, already on one grid.
        how: "mean" (default, the paper's), "median" (of an even number: the mean of the middle
            two) or "geometric_mean" (of values >= 0).
        weights: weights >= 0 for "mean" and "geometric_mean": one per scale, or one per scale and
            map, (scales, maps) for a stack (scales, maps, ...); None for equal.

    Returns:
        One map of the shape of each.

    Raises:
        ValueError: ``how`` is unknown; weights given with "median", of another number than the
            scales, negative or all 0; negative values with "geometric_mean".

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
    if how == "median":
        ordered, last = stack.sort(dim=0).values, len(stack) - 1
        return (ordered[last // 2] + ordered[last - last // 2]) / 2
    if how == "geometric_mean" and bool((stack < 0).any()):
        raise ValueError("aggregation 'geometric_mean' needs values >= 0; use 'mean' or 'median'.")
    if weights is None:
        weights = stack.new_ones(len(stack))
    share = (weights / weights.sum(0)).to(stack.dtype)
    share = share.reshape(*weights.shape, *[1] * (stack.ndim - weights.ndim))
    if how == "mean":
        return (share * stack).sum(0)
    return torch.xlogy(share, stack).sum(0).exp()  # a weight of 0 silences log(0)


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


def upsample(
    maps: Float[Tensor, "*batch rows cols"], size: tuple[int, int]
) -> Float[Tensor, "*batch height width"]:
    """Bring maps to another size, bilinear, pixel centres aligned (``align_corners=False``).

    Args:
        maps: maps on their grid.
        size: (height, width), in cells or pixels.

    Returns:
        The maps at that size; the same tensor if they have it already.

    Reference:
        Bilinear interpolation.

    Example:
        >>> import torch
        >>> upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4)).tolist()
        [[[0.0, 0.25, 0.75, 1.0]]]
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    # Two small matrix products: half the time of F.interpolate from a token grid to pixels.
    along_h = _bilinear_weights(maps.shape[-2], size[0]).to(maps)
    along_w = _bilinear_weights(maps.shape[-1], size[1]).to(maps)
    return along_h @ (maps @ along_w.T)


def resize_attributions(
    attributions: Float[Tensor, "n c h w"],
    size: tuple[int, int],
    preserve: Literal["mass", "density"] = "mass",
) -> Float[Tensor, "n c height width"]:
    """Bring attributions to another size and keep their sum (mass) or their level (density).

    "density" is the usual bilinear resize (pixel centres aligned). "mass" is that times the area
    ratio, made exact: separable weights per axis, cell overlap where it shrinks and bilinear where
    it grows, each source cell handing out just its own value (columns sum to 1). So the total is
    kept at any ratio; at ratios 2 and 1/2 both ways agree to the last digit.

    Args:
        attributions: (n, c, h, w), signed.
        size: (height, width) to reach.
        preserve: "mass" (default) for attributions that sum to a difference of outputs,
            "density" for maps whose level matters (Grad-CAM).

    Returns:
        Attributions (n, c, height, width); the same tensor if they have that size already.

    Raises:
        ValueError: ``preserve`` is unknown.

    Reference:
        Our reading: so that completeness survives the aggregation over scales.

    Example:
        >>> import torch
        >>> a = torch.rand(1, 1, 7, 7)
        >>> torch.allclose(resize_attributions(a, (5, 3)).sum(), a.sum())
        True
    """
    if preserve not in ("mass", "density"):
        raise ValueError(f"preserve must be one of mass, density, got {preserve!r}.")
    if tuple(attributions.shape[-2:]) == tuple(size):
        return attributions
    if preserve == "density":
        return F.interpolate(attributions, size=size, mode="bilinear", align_corners=False)
    along_h = _mass_weights(attributions.shape[-2], size[0]).to(attributions)
    along_w = _mass_weights(attributions.shape[-1], size[1]).to(attributions)
    return along_h @ attributions @ rearrange(along_w, "new old -> old new")


def _mass_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """Weights that take an axis of ``old`` cells to ``new``; each old cell's sum to 1."""
    if new < old:
        edges_new = torch.linspace(0, old, new + 1, dtype=torch.float64)
        edges_old = torch.arange(old + 1, dtype=torch.float64)
        upper = torch.minimum(edges_new[1:, None], edges_old[None, 1:])
        lower = torch.maximum(edges_new[:-1, None], edges_old[None, :-1])
        weights = (upper - lower).clamp(min=0)
    else:
        weights = _bilinear_weights(old, new)
    return weights / weights.sum(0, keepdim=True)


def _bilinear_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """Weights of linear interpolation along one axis: each unit vector, interpolated."""
    eye = torch.eye(old, dtype=torch.float64)[None]
    return F.interpolate(eye, size=new, mode="linear", align_corners=False)[0].T
