"""One safetensors file with tensors and, as JSON in its header, everything else."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_KEY = "captum_mllm"


def write_tensors(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the file whole or not at all.

    Args:
        path: file to write; its folder must exist.
        header: plain data for JSON.
        tensors: the tensors by name.
    """
    data = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={_KEY: json.dumps(header)},
    )
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """Read what :func:`write_tensors` wrote: the header and the tensors by name.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path {os.fspath(path)!r}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path {os.fspath(path)!r} is no safetensors file: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"path {os.fspath(path)!r} is damaged: {error}") from error
    if header is None:
        raise ValueError(f"path {os.fspath(path)!r} was not written by captum_mllm.")
    return header, tensors
