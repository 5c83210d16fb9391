"""Files and folders that appear whole or not at all; tensors with a header."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_KEY, _SUM = "captum_mllm", "sha256"
_BLANK = b"0" * 64  # in the checksum's place while it is computed
# Quotes within the header's text are escaped, so this stands in one place only.
_SUM_BEGINS = b'"sha256":"'
_SUM_AT = re.compile(_SUM_BEGINS + rb'([0-9a-f]{64})"')

# ---- files -----------------------------------------------------------------------------------


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all; an earlier file of that name stays until then.

    Args:
        path: file to write; its folder must exist.
        data: the file's content.
    """
    target = Path(path)
    # Not the whole name, which may be as long as names can be.
    partial = target.with_name(f".{target.name[:40]}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave the new name without content
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def nan_to_none(values: Any) -> Any:
    """Replace NaN by None throughout, as JSON has no NaN.

    Args:
        values: plain data, lists and dictionaries.

    Returns:
        The same data, new lists and dictionaries.

    Example:
        >>> nan_to_none({"a": [1.0, float("nan")], "b": float("nan")})
        {'a': [1.0, None], 'b': None}
    """
    if isinstance(values, dict):
        return {name: nan_to_none(value) for name, value in values.items()}
    if isinstance(values, list):
        return [nan_to_none(value) for value in values]
    return None if isinstance(values, float) and values != values else values


# ---- tensors with a header -------------------------------------------------------------------


def write_tensors(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors and a header to one safetensors file, whole or not at all, with a checksum.

    The checksum ("sha256" among the file's metadata) is that of the whole file with 64 zeros in
    the checksum's place.

    Args:
        path: file to write; its folder must exist.
        header: plain data for JSON.
        tensors: the tensors by name.
    """
    text = json.dumps(header, allow_nan=False)
    data = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={_KEY: text, _SUM: _BLANK.decode()},
    )
    digest = hashlib.sha256(data).hexdigest().encode()
    start = data.index(_SUM_BEGINS + _BLANK) + len(_SUM_BEGINS)
    write_atomic(path, data[:start] + digest + data[start + len(digest) :])


def read_tensors(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """Read what :func:`write_tensors` wrote: the header and the tensors by name.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file that :func:`write_tensors` wrote, or one that changed since.
    """
    name = f"path {os.fspath(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: no such file.")
    data = Path(path).read_bytes()
    found = _SUM_AT.search(data)
    if found and _checksum(data, *found.span(1)) != found[1]:
        raise ValueError(f"{name} is damaged: its checksum is not that of its content.")
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        header = json.loads(metadata.get(_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} is not a safetensors file: {error}") from error
    if header is None:
        raise ValueError(f"{name} was not written by captum_mllm.")
    if found is None:
        raise ValueError(
            f"{name} holds no checksum: an early version wrote it, or it is damaged. Make and save "
            "its content again."
        )
    return header, tensors


def _checksum(data: bytes, start: int, end: int) -> bytes:
    digest = hashlib.sha256(memoryview(data)[:start])
    digest.update(_BLANK)
    digest.update(memoryview(data)[end:])
    return digest.hexdigest().encode()


# ---- folders of a report ---------------------------------------------------------------------

_REPORT = ("index.html", "table.txt", "words.json")


@contextmanager
def filled_folder(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder whose files move to ``folder`` if nothing failed.

    Other files in ``folder`` stay; an earlier report there is removed, so that two answers don't
    mix.

    Args:
        folder: where the files are to appear; created if missing.
        force: replace files of the same names that no report of ours wrote, default False.

    Yields:
        A temporary folder next to it.

    Raises:
        FileExistsError: ``folder`` (or a folder above it) is a file, or it holds files of these
            names that are not ours.

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
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}-", dir=folder.parent))
    try:
        yield partial
        check_foreign(folder, [path.name for path in partial.iterdir()], force=force)
        folder.mkdir(exist_ok=True)
        _remove_earlier(folder)
        for path in sorted(partial.rglob("*")):
            target = folder / path.relative_to(partial)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raise if ``folder`` can't be created.

    Args:
        folder: the folder to write to.

    Raises:
        FileExistsError: it, or a folder above it, is a file.
        PermissionError: it, or the folder in which it would be created, is not writable.
    """
    for path in (folder, *folder.absolute().parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{str(path)!r} is a file, not a folder")
    above = next(path for path in folder.absolute().parents if path.is_dir())
    for path in (folder, above):
        if path.is_dir() and not os.access(path, os.W_OK):
            raise PermissionError(f"{str(path)!r} is not writable")


def check_foreign(folder: Path, names: Iterable[str] = _REPORT, *, force: bool = False) -> None:
    """Raise if files would be replaced that no report of ours wrote.

    Args:
        folder: the folder to write to; it need not exist.
        names: of the files to be written, default those of a report.
        force: whether the user wants it, default False.

    Raises:
        FileExistsError: there are such files; the message names them.
    """
    theirs = [name for name in names if (folder / name).exists()]
    if theirs and not force and not _holds_report(folder):
        raise FileExistsError(
            f"{str(folder)!r} holds {', '.join(sorted(theirs))}, which no report of captum_mllm "
            f"wrote"
        )


def _holds_report(folder: Path) -> bool:
    try:
        head = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        return head["written_by"] == "captum_mllm"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _remove_earlier(folder: Path) -> None:
    """Remove an earlier report of captum_mllm, and nothing else."""
    if _holds_report(folder):
        for name in _REPORT:
            (folder / name).unlink(missing_ok=True)
