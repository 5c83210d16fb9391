"""What context puts on a token's map, and how it is taken off: ECI, ARC, joint normalisation."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def context_weights(
    scores: Float[Tensor, "targets tokens"], is_context: Bool[Tensor, "targets tokens"]
) -> Float[Tensor, "targets tokens"]:
    """Weight of each context token in a target's interference: ``w_tj = s_tj / sum_j s_tj``.

    Args:
        scores: ``s_tj = relu(logit_{pos(j)}(y_t))``, >= 0.
        is_context: earlier text tokens whose id differs from the target's.

    Returns:
        Weights that sum to 1 over the context, or are all 0 where no context token scores.

    Reference:
        TAM, estimated causal inference.

    Example:
        >>> import torch
        >>> s, earlier = torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> context_weights(s, earlier).tolist()
        [[0.75, 0.25, 0.0]]
    """
    kept = torch.where(is_context, scores, torch.zeros_like(scores))
    total = kept.sum(1, keepdim=True)
    return torch.where(total > 0, kept / total, torch.zeros_like(kept))


def eci_subtract(
    maps: Float[Tensor, "targets cells"],
    context_maps: Float[Tensor, "tokens cells"],
    weights: Float[Tensor, "targets tokens"],
    alpha_max: float | None = None,
) -> Float[Tensor, "targets cells"]:
    """Subtract the context's interference map: ``relu(A_t - alpha E)``.

    ``E = sum_j w_tj A_j`` and ``alpha = <A_t, E> / <E, E>``, the least-squares fit in closed form
    (0 where E is 0).

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
    return arc_subtract(maps, context_maps, weights, torch.zeros_like(weights), alpha_max=alpha_max)


def arc_subtract(
    maps: Float[Tensor, "targets cells"],
    context_maps: Float[Tensor, "tokens cells"],
    weights: Float[Tensor, "targets tokens"],
    relevance: Float[Tensor, "targets tokens"],
    strength: float = 1.0,
    alpha_max: float | None = None,
) -> Float[Tensor, "targets cells"]:
    """Subtract what *irrelevant* context puts on the map: ``relu(A_t - strength * alpha * E)``.

    ``E0 = sum_j w_tj A_j``, ``alpha = <A_t, E0> / <E0, E0>``, ``E = sum_j w_tj (1 - r_tj) A_j``.
    r = 0 everywhere is ECI exactly, r = 1 everywhere leaves the map alone; alpha is fitted to E0
    and not to E, because a fit to E would undo r.

    Args:
        maps: raw maps A_t, >= 0.
        context_maps: raw maps A_j of the text tokens.
        weights: from :func:`context_weights`.
        relevance: r_tj in [0, 1], from :func:`rank_biased_overlap`.
        strength: lambda >= 0, default 1; 0 subtracts nothing.
        alpha_max: upper bound of alpha, or None (default).

    Returns:
        Cleaned maps (targets, cells), >= 0.

    Reference:
        Activation ranking correlation: the idea is the paper's, this formula is our reading.

    Example:
        >>> import torch
        >>> a, e, w = torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)
        >>> arc_subtract(a, e, w, relevance=torch.tensor([[0.5]])).tolist()
        [[1.0, 3.0]]
    """
    interference = weights @ context_maps
    energy = interference.square().sum(1)
    overlap = (maps * interference).sum(1)
    alpha = torch.where(energy > 0, overlap / energy, torch.zeros_like(energy))
    if alpha_max is not None:
        alpha = alpha.clamp(max=alpha_max)
    irrelevant = (weights * (1 - relevance.to(weights.dtype))) @ context_maps
    return (maps - strength * alpha[:, None] * irrelevant).clamp(min=0)


def joint_min_max(
    maps: Float[Tensor, "targets cells"],
    scores: Float[Tensor, "targets tokens"],
    is_earlier: Bool[Tensor, "targets tokens"],
) -> tuple[Float[Tensor, "targets cells"], Float[Tensor, "targets tokens"]]:
    """Min-max each target over its image cells *and* its earlier text scores together.

    Joint, so that maps of different tokens stay comparable: a function word that text explains
    gets a dark map. Where all values are equal the result is 0.

    Args:
        maps: cleaned maps over the cells of all images.
        scores: raw scores s_tj.
        is_earlier: all earlier text tokens, those with the target's id included.

    Returns:
        Maps and scores, both in [0, 1]; scores that are not earlier are 0.

    Reference:
        TAM, joint normalisation of the multimodal activations.

    Example:
        >>> import torch
        >>> earlier = torch.tensor([[True, False]])
        >>> m, s = joint_min_max(torch.tensor([[0.0, 1.0]]), torch.tensor([[4.0, 9.0]]), earlier)
        >>> m.tolist(), s.tolist()
        ([[0.0, 0.25]], [[1.0, 0.0]])
    """
    # A score that does not count is stood in for by a cell, which counts anyway.
    joint = torch.cat([maps, torch.where(is_earlier, scores, maps[:, :1])], dim=1)
    low, high = joint.aminmax(dim=1, keepdim=True)
    span = high - low
    safe = torch.where(span > 0, span, torch.ones_like(span))
    unit_maps = torch.where(span > 0, (maps - low) / safe, torch.zeros_like(maps))
    unit_scores = torch.where(is_earlier & (span > 0), (scores - low) / safe, 0.0)
    return unit_maps, unit_scores.to(scores.dtype)
