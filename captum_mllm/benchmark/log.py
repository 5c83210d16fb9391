"""The file to which a run writes its results: whole lines only, however the process ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Key = tuple[int, str]


class SampleLog:
    r"""One JSON object per line; an unfinished last line is removed when the file is opened.

    Args:
        path: the file; created if it is missing.

    Raises:
        ValueError: a line, other than an unfinished last one, is not a benchmark's.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "samples.jsonl"
        >>> SampleLog(path).append({"sample": 0, "method": "lens"})
        >>> with path.open("a") as file:
        ...     _ = file.write('{"sample": 1, "met')  # killed here
        >>> list(SampleLog(path).records), path.read_text()
        ([(0, 'lens')], '{"sample": 0, "method": "lens"}\n')
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[Key, dict[str, Any]] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            record = _read(line)
            if record is None:
                raise ValueError(
                    f"{path}: line {number} is not a line of a benchmark; delete it to compute its "
                    "sample again, or name another folder."
                )
            self.records[record["sample"], record["method"]] = record  # a later line replaces
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a line, and don't return before it is on disk.

        Args:
            record: plain data with "sample" and "method".
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(f"{self.path}: no space left; free some and run again.")
            os.fsync(file.fileno())
        self.records[record["sample"], record["method"]] = dict(record)


def _read(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    good = (
        isinstance(record, dict)
        and type(record.get("sample")) is int
        and isinstance(record.get("method"), str)
    )
    return record if good else None
