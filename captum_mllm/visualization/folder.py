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


@contextmanager
def filled_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder; what was written there moves to ``folder`` if nothing failed.

    Other files in ``folder`` stay; overlays of an earlier report there are taken away, so that
    two answers don't mix.

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
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)
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
    """Take away the overlays of an earlier report of ours, and nothing else."""
    try:
        head = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        ours = head["written_by"] == "captum_mllm"
    except (OSError, ValueError, KeyError, TypeError):
        return
    if ours:
        for path in folder.iterdir():
            if _OWN.fullmatch(path.name):
                path.unlink()
