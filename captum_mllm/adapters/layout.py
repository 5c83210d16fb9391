"""Where the tokens of pictures lie, as found by probing: plain data that a file can hold."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from captum_mllm.files import write_atomic
from captum_mllm.validation import ArgumentError

_FORMAT = 1


class LayoutError(ValueError):
    """The image tokens of a model have no places in the picture that can be relied on."""


@dataclass(frozen=True)
class PictureView:
    """One regular grid of tokens over a picture or a part of it.

    Args:
        tokens: rows of tokens, each by its index among the picture's placeholders; -1 for none.
        box: (left, upper, right, lower) of the grid in pixels of the picture.
        side: pixels along a token's cell as the vision encoder sees it.
    """

    tokens: tuple[tuple[int, ...], ...]
    box: tuple[float, float, float, float]
    side: float

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.tokens), len(self.tokens[0])

    def cell(self, row: int, col: int) -> tuple[float, float, float, float]:
        """(left, upper, right, lower) of one cell in pixels of the picture.

        Args:
            row: from the top, 0 first.
            col: from the left, 0 first.

        Returns:
            The cell's edges.
        """
        (rows, cols), (left, upper, right, lower) = self.shape, self.box
        dx, dy = (right - left) / cols, (lower - upper) / rows
        return (left + col * dx, upper + row * dy, left + (col + 1) * dx, upper + (row + 1) * dy)


@dataclass(frozen=True)
class PictureLayout:
    """Every view of one picture, the one with the most tokens first.

    Args:
        size: (height, width) of the picture, pixels.
        views: the grids.
        runs: lengths of the unbroken runs of the picture's placeholders, in the prompt's order.
    """

    size: tuple[int, int]
    views: tuple[PictureView, ...]
    runs: tuple[int, ...]


@dataclass(frozen=True)
class TokenLayout:
    """The layout of a prompt's pictures, for one model, one processor and these picture sizes.

    Args:
        pictures: one per picture, in the prompt's order.
        placeholders: ids of the tokens that pictures put their features on.
        notes: what does not fit a regular layout; none where it is exact.
        forwards: runs of the vision encoder that probing took.
        backwards: backward passes that it took.
        processor_calls: calls of the image processor that it took.

    Example:
        >>> view = PictureView(((0, 1), (2, 3)), (0.0, 0.0, 40.0, 20.0), 14.0)
        >>> layout = TokenLayout((PictureLayout((20, 40), (view,), (4,)),), (32000,))
        >>> TokenLayout.from_dict(layout.to_dict()) == layout
        True
        >>> str(layout)
        '2 x 2 tokens over 40 x 20 pixels'
    """

    pictures: tuple[PictureLayout, ...]
    placeholders: tuple[int, ...]
    notes: tuple[str, ...] = ()
    forwards: int = 0
    backwards: int = 0
    processor_calls: int = 0

    @property
    def views(self) -> tuple[PictureView, ...]:
        """The views of the first picture."""
        return self.pictures[0].views

    def __str__(self) -> str:
        parts = []
        for picture in self.pictures:
            grids = " and ".join(" x ".join(map(str, view.shape)) for view in picture.views)
            height, width = picture.size
            parts.append(f"{grids} tokens over {width} x {height} pixels")
        return "; ".join(parts) + (f" ({'; '.join(self.notes)})" if self.notes else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TokenLayout":
        """Inverse of :meth:`to_dict`, even if a JSON file turned tuples into lists.

        Args:
            data: from :meth:`to_dict`.

        Returns:
            The same layout.

        Raises:
            ValueError: it is not such data.
        """
        try:
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}, expected {_FORMAT}")
            pictures = tuple(
                PictureLayout(
                    _pair(picture["size"]),
                    tuple(map(_view, picture["views"])),
                    tuple(int(n) for n in picture["runs"]),
                )
                for picture in data["pictures"]
            )
            return cls(
                pictures,
                tuple(int(i) for i in data["placeholders"]),
                tuple(str(note) for note in data["notes"]),
                *(int(data[name]) for name in ("forwards", "backwards", "processor_calls")),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArgumentError("data", f"is no token layout: {error!r}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout to a JSON file, with a checksum.

        Args:
            path: the file.
        """
        data = self.to_dict()
        write_atomic(path, json.dumps({**data, "sha256": _digest(data)}, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenLayout":
        """Read a layout that :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The layout.

        Raises:
            ValueError: it holds no layout, or one that changed since.
        """
        name = repr(os.fspath(path))
        try:
            data = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ArgumentError("path", f"{name} is no JSON file: {error}") from error
        if not isinstance(data, dict) or "sha256" not in data:
            raise ArgumentError(
                "path", f"{name} is no token layout with a checksum; save it again."
            )
        if data.pop("sha256") != _digest(data):
            raise ArgumentError(
                "path", f"{name} is damaged: its checksum is not that of its content."
            )
        try:
            return cls.from_dict(data)
        except ArgumentError as error:
            raise ArgumentError("path", f"{name} can't be read: {error}") from error


def _digest(data: Mapping[str, Any]) -> str:
    """Of the values, however a file writes them."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _pair(values: Any) -> tuple[int, int]:
    height, width = values
    return int(height), int(width)


def _view(data: Mapping[str, Any]) -> PictureView:
    tokens = tuple(tuple(int(i) for i in row) for row in data["tokens"])
    left, upper, right, lower = (float(edge) for edge in data["box"])
    if not tokens or len({len(row) for row in tokens}) != 1:
        raise ValueError("rows of tokens of several lengths")
    return PictureView(tokens, (left, upper, right, lower), float(data["side"]))
