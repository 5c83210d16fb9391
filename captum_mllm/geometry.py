"""Where the model's image frame lies in the user's picture, and how to bring maps back to it."""

from dataclasses import asdict, dataclass
from math import ceil, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ImageGrid:
    """One image as the model saw it: its grid of image tokens and its frame in pixels.

    Args:
        rows: image tokens along the height.
        cols: image tokens along the width.
        height: height of the image as the model saw it, pixels.
        width: width of the image as the model saw it, pixels.
    """

    rows: int
    cols: int
    height: int
    width: int

    @property
    def cells(self) -> int:
        """Number of image tokens on the grid."""
        return self.rows * self.cols


@dataclass(frozen=True)
class ImageGeometry:
    """The part of the original picture that the model's frame shows.

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
        """The frame shows the whole picture, stretched: no crop, no padding."""
        return cls((0.0, 0.0, float(width), float(height)))


@dataclass(frozen=True)
class Preprocessing:
    """What an image processor does to a picture's frame: pad to square, resize, centre crop.

    Args:
        pad_to_square: the picture is first padded to a square, centred.
        shortest_edge: the shorter side is resized to this many pixels, aspect kept; or None.
        resize: the picture is stretched to (height, width); or None.
        crop: the centre (height, width) is cut out (zero-padded where smaller); or None.
    """

    pad_to_square: bool = False
    shortest_edge: int | None = None
    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """Read the settings of a processor (or image processor) of the CLIP kind.

        Args:
            processor: a transformers processor with ``image_processor``, or that itself.

        Raises:
            ValueError: the settings are of a kind that is not known here.
        """
        settings = getattr(processor, "image_processor", processor)
        name = type(settings).__name__
        if not hasattr(settings, "do_resize"):
            raise ValueError(
                f"processor must have an image processor, got {name}; pass geometry= instead."
            )
        shortest_edge = resize = crop = None
        if settings.do_resize:
            size = dict(settings.size)
            shortest_edge = size.get("shortest_edge")
            if size.get("height") and size.get("width"):
                resize = (size["height"], size["width"])
            if not (shortest_edge or resize) or size.get("longest_edge"):
                raise ValueError(
                    f"processor {name} resizes by {size}, which to_image can't undo; it knows "
                    f"shortest_edge, or height and width. Pass geometry= instead."
                )
        if getattr(settings, "do_center_crop", False):
            size = dict(settings.crop_size)
            crop = (size["height"], size["width"])
        # Only LLaVA's own image processor pads *before* it resizes.
        square = name.startswith("LlavaImageProcessor") and bool(getattr(settings, "do_pad", False))
        return cls(square, shortest_edge, resize, crop)

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) of the model's frame for a picture of that size."""
        return self.crop or self._resized(height, width)

    def geometry(self, height: int, width: int) -> ImageGeometry:
        """The box of the picture that the model's frame shows.

        Args:
            height: height of the original picture, pixels.
            width: width of the original picture, pixels.

        Example:
            >>> Preprocessing(shortest_edge=100, crop=(100, 100)).geometry(200, 600)
            ImageGeometry(box=(200.0, 0.0, 400.0, 200.0))
        """
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
        """Inverse of :meth:`to_dict`, also after a JSON file made lists of the tuples."""
        fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fixed)

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


def _crop_start(size: int, crop: int) -> int:
    """First row (or column) of a centre crop; negative where the crop pads."""
    return (size - crop) // 2 if size >= crop else -ceil((crop - size) / 2)


def maps_to_picture(
    maps: Float[Tensor, "targets rows cols"], geometry: ImageGeometry, size: tuple[int, int]
) -> Float[Tensor, "targets height width"]:
    """Place maps of the model's frame into the original picture, bilinear.

    Args:
        maps: maps over the model's frame, on any grid.
        geometry: the box of the picture that the frame shows.
        size: (height, width) of the picture, pixels.

    Returns:
        Maps in pixels of the picture, 0 where the model saw nothing of it.

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
    placed = F.grid_sample(
        maps[None], where[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    seen = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))[None, :]
    return placed * seen
