"""Annotation files: JSON that may be damaged, and the names of files in it that may lead away."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_mllm.pictures import is_file

MAX_MASK_PIXELS = 2_000_000_000
"""The most pixels of all masks of one picture together, a byte of memory each."""


def read_json(path: Path, name: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        name: what the error calls it.

    Returns:
        Its content.

    Raises:
        ValueError: it is no JSON, not UTF-8, or nested too deeply to be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{name} is not a JSON file: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{name} is not a JSON file: {error}.") from error


def is_text(value: Any) -> bool:
    r"""Whether a value of a JSON file is a text that is not empty and that UTF-8 can hold.

    Args:
        value: the value.

    Example:
        >>> is_text("a dog"), is_text(" "), is_text("\ud800")
        (True, False, False)
    """
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_files(
    file: Path, folder: Path, names: Sequence[str], kind: str, allow_outside: bool
) -> None:
    """Raise unless all files that an annotation file names are there, and in their folder.

    Args:
        file: the annotation file.
        folder: where the files must be.
        names: their names.
        kind: what they are, for the error.
        allow_outside: whether they may also be elsewhere.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: files are outside the folder.
    """
    missing = [name for name in names if not is_file(folder / name)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(names)} {kind} that {file} names are not in "
            f"{folder}: {first_few(missing)}. Give the folder that holds them, or remove "
            "them from the file."
        )
    root = folder.resolve()
    away = [] if allow_outside else [n for n in names if not _inside(root, folder / n)]
    if away:
        raise ValueError(
            f"{file}: {len(away)} of the {len(names)} {kind} that it names are outside {folder}, "
            f"by an absolute name, by '..' or by a link: {first_few(away)}. Put them there, or "
            "pass allow_outside=True if you trust the file."
        )


def _inside(root: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def first_few(values: Sequence[Any]) -> str:
    """The first three values as text, cut to 60 characters each.

    Args:
        values: any.

    Example:
        >>> first_few([1, 2, 3, 4])
        '1, 2, 3, ...'
    """
    texts = [text if len(text) <= 60 else f"{text[:57]}..." for text in map(str, values[:3])]
    return ", ".join(texts) + (", ..." if len(values) > 3 else "")


def mask_memory_problem(count: int, height: int, width: int, most: int) -> str | None:
    """What is wrong with so many masks of a picture of that size; None if they fit the limit.

    Args:
        count: number of masks.
        height: of the picture, pixels.
        width: likewise.
        most: the limit, pixels.
    """
    if count * height * width <= most:
        return None
    return (
        f"{count} masks of {width} x {height} pixels are more than {most} pixels together: make "
        "the picture smaller, or raise max_mask_pixels"
    )
