"""Gemma 3: one canvas of a fixed size, whose patches are averaged to few tokens."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.patch_grid import PatchGridAdapter
from captum_mllm.adapters.pixels import cut_window, enlarged
from captum_mllm.adapters.registry import register_adapter
from captum_mllm.functional import Box
from captum_mllm.geometry import ImageGrid


@register_adapter("Gemma3ForConditionalGeneration")
class Gemma3Adapter(PatchGridAdapter):
    """Adapter of Gemma 3: one canvas of a fixed size, whose patches are averaged to few tokens.

    Larger scales are computed through windows of the enlarged image; smaller ones are dropped.

    Pan-and-scan crops are further images, each with its own map.
    """

    required: ClassVar[Mapping[str, str]] = {
        "token_type_ids": "image tokens don't attend to each other and all hidden states are wrong"
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
                "token_type_ids must be 1 at the image tokens of input_ids and 0 elsewhere; pass "
                "what the processor returns."
            )

    @override
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        patches = super().grids(inputs)
        height, width = patches[0].height, patches[0].width
        if (height, width) != (self.side, self.side):
            raise ValueError(
                f"pixel_values are {height} x {width} pixels, but this model "
                f"takes {self.side} x {self.side} only."
            )
        cells = self.cells_per_side
        return (ImageGrid(cells, cells, self.side, self.side),) * len(patches)

    @override
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        return enlarged(grid, scale)

    @override
    def window_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], boxes: Sequence[Box]
    ) -> dict[str, Tensor]:
        size = (self.side, self.side)
        pairs = zip(inputs["pixel_values"], boxes, strict=True)
        return {
            "pixel_values": torch.stack([cut_window(pixels, box, size) for pixels, box in pairs])
        }

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        return (len(grids), (self.side // self.patch) ** 2)

    @override
    def size_hooks(self) -> AbstractContextManager[None]:
        return nullcontext()
