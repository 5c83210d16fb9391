"""How relevant a context token is to a target: rank-biased overlap and what could replace it.

All look at the predictions that led to the two tokens. Each is a pure function that gives r in
[0, 1] of every target (row) and every text token (column).
"""

from math import log

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from captum_mllm.functional import rank_biased_overlap

MEASURES = {
    "rbo": "rank-biased overlap of the two top-k predictions: ARC's own",
    "none": "r = 0: all context is irrelevant, which makes the image side ECI's",
    "keep": "r = 1: nothing is subtracted or damped, the raw lens",
    "same id": "1 if the context token is one of the target word's own tokens, else 0",
    "same top-1": "1 if both are predicted from the same most likely token, else 0",
    "cosine": "cosine of the final hidden states that predict the two, negative ones as 0",
    "jensen-shannon": "1 - JSD / ln 2 of the two predicted distributions over the vocabulary",
    "random": "control: rank-biased overlap's values, shuffled over the target's context",
    "oracle": "1 for words that the script knows to be about the target's object, else 0",
}


def cosine_relevance(
    targets: Float[Tensor, "targets dim"], tokens: Float[Tensor, "tokens dim"]
) -> Float[Tensor, "targets tokens"]:
    """Cosine of hidden states, negative values as 0.

    Args:
        targets: states that predict the targets.
        tokens: states that predict the context tokens.

    Returns:
        (targets, tokens) in [0, 1], float64; 0 where a state is 0.

    Example:
        >>> cosine_relevance(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
        tensor([[1., 0.]], dtype=torch.float64)
    """
    units = [F.normalize(states.double(), dim=1) for states in (targets, tokens)]
    return (units[0] @ units[1].T).clamp(0, 1)


def jensen_shannon_relevance(
    targets: Float[Tensor, "targets vocabulary"], tokens: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "targets tokens"]:
    """Similarity of predicted distributions: ``1 - JSD(p, q) / ln 2``.

    ``JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2`` with the entropy H in nats.

    Args:
        targets: logits that predict the targets.
        tokens: logits that predict the context tokens.

    Returns:
        (targets, tokens) in [0, 1], float64: 1 for equal distributions, 0 for disjoint ones.

    Reference:
        Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information
        Theory 37(1), 1991.

    Example:
        >>> a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 5.0]])
        >>> jensen_shannon_relevance(a, b)
        tensor([[1.]], dtype=torch.float64)
    """
    p, q = (logits.double().softmax(1) for logits in (targets, tokens))

    def entropy(shares: Tensor) -> Tensor:
        return -torch.xlogy(shares, shares).sum(-1)

    # A target at a time: never targets x tokens x vocabulary.
    rows = [entropy((own + q) / 2) - (entropy(own) + entropy(q)) / 2 for own in p]
    divergence = torch.stack(rows) if rows else p.new_zeros(0, len(q))
    return (1 - divergence / log(2)).clamp(0, 1)


def shuffled_relevance(
    relevance: Float[Tensor, "targets tokens"], columns: Int64[Tensor, " targets"], seed: int
) -> Float[Tensor, "targets tokens"]:
    """The same values of each target's context in another order.

    Args:
        relevance: r of every target and token.
        columns: each target's own column; its context is what stands before it.
        seed: of the orders.

    Returns:
        (targets, tokens): a row's first ``columns[t]`` values permuted, the others as they are.

    Example:
        >>> r = torch.tensor([[0.1, 0.2, 0.3, 0.9]])
        >>> sorted(shuffled_relevance(r, torch.tensor([3]), 0)[0, :3].tolist()) == r[0, :3].tolist()
        True
    """
    generator, out = torch.Generator().manual_seed(seed), relevance.clone()
    for row, column in enumerate(columns.tolist()):
        out[row, :column] = relevance[row, torch.randperm(column, generator=generator)]
    return out


def relevances(
    columns: Int64[Tensor, " targets"],
    rankings: Int64[Tensor, "tokens k"],
    hidden: Float[Tensor, "tokens dim"],
    logits: Float[Tensor, "tokens vocabulary"],
    own_word: Bool[Tensor, "targets tokens"],
    own_object: Bool[Tensor, "targets tokens"],
    *,
    rbo_p: float,
    seed: int,
) -> dict[str, Float[Tensor, "targets tokens"]]:
    """Every measure of `MEASURES`.

    Args:
        columns: the targets among the text tokens.
        rankings: top-k ids from which each text token was predicted.
        hidden: the final hidden state there.
        logits: the logits there.
        own_word: whether a token has the id of one of the target word's tokens.
        own_object: whether a token is about the target's object.
        rbo_p: persistence of the rank-biased overlap.
        seed: of the control "random".

    Returns:
        Name -> r, float64.
    """
    overlap = rank_biased_overlap(rankings[columns], rankings, rbo_p)
    first = rankings[:, 0]
    found = {
        "rbo": overlap,
        "none": torch.zeros_like(overlap),
        "keep": torch.ones_like(overlap),
        "same id": own_word,
        "same top-1": first[columns][:, None] == first,
        "cosine": cosine_relevance(hidden[columns], hidden),
        "jensen-shannon": jensen_shannon_relevance(logits[columns], logits),
        "random": shuffled_relevance(overlap, columns, seed),
        "oracle": own_object,
    }
    return {name: found[name].double() for name in MEASURES}
