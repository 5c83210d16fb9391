"""The base of families that cut an image into square tiles and add an overview."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar
from warnings import warn

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from captum_mllm.adapters.base import Adapter, View
from captum_mllm.adapters.pixels import canvas_to_tiles, picture_pixels, tiles_to_canvas
from captum_mllm.functional import find_layout, join_tiles, resize_pixels, split_tiles
from captum_mllm.geometry import ImageGrid


class TileAdapter(Adapter):
    """Tiles row by row, then the overview if there is more than one tile.

    The overview is the whole image at the size of one tile ("thumbnail", "global image").
    """

    unit: int
    """Side of a token in pixels; a tile's side is a multiple of it."""

    hint: ClassVar[str] = ""
    """What else may be wrong where tiles and placeholders don't match."""

    # ---- to be implemented by a family ------------------------------------------------------

    @abstractmethod
    def tiles(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """All tiles of all images, overviews included.

        Args:
            inputs: the model's inputs of one sample.

        Returns:
            (tiles, channels, height, width).
        """

    @abstractmethod
    def tiles_per_image(self, ids: Tensor, per_tile: int) -> list[int]:
        """How many tiles each image has, overview included, according to its placeholders.

        Args:
            ids: the prompt (tokens,).
            per_tile: number of placeholders of one tile.

        Returns:
            One number per image, in the order of the prompt.
        """

    @abstractmethod
    def as_inputs(self, tiles: Tensor) -> dict[str, Tensor]:
        """The model's pixel inputs, made of all tiles.

        Args:
            tiles: (tiles, channels, height, width), image after image.

        Returns:
            Replacements of the pixel inputs.
        """

    # ---- the contract -----------------------------------------------------------------------

    @override
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        tiles = self.tiles(inputs)
        side = self._check_square(tiles)
        cells = side // self.unit
        counts = self.tiles_per_image(inputs["input_ids"][0], cells**2)
        if sum(counts) != len(tiles):
            raise ValueError(
                f"input_ids hold image tokens of {sum(counts)} tiles ({cells} x {cells} tokens "
                f"each), but pixel_values hold {len(tiles)}: text and images must come from the "
                f"same processor call, and the processor's image_seq_len(gth) must be the "
                f"model's.{self.hint}"
            )
        grids = []
        layouts = self.layouts(inputs["input_ids"][0], counts, cells**2)
        for image_tiles, layout in zip(tiles.split(counts), layouts, strict=True):
            down, across = layout or self._layout(image_tiles)
            rows, cols = down * cells, across * cells
            grids.append(ImageGrid(rows, cols, down * side, across * side, tiles=(down, across)))
        return tuple(grids)

    def layouts(
        self, ids: Tensor, counts: Sequence[int], per_tile: int
    ) -> list[tuple[int, int] | None]:
        """Layout of each image's tiles where the prompt tells it, else None (default).

        Args:
            ids: the prompt (tokens,).
            counts: number of tiles of each image, overview included.
            per_tile: number of placeholders of one tile.

        Returns:
            Per image (down, across), or None: then the layout is found from the pixels.
        """
        del ids, per_tile
        return [None] * len(counts)

    def _check_square(self, tiles: Tensor) -> int:
        channels = int(self.config.vision_config.num_channels)
        if tiles.shape[-3] != channels:
            raise ValueError(
                f"pixel_values have {tiles.shape[-3]} channels, but this model takes {channels}."
            )
        height, width = tiles.shape[-2:]
        if height != width or height % self.unit:
            raise ValueError(
                f"pixel_values hold tiles of {height} x {width} pixels, but this model takes "
                f"square tiles whose side is a multiple of {self.unit} pixels: it would silently "
                f"scramble others. Let the processor cut the tiles."
            )
        return height

    @staticmethod
    def _layout(tiles: Tensor) -> tuple[int, int]:
        """Layout (down, across) of the tiles of one image."""
        if len(tiles) == 1:
            return 1, 1
        if len(tiles) == 2:
            raise ValueError(
                "pixel_values hold an image of 2 tiles: one tile has no overview and two tiles "
                "have one, so it must be 1, or 3 or more. Let the processor cut the tiles."
            )
        layout, certain = find_layout(tiles[:-1], tiles[-1])
        if not certain:
            warn(
                f"pixel_values don't tell how the {len(tiles) - 1} tiles of an image lie (is it "
                f"blank, or noise?): {layout[0]} down and {layout[1]} across is assumed.",
                stacklevel=2,
            )
        return layout

    @override
    def views(self, grid: ImageGrid) -> tuple[View, ...]:
        down, across = grid.tiles
        side = grid.rows // down
        tokens = rearrange(
            torch.arange(grid.cells),
            "(down across rows cols) -> (down rows) (across cols)",
            down=down, across=across, rows=side,
        )  # fmt: skip
        if down * across == 1:
            return (View(tokens),)
        overview = torch.arange(grid.cells, grid.cells + side**2).reshape(side, side)
        return View(tokens), View(overview)

    @staticmethod
    def count(grid: ImageGrid) -> int:
        """Number of an image's tiles, overview included.

        Args:
            grid: the image's grid.

        Returns:
            The number of tiles; 1 for an image of one tile, which has no overview.
        """
        n = grid.tiles[0] * grid.tiles[1]
        return n if n == 1 else n + 1

    @override
    def runs(self, grid: ImageGrid) -> tuple[int, ...]:
        return (grid.cells // (grid.tiles[0] * grid.tiles[1]),) * self.count(grid)

    @override
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        down, across = grid.tiles
        cells = round(grid.rows // down * scale)
        if cells < 1:
            raise ValueError(
                f"scales: {scale} makes tiles of {grid.height // down} pixels smaller than one "
                f"token of {self.unit} px; use larger scales."
            )
        rows, cols = down * cells, across * cells
        return ImageGrid(rows, cols, rows * self.unit, cols * self.unit, tiles=grid.tiles)

    @override
    def rescale_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        resized = []
        for tiles, grid in self._by_image(inputs, grids):
            n = grid.tiles[0] * grid.tiles[1]
            # The joined image is resized, so that the tiles' borders leave no trace.
            canvas = join_tiles(tiles[:n], grid.tiles)
            size, side = (grid.height, grid.width), grid.height // grid.tiles[0]
            resized.append(split_tiles(resize_pixels(canvas[None], size)[0], grid.tiles))
            if n > 1:
                resized.append(resize_pixels(tiles[n:], (side, side)))
        return self.as_inputs(torch.cat(resized))

    def _by_image(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> Iterator[tuple[Tensor, ImageGrid]]:
        """The tiles of each image, overview included, with its grid."""
        tiles = self.tiles(inputs).split([self.count(grid) for grid in grids])
        return zip(tiles, grids, strict=True)

    @override
    def canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> tuple[Tensor, ...]:
        pairs = self._by_image(inputs, grids)
        return tuple(tiles_to_canvas(tiles, grid.tiles) for tiles, grid in pairs)

    @override
    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], canvases: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        pairs = zip(self._by_image(inputs, grids), canvases, strict=True)
        changed = [canvas_to_tiles(tiles, grid.tiles, canvas) for (tiles, grid), canvas in pairs]
        return self.as_inputs(torch.cat(changed))

    @override
    def flipped(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], axes: Sequence[int]
    ) -> dict[str, Tensor]:
        flipped = []
        for tiles, grid in self._by_image(inputs, grids):
            n = grid.tiles[0] * grid.tiles[1]
            canvas = join_tiles(tiles[:n], grid.tiles).flip(tuple(axes))
            flipped += [split_tiles(canvas, grid.tiles), tiles[n:].flip(tuple(axes))]
        return self.as_inputs(torch.cat(flipped))

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        tiles = []
        for picture, grid in zip(pictures, grids, strict=True):
            side = grid.height // grid.tiles[0]
            pixels = picture_pixels(picture, settings, (grid.height, grid.width))
            tiles.append(split_tiles(pixels, grid.tiles))
            if self.count(grid) > 1:
                tiles.append(picture_pixels(picture, settings, (side, side))[None])
        return self.as_inputs(torch.cat(tiles))
