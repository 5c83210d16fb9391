"""Options that the records retired from the package, for the studies that measured them.

The record of ``studies.choose`` holds no gain for a level of scales (F1-IoU .7387 against .7353 and
.7388), nor for the geometric mean, and TAM's rank filter loses wherever it was tried outside TAM.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_mllm.attr import PostProcessor
from captum_mllm.functional import adaptive_weights, rank_gaussian_filter, upsample
from captum_mllm.model.trace import TokenTrace
from captum_mllm.model.views import ScaleViews

SCALE_NORMS = ("none", "max", "std")


def match_levels(maps: Tensor, base: Tensor, how: str) -> Tensor:
    """Bring a scale's maps to the level of the base scale's, each class on its own.

    Args:
        maps: (classes, cells): the maps at a scale.
        base: (classes, base cells): the maps at the base scale.
        how: "none", "max" (the base's maximum) or "std" (its population standard deviation).

    Returns:
        The maps times one factor per class; a map without a level stays as it is.

    Raises:
        ValueError: ``how`` is unknown.
    """
    if how not in SCALE_NORMS:
        raise ValueError(f"scale_norm must be one of {', '.join(SCALE_NORMS)}, got {how!r}.")
    if how == "none":
        return maps
    level, base_level = (
        m.amax(1, keepdim=True) if how == "max" else m.std(1, keepdim=True, correction=0)
        for m in (maps, base)
    )
    safe = torch.where(level > 0, level, torch.ones_like(level))
    return torch.where(level > 0, maps * base_level / safe, maps)


def geometric_mean(stack: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted geometric mean over the scales.

    Args:
        stack: (scales, ...): maps >= 0 on one grid.
        weights: one per scale, or (scales, maps); None for equal.

    Returns:
        One map of the shape of each.
    """
    if weights is None:
        weights = stack.new_ones(len(stack))
    share = (weights / weights.sum(0)).to(stack.dtype)
    share = share.reshape(*weights.shape, *[1] * (stack.ndim - weights.ndim))
    return torch.xlogy(share, stack).sum(0).exp()  # a weight of 0 silences log(0)


def merged(
    views: ScaleViews, aggregation: Any, scale_norm: str = "none", scale_weights: str = "equal"
) -> TokenTrace:
    """Aggregate views as ``ScaleViews.merged`` does, with the retired options too.

    Args:
        views: the maps of every view.
        aggregation: "mean", "median" or "geometric_mean".
        scale_norm: of `SCALE_NORMS`.
        scale_weights: "equal" or "adaptive".

    Returns:
        The evidence with aggregated maps.
    """
    if scale_norm != "none":
        leveled = tuple(
            tuple(
                match_levels(image.flatten(1), base.flatten(1), scale_norm).view_as(image)
                for image, base in zip(view, views.base.maps, strict=True)
            )
            for view in views.maps
        )
        # Levels leave ranks alone, so the adaptive weights are the same.
        views = replace(views, maps=leveled)
    if aggregation != "geometric_mean" or len(views.maps) == 1:
        return views.merged("median" if aggregation == "median" else "mean", scale_weights)
    weights = None
    if scale_weights == "adaptive":
        agreed = views.consistency
        weights = adaptive_weights(
            views.agreement(), None if agreed is None else torch.tensor(agreed)
        )
    maps = []
    for image in range(len(views.base.maps)):
        own = [view[image] for view in views.maps]
        finest = (max(m.shape[-2] for m in own), max(m.shape[-1] for m in own))
        maps.append(geometric_mean(torch.stack([upsample(m, finest) for m in own]), weights))
    return replace(views.merged("mean"), maps=tuple(maps))


def rank_filtered(method: PostProcessor) -> PostProcessor:
    """A post-processor with TAM's rank Gaussian filter before its last steps.

    Args:
        method: ``JointNormalization`` or ``ARC``; changed in place.

    Returns:
        The same post-processor.
    """
    finish = method.finish
    method.finish = lambda maps: finish(tuple(rank_gaussian_filter(m) for m in maps))  # type: ignore[method-assign]
    return method
