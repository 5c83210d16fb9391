"""Which token hears which pixel, read from a few gradients: a pixel belongs to one token at most.

Token ``i`` of ``n`` gets the sign of bit ``b`` of ``i`` as its weight in the ``b``-th of
``ceil(log2 n)`` weighted sums. Where a pixel reaches one token only, the gradient of each sum with
respect to that pixel is plus or minus the gradient of the unweighted sum, and the signs spell the
token's number.
"""

from math import ceil, log2

import torch
from jaxtyping import Float, Int64
from torch import Tensor

NOBODY = -1
"""Owner of a pixel that no token hears."""

SEVERAL = -2
"""Owner of a pixel that more than one token hears."""

_SAME = 2e-2  # of the plain gradient's size: float32 gradients of one owner agree to 1e-3
_NOTHING = 1e-6  # of the largest gradient: what is left where sums cancel


def sign_codes(n: int) -> Float[Tensor, "bits n"]:
    """The weights of ``n`` tokens in each sum: plus or minus 1 by the bits of their numbers.

    Args:
        n: number of tokens, at least 1.

    Returns:
        (bits, n), with ``ceil(log2 n)`` bits, at least one.

    Reference:
        Our reading; the binary code of group testing.

    Example:
        >>> sign_codes(3).tolist()
        [[-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    """
    numbers, bits = torch.arange(n), torch.arange(max(1, ceil(log2(n))))
    return torch.where((numbers >> bits[:, None]) & 1 == 1, 1.0, -1.0)


def owners(
    plain: Float[Tensor, "..."],
    coded: Float[Tensor, "bits ..."],
    n: int,
    largest: float | None = None,
) -> Int64[Tensor, "..."]:
    """The token that owns each pixel.

    Args:
        plain: gradient of the unweighted sum.
        coded: gradient of each weighted sum, in the order of :func:`sign_codes`.
        n: number of tokens.
        largest: size of the largest plain gradient over all inputs; default over ``plain``.

    Returns:
        The token's number, :data:`NOBODY` or :data:`SEVERAL`.

    Reference:
        Our reading.

    Example:
        >>> import torch
        >>> hears = torch.tensor([[2.0, 0, 0, 1], [0, 3.0, 0, 0], [0, 0, 0, 1]])  # token x pixel
        >>> owners(hears.sum(0), sign_codes(3) @ hears, 3).tolist()
        [0, 1, -1, -2]
    """
    largest = float(plain.abs().max()) if largest is None else largest
    ratio = coded / torch.where(plain == 0, 1.0, plain)
    alone = ((ratio.abs() - 1).abs() <= _SAME).all(0)
    places = 2 ** torch.arange(len(coded), device=plain.device)
    number = ((ratio > 0) * places.reshape(-1, *[1] * plain.ndim)).sum(0)
    owner = torch.where(alone & (number < n), number, SEVERAL)
    return torch.where(plain.abs() > _NOTHING * largest, owner, NOBODY)
