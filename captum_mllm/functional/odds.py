"""Log-odds of a token: a measure of certainty that does not saturate near 0 or 1."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def log_odds(
    logits: Float[Tensor, "*rows vocabulary"], ids: Int64[Tensor, "*rows"]
) -> Float[Tensor, "*rows"]:
    """``o = log p - log(1 - p)`` of one token per row, p of the softmax.

    It is computed as ``z_y - logsumexp of all other z``, which is the same number without
    ``1 - p``: finite for finite logits, exact where p rounds to 1 or to 0. p is ``sigmoid(o)``.

    Args:
        logits: a row per prediction, over at least two tokens.
        ids: the token of each row.

    Returns:
        Log-odds in nats, one per row, float32 (float64 stays float64).

    Raises:
        ValueError: a vocabulary of one token.

    Reference:
        ContextCite (arXiv 2409.00729) uses log-odds as what attributions should predict; the form
        with all other logits is ours.

    Example:
        >>> log_odds(torch.tensor([[0.0, 0.0, 0.0], [99.0, 0.0, 0.0]]), torch.tensor([0, 0]))
        tensor([-0.6931, 98.3069])
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"logits must be of at least two tokens, got {tuple(logits.shape)}.")
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    places = ids[..., None]
    others = values.scatter(-1, places, float("-inf")).logsumexp(-1)
    return values.gather(-1, places)[..., 0] - others
