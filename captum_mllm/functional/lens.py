"""The logit lens: the LM head applied to the hidden state of every position."""

import torch
from jaxtyping import Float
from torch import Tensor


def lens_logits(
    hidden: Float[Tensor, "positions dim"],
    weight: Float[Tensor, "classes dim"],
    bias: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "classes positions"]:
    """Logit of each class at each position: ``logit_i(v) = W_v . h_i + b_v``.

    Computed in float32 (float64 stays float64). Only the rows of the LM head that belong to the
    classes are used, so the cost is positions x classes, never positions x vocabulary.

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
