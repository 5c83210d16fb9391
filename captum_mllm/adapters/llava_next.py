"""LLaVA-NeXT (1.6): base image first, then tiles without padding, a newline after each row."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, ClassVar

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

Size = tuple[int, int]


@register_adapter("LlavaNextForConditionalGeneration")
class LlavaNextAdapter(Adapter):
    """Adapter of ``LlavaNextForConditionalGeneration``.

    A picture is seen twice: stretched to one tile (base image), and with its aspect kept on a
    canvas of tiles, one of the config's ``image_grid_pinpoints``, whose padding is cut off the
    tokens. The frame is that part of the canvas which has tokens: the picture, but for less than
    one patch at its edges. Tiles are of one fixed size: larger scales are seen through windows of
    the enlarged picture, each as a picture of its own on the same canvas; smaller ones are dropped.
    """

    fixed_size = True
    tile_axis = True
    required: ClassVar[Mapping[str, str]] = {"image_sizes": "the tiles can't be put together"}

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
        grids = tuple(self._grid((int(height), int(width))) for height, width in sizes)
        needed = max(1 + grid.tiles[0] * grid.tiles[1] for grid in grids)
        if pixels.shape[1] < needed:
            raise ValueError(
                f"pixel_values hold {pixels.shape[1]} tiles an image, but image_sizes and the "
                f"model's image_grid_pinpoints make {needed}: is the processor that of the model?"
            )
        return grids

    def _canvas(self, picture: Size) -> Size:
        """The pinpoint (height, width) that a picture of that size is put on."""
        from transformers.image_processing_utils import select_best_resolution

        return select_best_resolution(picture, self.config.image_grid_pinpoints)

    def _content(self, picture: Size) -> tuple[Size, Size]:
        """Size of the picture on its canvas, and where its upper left corner lies there."""
        height, width = picture
        canvas_h, canvas_w = self._canvas(picture)
        by_h, by_w = canvas_h / height, canvas_w / width
        if by_w < by_h:
            size = min(ceil(height * by_w), canvas_h), canvas_w
        else:
            size = canvas_h, min(ceil(width * by_h), canvas_w)
        return size, ((canvas_h - size[0]) // 2, (canvas_w - size[1]) // 2)

    def _grid(self, picture: Size) -> ImageGrid:
        height, width = picture
        canvas_h, canvas_w = self._canvas(picture)
        rows, cols = canvas_h // self.patch, canvas_w // self.patch
        # Tokens of the padding are cut off as the model does, in whole tokens.
        top = left = 0
        if width / height > cols / rows:
            top = (rows - int(round(height * (cols / width), 7))) // 2
        else:
            left = (cols - int(round(width * (rows / height), 7))) // 2
        rows, cols = rows - 2 * top, cols - 2 * left
        if not rows or not cols:
            raise ValueError(
                f"image_sizes: of a picture of {height} x {width} pixels not one row (column) of "
                f"tile tokens is left, so it has no map. Pad or crop the picture before the "
                f"processor."
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
            tiles=(canvas_h // self.side, canvas_w // self.side),
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
            raise ValueError("grid lacks its picture; use the grids that this adapter gives.")
        return grid.picture

    def _base_box(self, grid: ImageGrid) -> Box:
        """The whole picture, which the base image shows, in fractions of the frame."""
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
        """The whole picture as it lies on its canvas of tiles, without the padding."""
        found = []
        for own, grid in zip(inputs["pixel_values"], grids, strict=True):
            (h, w), (y, x) = self._content(self._picture(grid))
            canvas = join_tiles(own[1 : 1 + grid.tiles[0] * grid.tiles[1]], grid.tiles)
            found.append(canvas[None, :, y : y + h, x : x + w])
        return tuple(found)

    @override
    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], frames: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        made = []
        before = self.canvases(inputs, grids)
        for own, old, new, grid in zip(inputs["pixel_values"], before, frames, grids, strict=True):
            (h, w), (y, x) = self._content(self._picture(grid))
            n = 1 + grid.tiles[0] * grid.tiles[1]
            canvas = join_tiles(own[1:n], grid.tiles).to(new.dtype, copy=True)
            canvas[:, y : y + h, x : x + w] = new[0]
            base = own[:1] + resize_pixels(new - old, (self.side, self.side))
            made.append(torch.cat([base, split_tiles(canvas, grid.tiles), own[n:]]))
        return {"pixel_values": torch.stack(made)}

    @override
    def mirrored(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        pixels = super().mirrored(inputs, grids)["pixel_values"].clone()
        pixels[:, 0] = inputs["pixel_values"][:, 0].flip(-1)  # the base image, exactly
        return {"pixel_values": pixels}

    @override
    def window_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], boxes: Sequence[Box]
    ) -> dict[str, Tensor]:
        made = []
        for own, grid, box in zip(inputs["pixel_values"], grids, boxes, strict=True):
            (h, w), (y, x) = self._content(self._picture(grid))
            canvas = join_tiles(own[1 : 1 + grid.tiles[0] * grid.tiles[1]], grid.tiles)
            # An odd pixel of padding is at the bottom (right): that corner has some if any has.
            padding = canvas[:, -1, -1]
            window = cut_window(canvas[:, y : y + h, x : x + w], box, (h, w))
            # The canvas has more pixels than the base image: both come from it.
            base = resize_pixels(window[None], (self.side, self.side))[0]
            made.append(self._tiles(base, window, grid, padding))
        return self._inputs(made, grids, inputs["image_sizes"])

    @override
    def window_frame(self, grid: ImageGrid, box: Box) -> Box:
        """The frame cuts a little off the picture (or adds some), of a window as of the whole."""
        left, upper, right, lower = self._base_box(grid)
        x, y, wide, high = box[0], box[1], box[2] - box[0], box[3] - box[1]
        # A point p of the picture lies at left + p (right - left) in the frame.
        begin_x = left + x * (right - left) - left * wide
        begin_y = upper + y * (lower - upper) - upper * high
        return (begin_x, begin_y, begin_x + wide, begin_y + high)

    def _tiles(self, base: Tensor, picture: Tensor, grid: ImageGrid, padding: Tensor) -> Tensor:
        """Base image and tiles of a picture on the grid's canvas; one padding value a channel."""
        size = self._picture(grid)
        (h, w), (y, x) = self._content(size)
        canvas = padding[:, None, None].repeat(1, *self._canvas(size))
        canvas[:, y : y + h, x : x + w] = resize_pixels(picture[None], (h, w))[0]
        return torch.cat([base[None], split_tiles(canvas, grid.tiles)])

    def _inputs(
        self, made: Sequence[Tensor], grids: Sequence[ImageGrid], like: Tensor | None
    ) -> dict[str, Tensor]:
        most = max(len(tiles) for tiles in made)
        padded = [F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - len(tiles))) for tiles in made]
        sizes = torch.tensor([grid.picture for grid in grids])
        sizes = sizes if like is None else sizes.to(like)
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        made = []
        for picture, grid in zip(pictures, grids, strict=True):
            base = picture_pixels(picture, settings, (self.side, self.side))
            pixels = picture_pixels(picture, settings, self._content(self._picture(grid))[0])
            black = picture_pixels(Image.new("RGB", (1, 1)), settings, (1, 1))[:, 0, 0]
            made.append(self._tiles(base, pixels, grid, black))
        return self._inputs(made, grids, None)

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        tiles = sum(1 + grid.tiles[0] * grid.tiles[1] for grid in grids)
        return (tiles, self.base_cells**2 + self.tower_extra)
