"""InternVL 2.5 and 3: square tiles and a thumbnail."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.registry import register_adapter
from captum_mllm.adapters.tiles import TileAdapter
from captum_mllm.geometry import ImageGrid


@register_adapter("InternVLForConditionalGeneration")
class InternVLAdapter(TileAdapter):
    """Adapter of InternVL 2.5 and 3 in native form: ``pixel_values`` (tiles, 3, side, side)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        patch = self.config.vision_config.patch_size
        self.patch = int(patch if isinstance(patch, int) else patch[0])
        self.unit = round(self.patch / self.config.downsample_ratio)
        if self.config.vision_feature_select_strategy != "default":
            raise ValueError(
                "model: InternVL with vision_feature_select_strategy 'full' has no square grid of "
                "image tokens; 'default' is supported."
            )

    @override
    def tiles(self, inputs: Mapping[str, Tensor]) -> Tensor:
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4 or not len(pixels):
            raise ValueError(
                f"pixel_values must be (tiles, channels, height, width), got shape "
                f"{tuple(pixels.shape)}; pass what the processor returns."
            )
        return pixels

    @override
    def tiles_per_image(self, ids: Tensor, per_tile: int) -> list[int]:
        is_image = (ids == self.visual_ids[0]).tolist()
        runs = [len(list(run)) for visual, run in groupby(is_image) if visual]
        # A run that is not a whole number of tiles is noticed by the sum.
        return [max(1, round(run / per_tile)) for run in runs]

    @override
    def runs(self, grid: ImageGrid) -> tuple[int, ...]:
        return (sum(super().runs(grid)),)

    @override
    def block(
        self, ids: Tensor, where: Tensor
    ) -> range:  # with <img> and </img>, which no config names
        return range(max(0, int(where[0]) - 1), min(len(ids), int(where[-1]) + 2))

    @override
    def as_inputs(self, tiles: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": tiles}

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        side = grids[0].height // grids[0].tiles[0] // self.patch
        return (sum(self.count(grid) for grid in grids), 1 + side**2)
