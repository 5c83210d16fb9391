"""Masks of COCO files: polygons and run lengths, checked before pycocotools draws them."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import numpy as np
from PIL import Image

from captum_mllm.validation import ArgumentError

MAX_OUTLINE = 1_000_000
"""The most pixels of one annotation's outline, of which pycocotools keeps about 40 bytes each."""

_MOST_PIXELS = 2**31 - 1  # pycocotools numbers pixels in 32 bits

_FAR = 100_000  # pixels; pycocotools counts fifths of them in 32 bits and crashes where they end


def mask_tools(who: str) -> Any:
    """pycocotools.mask.

    Args:
        who: What needs it, for the error.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise ImportError(
            f'{who} needs pycocotools: pip install "captum-mllm[metrics]".'
        ) from error


def pixel_limit(max_pixels: int | None) -> int:
    """The limit of a picture's pixels that holds.

    Args:
        max_pixels: As the user gives it; None for Pillow's.

    Raises:
        ArgumentError: It is no whole number above 0, or more than pixels can be numbered.
    """
    if max_pixels is None:
        pillows = Image.MAX_IMAGE_PIXELS
        return _MOST_PIXELS if pillows is None else min(int(pillows), _MOST_PIXELS)
    check_limit("max_pixels", max_pixels)
    if max_pixels > _MOST_PIXELS:
        raise ArgumentError("max_pixels", f"must be at most {_MOST_PIXELS}, got {max_pixels}.")
    return max_pixels


def check_limit(name: str, value: Any) -> int:
    """Check that a limit is a whole number above 0.

    Args:
        name: The argument's.
        value: The value given for it.

    Raises:
        ArgumentError: It is not.
    """
    if type(value) is not int or value < 1:
        raise ArgumentError(name, f"must be a whole number above 0, got {value!r}.")
    return value


def mask_problem(
    mask: Any, height: int, width: int, max_outline: int = MAX_OUTLINE
) -> tuple[str, str] | None:
    """What is wrong with a segmentation.

    Args:
        mask: As in an instances file.
        height: Of the image, in pixels.
        width: Likewise.
        max_outline: See :class:`~captum_mllm.data.coco.CocoDataset`.

    Returns:
        What is wrong and how to fix it; None if nothing is.

    Example:
        >>> mask_problem([[0, 0, 4, 0]], 5, 5)
        ('holds a polygon of 4 numbers', 'it takes 3 points or more, x and y')
    """
    kinds = 'give polygons, [[x, y, x, y, ...], ...], or run lengths, {"size": ..., "counts": ...}'
    if isinstance(mask, dict):
        return _runs_problem(mask, height, width)
    if not isinstance(mask, list) or not mask:
        return ("is missing or empty" if not mask else f"is {shown(mask)}"), kinds
    bound = 0.0
    for points in mask:
        if not isinstance(points, list) or not all(map(is_number, points)):
            return f"holds a polygon that is {shown(points)}", kinds
        if len(points) < 6 or len(points) % 2:
            return f"holds a polygon of {len(points)} numbers", "it takes 3 points or more, x and y"
        farthest = max(points, key=abs)
        if abs(farthest) > _FAR:
            fix = f"give pixels of the image, at most {_FAR} from its corner"
            return f"holds a polygon with the coordinate {shown(farthest)}", fix
        bound += len(points) * abs(farthest)  # no edge is longer than twice the farthest
    if bound > max_outline:  # else there is no need to measure
        outline = sum(map(_outline, mask))
        if outline > max_outline:
            fix = f"it may be {max_outline} at most: correct it, or raise max_outline"
            return f"has an outline of {round(outline)} pixels", fix
    return None


def _outline(points: list[float]) -> float:
    """Pixels of a polygon's outline: the sum of the longer side of its edges."""
    corners = np.asarray(points, np.float64).reshape(-1, 2)
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(1).sum())


def _runs_problem(mask: dict, height: int, width: int) -> tuple[str, str] | None:
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width]:
        fix = f"the image's [height, width] is {[height, width]}: draw the mask at that size"
        return f"has size {shown(size)}", fix
    fix = "give a list of run lengths, or COCO's compressed text of them"
    if isinstance(counts, list):
        good = all(type(run) is int and run >= 0 for run in counts)
        total = sum(counts) if good else -1
    elif isinstance(counts, str) and counts:
        total = _compressed_total(counts)
    else:
        return f"has counts {shown(counts)}", fix
    if total < 0:
        return f"has counts that are not run lengths: {shown(counts)}", fix
    if total != height * width:
        return f"has counts for {total} pixels of {height * width}", fix
    return None


def _compressed_total(counts: str) -> int:
    """Sum of compressed run lengths, -1 if they are none.

    pycocotools returns memory it never wrote where they end too early. A run takes 6-bit digits,
    lowest first, the last one without bit 5; from the fourth run on it is the difference to the
    run before the last.
    """
    if not counts.isascii():
        return -1
    digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    if digits.min() < 0 or digits.max() > 63 or not len(ends) or ends[-1] != len(digits) - 1:
        return -1
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:  # no run is of 2^34 pixels
        return -1
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return -1 if (runs < 0).any() else int(runs.sum())


def draw_mask(tools: Any, mask: Any, height: int, width: int) -> np.ndarray:
    """Draw a segmentation in which `mask_problem` finds nothing wrong.

    Args:
        tools: What `mask_tools` gives.
        mask: As in an instances file.
        height: Of the image, in pixels.
        width: Likewise.

    Returns:
        bool (height, width).
    """
    runs = mask
    if not isinstance(mask, dict):
        runs = tools.merge(tools.frPyObjects(mask, height, width))
    elif not isinstance(mask["counts"], str):
        runs = tools.frPyObjects(mask, height, width)
    with warnings.catch_warnings():  # of pycocotools' arrays, under numpy 2
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        # A byte per pixel as a bool, which needs no second copy where the order is right.
        return np.ascontiguousarray(tools.decode(runs)).view(bool)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def shown(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
