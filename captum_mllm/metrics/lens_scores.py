"""What a picture's own states say about a word: pure functions on states and maps."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from captum_mllm.checks import check_number
from captum_mllm.functional import lens_logits

CHUNK = 16384  # vocabulary entries at a time


def log_normalizer(
    hidden: Float[Tensor, "cells dim"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, " cells"]:
    """``log sum_v exp(W_v . h_i + b_v)`` of each cell, never cells x vocabulary at once.

    Args:
        hidden: hidden states after the final norm.
        weight: the LM head's matrix.
        bias: its bias, or None.
        chunk: vocabulary entries at a time, default 16384.

    Returns:
        One value per cell, float32 (float64 stays float64): subtracted from a logit it makes a
        log-probability.

    Raises:
        ValueError: ``chunk`` < 1.

    Reference:
        The denominator of the softmax.

    Example:
        >>> z = log_normalizer(torch.zeros(1, 2), torch.ones(5, 2), chunk=2)
        >>> round(float(z.exp()), 4)
        5.0
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    total: Tensor | None = None
    for start in range(0, len(weight), chunk):
        own = slice(start, start + chunk)
        logits = lens_logits(hidden, weight[own], None if bias is None else bias[own])
        part = logits.logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    if total is None:
        raise ValueError("weight is empty: give the LM head's matrix.")
    return total


def rank_of(
    hidden: Float[Tensor, "words dim"],
    ids: Int64[Tensor, " words"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    *,
    chunk: int = CHUNK,
) -> Int64[Tensor, " words"]:
    """Place of each id among all logits of its own state: 1 is the largest; ties by lower id.

    Args:
        hidden: one state per word, e.g. that of its peak cell.
        ids: one id per word.
        weight: the LM head's matrix.
        bias: its bias, or None.
        chunk: vocabulary entries at a time, default 16384.

    Returns:
        (words,): ranks from 1 to the size of the vocabulary.

    Raises:
        ValueError: ``chunk`` < 1.

    Reference:
        Ours.

    Example:
        >>> rank_of(torch.ones(1, 1), torch.tensor([2]), torch.tensor([[3.0], [1.0], [2.0]]))
        tensor([2])
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    parts = []  # each logit is computed once: its own is compared bit for bit
    columns = torch.arange(len(ids), device=ids.device)
    bounds = [slice(start, start + chunk) for start in range(0, len(weight), chunk)]
    own = torch.empty(0)
    for part in bounds:
        logits = lens_logits(hidden, weight[part], None if bias is None else bias[part])
        inside = (ids >= part.start) & (ids < part.start + len(logits))
        if not len(own):
            own = logits.new_zeros(len(ids))
        own[inside] = logits[ids[inside] - part.start, columns[inside]]
        parts.append(logits)
    ranks = torch.ones_like(ids)
    for part, logits in zip(bounds, parts, strict=True):
        entries = torch.arange(len(logits), device=ids.device)[:, None] + part.start
        ranks += ((logits > own) | ((logits == own) & (entries < ids))).sum(0)
    return ranks


def map_entropy(maps: Float[Tensor, "targets ..."]) -> Float64[Tensor, " targets"]:
    """How spread a map is: entropy of its share per cell, over that of a flat map.

    Args:
        maps: any values; negative ones count as 0. All axes but the first are cells.

    Returns:
        Value in [0, 1] per map: 0 where one cell holds everything, 1 for a flat map. A map
        without a positive value points nowhere and counts as flat.

    Reference:
        Shannon entropy; its use as a score of hallucination is ours.

    Example:
        >>> map_entropy(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])).tolist()
        [0.5]
    """
    shares = _shares(maps)
    if shares.shape[1] == 1:
        return torch.zeros(len(shares), dtype=torch.float64)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return entropy / torch.tensor(float(shares.shape[1]), dtype=torch.float64).log()


def mass_area(
    maps: Float[Tensor, "targets ..."], mass: float = 0.85
) -> Float64[Tensor, " targets"]:
    """Smallest share of the cells that together hold a share of the map's mass.

    Args:
        maps: any values; negative ones count as 0. All axes but the first are cells.
        mass: share of the mass in (0, 1], default 0.85.

    Returns:
        Value in (0, 1] per map. A map without a positive value counts as flat.

    Raises:
        ValueError: ``mass`` out of range.

    Reference:
        Ours.

    Example:
        >>> mass_area(torch.tensor([[6.0, 3.0, 1.0, 0.0]])).tolist()
        [0.5]
    """
    mass = check_number("mass", mass, "above 0 and up to 1", lambda m: 0 < m <= 1)
    shares = _shares(maps).sort(1, descending=True).values
    short = shares.cumsum(1) < mass - 1e-9  # sums of equal shares round
    return (short.sum(1) + 1).clamp(max=shares.shape[1]).double() / shares.shape[1]


def _shares(maps: Tensor) -> Float64[Tensor, "targets cells"]:
    if maps.ndim < 2 or 0 in maps.shape[1:]:
        raise ValueError(f"maps must be (targets, ...cells), got shape {tuple(maps.shape)}.")
    if bool(maps.isnan().any()):
        raise ValueError("maps must not hold NaN.")
    flat = maps.detach().cpu().double().flatten(1).clamp(min=0)
    total = flat.sum(1, keepdim=True)
    return torch.where(total > 0, flat / total.clamp(min=1e-300), 1 / flat.shape[1])
