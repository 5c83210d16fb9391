"""Checks of arguments, and the error that they raise."""

from collections.abc import Callable
from math import isfinite
from numbers import Integral, Real
from operator import index
from typing import Any

MAX_SCALE = 16.0
"""The largest factor of an image's height and width: 256 times its pixels."""


class ArgumentError(ValueError):
    """An argument with a wrong value; the message begins with the argument's name.

    Args:
        argument: the argument's name, also the attribute ``argument``.
        problem: the rest of the message: what is wrong, what was given, how to fix it.

    Example:
        >>> error = ArgumentError("scales", "must be distinct, got (1.0, 1.0).")
        >>> str(error), error.argument
        ('scales must be distinct, got (1.0, 1.0).', 'scales')
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)  # the arguments as they are: it can be pickled
        self.argument = argument

    def __str__(self) -> str:
        return " ".join(self.args)


def check_number(name: str, value: Any, wanted: str, valid: Callable[[float], bool]) -> float:
    """Check that an argument is a number in its range.

    Args:
        name: the argument's name.
        value: the value given for it.
        wanted: the range, for the message.
        valid: whether a number is in range; NaN must not be.

    Returns:
        The value as a float.

    Raises:
        TypeError: the value is not a number.
        ArgumentError: the number is out of range.

    Example:
        >>> check_number("rbo_p", 0.9, "strictly between 0 and 1", lambda p: 0 < p < 1)
        0.9
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {wanted}, got {value!r}.")
    if not valid(float(value)):
        raise ArgumentError(name, f"must lie {wanted}, got {value!r}.")
    return float(value)


def check_alpha_max(value: Any) -> float | None:
    """Check the upper bound of the fitted alpha: None, or a number > 0."""
    if value is None:
        return None
    return check_number("alpha_max", value, "above 0 (or be None)", lambda a: a > 0)


def picture_size(size: Any) -> tuple[int, int]:
    """Read (height, width) from a pair of numbers or a PIL picture.

    Args:
        size: (height, width) in pixels, whole numbers of Python or NumPy; or the picture.

    Returns:
        (height, width) in pixels.

    Raises:
        TypeError: ``size`` is neither of them.
        ArgumentError: the sides are not whole numbers of pixels.
    """
    if hasattr(size, "height") and hasattr(size, "width"):
        size = (size.height, size.width)
    if not isinstance(size, tuple | list):
        raise TypeError(f"size must be (height, width) in pixels or a PIL picture, got {size!r}.")
    whole = [isinstance(side, Integral) and not isinstance(side, bool) for side in size]
    if len(size) != 2 or not all(whole) or min(size) < 1:
        raise ArgumentError("size", f"must be (height, width), whole pixels >= 1, got {size!r}.")
    return int(size[0]), int(size[1])


def check_scales(scales: Any) -> tuple[float, ...]:
    """Check factors of the image's height and width: above 0, at most 16, distinct.

    Args:
        scales: a sequence of numbers.

    Returns:
        The factors as floats.

    Raises:
        TypeError: ``scales`` is not a sequence of numbers.
        ArgumentError: it is empty, or holds a number that is repeated, not above 0 or above 16.

    Example:
        >>> check_scales([1, 1.5])
        (1.0, 1.5)
    """
    if isinstance(scales, str):
        raise TypeError(f"scales must be a sequence of numbers, got {scales!r}.")
    try:
        values = tuple(float(scale) for scale in scales)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scales must be a sequence of numbers, got {scales!r}.") from error
    if not values:
        raise ArgumentError("scales", "is empty: give at least one factor, e.g. (1.0, 1.25, 1.5).")
    if any(not isfinite(s) or s <= 0 for s in values):
        raise ArgumentError("scales", f"must be finite numbers > 0, got {values}.")
    if max(values) > MAX_SCALE:
        raise ArgumentError("scales", f"must be at most {MAX_SCALE:g}, got {max(values):g}.")
    if len(set(values)) < len(values):
        raise ArgumentError("scales", f"must be distinct, got {values}.")
    return values


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Check that an argument is one of several words.

    Args:
        name: the argument's name.
        value: the value given for it.
        choices: the valid words.

    Returns:
        The value.

    Raises:
        ArgumentError: the value is not one of them.

    Example:
        >>> check_choice("aggregation", "mean", ("mean", "median"))
        'mean'
    """
    if value not in choices:
        raise ArgumentError(name, f"must be one of {', '.join(choices)}, got {value!r}.")
    return value


def as_index(value: Any) -> int | None:
    """A whole number of Python, NumPy or torch as an int; None for anything else, bool too.

    Args:
        value: anything.

    Example:
        >>> as_index(3), as_index(True), as_index("3"), as_index(3.0)
        (3, None, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None
