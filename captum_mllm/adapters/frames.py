"""Families that see one frame per image, its tokens row by row: LLaVA-1.5, PaliGemma, Gemma 3."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.base import Adapter, View
from captum_mllm.adapters.hooks import interpolated_positions
from captum_mllm.adapters.pictures import cut_window, enlarged, picture_pixels
from captum_mllm.adapters.registry import register_adapter
from captum_mllm.functional import Box, resize_pixels
from captum_mllm.geometry import ImageGrid

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Extra tokens that each kind of vision tower puts before its patches."""


class FrameAdapter(Adapter):
    """``pixel_values`` (images, channels, height, width), one patch per cell, any size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        vision = self.config.vision_config
        self.patch = int(vision.patch_size)
        self.channels = int(getattr(vision, "num_channels", 3))

    @override
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4 or pixels.shape[1] != self.channels or not len(pixels):
            raise ValueError(
                f"pixel_values must be (images, {self.channels} channels, height, width) with at "
                f"least one image, got shape {tuple(pixels.shape)}; pass what the processor "
                f"returns."
            )
        height, width = pixels.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"pixel_values are {height} x {width} pixels, which is not a whole number of "
                f"{self.patch} px patches; let the processor resize to multiples of {self.patch}."
            )
        grid = ImageGrid(height // self.patch, width // self.patch, height, width)
        return (grid,) * pixels.shape[0]

    @override
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        rows, cols = round(grid.rows * scale), round(grid.cols * scale)
        if rows < 1 or cols < 1:
            raise ValueError(
                f"scales: {scale} makes an image of {grid.height} x {grid.width} pixels smaller "
                f"than one {self.patch} px patch; use larger scales."
            )
        return ImageGrid(rows, cols, rows * self.patch, cols * self.patch)

    @override
    def rescale_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        size = (grids[0].height, grids[0].width)
        return {"pixel_values": resize_pixels(inputs["pixel_values"], size)}

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        pairs = zip(pictures, grids, strict=True)
        made = [picture_pixels(p, settings, (g.height, g.width)) for p, g in pairs]
        return {"pixel_values": torch.stack(made)}

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        return (len(grids), grids[0].cells)

    @override
    def size_hooks(self) -> AbstractContextManager[None]:
        """Have the tower interpolate its position embeddings; a no-op at its native size."""
        return interpolated_positions(self.tower)


@register_adapter("LlavaForConditionalGeneration")
class LlavaAdapter(FrameAdapter):
    """Adapter of ``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower.

    Raises:
        ValueError: another kind of tower (Pixtral lays its tokens out differently).
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
            # What is cropped keeps its proportion to the crop.
            crop = dict(settings.crop_size)
            shares = {"height": height / crop["height"], "width": width / crop["width"]}
            overrides["size"] = {
                name: max(1, round(length * shares.get(name, shares["height"])))
                for name, length in dict(settings.size).items()
                if length
            }
        made = settings(images=list(pictures), return_tensors="pt", **overrides)
        return {"pixel_values": made["pixel_values"]}


@register_adapter("PaliGemmaForConditionalGeneration")
class PaliGemmaAdapter(FrameAdapter):
    """Adapter of PaliGemma 1 and 2: a prefix LM whose whole prompt sees itself."""

    required: ClassVar[Mapping[str, str]] = {
        "token_type_ids": "the prompt is masked causally and every hidden state is another one"
    }
    suffix_fill: ClassVar[Mapping[str, int]] = {"attention_mask": 1, "token_type_ids": 1}
    prompt_sees_ahead = True

    @override
    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        super().check_inputs(inputs)
        if bool((inputs["token_type_ids"] != 0).any()):
            raise ValueError(
                "token_type_ids must be 0 throughout the prompt (1 marks an answer, which is "
                "masked causally): call the processor without suffix=, and pass the answer as "
                "target."
            )


@register_adapter("Gemma3ForConditionalGeneration")
class Gemma3Adapter(FrameAdapter):
    """Adapter of Gemma 3: one frame of one fixed size, its patches averaged to few tokens.

    Larger scales are seen through windows of the enlarged image, smaller ones are dropped.

    Pan-and-scan crops are further images: each has a map of its own.
    """

    required: ClassVar[Mapping[str, str]] = {
        "token_type_ids": "image tokens don't see each other: all hidden states are others"
    }

    fixed_size = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.side = int(self.config.vision_config.image_size)
        self.cells_per_side = round(self.config.mm_tokens_per_image**0.5)

    @override
    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        super().check_inputs(inputs)
        if not torch.equal(
            inputs["token_type_ids"] == 1, inputs["input_ids"] == self.visual_ids[0]
        ):
            raise ValueError(
                "token_type_ids must be 1 at the image tokens of input_ids and at no other; pass "
                "what the processor returns."
            )

    @override
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        frames = super().grids(inputs)
        if (frames[0].height, frames[0].width) != (self.side, self.side):
            raise ValueError(
                f"pixel_values are {frames[0].height} x {frames[0].width} pixels, but this model "
                f"takes {self.side} x {self.side} only."
            )
        cells = self.cells_per_side
        return (ImageGrid(cells, cells, self.side, self.side),) * len(frames)

    @override
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        return enlarged(grid, scale)

    @override
    def window_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], boxes: Sequence[Box]
    ) -> dict[str, Tensor]:
        size = (self.side, self.side)
        pairs = zip(inputs["pixel_values"], boxes, strict=True)
        return {"pixel_values": torch.stack([cut_window(own, box, size) for own, box in pairs])}

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        return (len(grids), (self.side // self.patch) ** 2)

    @override
    def size_hooks(self) -> AbstractContextManager[None]:
        return nullcontext()
