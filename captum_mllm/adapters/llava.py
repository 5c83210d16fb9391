"""LLaVA-1.5: one canvas per image, seen by a CLIP or SigLIP tower."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.base import View
from captum_mllm.adapters.patch_grid import PatchGridAdapter
from captum_mllm.adapters.registry import register_adapter
from captum_mllm.geometry import ImageGrid

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Number of tokens that each kind of vision tower puts before its patches."""


@register_adapter("LlavaForConditionalGeneration")
class LlavaAdapter(PatchGridAdapter):
    """Adapter of ``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower.

    Raises:
        ValueError: the tower is of another kind (Pixtral lays its tokens out differently).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        vision = self.config.vision_config
        if vision.model_type not in _CLASS_TOKENS:
            raise ValueError(
                f"model: LLaVA with a {vision.model_type!r} tower is not supported; known towers: "
                f"{', '.join(_CLASS_TOKENS)}. Register an adapter of your own for it."
            )
        keeps_all = self.config.vision_feature_select_strategy == "full"
        self.tower_extra = _CLASS_TOKENS[vision.model_type]
        self.extra = self.tower_extra if keeps_all else 0

    @override
    def runs(self, grid: ImageGrid) -> tuple[int, ...]:
        return (grid.cells + self.extra,)

    @override
    def views(self, grid: ImageGrid) -> tuple[View, ...]:
        cells = torch.arange(self.extra, self.extra + grid.cells)
        return (View(cells.reshape(grid.shape)),)

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        return (len(grids), grids[0].cells + self.tower_extra)

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        height, width = grids[0].height, grids[0].width
        size = {"height": height, "width": width}
        overrides: dict[str, Any] = {"size": size}
        if getattr(settings, "do_center_crop", False):
            overrides["crop_size"] = size
            # The size before the crop keeps its proportion to the crop.
            crop = dict(settings.crop_size)
            shares = {"height": height / crop["height"], "width": width / crop["width"]}
            overrides["size"] = {
                name: max(1, round(length * shares.get(name, shares["height"])))
                for name, length in dict(settings.size).items()
                if length
            }
        batch = settings(images=list(pictures), return_tensors="pt", **overrides)
        return {"pixel_values": batch["pixel_values"]}
