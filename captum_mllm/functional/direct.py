"""Direct logit attribution: what attention copies from each position into one logit."""

from math import inf

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from captum_mllm.functional.tam import level_of


def visible_keys(
    rows: Int64[Tensor, " rows"],
    n_keys: int,
    mask: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Bool[Tensor, "#heads rows keys"], Float[Tensor, "#heads rows keys"] | None]:
    """Which keys some queries see, from what an attention kernel is given.

    Args:
        rows: positions of the queries.
        n_keys: number of keys.
        mask: (1, heads or 1, queries, keys), boolean (True: visible) or additive; None if the
            kernel masks by itself.
        causal: without a mask, whether a query sees no later key, default True.
        window: without a mask, how many keys a query sees, its own included; None for all.

    Returns:
        Whether each key is visible, and what is added to the scores: None if nothing is.

    Reference:
        The conventions of transformers' attention interface.

    Example:
        >>> import torch
        >>> visible_keys(torch.tensor([1]), 3)[0].tolist()
        [[[True, True, False]]]
    """
    if mask is not None:
        chosen = mask[0][:, rows][..., :n_keys]
        if chosen.dtype == torch.bool:
            return chosen, None
        chosen = chosen.float()
        return chosen > torch.finfo(mask.dtype).min / 2, chosen
    keys = torch.arange(n_keys, device=rows.device)
    visible = torch.ones(len(rows), n_keys, dtype=torch.bool, device=rows.device)
    if causal:
        visible = keys[None, :] <= rows[:, None]
    if window is not None:
        visible = visible & (keys[None, :] > rows[:, None] - window)
    return visible[None], None


def added_to_scores(
    visible: Bool[Tensor, "#heads rows keys"], bias: Float[Tensor, "#heads rows keys"] | None = None
) -> Float[Tensor, "#heads rows keys"]:
    """Visibility and bias as one term of the scores: ``-inf`` where a key is not visible.

    A forward's layers share it, so that it is made once.

    Args:
        visible: which keys each query sees.
        bias: what is added to the scores, or None (default).

    Returns:
        What :func:`attention_rows` takes as ``bias``, without ``visible``.

    Reference:
        The additive masks of transformers' attention interface.

    Example:
        >>> import torch
        >>> added_to_scores(torch.tensor([[[True, False]]])).tolist()
        [[[0.0, -inf]]]
    """
    if bias is None:
        bias = torch.zeros((), device=visible.device)
    return torch.where(visible, bias, -inf)


def attention_rows(
    query: Float[Tensor, "heads rows dim"],
    key: Float[Tensor, "groups keys dim"],
    scaling: float,
    visible: Bool[Tensor, "#heads rows keys"] | None = None,
    bias: Float[Tensor, "#heads rows keys"] | None = None,
    *,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "heads rows keys"]:
    """Attention weights of some queries: ``softmax(q k^T * scaling + bias)``, in float32.

    Args:
        query: the queries, after rotary embedding.
        key: the keys; consecutive heads share those of one group.
        scaling: factor of the scores.
        visible: which keys each query sees, or None (default): all, or as ``bias`` says.
        bias: what is added to the scores, or None (default).
        softcap: bound c of soft-capped scores ``c * tanh(score / c)``, or None (default).
        sinks: a logit per head that takes part in the softmax and attends to nothing, or None.

    Returns:
        Weights; each row sums to 1, or to less with sinks.

    Reference:
        Vaswani et al., "Attention is all you need", NeurIPS 2017; grouped keys, soft-capping
        and sinks as Llama 2, Gemma 2 and gpt-oss have them.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(1, 1, 2), torch.zeros(1, 4, 2)
        >>> attention_rows(q, k, 1.0, torch.tensor([[[True, True, False, False]]])).tolist()
        [[[0.5, 0.5, 0.0, 0.0]]]
    """
    if softcap is None:
        scores = _grouped(query.float(), key.float().mT, scaling, bias)
    else:
        scores = softcap * torch.tanh(_grouped(query.float(), key.float().mT, scaling) / softcap)
        scores = scores if bias is None else scores.add_(bias)
    if visible is not None:
        scores.masked_fill_(~visible, -inf)
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def head_contributions(
    weights: Float[Tensor, "heads rows keys"],
    value: Float[Tensor, "groups keys dim"],
    directions: Float[Tensor, "heads rows dim"],
) -> Float[Tensor, "heads rows keys"]:
    """What each head writes from each position in a direction: ``A_h[q, i] * (u_qh . v_hi)``.

    Args:
        weights: attention weights of the queries.
        value: the values; consecutive heads share those of one group.
        directions: per head, the direction in the residual stream led back through the output
            projection: ``u_qh = d_q O_h``.

    Returns:
        Signed contributions, in the precision of the weights. Their sum over the positions is
        ``u_qh`` times what the head passes to the projection (:func:`head_outputs`); over heads
        and positions, it is the projection's output in that direction, without its bias.
        ``u . v`` is computed in the precision of the values: no copy of them is made.

    Reference:
        Elhage et al., "A mathematical framework for transformer circuits", 2021 (OV circuits).

    Example:
        >>> import torch
        >>> weights = torch.tensor([[[0.25, 0.75]]])
        >>> values, direction = torch.tensor([[[2.0], [-4.0]]]), torch.tensor([[[1.0]]])
        >>> head_contributions(weights, values, direction).tolist()
        [[[0.5, -3.0]]]
    """
    return weights * _grouped(directions.to(value.dtype), value.mT)


