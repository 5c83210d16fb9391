"""The maps of one sample at every scale, before they are aggregated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.functional import (
    Aggregation,
    ScaleNorm,
    adaptive_weights,
    aggregate,
    match_levels,
    rank_correlation,
    upsample,
)
from captum_mllm.geometry import ImageGrid
from captum_mllm.trace import TokenTrace

SCALE_WEIGHTS = ("equal", "adaptive")


@dataclass(frozen=True, eq=False)
class ScaleViews:
    """What :meth:`MultiScaleAttribution.views` gathered; runs no model any more.

    Args:
        base: the evidence at scale 1.
        maps: per view, per image (classes, rows, cols) as in :class:`TokenTrace`.
        scales: achieved scale of each view; a mirrored one follows the scale's own.
        mirrored: whether each view was seen mirrored (its maps are mirrored back).
        consistency: per view how far the model still predicts the same answer, or None.
    """

    base: TokenTrace
    maps: tuple[tuple[Float[Tensor, "classes ..."], ...], ...]
    scales: tuple[float, ...]
    mirrored: tuple[bool, ...]
    consistency: tuple[float, ...] | None = None

    def only(self, views: Sequence[int]) -> "ScaleViews":
        """Some of the views, by their numbers.

        Args:
            views: places in ``maps``, in the order wanted.

        Returns:
            The same run with those views alone.
        """
        agreed = self.consistency
        return ScaleViews(
            self.base,
            tuple(self.maps[view] for view in views),
            tuple(self.scales[view] for view in views),
            tuple(self.mirrored[view] for view in views),
            None if agreed is None else tuple(agreed[view] for view in views),
        )

    def agreement(self) -> Float[Tensor, "views classes"]:
        """Rank correlation of each view's maps with scale 1's, over the cells of all images.

        The maps are compared on scale 1's grid. A mirrored view counts as its scale does: that it
        orders the cells otherwise is what it is there for.
        """
        base = self.base.cells
        found: list[Tensor] = []
        for view, flip in zip(self.maps, self.mirrored, strict=True):
            if flip:
                found.append(found[-1])
                continue
            pairs = zip(view, self.base.maps, strict=True)
            near = [upsample(own, (there.shape[-2], there.shape[-1])) for own, there in pairs]
            found.append(rank_correlation(TokenTrace.pack_cells(near), base))
        return torch.stack(found)

    def merged(
        self,
        aggregation: Aggregation = "mean",
        scale_norm: ScaleNorm = "none",
        scale_weights: str = "equal",
    ) -> TokenTrace:
        """Aggregate the views, each brought to the finest grid among them.

        Args:
            aggregation: see :class:`MultiScaleAttribution`.
            scale_norm: see :class:`MultiScaleAttribution`.
            scale_weights: see :class:`MultiScaleAttribution`.

        Returns:
            The evidence at scale 1 with aggregated maps.
        """
        weights = None
        if scale_weights == "adaptive" and len(self.maps) > 1:
            agreed = self.consistency
            weights = adaptive_weights(
                self.agreement(), None if agreed is None else torch.tensor(agreed)
            )
        merged = []
        for image, base in enumerate(self.base.maps):
            maps = [
                match_levels(view[image].flatten(1), base.flatten(1), scale_norm).view_as(
                    view[image]
                )
                for view in self.maps
            ]
            finest = (max(m.shape[-2] for m in maps), max(m.shape[-1] for m in maps))
            stack = torch.stack([upsample(own, finest) for own in maps])
            merged.append(aggregate(stack, aggregation, weights))
        distinct = [i for i, s in enumerate(self.scales) if s not in self.scales[:i]]
        agreed = self.consistency
        return replace(
            self.base,
            maps=tuple(merged),
            scales=tuple(self.scales[i] for i in distinct),
            consistency=None if agreed is None else tuple(agreed[i] for i in distinct),
        )


def achieved_scale(base: Sequence[ImageGrid], scaled: Sequence[ImageGrid]) -> float:
    """Square root of the ratio of grid areas, over all images."""
    return sqrt(sum(grid.cells for grid in scaled) / sum(grid.cells for grid in base))
