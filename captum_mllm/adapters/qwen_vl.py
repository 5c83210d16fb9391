"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size, patches merged to tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.base import Adapter
from captum_mllm.adapters.pixels import picture_pixels
from captum_mllm.adapters.registry import register_adapter
from captum_mllm.functional import frames_to_patches, patches_to_frames, resize_pixels
from captum_mllm.geometry import ImageGrid
from captum_mllm.validation import ArgumentError

_KINDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""Each pixel input, and the input that holds its (steps, patches down, patches across)."""


@register_adapter(
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)
class QwenVLAdapter(Adapter):
    """Adapter of Qwen2-VL and Qwen2.5-VL: pixels as rows of patches, tokens row by row."""

    pixel_keys = tuple(_KINDS)
    required: ClassVar[Mapping[str, str]] = {
        "mm_token_type_ids": "positions lack the image's rows and columns (M-RoPE)"
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        vision = self.config.vision_config
        self.merge = int(vision.spatial_merge_size)
        self.patch = int(vision.patch_size)
        self.temporal = int(vision.temporal_patch_size)
        self.channels = int(getattr(vision, "in_channels", None) or vision.in_chans)
        self.side = self.patch * self.merge  # of a cell, pixels

    @override
    def placeholder(self, grid: ImageGrid) -> int:
        return int(self.config.video_token_id if grid.steps else self.config.image_token_id)

    @override
    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        super().check_inputs(inputs)
        ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
        expected = torch.zeros_like(kinds)
        expected[ids == self.config.image_token_id] = 1
        expected[ids == self.config.video_token_id] = 2
        if not torch.equal(kinds, expected):
            raise ValueError(
                "mm_token_type_ids must be 1 at the image tokens of input_ids, 2 at the video "
                "tokens and 0 elsewhere; pass what the processor returns."
            )

    @override
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        grids: list[ImageGrid] = []
        for name, shape_name in _KINDS.items():
            if inputs.get(name) is None:
                continue
            shapes = inputs.get(shape_name)
            self._check_rows(name, inputs[name], shape_name, shapes)
            for steps, h, w in shapes.tolist():  # type: ignore[union-attr]
                grid = ImageGrid(h // self.merge, w // self.merge, h * self.patch, w * self.patch)
                if name != "pixel_values":
                    grid = replace(grid, steps=steps, frames=steps * self.temporal)
                grids.append(grid)
        return tuple(grids)

    def _check_rows(self, name: str, pixels: Tensor, shape_name: str, shapes: Any) -> None:
        """Raise unless the rows of patches match the grids."""
        if not isinstance(shapes, Tensor) or shapes.ndim != 2 or shapes.shape[1] != 3:
            got = "nothing" if shapes is None else getattr(shapes, "shape", type(shapes).__name__)
            raise ValueError(
                f"inputs must hold {shape_name!r} (images, 3) next to {name!r}, got {got}; pass "
                f"everything that the processor returns."
            )
        whole = not (shapes.is_floating_point() or shapes.is_complex())
        if not whole or shapes.dtype == torch.bool or bool((shapes < 1).any()):
            raise ArgumentError(
                shape_name,
                f"must hold whole numbers of patches >= 1 (steps, down, across), got "
                f"{shapes.tolist()} of {shapes.dtype}; pass what the processor returns.",
            )
        values = self.channels * self.temporal * self.patch**2
        expected = (int(shapes.prod(-1).sum()), values)
        if tuple(pixels.shape) != expected or not len(shapes):
            raise ValueError(
                f"{name} must be rows of patches, shape {expected} by {shape_name}, got "
                f"{tuple(pixels.shape)}; pass what the processor returns."
            )
        if bool((shapes[:, 1:] % self.merge != 0).any()):
            raise ValueError(
                f"{shape_name} must hold multiples of {self.merge} patches down and across, got "
                f"{shapes.tolist()}."
            )
        if name == "pixel_values" and bool((shapes[:, 0] != 1).any()):
            raise ValueError(f"{shape_name} must begin with 1 (one step in time) for images.")

    @override
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        rows, cols = round(grid.rows * scale), round(grid.cols * scale)
        if rows < 1 or cols < 1:
            raise ValueError(
                f"scales: {scale} makes an image of {grid.height} x {grid.width} pixels smaller "
                f"than one token of {self.side} px; use larger scales."
            )
        size = {"height": rows * self.side, "width": cols * self.side}
        return replace(grid, rows=rows, cols=cols, **size)

    @override
    def rescale_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        rescaled: dict[str, Tensor] = {}
        remaining = list(grids)
        for name, shape_name in _KINDS.items():
            if inputs.get(name) is None:
                continue
            shapes = inputs[shape_name]
            pieces = inputs[name].split(shapes.prod(-1).tolist())
            targets, remaining = remaining[: len(shapes)], remaining[len(shapes) :]
            patches = [
                self._patches(resize_pixels(self._frames(rows, shape), (grid.height, grid.width)))
                for rows, shape, grid in zip(pieces, shapes.tolist(), targets, strict=True)
            ]
            rescaled[name] = torch.cat(patches)
            rescaled[shape_name] = self._shapes(targets).to(shapes)
        return rescaled

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        patches = []
        for picture, grid in zip(pictures, grids, strict=True):
            pixels = picture_pixels(picture, settings, (grid.height, grid.width))
            patches.append(self._patches(pixels.expand(self.temporal, -1, -1, -1)))
        return {"pixel_values": torch.cat(patches), "image_grid_thw": self._shapes(grids)}

    @override
    def canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> tuple[Tensor, ...]:
        """One frame of an image (the processor repeats it for a step), all frames of a video."""
        canvases = []
        for name, shape_name in _KINDS.items():
            if inputs.get(name) is None:
                continue
            shapes = inputs[shape_name]
            for rows, shape in zip(
                inputs[name].split(shapes.prod(-1).tolist()), shapes.tolist(), strict=True
            ):
                frames = self._frames(rows, shape)
                if name == "pixel_values" and not bool((frames == frames[:1]).all()):
                    raise ValueError(
                        "pixel_values hold an image whose step in time has different frames, so "
                        "it is not a still image; pass what the processor returns."
                    )
                canvases.append(frames[:1] if name == "pixel_values" else frames[None])
        return tuple(canvases)

    @override
    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], canvases: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        patches: dict[str, list[Tensor]] = {}
        for grid, canvas in zip(grids, canvases, strict=True):
            name = "pixel_values_videos" if grid.steps else "pixel_values"
            frames = canvas[0] if grid.steps else canvas.expand(self.temporal, -1, -1, -1)
            patches.setdefault(name, []).append(self._patches(frames))
        return {name: torch.cat(rows) for name, rows in patches.items()}

    def _frames(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        steps, h, w = shape
        layout = {"patch": self.patch, "temporal": self.temporal, "merge": self.merge}
        return patches_to_frames(rows, (steps, h, w), channels=self.channels, **layout)

    def _patches(self, frames: Tensor) -> Tensor:
        return frames_to_patches(frames, patch=self.patch, temporal=self.temporal, merge=self.merge)

    def _shapes(self, grids: Sequence[ImageGrid]) -> Tensor:
        sizes = [(g.steps or 1, g.rows * self.merge, g.cols * self.merge) for g in grids]
        return torch.tensor(sizes, dtype=torch.int64)

    @override
    def tower_calls(self, grids: Sequence[ImageGrid]) -> list[Sequence[ImageGrid]]:
        images = [grid for grid in grids if not grid.steps]
        videos = [grid for grid in grids if grid.steps]
        return [kind for kind in (images, videos) if kind]

    @override
    def features(self, tower_output: Any) -> Tensor:
        return tower_output.pooler_output  # after the merger

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        return (sum(grid.cells for grid in grids),)


@register_adapter("Qwen3VLForConditionalGeneration")
class Qwen3VLAdapter(QwenVLAdapter):
    """Adapter of Qwen3-VL: each step of a video follows its time, in a run of its own."""

    @override
    def runs(self, grid: ImageGrid) -> tuple[int, ...]:
        return (grid.rows * grid.cols,) * (grid.steps or 1)

    @override
    def block(self, ids: Tensor, where: Tensor) -> range:
        """Begins with the time before a video's first step, as long as that of its second."""
        first, last = int(where[0]), int(where[-1])
        between = [gap - 1 for gap in where.diff().tolist() if gap > 1]  # end, time, start
        return range(max(0, first - between[0] + 1) if between else first, last + 1)
