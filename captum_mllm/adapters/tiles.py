"""Families that cut an image into square tiles and add an overview: what they share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from warnings import warn

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from captum_mllm.adapters.base import Adapter, View
from captum_mllm.adapters.pixels import frame_tiles, picture_pixels, tiles_frame
from captum_mllm.functional import find_layout, join_tiles, resize_pixels, split_tiles
from captum_mllm.geometry import ImageGrid


class TileAdapter(Adapter):
    """Tiles row by row, the overview last where there is more than one tile.

    The overview is the whole picture at the size of one tile ("thumbnail", "global image").
    """

    unit: int
    """Pixels along a side that make one token; tiles are multiples of it."""

    hint: ClassVar[str] = ""
    """What else may be wrong where tiles and placeholders don't fit."""

    # ---- what a subclass says ---------------------------------------------------------------

    @abstractmethod
    def tiles(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """All tiles of all images, overviews included, (tiles, channels, height, width).

        Args:
            inputs: the model's inputs of one sample.

        Returns:
            (tiles, channels, height, width).
        """

    @abstractmethod
    def tiles_per_image(self, ids: Tensor, per_tile: int) -> list[int]:
        """How many tiles each image has, overview included, as its placeholders tell.

        Args:
            ids: (tokens,): the prompt.
            per_tile: placeholders of one tile.

        Returns:
            One number per image, in the order of the prompt.
        """

    @abstractmethod
    def as_inputs(self, tiles: Tensor) -> dict[str, Tensor]:
        """The model's pixel inputs made of all tiles.

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
        found = []
        told = self.layouts(inputs["input_ids"][0], counts, cells**2)
        for own, layout in zip(tiles.split(counts), told, strict=True):
            down, across = layout or self._layout(own)
            rows, cols = down * cells, across * cells
            found.append(ImageGrid(rows, cols, down * side, across * side, tiles=(down, across)))
        return tuple(found)

    def layouts(
        self, ids: Tensor, counts: Sequence[int], per_tile: int
    ) -> list[tuple[int, int] | None]:
        """Tiles down and across of each image where the prompt tells, else None (default).

        Args:
            ids: (tokens,): the prompt.
            counts: tiles of each image, overview included.
            per_tile: placeholders of one tile.

        Returns:
            Per image (down, across), or None: then the pixels tell.
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
                f"square tiles whose side is a multiple of {self.unit} pixels: it would scramble "
                f"others without a word. Let the processor cut the tiles."
            )
        return height

    @staticmethod
    def _layout(own: Tensor) -> tuple[int, int]:
        """Tiles down and across of one image."""
        if len(own) == 1:
            return 1, 1
        if len(own) == 2:
            raise ValueError(
                "pixel_values hold an image of 2 tiles: one tile needs no overview and two have "
                "one, so it must be 1 tile, or 3 and more. Let the processor cut the tiles."
            )
        layout, certain = find_layout(own[:-1], own[-1])
        if not certain:
            warn(
                f"pixel_values don't tell how the {len(own) - 1} tiles of an image lie (is it "
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
            grid: the image's.

        Returns:
            1 for a picture of one tile, which has no overview.
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
        made = []
        for own, grid in zip(
            self.tiles(inputs).split([self.count(grid) for grid in grids]), grids, strict=True
        ):
            n = grid.tiles[0] * grid.tiles[1]
            # Whole pictures are resized, so that nothing happens at the tiles' borders.
            picture = join_tiles(own[:n], grid.tiles)
            size, side = (grid.height, grid.width), grid.height // grid.tiles[0]
            made.append(split_tiles(resize_pixels(picture[None], size)[0], grid.tiles))
            if n > 1:
                made.append(resize_pixels(own[n:], (side, side)))
        return self.as_inputs(torch.cat(made))

    @override
    def canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> tuple[Tensor, ...]:
        own = self.tiles(inputs).split([self.count(grid) for grid in grids])
        return tuple(tiles_frame(t, g.tiles) for t, g in zip(own, grids, strict=True))

    @override
    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], frames: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        own = self.tiles(inputs).split([self.count(grid) for grid in grids])
        made = zip(own, grids, frames, strict=True)
        return self.as_inputs(torch.cat([frame_tiles(t, g.tiles, new) for t, g, new in made]))

    @override
    def mirrored(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        made = []
        own = self.tiles(inputs).split([self.count(grid) for grid in grids])
        for tiles, grid in zip(own, grids, strict=True):
            n = grid.tiles[0] * grid.tiles[1]
            picture = join_tiles(tiles[:n], grid.tiles).flip(-1)
            made += [split_tiles(picture, grid.tiles), tiles[n:].flip(-1)]
        return self.as_inputs(torch.cat(made))

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        made = []
        for picture, grid in zip(pictures, grids, strict=True):
            side = grid.height // grid.tiles[0]
            pixels = picture_pixels(picture, settings, (grid.height, grid.width))
            made.append(split_tiles(pixels, grid.tiles))
            if self.count(grid) > 1:
                made.append(picture_pixels(picture, settings, (side, side))[None])
        return self.as_inputs(torch.cat(made))
