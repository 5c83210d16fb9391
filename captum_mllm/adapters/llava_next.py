"""LLaVA-NeXT (1.6): the base image, then tiles without padding, a newline after each row."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, ClassVar
from warnings import warn

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.base import Adapter, View
from captum_mllm.adapters.pixels import cut_window, enlarged, picture_pixels
from captum_mllm.adapters.registry import register_adapter
from captum_mllm.functional import WHOLE, Box, join_tiles, resize_pixels, split_tiles
from captum_mllm.geometry import ImageGrid
from captum_mllm.validation import ArgumentError

Size = tuple[int, int]

_APART = 0.7
"""Mean difference, in deviations, of pictures that are not one: 1 for noise, .1 for resampling."""


@register_adapter("LlavaNextForConditionalGeneration")
class LlavaNextAdapter(Adapter):
    """Adapter of ``LlavaNextForConditionalGeneration``.

    An image is seen twice: stretched to one tile (base image), and with its aspect kept, padded to
    one of the config's ``image_grid_pinpoints`` and cut into tiles. The tokens of the padding are
    dropped. The grid covers what has tokens: the picture, except for less than one patch at its
    edges. Tiles are of one fixed size: larger scales are computed through windows of the enlarged
    image, each padded and cut as the image is; smaller scales are dropped.
    """

    fixed_size = True
    tile_axis = True
    required: ClassVar[Mapping[str, str]] = {"image_sizes": "the tiles can't be joined"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        vision = self.config.vision_config
        self.patch, self.side = int(vision.patch_size), int(vision.image_size)
        self.tower_extra = 1 if vision.model_type == "clip_vision_model" else 0
        drops = self.config.vision_feature_select_strategy == "default"
        if drops != bool(self.tower_extra):
            raise ValueError(
                f"model: LLaVA-NeXT with a {vision.model_type!r} tower and "
                f"vision_feature_select_strategy "
                f"{self.config.vision_feature_select_strategy!r} has no square grid of image "
                f"tokens; a CLIP tower needs 'default', a tower without class token 'full'."
            )
        self.base_cells = self.side // self.patch

    @override
    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Also warn where the tiles, joined by image_sizes, don't show what the base image does."""
        super().check_inputs(inputs)
        grids = self.grids(inputs)
        found = int((inputs["input_ids"] == self.visual_ids[0]).sum())
        if found != sum(sum(self.runs(grid)) for grid in grids):
            return  # an error where the placeholders are read
        pairs = zip(inputs["pixel_values"], self.canvases(inputs, grids), strict=True)
        for tiles, canvas in pairs:
            base = tiles[0].detach().float()
            again = resize_pixels(canvas.detach().float(), (self.side, self.side))[0]
            # By patches, as noise of single pixels is no sign; and a flat picture has no deviation.
            base, again = (F.avg_pool2d(image, self.patch) for image in (base, again))
            if float((again - base).abs().mean()) > max(0.05, _APART * float(base.std())):
                warn(
                    "pixel_values hold tiles that, joined for the picture's size in image_sizes, "
                    "show something else than their base image: are image_sizes those of another "
                    "picture? Pass what one call of the processor returns.",
                    stacklevel=2,
                )

    @override
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
        expected = (self.side, self.side)
        if pixels.ndim != 5 or tuple(pixels.shape[-2:]) != expected:
            raise ValueError(
                f"pixel_values must be (images, tiles, channels, {self.side}, {self.side}), got "
                f"shape {tuple(pixels.shape)}; pass what the processor returns."
            )
        if tuple(sizes.shape) != (len(pixels), 2):
            raise ValueError(
                f"image_sizes must be (images, 2) with one (height, width) for each of "
                f"{len(pixels)} images, got shape {tuple(sizes.shape)}."
            )
        if sizes.is_floating_point() or bool((sizes < 1).any()):
            raise ArgumentError(
                "image_sizes",
                f"must hold whole pixels >= 1, (height, width) of each picture, got "
                f"{sizes.tolist()}; pass what the processor returns.",
            )
        grids = tuple(self._grid((int(height), int(width))) for height, width in sizes)
        needed = max(1 + grid.tiles[0] * grid.tiles[1] for grid in grids)
        if pixels.shape[1] < needed:
            raise ValueError(
                f"pixel_values hold {pixels.shape[1]} tiles per image, but image_sizes and the "
                f"model's image_grid_pinpoints make {needed}: is this the model's processor?"
            )
        return grids

    def _pinpoint(self, picture: Size) -> Size:
        """The size (height, width) in pixels that a picture of that size is padded to."""
        from transformers.image_processing_utils import select_best_resolution

        return select_best_resolution(picture, self.config.image_grid_pinpoints)

    def _content(self, picture: Size) -> tuple[Size, Size]:
        """Size of the picture within the padding, and the (y, x) of its upper left corner there."""
        height, width = picture
        padded_h, padded_w = self._pinpoint(picture)
        by_h, by_w = padded_h / height, padded_w / width
        if by_w < by_h:
            size = min(ceil(height * by_w), padded_h), padded_w
        else:
            size = padded_h, min(ceil(width * by_h), padded_w)
        return size, ((padded_h - size[0]) // 2, (padded_w - size[1]) // 2)

    def _grid(self, picture: Size) -> ImageGrid:
        height, width = picture
        padded_h, padded_w = self._pinpoint(picture)
        rows, cols = padded_h // self.patch, padded_w // self.patch
        # Tokens of the padding are dropped as the model does, in whole rows or columns.
        top = left = 0
        if width / height > cols / rows:
            top = (rows - int(round(height * (cols / width), 7))) // 2
        else:
            left = (cols - int(round(width * (rows / height), 7))) // 2
        rows, cols = rows - 2 * top, cols - 2 * left
        if not rows or not cols:
            raise ValueError(
                f"image_sizes: a picture of {height} x {width} pixels keeps no row or no column of "
                f"tile tokens, so it has no map. Pad or crop the picture before the processor."
            )
        (seen_h, seen_w), (y, x) = self._content(picture)
        by_h, by_w = height / seen_h, width / seen_w
        upper, leftmost = (top * self.patch - y) * by_h, (left * self.patch - x) * by_w
        box = (
            leftmost,
            upper,
            leftmost + cols * self.patch * by_w,
            upper + rows * self.patch * by_h,
        )
        return ImageGrid(
            rows,
            cols,
            rows * self.patch,
            cols * self.patch,
            tiles=(padded_h // self.side, padded_w // self.side),
            picture=picture,
            box=box,
        )

    @override
    def runs(self, grid: ImageGrid) -> tuple[int, ...]:
        return (self.base_cells**2 + grid.rows * (grid.cols + 1),)

    @override
    def views(self, grid: ImageGrid) -> tuple[View, ...]:
        n = self.base_cells
        after = torch.arange(grid.rows * (grid.cols + 1)).reshape(grid.rows, grid.cols + 1)
        return (
            View(n * n + after[:, :-1]),  # the last of each row is the newline
            View(torch.arange(n * n).reshape(n, n), self._base_box(grid)),
        )

    @staticmethod
    def _picture(grid: ImageGrid) -> Size:
        if grid.picture is None or grid.box is None:
            raise ValueError("grid lacks its picture; use the grids that this adapter returns.")
        return grid.picture

    def _base_box(self, grid: ImageGrid) -> Box:
        """The box of the whole picture, which the base image shows, in fractions of the grid."""
        height, width = self._picture(grid)
        left, upper, right, lower = grid.box or WHOLE
        wide, high = right - left, lower - upper
        return (-left / wide, -upper / high, (width - left) / wide, (height - upper) / high)

    @override
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        return enlarged(grid, scale)

    @override
    def canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> tuple[Tensor, ...]:
        """The whole picture as its tiles show it, without the padding."""
        canvases = []
        for tiles, grid in zip(inputs["pixel_values"], grids, strict=True):
            (h, w), (y, x) = self._content(self._picture(grid))
            padded = join_tiles(tiles[1 : 1 + grid.tiles[0] * grid.tiles[1]], grid.tiles)
            canvases.append(padded[None, :, y : y + h, x : x + w])
        return tuple(canvases)

    @override
    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], canvases: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        changed = []
        before = self.canvases(inputs, grids)
        images = zip(inputs["pixel_values"], before, canvases, grids, strict=True)
        for tiles, old, new, grid in images:
            (h, w), (y, x) = self._content(self._picture(grid))
            n = 1 + grid.tiles[0] * grid.tiles[1]
            padded = join_tiles(tiles[1:n], grid.tiles).to(new.dtype, copy=True)
            padded[:, y : y + h, x : x + w] = new[0]
            base = tiles[:1] + resize_pixels(new - old, (self.side, self.side))
            changed.append(torch.cat([base, split_tiles(padded, grid.tiles), tiles[n:]]))
        return {"pixel_values": torch.stack(changed)}

    @override
    def flipped(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], axes: Sequence[int]
    ) -> dict[str, Tensor]:
        pixels = super().flipped(inputs, grids, axes)["pixel_values"].clone()
        pixels[:, 0] = inputs["pixel_values"][:, 0].flip(tuple(axes))  # the base image, exactly
        return {"pixel_values": pixels}

    @override
    def window_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], boxes: Sequence[Box]
    ) -> dict[str, Tensor]:
        windows = []
        for tiles, grid, box in zip(inputs["pixel_values"], grids, boxes, strict=True):
            (h, w), (y, x) = self._content(self._picture(grid))
            padded = join_tiles(tiles[1 : 1 + grid.tiles[0] * grid.tiles[1]], grid.tiles)
            # An odd pixel of padding is at the bottom (right): that corner has some if any has.
            padding = padded[:, -1, -1]
            window = cut_window(padded[:, y : y + h, x : x + w], box, (h, w))
            # The joined tiles have more pixels than the base image: both are made of them.
            base = resize_pixels(window[None], (self.side, self.side))[0]
            windows.append(self._tiles(base, window, grid, padding))
        return self._inputs(windows, grids, inputs["image_sizes"])

    @override
    def window_canvas(self, grid: ImageGrid, box: Box) -> Box:
        """The grid cuts a little off a window (or adds some), as it does off the whole picture."""
        left, upper, right, lower = self._base_box(grid)
        x, y, wide, high = box[0], box[1], box[2] - box[0], box[3] - box[1]
        # A point p of the picture lies at left + p (right - left) on the grid.
        begin_x = left + x * (right - left) - left * wide
        begin_y = upper + y * (lower - upper) - upper * high
        return (begin_x, begin_y, begin_x + wide, begin_y + high)

    def _tiles(self, base: Tensor, picture: Tensor, grid: ImageGrid, padding: Tensor) -> Tensor:
        """Base image and padded tiles of a picture; one padding value per channel."""
        size = self._picture(grid)
        (h, w), (y, x) = self._content(size)
        padded = padding[:, None, None].repeat(1, *self._pinpoint(size))
        padded[:, y : y + h, x : x + w] = resize_pixels(picture[None], (h, w))[0]
        return torch.cat([base[None], split_tiles(padded, grid.tiles)])

    def _inputs(
        self, images: Sequence[Tensor], grids: Sequence[ImageGrid], like: Tensor | None
    ) -> dict[str, Tensor]:
        most = max(len(tiles) for tiles in images)
        padded = [F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - len(tiles))) for tiles in images]
        sizes = torch.tensor([grid.picture for grid in grids])
        sizes = sizes if like is None else sizes.to(like)
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        images = []
        for picture, grid in zip(pictures, grids, strict=True):
            base = picture_pixels(picture, settings, (self.side, self.side))
            pixels = picture_pixels(picture, settings, self._content(self._picture(grid))[0])
            black = picture_pixels(Image.new("RGB", (1, 1)), settings, (1, 1))[:, 0, 0]
            images.append(self._tiles(base, pixels, grid, black))
        return self._inputs(images, grids, None)

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        tiles = sum(1 + grid.tiles[0] * grid.tiles[1] for grid in grids)
        return (tiles, self.base_cells**2 + self.tower_extra)
