"""Pixels at other scales: from the given pixel tensor, or anew from the original pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.functional import (
    Aggregation,
    Box,
    ScaleNorm,
    adaptive_weights,
    aggregate,
    match_levels,
    rank_correlation,
    upsample,
)
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.inputs import Sample
from captum_mllm.model.trace import TokenTrace

_TOLERANCE = 0.2  # mean difference of pixels, in their standard deviations


def scaled_inputs(
    adapter: Adapter, processor: Any, sample: Sample, grids: Sequence[ImageGrid], images: Any
) -> dict[str, Tensor]:
    """The inputs that hold or describe pixels, on other grids.

    Args:
        adapter: the model's adapter.
        processor: the model's processor, or None.
        sample: the prompt at its own scale.
        grids: the grids to reach, one per image.
        images: original pictures to start from, or None to resize the pixel tensor.

    Raises:
        TypeError: paths instead of pictures.
        ValueError: ``images`` that can't be used, or are not those of the inputs.
    """
    if images is None:
        return adapter.rescale_pixels(sample.kwargs, grids)
    pictures, settings = _pictures(adapter, processor, sample, images)
    return _like(sample, adapter.pixels_from_pictures(pictures, settings, grids))


def window_inputs(
    adapter: Adapter, processor: Any, sample: Sample, boxes: Sequence[Box], images: Any
) -> dict[str, Tensor]:
    """The inputs that hold pixels, at the model's own size, of a box of each image.

    Args:
        adapter: the model's adapter.
        processor: the model's processor, or None.
        sample: the prompt at its own scale.
        boxes: per image, (left, upper, right, lower) in fractions of it.
        images: original pictures to start from, or None to resize the pixel tensor.

    Raises:
        TypeError: paths instead of pictures.
        ValueError: ``images`` that can't be used, or are not those of the inputs.
    """
    if images is None:
        return adapter.window_pixels(sample.kwargs, sample.grids, boxes)
    pictures, settings = _pictures(adapter, processor, sample, images)
    cuts = []
    for picture, (left, upper, right, lower) in zip(pictures, boxes, strict=True):
        wide, high = picture.size
        edges = (left * wide, upper * high, right * wide, lower * high)
        cuts.append(picture.crop(tuple(round(edge) for edge in edges)))
    return _like(sample, adapter.pixels_from_pictures(cuts, settings, sample.grids))


def _like(sample: Sample, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the sample's device; in the dtype of its inputs where it has them."""
    device = sample.prompt_ids.device
    return {name: x.to(device, sample.kwargs.get(name, x).dtype) for name, x in made.items()}


def _pictures(
    adapter: Adapter, processor: Any, sample: Sample, images: Any
) -> tuple[list[Any], Any]:
    """The checked pictures, and the image processor."""
    pictures = list(images) if isinstance(images, list | tuple) else [images]
    for picture in pictures:
        if not hasattr(picture, "convert"):
            raise TypeError(
                f"images= takes PIL pictures, not {type(picture).__name__}: open paths by "
                f"PIL.Image.open(path), make arrays pictures by PIL.Image.fromarray(array)."
            )
    settings = getattr(processor, "image_processor", None)
    if settings is None:
        raise ValueError("images= needs a processor: make the attributor with one.")
    if any(grid.steps for grid in sample.grids):
        raise ValueError("images= can't hold a video: leave it out to resize its frames.")
    if len(pictures) != len(sample.grids):
        raise ValueError(
            f"images= holds {len(pictures)} pictures, inputs have {len(sample.grids)}."
        )
    made = adapter.pixels_from_pictures(pictures, settings, sample.grids)["pixel_values"]
    given = sample.kwargs["pixel_values"].to(made)
    # Resizing differs a little between ways of resampling; another picture differs much.
    close = made.shape == given.shape and float((made - given).abs().mean()) <= _TOLERANCE * float(
        given.std().clamp(min=1e-3)
    )
    if not close:
        raise ValueError(
            f"images= through the processor's settings are not the pixels of inputs (shapes "
            f"{tuple(made.shape)} and {tuple(given.shape)}): are they other pictures, in another "
            f"order, or was the processor called with other settings? Leave images out to resize "
            f"the pixel tensor."
        )
    return pictures, settings


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
