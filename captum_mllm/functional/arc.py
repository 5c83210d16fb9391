"""ARC: rankings of predictions, the overlap of two rankings, and the subtraction that uses it.

In the order of the paper:

1. :func:`top_k_rankings`: the ids of the k largest logits at a position.
2. :func:`rank_biased_overlap`: the relevance ``r_tj`` of a context token j for a target t.
3. :func:`arc_subtract`: ``relu(A_t - strength * alpha * sum_j w_tj (1 - r_tj) A_j)``.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from captum_mllm.functional.tam import subtract_fitted


def top_k_rankings(
    logits: Float[Tensor, "positions vocabulary"], k: int
) -> Int64[Tensor, "positions {k}"]:
    """Ids of the ``k`` largest logits of each row, largest first; ties go to the lower id.

    Logits are compared in float32. The order of equal values depends neither on the device nor on
    the sorting algorithm.

    Args:
        logits: one row per position.
        k: depth of the ranking, 1 <= k <= vocabulary.

    Returns:
        Token ids (positions, k).

    Raises:
        ValueError: ``k`` is not in 1..vocabulary.

    Reference:
        ARC's rankings: the paper, k = 50; breaking ties by the lower id is our reading.

    Example:
        >>> import torch
        >>> top_k_rankings(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), k=3).tolist()
        [[1, 2, 3]]
    """
    vocabulary = logits.shape[1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"top_k must lie in 1..{vocabulary} (the vocabulary), got {k}.")
    rows = max(1, _BLOCK // vocabulary)  # the keys of all rows would be eight times the logits
    return torch.cat([_ranked(block, k) for block in logits.split(rows)])


_BLOCK = 2**20
"""Numbers that a step works on at once: 8 MB of int64 or float64, whatever the input's size."""


def _ranked(
    logits: Float[Tensor, "positions vocabulary"], k: int
) -> Int64[Tensor, "positions {k}"]:
    # An order-preserving int of the float in the high half and the reversed id in the low half
    # make every key distinct, so that topk has one right answer even where logits are equal.
    vocabulary = logits.shape[1]
    bits = (logits.float() + 0.0).contiguous().view(torch.int32).to(torch.int64)  # + 0.0: no -0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(vocabulary, device=logits.device)
    keys = ordered * 2**32 + (vocabulary - 1 - ids)
    return vocabulary - 1 - (keys.topk(k, dim=1).values & 0xFFFFFFFF)


def rank_biased_overlap(
    rankings_a: Int64[Tensor, "a k"], rankings_b: Int64[Tensor, "b k"], p: float = 0.9
) -> Float[Tensor, "a b"]:
    """Rank-biased overlap of every ranking in ``rankings_a`` with every one in ``rankings_b``.

    ``(1 - p) / (1 - p^k) * sum_{d=1..k} p^(d-1) * |A_1..d & B_1..d| / d``: truncated at depth k
    and divided by ``1 - p^k``, so that identical rankings give 1. It is evaluated in closed form,
    ``sum over common ids of g(max(rank_a, rank_b))`` with
    ``g(m) = (1 - p) / (1 - p^k) * sum_{d=m..k} p^(d-1) / d``.

    Args:
        rankings_a: ids, best first, distinct within a row.
        rankings_b: the same, of the same depth.
        p: persistence in (0, 1), default 0.9; with small values only the first ranks count.

    Returns:
        Similarities (a, b) in [0, 1], float64.

    Raises:
        ValueError: ``p`` is outside (0, 1), the depths differ, or a row holds an id twice.

    Reference:
        "A similarity measure for indefinite rankings", ACM TOIS 28(4), 2010; its use for
        activation ranking correlation is the paper's; p and the division by ``1 - p^k`` are our
        reading.

    Example:
        >>> import torch
        >>> ab, ba = torch.tensor([[1, 2]]), torch.tensor([[2, 1]])
        >>> round(rank_biased_overlap(ab, ba, p=0.5).item(), 4)  # depth 1: 0, depth 2: 2/2
        0.3333
    """
    if not 0.0 < p < 1.0:
        raise ValueError(f"rbo_p must lie strictly between 0 and 1, got {p}.")
    if rankings_a.shape[1] != rankings_b.shape[1]:
        raise ValueError(
            f"rankings_a and rankings_b must have the same depth, got {rankings_a.shape[1]} and "
            f"{rankings_b.shape[1]}; cut both to the smaller."
        )
    for name, rankings in (("rankings_a", rankings_a), ("rankings_b", rankings_b)):
        in_order = rankings.sort(dim=1).values
        if bool((in_order[:, 1:] == in_order[:, :-1]).any()):
            raise ValueError(f"{name} must hold distinct ids in each row, got a repeated id.")
    (n_a, k), n_b, device = rankings_a.shape, rankings_b.shape[0], rankings_a.device

    depth = torch.arange(1, k + 1, dtype=torch.float64, device=device)
    persistence = p ** (depth - 1)  # its sum is (1 - p^k) / (1 - p), without the cancellation
    per_depth = persistence / persistence.sum() / depth
    gain = per_depth.flip(0).cumsum(0).flip(0)  # g(1..k)

    # g decreases with the rank, so g(max(rank_a, rank_b)) = min(g(rank_a), g(rank_b)); it is 0
    # where an id is not in the list.
    ids, compact = torch.cat([rankings_a, rankings_b]).unique(return_inverse=True)
    compact_a, compact_b = compact[:n_a], compact[n_a:]
    overlap = gain.new_empty(n_b, n_a)
    rows = max(1, _BLOCK // max(len(ids), n_a * k, 1))
    for some, block in zip(overlap.split(rows), compact_b.split(rows), strict=True):
        gain_in_b = gain.new_zeros(len(block), len(ids)).scatter_(
            1, block, gain.expand(len(block), k)
        )
        some[:] = torch.minimum(gain_in_b[:, compact_a], gain).sum(-1)  # over (b, a, k)
    # Rounding alone could exceed 1, or miss it where the rankings are the same.
    same = torch.cat([compact_a, compact_b]).unique(dim=0, return_inverse=True)[1]
    overlap[same[n_a:, None] == same[None, :n_a]] = 1
    return overlap.T.clamp(max=1)


def arc_subtract(
    maps: Float[Tensor, "targets cells"],
    context_maps: Float[Tensor, "tokens cells"],
    weights: Float[Tensor, "targets tokens"],
    relevance: Float[Tensor, "targets tokens"],
    strength: float = 1.0,
    alpha_max: float | None = None,
) -> Float[Tensor, "targets cells"]:
    """Subtract interference from *irrelevant* context: ``relu(A_t - strength * alpha * E)``.

    ``E0 = sum_j w_tj A_j``, alpha is its least-squares fit to the map
    (:func:`~captum_mllm.functional.tam.fit_alpha`), and ``E = sum_j w_tj (1 - r_tj) A_j``. With
    r = 0 everywhere this is ECI exactly; with r = 1 everywhere the map is left unchanged. alpha is
    fitted to E0 and not to E, because a fit to E would undo r.

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
    irrelevant = (weights * (1 - relevance.to(weights.dtype))) @ context_maps
    return subtract_fitted(maps, weights @ context_maps, irrelevant, strength, alpha_max)
