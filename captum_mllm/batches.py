"""Several copies of one sample, each with pictures of its own, for one forward."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from captum_mllm.adapters import Adapter


def batched(
    adapter: Adapter,
    kwargs: Mapping[str, Tensor],
    pixels: Sequence[Mapping[str, Tensor]],
    n: int,
) -> dict[str, Tensor]:
    """A sample's inputs repeated for n copies, each with pixels of its own.

    Args:
        adapter: tells which inputs are token-wise.
        kwargs: the model's inputs of one sample.
        pixels: the pixel inputs of each copy; empty if they are all the sample's own.
        n: number of copies.
    """
    made = {}
    for name, value in kwargs.items():
        if pixels and name in pixels[0]:
            continue
        if name in adapter.token_wise:
            made[name] = value.expand(n, -1)
        else:  # images, tiles, rows of patches, sizes: one copy's follow the other's
            made[name] = value.repeat(n, *[1] * (value.ndim - 1))
    for name in pixels[0] if pixels else ():
        made[name] = torch.cat([own[name] for own in pixels])
    return made