def head_outputs(
    weights: Float[Tensor, "heads rows keys"], value: Float[Tensor, "groups keys dim"]
) -> Float[Tensor, "heads rows dim"]:
    """Output of attention: the values, weighted.

    Args:
        weights: attention weights of the queries.
        value: the values; consecutive heads share those of one group.

    Returns:
        What each head passes to the output projection.

    Reference:
        See :func:`attention_rows`.

    Example:
        >>> import torch
        >>> head_outputs(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[2.0], [4.0]]])).tolist()
        [[[3.0]]]
    """
    return _grouped(weights, value.float())


def _grouped(
    left: Float[Tensor, "heads rows inner"],
    right: Float[Tensor, "groups inner columns"],
    factor: float = 1.0,
    added: Float[Tensor, "#heads rows columns"] | None = None,
) -> Float[Tensor, "heads rows columns"]:
    """``factor * left @ right + added``; consecutive heads share the right side of one group."""
    (groups, _, columns), (heads, rows, inner) = right.shape, left.shape
    stacked = heads // groups * rows
    left = left.reshape(groups, stacked, inner)
    if added is None:
        added, share = left.new_empty(1), 0.0  # not read
    else:
        alike = added.shape[0] == 1
        added = added.expand(heads // groups if alike else heads, rows, columns)
        added, share = added.reshape(1 if alike else groups, stacked, columns), 1.0
    product = torch.baddbmm(added, left, right, beta=share, alpha=factor)
    return product.view(heads, rows, columns)


def product_of_experts(
    lens: Float[Tensor, "maps cells"],
    direct: Float[Tensor, "maps cells"],
    beta: float = 1.0,
    floor: float = 0.01,
) -> Float[Tensor, "maps cells"]:
    """The lens's map times the direct attribution's, each standardised in the log domain.

    ``M = z(lens) + beta * z(log(direct / max(direct) + 0.01))`` with ``z(x) = (x - mean) / std``
    over the cells; then stretched so that the smallest cell is 0 and the largest is the lens's
    largest: the lens says where the token can be read and how strongly, the direct
    attribution which of these places the answer read.

    Args:
        lens: maps >= 0, lens logits.
        direct: maps >= 0 of the same cells.
        beta: weight of the direct attribution, default 1.
        floor: share of a map's peak that is added to the direct attribution, > 0, default 0.01.

    Returns:
        Maps >= 0 with the lens's peaks: 0 where the lens is 0 everywhere; the lens itself where
        both are constant.

    Reference:
        Ours; Hinton, "Training products of experts by minimizing contrastive divergence", 2002,
        for the idea of multiplying experts.

    Example:
        >>> import torch
        >>> lens = torch.tensor([[0.0, 4.0, 4.0]])  # the token can be read in two places
        >>> product_of_experts(lens, torch.tensor([[0.0, 0.0, 2.0]])).round(decimals=1).tolist()
        [[0.0, 2.0, 4.0]]
    """
    peak = direct.amax(1, keepdim=True)
    share = direct / torch.where(peak > 0, peak, 1.0)
    both = _standardised(lens) + beta * _standardised((share + floor).log())
    low, high = both.amin(1, keepdim=True), both.amax(1, keepdim=True)
    width = torch.where(high > low, high - low, 1.0)
    return torch.where(high > low, (both - low) / width, 1.0) * lens.amax(1, keepdim=True)


def _standardised(maps: Float[Tensor, "maps cells"]) -> Float[Tensor, "maps cells"]:
    """Each map with mean 0 and standard deviation 1 over its cells; a constant one is 0."""
    maps = maps / level_of(maps)  # a lens of 1e-23 has squares below float32's range
    centred = maps - maps.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    flat = std <= 1e-6 * maps.abs().amax(1, keepdim=True)
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, std))
