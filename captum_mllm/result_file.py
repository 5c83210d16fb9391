"""What a file of a result holds, and the checks of every field of it."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from captum_mllm.geometry import ImageGrid, Preprocessing
from captum_mllm.validation import ArgumentError

FORMAT = 2
"""Of the files; 2 came with the checksum."""

_TEXTS = ("input_tokens", "output_tokens", "units", "method")
_HEADER = ("format", *_TEXTS, "scales", "consistency", "grids", "preprocessing")
_TENSORS = ("token_attr", "output_ids", "output_probs")
_CELL = 1024  # pixels along a side of a cell at most: no model's tokens are that coarse
_ROUNDING = 1e-3  # a map in [0, 1] may be this much out of it


def pack_result(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a result's file.

    Args:
        fields: the result's, by name.

    Returns:
        Plain data for JSON, and the tensors by name.
    """
    tensors = {f"grid_attr.{n}": maps for n, maps in enumerate(fields["grid_attr"])}
    tensors |= {n: fields[n] for n in (*_TENSORS, "relevance") if fields[n] is not None}
    rule = fields["preprocessing"]
    header = {
        "format": FORMAT,
        **{name: fields[name] for name in (*_TEXTS, "scales", "consistency")},
        "grids": [grid.to_dict() for grid in fields["grids"]],
        "preprocessing": None if rule is None else rule.to_dict(),
    }
    return header, tensors


def unpack_result(
    header: Any, tensors: Mapping[str, Tensor], units: Sequence[str]
) -> dict[str, Any]:
    """The fields of a result from what a file holds, each checked, alone and with the others.

    Args:
        header: from :func:`pack_result`, as JSON gives it.
        tensors: likewise.
        units: the units that there are; the values of the last lie in [0, 1].

    Returns:
        The fields by name.

    Raises:
        ArgumentError: a field is missing, or is not what it must be; the message names it.
    """
    _check_names("header", header, ("format",), maybe=None)
    if header["format"] != FORMAT:
        raise ArgumentError(
            "format",
            f"is {_shown(header['format'])}, and this version reads {FORMAT}: use the captum_mllm "
            "version that wrote it, or make and save the result again.",
        )
    _check_names("header", header, _HEADER)
    _check_tokens(header, units)
    grids = tuple(_grid(f"grids[{n}]", grid) for n, grid in enumerate(_list(header, "grids")))
    names = [*_TENSORS, *(f"grid_attr.{n}" for n in range(len(grids)))]
    _check_names("tensors", tensors, names, maybe=("relevance",))
    targets, tokens = len(header["output_tokens"]), len(header["input_tokens"])
    high = 1.0 if header["units"] == units[-1] else None
    _check_floats("token_attr", tensors, (targets, tokens), high)
    _check_floats("output_probs", tensors, (targets,), 1.0)
    if "relevance" in tensors:
        _check_floats("relevance", tensors, (targets, tokens), 1.0)
    _check_ids(tensors["output_ids"], targets)
    for n, grid in enumerate(grids):
        frames = (grid.frames,) if grid.steps else ()
        _check_floats(f"grid_attr.{n}", tensors, (targets, *frames, None, None), high)
    consistency, rule = header["consistency"], header["preprocessing"]
    return {
        **{name: header[name] for name in ("units", "method")},
        **{name: tuple(header[name]) for name in ("input_tokens", "output_tokens", "scales")},
        **{name: tensors[name] for name in _TENSORS},
        "relevance": tensors.get("relevance"),
        "grid_attr": tuple(tensors[f"grid_attr.{n}"] for n in range(len(grids))),
        "grids": grids,
        "consistency": None if consistency is None else tuple(consistency),
        "preprocessing": None if rule is None else _preprocessing(rule),
    }


# ---- the header ------------------------------------------------------------------------------


def _check_names(
    what: str, found: Any, wanted: Sequence[str], maybe: Sequence[str] | None = ()
) -> None:
    """All wanted names are there, and no others; None for ``maybe`` allows any others."""
    if not isinstance(found, Mapping):
        raise ArgumentError(what, f"must hold {', '.join(wanted)}, got {_shown(found)}.")
    for name in wanted:
        if name not in found:
            raise ArgumentError(name, f"is missing in the {what}.")
    for name in found:
        if maybe is not None and name not in wanted and name not in maybe:
            raise ArgumentError(what, f"must not hold {_shown(name)}, which no result has.")


def _check_tokens(header: Mapping[str, Any], units: Sequence[str]) -> None:
    for name in ("input_tokens", "output_tokens"):
        if not all(isinstance(token, str) for token in _list(header, name)):
            raise ArgumentError(name, "must hold texts only.")
    if header["units"] not in units:
        raise ArgumentError("units", f"must be one of {units}, got {_shown(header['units'])}.")
    if not isinstance(header["method"], str):
        raise ArgumentError("method", f"must be a text, got {_shown(header['method'])}.")
    scales, consistency = _list(header, "scales"), header["consistency"]
    if not scales or not all(_is_number(scale) and scale > 0 for scale in scales):
        raise ArgumentError("scales", f"must be numbers above 0, got {_shown(scales)}.")
    if consistency is None:
        return
    if len(_list(header, "consistency")) != len(scales) or not all(
        _is_number(value) and -_ROUNDING <= value <= 1 + _ROUNDING for value in consistency
    ):
        raise ArgumentError(
            "consistency", f"must be a number in [0, 1] per scale, got {_shown(consistency)}."
        )


