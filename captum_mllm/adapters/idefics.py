"""Idefics3 and SmolVLM: tiles that the prompt names, and a global image."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.registry import register_adapter
from captum_mllm.adapters.tiles import TileAdapter
from captum_mllm.geometry import ImageGrid
from captum_mllm.validation import ArgumentError


@register_adapter("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
class IdeficsAdapter(TileAdapter):
    """Adapter of Idefics3 and SmolVLM: pixels (1, tiles, 3, s, s), tiles named in the text."""

    tile_axis = True
    hint = " (A tile that is 0 everywhere counts as padding for the model.)"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.patch = int(self.config.vision_config.patch_size)
        self.unit = self.patch * int(self.config.scale_factor)

    @override
    def tiles(self, inputs: Mapping[str, Tensor]) -> Tensor:
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
        if pixels.ndim != 5 or pixels.shape[0] != 1 or not pixels.shape[1]:
            raise ValueError(
                f"pixel_values must be (1, tiles, channels, height, width), got shape "
                f"{tuple(pixels.shape)}; pass what the processor returns for one sample."
            )
        expected = (*pixels.shape[:2], *pixels.shape[3:])
        if mask is not None and tuple(mask.shape) != expected:
            raise ArgumentError(
                "pixel_attention_mask",
                f"must be (1, tiles, height, width) = {expected}, as pixel_values have it, got "
                f"{tuple(mask.shape)}: text, pixels and mask must come from the same processor "
                f"call.",
            )
        real = (pixels[0] != 0).flatten(1).any(1)  # how the model recognises padding
        if mask is not None and not bool(mask[0][real].bool().all()):
            raise ValueError(
                "pixel_attention_mask has zeros inside a tile, whose padded part has no place in "
                "the map. Let the processor cut the image into tiles of one size."
            )
        return pixels[0][real]

    @override
    def tiles_per_image(self, ids: Tensor, per_tile: int) -> list[int]:
        """Counts by the names before each run: every overview is called what the last run is."""
        where = (ids == self.visual_ids[0]).nonzero()[:, 0].tolist()
        starts, ends = where[::per_tile], where[per_tile - 1 :: per_tile]
        if not ends or ends[-1] + 1 >= len(ids):
            return [len(starts)]
        fence = int(ids[ends[-1] + 1])  # a marker around every image and tile
        names = [self._name(ids, start, fence) for start in starts]
        counts = [0]
        for name in names:
            counts[-1] += 1
            if name == names[-1]:
                counts.append(0)
        return counts[:-1]

    @override
    def layouts(
        self, ids: Tensor, counts: Sequence[int], per_tile: int
    ) -> list[tuple[int, int] | None]:
        """Layouts by the line break after each row of tiles, where no fence follows directly."""
        ends = (ids == self.visual_ids[0]).nonzero()[:, 0].tolist()[per_tile - 1 :: per_tile]
        if not ends or ends[-1] + 1 >= len(ids):
            return [None] * len(counts)
        fence = int(ids[ends[-1] + 1])
        layouts: list[tuple[int, int] | None] = []
        for count in counts:
            tile_ends, ends = ends[: count - 1], ends[count:]
            n, down = len(tile_ends), sum(int(ids[end + 1]) != fence for end in tile_ends)
            layouts.append((down, n // down) if down and n % down == 0 else None)
        return layouts

    @override
    def block(self, ids: Tensor, where: Tensor) -> range:  # from fence to fence
        first, end = int(where[0]), int(where[-1]) + 1
        if end >= len(ids):
            return range(first, end)
        fences = (ids[:first] == ids[end]).nonzero()[:, 0]
        return range(int(fences[-1]) if len(fences) else first, end + 1)

    @staticmethod
    def _name(ids: Tensor, start: int, fence: int) -> tuple[int, ...]:
        """The ids between the last fence and a run: the tile's name in the text."""
        fences = (ids[:start] == fence).nonzero()[:, 0]
        return tuple(ids[int(fences[-1]) + 1 : start].tolist()) if len(fences) else ()

    @override
    def as_inputs(self, tiles: Tensor) -> dict[str, Tensor]:
        shape = (1, len(tiles), *tiles.shape[-2:])
        mask = torch.ones(shape, dtype=torch.int64, device=tiles.device)
        return {"pixel_values": tiles[None], "pixel_attention_mask": mask}

    @override
    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], canvases: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """A tile of zeros would count as padding: it gets the smallest value above 0 instead."""
        changed = super().with_canvases(inputs, grids, canvases)
        pixels = changed["pixel_values"]
        blank = (pixels == 0).flatten(2).all(2)[:, :, None, None, None]
        return changed | {"pixel_values": pixels + blank * torch.finfo(pixels.dtype).tiny}

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        side = grids[0].height // grids[0].tiles[0] // self.patch
        return (sum(self.count(grid) for grid in grids), side**2)
