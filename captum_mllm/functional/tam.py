"""TAM: context weights, estimated causal inference, joint normalisation, rank Gaussian filter.

In the order of the paper; ``s_tj`` is the score of target t at context token j, ``A`` a raw map:

1. :func:`context_weights`: ``w_tj = s_tj / sum_j s_tj``.
2. :func:`fit_alpha`: ``alpha = <A_t, E> / <E, E>`` with ``E = sum_j w_tj A_j``.
3. :func:`eci_subtract`: ``relu(A_t - alpha E)``.
4. :func:`joint_min_max`: each target's cells and earlier text scores to [0, 1] together.
5. :func:`rank_gaussian_filter`: a 3x3 filter that suppresses single hot cells.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def level_of(values: Float[Tensor, "rows n"]) -> Float[Tensor, "rows 1"]:
    """The power of two at each row's largest magnitude; 1 where the row is 0 or empty.

    Relative to it, sums and squares stay in the dtype's range at any level of the values, and no
    digit changes: a division by a power of two is exact.

    Args:
        values: rows of numbers.

    Returns:
        A power of two per row (rows, 1).

    Reference:
        Ours.

    Example:
        >>> import torch
        >>> level_of(torch.tensor([[0.3, -5.0], [0.0, 0.0]])).tolist()
        [[4.0], [1.0]]
    """
    if not values.shape[1]:
        return values.new_ones(len(values), 1)
    peak = values.abs().amax(1, keepdim=True)
    return torch.where(peak > 0, peak / (2 * torch.frexp(peak).mantissa), 1.0).to(values.dtype)


def context_weights(
    scores: Float[Tensor, "targets tokens"], is_context: Bool[Tensor, "targets tokens"]
) -> Float[Tensor, "targets tokens"]:
    """Weight of each context token in a target's interference: ``w_tj = s_tj / sum_j s_tj``.

    Args:
        scores: ``s_tj = relu(logit_{pos(j)}(y_t))``, >= 0.
        is_context: whether token j is context of target t: an earlier text token whose id differs
            from the target's.

    Returns:
        Weights (targets, tokens) that sum to 1 over the context, or are all 0 where no context
        token has a positive score.

    Reference:
        TAM, estimated causal inference.

    Example:
        >>> import torch
        >>> s, earlier = torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> context_weights(s, earlier).tolist()
        [[0.75, 0.25, 0.0]]
    """
    kept = torch.where(is_context, scores, torch.zeros_like(scores))
    kept = kept / level_of(kept)
    total = kept.sum(1, keepdim=True)
    return torch.where(total > 0, kept / total, torch.zeros_like(kept))


def fit_alpha(
    maps: Float[Tensor, "targets cells"],
    interference: Float[Tensor, "targets cells"],
    alpha_max: float | None = None,
) -> Float[Tensor, " targets"]:
    """Strength of the interference in each map: ``alpha = <A_t, E_t> / <E_t, E_t>``.

    The least-squares fit of ``alpha E_t`` to ``A_t``, in closed form.

    Args:
        maps: raw maps A_t, >= 0.
        interference: interference maps E_t, >= 0.
        alpha_max: upper bound of alpha, or None (default, as TAM).

    Returns:
        alpha (targets,), >= 0; 0 where the interference map is 0.

    Reference:
        TAM, estimated causal inference (ECI); the bound is ours.

    Example:
        >>> import torch
        >>> fit_alpha(torch.tensor([[3.0, 1.0, 4.0]]), torch.tensor([[1.0, 1.0, 0.0]])).tolist()
        [2.0]
    """
    level, unit = level_of(maps), level_of(interference)
    alpha = _fit(maps / level, interference / unit) * (level / unit)[:, 0]
    return alpha if alpha_max is None else alpha.clamp(max=alpha_max)


def _fit(
    maps: Float[Tensor, "targets cells"], interference: Float[Tensor, "targets cells"]
) -> Float[Tensor, " targets"]:
    """Least-squares alpha of maps whose largest values are about 1; 0 where the second is 0."""
    wide = torch.promote_types(maps.dtype, torch.float32)  # the sum over the cells leaves float16
    energy = interference.square().sum(1, dtype=wide)
    overlap = (maps * interference).sum(1, dtype=wide)
    return torch.where(energy > 0, overlap / energy, 0.0).to(maps.dtype)


def subtract_fitted(
    maps: Float[Tensor, "targets cells"],
    interference: Float[Tensor, "targets cells"],
    subtracted: Float[Tensor, "targets cells"],
    strength: float = 1.0,
    alpha_max: float | None = None,
) -> Float[Tensor, "targets cells"]:
    """``relu(A_t - strength * alpha * D_t)``, alpha fitted to E_t (:func:`fit_alpha`).

    Maps of any level that their dtype holds: neither squares nor alpha itself, which is the ratio
    of two levels, leave its range on the way.

    Args:
        maps: raw maps A_t, >= 0.
        interference: the maps E_t that alpha is fitted to, >= 0.
        subtracted: the part D_t of them that is subtracted, 0 <= D_t <= E_t.
        strength: factor >= 0, default 1.
        alpha_max: upper bound of alpha, or None (default).

    Returns:
        Cleaned maps (targets, cells), >= 0.

    Reference:
        TAM, estimated causal inference (ECI); ours in the rest.

    Example:
        >>> import torch
        >>> a, e = torch.tensor([[2e20, 3e20]]), torch.tensor([[1e-20, 0.0]])
        >>> [round(v / 1e20, 4) for v in subtract_fitted(a, e, e)[0].tolist()]
        [0.0, 3.0]
    """
    level, unit = level_of(maps), level_of(interference)
    alpha = _fit(maps / level, interference / unit)[:, None]
    if alpha_max is not None:
        largest = torch.finfo(maps.dtype).max
        alpha = torch.minimum(alpha, (alpha_max * (unit / level)).clamp(max=largest))
    cleaned = maps / level - strength * alpha * (subtracted / unit)
    return cleaned.clamp(min=0) * level


def eci_subtract(
    maps: Float[Tensor, "targets cells"],
    context_maps: Float[Tensor, "tokens cells"],
    weights: Float[Tensor, "targets tokens"],
    alpha_max: float | None = None,
) -> Float[Tensor, "targets cells"]:
    """Subtract the context's interference map: ``relu(A_t - alpha E)``.

    ``E = sum_j w_tj A_j``, and alpha is its least-squares fit to the map (:func:`fit_alpha`).

    Args:
        maps: raw maps A_t, >= 0.
        context_maps: raw maps A_j of the text tokens.
        weights: from :func:`context_weights`.
        alpha_max: upper bound of alpha, or None (default, as TAM).

    Returns:
        Cleaned maps (targets, cells), >= 0.

    Reference:
        TAM, estimated causal inference (ECI); the bound is ours.

    Example:
        >>> import torch
        >>> a, e = torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 0.0]])
        >>> eci_subtract(a, e, torch.ones(1, 1)).tolist()
        [[0.0, 3.0]]
    """
    interference = weights @ context_maps
    return subtract_fitted(maps, interference, interference, alpha_max=alpha_max)


def joint_min_max(
    maps: Float[Tensor, "targets cells"],
    scores: Float[Tensor, "targets tokens"],
    is_earlier: Bool[Tensor, "targets tokens"],
) -> tuple[Float[Tensor, "targets cells"], Float[Tensor, "targets tokens"]]:
    """Min-max normalise each target over its image cells *and* its earlier text scores together.

    The joint range keeps maps of different tokens comparable: a function word that the text
    explains gets a dark map. Where all values are equal, the result is 0.

    Args:
        maps: cleaned maps over the cells of all images.
        scores: raw scores s_tj.
        is_earlier: whether token j is an earlier text token of target t, those with the target's
            id included.

    Returns:
        Maps (targets, cells) and scores (targets, tokens), both in [0, 1]; scores of tokens that
        are not earlier are 0.

    Reference:
        TAM, joint normalisation of the multimodal activations.

    Example:
        >>> import torch
        >>> earlier = torch.tensor([[True, False]])
        >>> m, s = joint_min_max(torch.tensor([[0.0, 1.0]]), torch.tensor([[4.0, 9.0]]), earlier)
        >>> m.tolist(), s.tolist()
        ([[0.0, 0.25]], [[1.0, 0.0]])
    """
    # A score that does not count is replaced by a cell's value, which counts anyway.
    joint = torch.cat([maps, torch.where(is_earlier, scores, maps[:, :1])], dim=1)
    low, high = joint.aminmax(dim=1, keepdim=True)
    span = high - low
    safe = torch.where(span > 0, span, torch.ones_like(span))
    unit_maps = torch.where(span > 0, (maps - low) / safe, torch.zeros_like(maps))
    unit_scores = torch.where(is_earlier & (span > 0), (scores - low) / safe, 0.0)
    return unit_maps, unit_scores.to(scores.dtype)


def rank_gaussian_filter(
    maps: Float[Tensor, "*batch rows cols"],
) -> Float[Tensor, "*batch rows cols"]:
    """3x3 filter that weights the values of a window by their rank: robust to single hot cells.

    The nine values of a window are sorted in ascending order; rank r = 0..8 has the weight
    ``exp(-(r - 4)^2 / (2 sigma^2))``, normalised, where sigma is the window's population standard
    deviation divided by its mean. Borders are reflect-padded (replicated along an axis of one
    cell). The result is 0 where the window's mean is not positive, and the constant where the
    window is constant.

    Args:
        maps: maps >= 0, any number of leading axes.

    Returns:
        Filtered maps of the same shape.

    Reference:
        TAM, rank Gaussian filter (its released code yields NaN on a constant window).

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
    # At the window's own level: squares of 1e-30 or 1e30, or two of 3e38, leave float32's range.
    level = level_of(low_to_high[8].reshape(-1, 1)).reshape(low_to_high[8].shape)
    low_to_high = [plane / level for plane in low_to_high]
    peak = low_to_high[8]
    relative = torch.stack(low_to_high) / torch.where(peak > 0, peak, torch.ones_like(peak))
    mean = relative.mean(0)
    variance = (relative - mean).square().mean(0)
    tiny = torch.finfo(maps.dtype).tiny
    # A tiny sigma leaves all weight on the median, which is the value of a constant window.
    sigma2 = (variance / mean.clamp(min=tiny).square()).clamp(min=tiny)
    nearest = (-0.5 / sigma2).exp()  # weight of ranks 3 and 5; that of 4 -+ d is its d^2-th power
    total, norm = low_to_high[4], torch.ones_like(nearest)
    for d in range(1, 5):
        weight = nearest ** (d * d)
        total = total + weight * (low_to_high[4 - d] + low_to_high[4 + d])
        norm = norm + 2 * weight
    filtered = torch.where(mean > 0, total / norm, torch.zeros_like(total))
    return (filtered * level).reshape(maps.shape)


# A sorting network: compare and swap the planes of each pair, in this order.
_NETWORK = (
    *((0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7)),  # sort threes
    *((0, 3), (3, 6), (0, 3), (1, 4), (4, 7), (1, 4), (2, 5), (5, 8), (2, 5)),  # merge by column
    *((1, 3), (5, 7), (2, 6), (4, 6), (2, 4), (2, 3), (5, 6)),
)


def _sort_nine(planes: list[Tensor]) -> list[Tensor]:
    """Sort nine tensors elementwise, ascending; ten times as fast as torch.sort here."""
    planes = list(planes)
    for i, j in _NETWORK:
        low, high = planes[i], planes[j]
        planes[i], planes[j] = torch.minimum(low, high), torch.maximum(low, high)
    return planes
