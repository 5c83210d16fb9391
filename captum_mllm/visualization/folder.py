"""Files appear in a folder all together or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OWN = re.compile(r"word-\d{2,}-[a-z0-9]+\.png")
_REPORT = ("index.html", "picture.png", "text-heatmap.png", "text-heatmap.html", "table.txt")


@contextmanager
def filled_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder; what was written there moves to ``folder`` if nothing failed.

    Other files in ``folder`` stay; an earlier report there (or one per image, in its folders
    ``image-1``, ``image-2``, ...) is taken away, so that two answers don't mix.

    Args:
        folder: where the files are to appear; made if missing.

    Yields:
        A temporary folder beside it.

    Raises:
        FileExistsError: ``folder`` (or a folder above it) is a file.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "report"
        >>> with filled_folder(target) as folder:
        ...     _ = (folder / "table.txt").write_text("dog")
        >>> [path.name for path in target.iterdir()]
        ['table.txt']
    """
    folder = folder.absolute()
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        folder.mkdir(exist_ok=True)
        _remove_earlier(folder)
        for earlier in list(folder.glob("image-*")):  # one report per image
            _remove_earlier(earlier)
            if earlier.is_dir() and not any(earlier.iterdir()):
                earlier.rmdir()
        for path in sorted(partial.rglob("*")):
            target = folder / path.relative_to(partial)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raise if ``folder`` can't be made.

    Args:
        folder: where a folder is wanted.

    Raises:
        FileExistsError: it, or a folder above it, is a file.
        PermissionError: it, or the folder in which it would be made, may not be written.
    """
    for path in (folder, *folder.absolute().parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{str(path)!r} is a file, not a folder")
    above = next(path for path in folder.absolute().parents if path.is_dir())
    for path in (folder, above):
        if path.is_dir() and not os.access(path, os.W_OK):
            raise PermissionError(f"{str(path)!r} may not be written")


def _remove_earlier(folder: Path) -> None:
    """Take away an earlier report of ours, and nothing else."""
    try:
        head = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        ours = head["written_by"] == "captum_mllm"
    except (OSError, ValueError, KeyError, TypeError):
        return
    if ours:
        for path in folder.iterdir():
            if _OWN.fullmatch(path.name) or path.name in (*_REPORT, "words.json"):
                path.unlink()