def _grid(name: str, data: Any) -> ImageGrid:
    _check_names(name, data, tuple(ImageGrid(1, 1, 1, 1).to_dict()))
    _check_whole(name, data, ("rows", "cols", "height", "width"), least=1)
    _check_whole(name, data, ("steps", "frames"), least=0)
    for side, cells in (("height", "rows"), ("width", "cols")):
        if data[side] > _CELL * data[cells]:
            raise ArgumentError(
                f"{name}.{side}",
                f"must be at most {_CELL} pixels per cell, got {data[side]} for {data[cells]}.",
            )
    _check_pairs(name, data, ("tiles",))
    _check_pairs(name, {key: data[key] for key in ("picture",) if data[key] is not None})
    steps, frames, box = data["steps"], data["frames"], data["box"]
    if (frames % steps or frames < steps) if steps else frames:
        raise ArgumentError(f"{name}.frames", f"must be a multiple of its steps, got {frames}.")
    if box is not None and not (
        isinstance(box, list)
        and len(box) == 4
        and all(map(_is_number, box))
        and box[0] < box[2]
        and box[1] < box[3]
    ):
        raise ArgumentError(f"{name}.box", f"must be left, upper, right, lower, got {_shown(box)}.")
    return ImageGrid.from_dict(data)


def _preprocessing(data: Any) -> Preprocessing:
    _check_names("preprocessing", data, tuple(Preprocessing().to_dict()))
    for key in ("pad_to_square", "whole"):
        if not isinstance(data[key], bool):
            raise ArgumentError(f"preprocessing.{key}", f"must be a bool, got {_shown(data[key])}.")
    given = {key: value for key, value in data.items() if value is not None}
    _check_whole("preprocessing", given, ("shortest_edge",), least=1)
    _check_whole("preprocessing", given, ("keeps_aspect",), least=0)
    _check_pairs("preprocessing", given, ("resize", "crop"))
    return Preprocessing.from_dict(data)


def _check_whole(name: str, data: Mapping[str, Any], keys: Sequence[str], least: int) -> None:
    for key in keys:
        if key in data and (type(data[key]) is not int or data[key] < least):
            raise ArgumentError(
                f"{name}.{key}", f"must be a whole number >= {least}, got {_shown(data[key])}."
            )


def _check_pairs(name: str, data: Mapping[str, Any], keys: Sequence[str] | None = None) -> None:
    for key in data if keys is None else keys:
        pair = data.get(key, [1, 1])
        whole = isinstance(pair, list) and all(type(side) is int and side > 0 for side in pair)
        if not whole or len(pair) != 2:
            raise ArgumentError(
                f"{name}.{key}", f"must be two whole numbers >= 1, got {_shown(pair)}."
            )


def _list(header: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(header[name], list):
        raise ArgumentError(name, f"must be a list, got {_shown(header[name])}.")
    return header[name]


def _is_number(value: Any) -> bool:
    """A finite number, whole or not; a whole one that no float can hold is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isfinite(value) if isinstance(value, float) else abs(value) < 2**53


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- the tensors -----------------------------------------------------------------------------


def _check_floats(
    name: str, tensors: Mapping[str, Tensor], shape: tuple[int | None, ...], high: float | None
) -> None:
    """Float32 of that shape (None: any side), finite, from 0 to ``high`` but for rounding."""
    tensor = tensors[name]
    sides = len(tensor.shape) == len(shape) and all(
        side == wanted or (wanted is None and side > 0)
        for side, wanted in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype != torch.float32 or not sides:
        wanted = ", ".join("*" if side is None else str(side) for side in shape)
        raise ArgumentError(
            name,
            f"must be float32 of shape ({wanted}), got {_kind(tensor)} of {tuple(tensor.shape)}.",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ArgumentError(name, "must be finite, got NaN or infinity.")
    if not tensor.numel():
        return
    least, most = float(tensor.min()), float(tensor.max())
    if least < -1e-6 * max(1.0, most) or (high is not None and most > high + _ROUNDING):
        wanted = ">= 0" if high is None else f"in [0, {high:g}]"
        raise ArgumentError(name, f"must lie {wanted}, got {least:g} to {most:g}.")


def _check_ids(ids: Tensor, targets: int) -> None:
    if ids.dtype != torch.int64 or ids.shape != (targets,):
        raise ArgumentError(
            "output_ids",
            f"must be int64 of shape ({targets},), got {_kind(ids)} of {tuple(ids.shape)}.",
        )
    if targets and int(ids.min()) < 0:
        raise ArgumentError("output_ids", f"must be >= 0, got {int(ids.min())}.")


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
