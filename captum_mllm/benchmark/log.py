"""The file to which a run writes its results: whole lines only, each with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from captum_mllm.files import write_atomic

Key = tuple[int, str]
_SEALED = re.compile(rb'(\{.*), "checksum": "([0-9a-f]{16})"\}', re.DOTALL)


class SampleLog:
    r"""One JSON object per line, whose last field is a checksum of the line's other bytes.

    Lines that don't fit are set aside when the file is opened: they move to a file next to it, as
    they are, and are no records. These are lines that were cut off or changed, lines that repeat
    the sample and method of an earlier one (unless that one failed), and lines that ``check``
    rejects.

    Args:
        path: the file; created if it is missing.
        check: what is wrong with a record, or None if nothing is. Default: nothing is.

    Attributes:
        records: the fitting lines by sample and method; where one failed and was done again, the
            later.
        set_aside: how many lines were set aside for each reason.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "samples.jsonl"
        >>> SampleLog(path).append({"sample": 0, "method": "lens"})
        >>> path.read_text()
        '{"sample": 0, "method": "lens", "checksum": "f75c598f6095566d"}\n'
        >>> with path.open("a") as file:
        ...     _ = file.write('{"sample": 1, "met')  # killed here
        >>> log = SampleLog(path)
        >>> list(log.records), dict(log.set_aside)
        ([(0, 'lens')], {'cut off or changed': 1})
        >>> log.others.read_text(), len(path.read_text().splitlines())
        ('{"sample": 1, "met\n', 1)
    """

    def __init__(
        self, path: Path, check: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    ) -> None:
        self.path = path
        self.records: dict[Key, dict[str, Any]] = {}
        self.set_aside: Counter[str] = Counter()
        data = path.read_bytes() if path.exists() else b""
        whole = data.endswith(b"\n") or not data
        lines = [line.removesuffix(b"\r") for line in data.split(b"\n")[: -1 if whole else None]]
        bad = []
        for number, line in enumerate(lines, 1):
            record = _opened(line) if whole or number < len(lines) else None
            problem = self._problem(record, check)
            if problem or record is None:
                self.set_aside[problem or "cut off or changed"] += 1
                bad.append(number)
            else:
                self.records[record["sample"], record["method"]] = record
        if bad:
            self._move(lines, set(bad))

    @property
    def others(self) -> Path:
        """The file that holds the lines that were set aside."""
        return self.path.with_name(f"{self.path.stem}.set-aside{self.path.suffix}")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a line, and don't return before it is on disk.

        Args:
            record: plain data with "sample" and "method".

        Raises:
            OSError: it can't be written; nothing of the line is left in the file.
        """
        line = _sealed(record)
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(f"{self.path}: no space left; free some and run again.")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
        self.records[record["sample"], record["method"]] = dict(record)

    def _problem(
        self, record: dict[str, Any] | None, check: Callable[[Mapping[str, Any]], str | None]
    ) -> str | None:
        if record is None:
            return "cut off or changed"
        if type(record.get("sample")) is not int or not isinstance(record.get("method"), str):
            return "without sample or method"
        earlier = self.records.get((record["sample"], record["method"]))
        if earlier is not None and "error" not in earlier:
            return "repeated"
        return check(record)

    def _move(self, lines: list[bytes], bad: Collection[int]) -> None:
        """First all of them are in the other file, then none in this: none is ever lost."""
        kept: list[bytes] = []
        with self.others.open("ab") as file:
            for number, line in enumerate(lines, 1):
                if number in bad:
                    file.write(line + b"\n")
                else:
                    kept.append(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        write_atomic(self.path, b"".join(kept))


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _sealed(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, allow_nan=False).encode()
    return text[:-1] + f', "checksum": "{_checksum(text)}"}}\n'.encode()


def _opened(line: bytes) -> dict[str, Any] | None:
    """The record of a line whose checksum is right."""
    match = _SEALED.fullmatch(line)
    if match is None or _checksum(match[1] + b"}") != match[2].decode():
        return None
    try:
        return json.loads(match[1] + b"}")
    except (ValueError, RecursionError):
        return None


def line_problem(record: Mapping[str, Any], metrics: Collection[str]) -> str | None:
    """What a line of a benchmark lacks: its picture's hashes, and values or an error.

    Args:
        record: the line.
        metrics: the names of which there must be values.

    Returns:
        The problem, or None.

    Example:
        >>> of = {"picture": None, "annotation": None}
        >>> line_problem({"sha256": of, "seconds": -1.0, "values": {"auc": [0.5]}}, {"auc"})
        'without a time'
    """
    of = record.get("sha256")
    if not isinstance(of, dict) or set(of) != {"picture", "annotation"}:
        return "without the hashes of its picture and annotation"
    if "error" in record:
        error = record["error"]
        texts = isinstance(error, dict) and set(error) == {"type", "text"}
        if "values" in record or not texts or not all(isinstance(t, str) for t in error.values()):
            return "without values or an error"
        return None
    if not _is_number(record.get("seconds")) or record["seconds"] < 0:
        return "without a time"
    values = record.get("values")
    if not isinstance(values, dict) or not set(metrics) <= set(values):
        return "without the values of a metric"
    lists = all(isinstance(row, list) for row in values.values())
    if not lists or not all(v is None or _is_number(v) for row in values.values() for v in row):
        return "with a value that is no number"
    ids = record.get("answer_ids")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        return "without an answer"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
