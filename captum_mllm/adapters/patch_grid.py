"""The base of families with one canvas per image and one token per cell, row by row."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.base import Adapter
from captum_mllm.adapters.hooks import interpolated_positions
from captum_mllm.adapters.pixels import picture_pixels
from captum_mllm.functional import resize_pixels
from captum_mllm.geometry import ImageGrid


class PatchGridAdapter(Adapter):
    """``pixel_values`` (images, channels, height, width) of any size, one patch per cell."""

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
        pixels = [picture_pixels(p, settings, (g.height, g.width)) for p, g in pairs]
        return {"pixel_values": torch.stack(pixels)}

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        return (len(grids), grids[0].cells)

    @override
    def size_hooks(self) -> AbstractContextManager[None]:
        """Have the tower interpolate its position embeddings; a no-op at its native size."""
        return interpolated_positions(self.tower)
