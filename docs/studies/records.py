"""Large records of studies, compressed."""

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_record(path: Path) -> Any:
    """Read a record.

    Args:
        path: a file of :func:`write_record`, NAME.json.xz.
    """
    return json.loads(lzma.decompress(path.read_bytes()))


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; the same one makes the same bytes with the same liblzma.

    Args:
        path: the file, NAME.json.xz.
        record: what JSON can hold.
    """
    path.write_bytes(lzma.compress(json.dumps(record).encode() + b"\n", preset=9))
