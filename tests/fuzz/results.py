"""Damaged files of results."""

import hashlib
import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from captum_mllm import ARC, MSEA, MLLMAttributionResult
from captum_mllm.files import read_tensors
from tests.fuzz.damage import damaged_bytes, damaged_data
from tests.fuzz.harness import Case
from tests.fuzz.inputs import encoded, kin_of


@cache
def undamaged() -> tuple[MLLMAttributionResult, bytes, Path]:
    """A result with everything that one can have, its file's bytes, and a folder."""
    kin = kin_of("Llava")
    method = ARC(MSEA(kin.model, kin.processor, scales=(1.0, 1.5), consistency=True))
    result = method.attribute(encoded("Llava"), kin.answer)
    folder = Path(mkdtemp())
    result.save(folder / "result.safetensors")
    return result, (folder / "result.safetensors").read_bytes(), folder


def equal(one: Any, two: Any) -> bool:
    """Values alike to the last bit, types too; a list of a file is a tuple of a result."""
    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        kinds = isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
        return kinds and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two


def same(one: MLLMAttributionResult, two: MLLMAttributionResult) -> bool:
    names = [f.name for f in fields(MLLMAttributionResult)]
    return all(equal(getattr(one, name), getattr(two, name)) for name in names)


def as_written(header: Any, tensors: Any, result: MLLMAttributionResult) -> bool:
    """Whether a result holds exactly what its file does: damage that is another valid result."""
    grids = [json.loads(json.dumps(grid.to_dict())) for grid in result.grids]
    rule = result.preprocessing and json.loads(json.dumps(result.preprocessing.to_dict()))
    plain = ("input_tokens", "output_tokens", "scales", "consistency", "units", "method")
    maps = [tensors[f"grid_attr.{n}"] for n in range(len(grids))]
    names = ("token_attr", "output_ids", "output_probs", "relevance")
    return (
        all(equal(header[name], getattr(result, name)) for name in plain)
        and (grids, rule) == (header["grids"], header["preprocessing"])
        and equal(maps, result.grid_attr)
        and all(equal(tensors.get(name), getattr(result, name)) for name in names)
    )


def damaged_tensors(draw: Any, tensors: dict[str, torch.Tensor]) -> tuple[str, Any]:
    """One tensor removed, renamed, of another type or shape, with values that can't be."""
    name = draw(st.sampled_from(sorted(tensors)))
    value = tensors[name].clone()
    kinds = ("remove", "rename", "dtype", "shape", "value", "swap")
    kind = draw(st.sampled_from(kinds))
    if kind == "remove":
        del tensors[name]
    elif kind == "rename":
        new = draw(st.sampled_from(("grid_attr.1", "relevance", "x", f"{name}_", "seq_attr")))
        tensors[new] = tensors.pop(name)
    elif kind == "dtype":
        dtypes = (torch.float16, torch.float64, torch.int32, torch.bool, torch.uint8)
        tensors[name] = value.to(draw(st.sampled_from(dtypes)))
    elif kind == "shape":
        shapes = (
            value[:-1],
            value[..., :-1],
            value.flatten(),
            value[None],
            value[:0],
            value.expand(2, *value.shape),
        )
        tensors[name] = draw(st.sampled_from(shapes)).contiguous()
    elif kind == "swap":
        tensors[name] = tensors[draw(st.sampled_from(sorted(tensors)))].clone()
    elif value.numel():
        at = draw(st.integers(0, value.numel() - 1))
        new = draw(st.sampled_from((-1.0, 2.0, 1e30, float("nan"), float("inf"), 0.5)))
        value.flatten()[at] = new if value.is_floating_point() else -5
        tensors[name] = value
    return f"tensor {kind}: {name}", tensors


def sealed(header: Any, tensors: Any) -> bytes:
    """A file whose checksum is right, whatever it holds, NaN among it."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    blank = "0" * 64
    data = save(tensors, metadata={"captum_mllm": json.dumps(header), "sha256": blank})
    at = data.rindex(blank.encode(), 0, 8 + int.from_bytes(data[:8], "little"))
    return data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :]


def draw_case(data: st.DataObject) -> Case:
    result, file, folder = undamaged()
    path = folder / "damaged.safetensors"
    kind = data.draw(st.sampled_from(("bytes", "header", "header", "tensors")))
    header: Any = None
    tensors: Any = None
    if kind == "bytes":
        what, damaged = damaged_bytes(data.draw, file)
        path.write_bytes(damaged)
    else:
        header, tensors = read_tensors(folder / "result.safetensors")
        if kind == "header":
            what, header = damaged_data(data.draw, header)
        else:
            what, tensors = damaged_tensors(data.draw, tensors)
        path.write_bytes(sealed(header, tensors))
        header = json.loads(json.dumps(header))

    def run() -> MLLMAttributionResult:
        loaded = MLLMAttributionResult.load(path)
        # What is loaded can be used: no error comes later, far from its cause.
        repr(loaded)
        loaded.image_attr  # noqa: B018
        loaded.select([0])
        loaded.save(folder / "again.safetensors")
        return loaded

    def is_right(loaded: MLLMAttributionResult) -> bool:
        again = MLLMAttributionResult.load(folder / "again.safetensors")
        if not same(again, loaded):
            return False
        return same(loaded, result) or (header is not None and as_written(header, tensors, loaded))

    return Case(what, run, is_right, ["damaged.safetensors"])
