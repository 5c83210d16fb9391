"""Files that appear whole or not at all; one of tensors with everything else in its header."""

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
    write_whole(path, data)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all; what was there before stays until then.

    Args:
        path: file to write; its folder must exist.
        data: what is to be in it.
    """
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


def no_nan(values: Any) -> Any:
    """JSON knows no NaN: null stands for it.

    Args:
        values: plain data, lists and dictionaries.

    Example:
        >>> no_nan({"a": [1.0, float("nan")], "b": float("nan")})
        {'a': [1.0, None], 'b': None}
    """
    if isinstance(values, dict):
        return {name: no_nan(value) for name, value in values.items()}
    if isinstance(values, list):
        return [no_nan(value) for value in values]
    return None if isinstance(values, float) and values != values else values
