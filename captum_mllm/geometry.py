"""Where the model's canvas lies in the user's picture, and how to place maps in that picture.

The *picture* is the user's file, the *image* is what the model saw of it, and the *canvas* is the
image's extent in pixels.
"""

from dataclasses import asdict, dataclass
from math import ceil, isfinite, prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class ImageGrid:
    """One image or video as the model saw it: its grid of cells and its canvas in pixels.

    Args:
        rows: cells along the height; with tiles, of all tiles joined.
        cols: cells along the width.
        height: height of the canvas, pixels.
        width: width of the canvas, pixels.
        tiles: (down, across), the tiles that the canvas is cut into, default (1, 1).
        steps: cells along the time axis of a video; 0 (default) for a still image.
        frames: frames of the video as the model saw it, a multiple of ``steps`` (processors may
            sample frames and repeat the last one); 0 for a still image.
        picture: (height, width) of the original picture where the inputs tell it, else None
            (default).
        box: the part of that picture that the canvas shows, as in :class:`ImageGeometry`, where
            the inputs tell it, else None (default).
    """

    rows: int
    cols: int
    height: int
    width: int
    tiles: tuple[int, int] = (1, 1)
    steps: int = 0
    frames: int = 0
    picture: tuple[int, int] | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols); (steps, rows, cols) for a video."""
        return (self.steps, self.rows, self.cols) if self.steps else (self.rows, self.cols)

    @property
    def cells(self) -> int:
        """Number of cells on the grid."""
        return prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ImageGrid":
        """Inverse of :meth:`to_dict`, even if a JSON file turned tuples into lists.

        Args:
            data: from :meth:`to_dict`.

        Returns:
            The same grid.
        """
        return cls(**_tuples(data))


@dataclass(frozen=True)
class ImageGeometry:
    """The part of the original picture that the model's canvas shows.

    Args:
        box: (left, upper, right, lower) in pixels of the original picture, PIL's order; parts
            outside the picture (padding) are allowed, e.g. a negative ``left``.

    Raises:
        ValueError: the box is empty or not finite.

    Example:
        >>> ImageGeometry.stretched(height=100, width=300)
        ImageGeometry(box=(0.0, 0.0, 300.0, 100.0))
    """

    box: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        if not isinstance(self.box, tuple) or len(self.box) != 4:
            raise TypeError(
                f"geometry box must be a tuple (left, upper, right, lower), got {self.box!r}."
            )
        left, upper, right, lower = self.box
        if not all(isfinite(edge) for edge in self.box) or right <= left or lower <= upper:
            raise ValueError(
                f"geometry box must be (left, upper, right, lower) with right > left and "
                f"lower > upper, got {self.box}."
            )

    @classmethod
    def stretched(cls, height: int, width: int) -> "ImageGeometry":
        """The canvas shows the whole picture, stretched: no crop, no padding.

        Args:
            height: height of the original picture, pixels.
            width: width of the original picture, pixels.

        Returns:
            The geometry whose box is the whole picture.
        """
        return cls((0.0, 0.0, float(width), float(height)))


@dataclass(frozen=True)
class Preprocessing:
    """What an image processor does to a picture: pad to a square, resize, centre crop.

    Most families stretch the whole picture to a canvas of the model's choice: ``whole``.

    Args:
        pad_to_square: whether the picture is first padded to a square, centred; default False.
        shortest_edge: the shorter side is resized to this many pixels and the aspect is kept; or
            None (default).
        resize: the picture is stretched to (height, width); or None (default).
        crop: the centre (height, width) is cropped (zero-padded where smaller); or None (default).
        whole: whether the canvas shows the whole picture whatever its size, default False; the
            settings above are then unused.
        keeps_aspect: with ``whole``, each side of the canvas is the picture's times one factor,
            rounded by at most this many pixels; None (default) where the canvas may have any
            aspect.
    """

    pad_to_square: bool = False
    shortest_edge: int | None = None
    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    whole: bool = False
    keeps_aspect: int | None = None

    def check(self, height: int, width: int, grid: ImageGrid) -> None:
        """Compare a picture's size with the canvas that the model saw.

        Args:
            height: height of the original picture, pixels.
            width: width of the original picture, pixels.
            grid: the image as the model saw it.

        Raises:
            ValueError: no picture of that size gives that canvas.
        """
        if self.whole:
            fits = self.keeps_aspect is None or _one_factor(
                (height, width), (grid.height, grid.width), self.keeps_aspect
            )
            gives = "another aspect"
        else:
            fits = self.canvas(height, width) == (grid.height, grid.width)
            gives = f"a canvas of {self.canvas(height, width)}"
        if not fits:
            raise ValueError(
                f"size {(height, width)} through the processor's settings gives {gives}, but the "
                f"model saw {(grid.height, grid.width)} pixels: was the processor called with "
                f"other settings, or is size not (height, width)? Pass geometry=ImageGeometry(box)."
            )

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) of the canvas for a picture of that size, unless ``whole``.

        Args:
            height: height of the original picture, pixels.
            width: width of the original picture, pixels.

        Returns:
            (height, width) in pixels as the model sees it.
        """
        return self.crop or self._resized(height, width)

    def geometry(self, height: int, width: int) -> ImageGeometry:
        """The box of the picture that the model's canvas shows.

        Args:
            height: height of the original picture, pixels.
            width: width of the original picture, pixels.

        Returns:
            Where the canvas lies in the picture, in the picture's pixels.

        Example:
            >>> Preprocessing(shortest_edge=100, crop=(100, 100)).geometry(200, 600)
            ImageGeometry(box=(200.0, 0.0, 400.0, 200.0))
        """
        if self.whole:
            return ImageGeometry.stretched(height, width)
        padded_h, padded_w = self._padded(height, width)
        resized_h, resized_w = self._resized(height, width)
        crop_h, crop_w = self.crop or (resized_h, resized_w)
        top = _crop_start(resized_h, crop_h)
        left = _crop_start(resized_w, crop_w)
        scale_y, scale_x = padded_h / resized_h, padded_w / resized_w
        off_y, off_x = (padded_h - height) // 2, (padded_w - width) // 2
        return ImageGeometry(
            (
                left * scale_x - off_x,
                top * scale_y - off_y,
                (left + crop_w) * scale_x - off_x,
                (top + crop_h) * scale_y - off_y,
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Preprocessing":
        """Inverse of :meth:`to_dict`, even if a JSON file turned tuples into lists.

        Args:
            data: from :meth:`to_dict`.

        Returns:
            The same settings.
        """
        return cls(**_tuples(data))

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        side = max(height, width)
        return (side, side) if self.pad_to_square else (height, width)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        height, width = self._padded(height, width)
        if self.resize:
            return self.resize
        if self.shortest_edge:
            edge = self.shortest_edge
            if height <= width:
                return edge, int(edge * width / height)
            return int(edge * height / width), edge
        return height, width


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def _one_factor(size: tuple[int, int], canvas: tuple[int, int], rounding: int) -> bool:
    """Whether one factor scales both sides to the canvas's, each to within ``rounding`` pixels."""
    pairs = list(zip(size, canvas, strict=True))
    least = max((scaled - rounding) / side for side, scaled in pairs)
    most = min((scaled + rounding) / side for side, scaled in pairs)
    return least <= most


def _crop_start(size: int, crop: int) -> int:
    """First row (or column) of a centre crop; negative where the crop pads."""
    return (size - crop) // 2 if size >= crop else -ceil((crop - size) / 2)


def picture_geometry(
    grid: ImageGrid, size: tuple[int, int], rule: Preprocessing | None
) -> ImageGeometry:
    """The box of the original picture that a canvas shows.

    Args:
        grid: the image as the model saw it.
        size: (height, width) of the original picture, pixels.
        rule: what the processor did to the picture; needed where the inputs don't tell the box.

    Raises:
        ValueError: the box is not known, or ``size`` does not give the canvas that the model saw.
    """
    if grid.box is not None:
        if grid.picture not in (None, size):
            raise ValueError(
                f"size must be that of the picture, (height, width) = {grid.picture}, got {size}."
            )
        return ImageGeometry(grid.box)
    if rule is None:
        raise ValueError(
            "to_image needs a processor (give it to the attributor, e.g. MSEA(model, processor), "
            "or as processor=) or geometry=ImageGeometry(box) to know which part of the picture "
            "the model saw."
        )
    rule.check(*size, grid)
    return rule.geometry(*size)


def maps_to_picture(
    maps: Float[Tensor, "targets *time rows cols"], geometry: ImageGeometry, size: tuple[int, int]
) -> Float[Tensor, "targets *time height width"]:
    """Place maps of the model's canvas in the original picture, bilinear.

    Args:
        maps: maps over the model's canvas, on any grid; with a time axis for a video.
        geometry: the box of the picture that the canvas shows.
        size: (height, width) of the picture, pixels.

    Returns:
        Maps over the pixels of the picture, 0 where the model did not see it.

    Example:
        >>> half = ImageGeometry((0.0, 0.0, 2.0, 1.0))  # the model saw the left half only
        >>> maps_to_picture(torch.ones(1, 1, 1), half, (1, 4)).tolist()
        [[[1.0, 1.0, 0.0, 0.0]]]
    """
    left, upper, right, lower = geometry.box
    height, width = size
    y = (torch.arange(height, dtype=maps.dtype, device=maps.device) + 0.5 - upper) / (lower - upper)
    x = (torch.arange(width, dtype=maps.dtype, device=maps.device) + 0.5 - left) / (right - left)
    where = torch.stack(torch.meshgrid(x * 2 - 1, y * 2 - 1, indexing="xy"), dim=-1)
    flat = maps.flatten(0, -3)
    placed = F.grid_sample(
        flat[None], where[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    seen = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))[None, :]
    return (placed * seen).unflatten(0, maps.shape[:-2])


def cell_mask(
    geometry: ImageGeometry, size: tuple[int, int], shape: tuple[int, int]
) -> Int64[Tensor, "height width"]:
    """The cell of a grid that each pixel of a picture lies in.

    Args:
        geometry: the part of the picture that the grid covers.
        size: (height, width) of the picture, pixels.
        shape: rows and columns of the grid.

    Returns:
        (height, width): the cell's number, row by row from 0; rows * cols where there is none.

    Example:
        >>> cell_mask(ImageGeometry((0.0, 0.0, 2.0, 1.0)), (1, 3), (1, 2)).tolist()
        [[0, 1, 2]]
    """
    left, upper, right, lower = geometry.box
    (height, width), (rows, cols) = size, shape
    y = (torch.arange(height) + 0.5 - upper) / (lower - upper) * rows
    x = (torch.arange(width) + 0.5 - left) / (right - left) * cols
    inside = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < cols))[None, :]
    cells = y.floor().long()[:, None] * cols + x.floor().long()[None, :]
    return torch.where(inside, cells, rows * cols)
