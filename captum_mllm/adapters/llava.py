"""LLaVA-1.5: one CLIP (or SigLIP) frame per image, tokens row by row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.base import Adapter
from captum_mllm.adapters.registry import register_adapter
from captum_mllm.geometry import ImageGrid

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Extra tokens that each kind of vision tower puts before its patches."""


@register_adapter("LlavaForConditionalGeneration")
class LlavaAdapter(Adapter):
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
        self.patch = int(vision.patch_size)
        keeps_all = self.config.vision_feature_select_strategy == "full"
        self.tower_extra = _CLASS_TOKENS[vision.model_type]
        self.extra = self.tower_extra if keeps_all else 0

    @property
    @override
    def tower(self) -> nn.Module:
        return self.model.get_encoder(modality="image")

    @override
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        pixels = inputs["pixel_values"]
        channels = int(self.config.vision_config.num_channels)
        if pixels.ndim != 4 or pixels.shape[1] != channels or not len(pixels):
            raise ValueError(
                f"pixel_values must be (images, {channels} channels, height, width) with at least "
                f"one image, got shape {tuple(pixels.shape)}; pass what the processor returns."
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
    def tokens_per_image(self, grid: ImageGrid) -> int:
        return grid.cells + self.extra

    @override
    def grid_tokens(self, grid: ImageGrid) -> Int64[Tensor, " cells"]:
        return torch.arange(self.extra, self.extra + grid.cells)

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
        pixels = inputs["pixel_values"]
        # Bicubic with antialiasing, as the CLIP processor resizes pictures.
        resized = F.interpolate(
            pixels.float(),
            size=(grids[0].height, grids[0].width),
            mode="bicubic",
            align_corners=False,
            antialias=True,
        )
        return {"pixel_values": resized.to(pixels.dtype)}

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], processor: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        settings = processor.image_processor
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
        return dict(settings(images=list(pictures), return_tensors="pt", **overrides))

    @override
    def check_features(self, tower_output: Any, grids: Sequence[ImageGrid]) -> None:
        images, tokens = tower_output.last_hidden_state.shape[:2]
        expected = (len(grids), grids[0].cells + self.tower_extra)
        if (images, tokens) != expected:
            raise ValueError(
                f"model: the vision tower gave {tokens} features for each of {images} images, "
                f"but the pixels make {expected[1]} for each of {expected[0]}."
            )

    @override
    @contextmanager
    def size_hooks(self) -> Iterator[None]:
        """Have the tower interpolate its position embeddings; a no-op at its native size."""

        def interpolate(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, "interpolate_pos_encoding": True}

        handle = self.tower.register_forward_pre_hook(interpolate, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
