"""The maps of one sample at several scales, and how they become one trace."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.functional import (
    Aggregation,
    adaptive_weights,
    aggregate,
    rank_correlation,
    upsample,
)
from captum_mllm.model.trace import TokenTrace
from captum_mllm.validation import check_choice

SCALE_WEIGHTS = ("equal", "adaptive")


@dataclass(frozen=True, eq=False)
class ScaleViews:
    """The maps of one sample at every scale, before they are aggregated; runs no model.

    Args:
        base: the evidence at scale 1.
        maps: per view, per image (classes or text tokens, rows, cols) as in :class:`TokenTrace`.
        scales: achieved scale of each view; a flipped one follows the scale's own.
        flipped: whether each view is flipped (its maps are flipped back).
        consistency: per view how far the model still predicts the same answer, or None.
    """

    base: TokenTrace
    maps: tuple[tuple[Float[Tensor, "classes ..."], ...], ...]
    scales: tuple[float, ...]
    flipped: tuple[bool, ...]
    consistency: tuple[float, ...] | None = None

    def select(self, views: Sequence[int]) -> "ScaleViews":
        """Some of the views, by their numbers.

        Args:
            views: places in ``maps``, in the order that they are to have.

        Returns:
            The same run with those views alone.
        """
        agreed = self.consistency
        return ScaleViews(
            self.base,
            tuple(self.maps[view] for view in views),
            tuple(self.scales[view] for view in views),
            tuple(self.flipped[view] for view in views),
            None if agreed is None else tuple(agreed[view] for view in views),
        )

    def agreement(self) -> Float[Tensor, "views classes"]:
        """Rank correlation of each view's maps with scale 1's, over the cells of all images.

        The maps are compared on scale 1's grid. A flipped view counts as its scale does: that it
        orders the cells differently is its purpose.

        Raises:
            ValueError: a scale of which there is a flipped view only.
        """
        base = self.base.cells
        per_scale: dict[float, Tensor] = {}
        for scale, view, flip in zip(self.scales, self.maps, self.flipped, strict=True):
            if not flip:
                pairs = zip(view, self.base.maps, strict=True)
                near = [upsample(m, (there.shape[-2], there.shape[-1])) for m, there in pairs]
                per_scale[scale] = rank_correlation(TokenTrace.pack_cells(near), base)
        if alone := [scale for scale in self.scales if scale not in per_scale]:
            raise ValueError(
                f"views hold scales {alone} flipped only, whose agreement is that of the plain "
                f"view: select that one too, or take scale_weights='equal'."
            )
        return torch.stack([per_scale[scale] for scale in self.scales])

    def merged(
        self,
        aggregation: Aggregation = "mean",
        scale_weights: str = "equal",
    ) -> TokenTrace:
        """Aggregate the views, each brought to the finest grid among them.

        Args:
            aggregation: see :class:`~captum_mllm.MSEA`.
            scale_weights: see :class:`~captum_mllm.MSEA`; default "equal" here.

        Returns:
            The evidence at scale 1 with aggregated maps.
        """
        check_choice("scale_weights", scale_weights, SCALE_WEIGHTS)
        weights = None
        if scale_weights == "adaptive" and len(self.maps) > 1:
            weights = adaptive_weights(self.agreement(), self._relative_consistency())
        merged = []
        for image in range(len(self.base.maps)):
            maps = [view[image] for view in self.maps]
            finest = (max(m.shape[-2] for m in maps), max(m.shape[-1] for m in maps))
            stack = torch.stack([upsample(m, finest) for m in maps])
            merged.append(aggregate(stack, aggregation, weights))
        distinct = [i for i, s in enumerate(self.scales) if s not in self.scales[:i]]
        agreed = self.consistency
        return replace(
            self.base,
            maps=tuple(merged),
            scales=tuple(self.scales[i] for i in distinct),
            consistency=None if agreed is None else tuple(agreed[i] for i in distinct),
        )

    def _relative_consistency(self) -> Float[Tensor, " views"] | None:
        """Consistency over that of the best view, all alike where no view has any.

        Weights count by their ratios, and float32 has none for an answer of probability 1e-50.
        """
        if self.consistency is None:
            return None
        best = max(self.consistency)
        return torch.tensor([c / best if best else 1.0 for c in self.consistency]).double()
