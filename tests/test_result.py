"""The result object: fields, maps, files."""

import dataclasses
import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from captum_mllm import LogitLens, MLLMAttributionResult, TokenActivationMap
from tests.oracle import formulas as reference
from tests.oracle.comparing import with_two_images
from tests.oracle.published import ARC, MSEA

METHODS = {
    "lens": lambda s: LogitLens(s.model),
    "lens-processor": lambda s: LogitLens(s.model, s.processor),
    "consistency": lambda s: MSEA(s.model, s.processor, consistency=True),
    "arc": lambda s: ARC(MSEA(s.model, s.processor)),
    "tam": lambda s: TokenActivationMap(s.model, s.processor),
}


@pytest.fixture(params=METHODS)
def result(request, tiny_subject):
    return METHODS[request.param](tiny_subject).attribute(tiny_subject.inputs, tiny_subject.answer)


@pytest.fixture
def of_two_images(tiny_subject):
    inputs = with_two_images(tiny_subject)[0]
    return ARC(MSEA(tiny_subject.model, tiny_subject.processor)).attribute(
        inputs, tiny_subject.answer
    )


def check_equal(one, two):
    for f in fields(MLLMAttributionResult):
        a, b = getattr(one, f.name), getattr(two, f.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), f.name
            assert a.dtype == b.dtype
        elif f.name == "grid_attr":
            assert type(a) is type(b) is tuple
            assert len(a) == len(b)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        else:
            assert a == b, f.name
            assert type(a) is type(b), f.name


# ---- fields ---------------------------------------------------------------------------------


def test_is_frozen(result):
    for f in fields(result):
        with pytest.raises(FrozenInstanceError):
            setattr(result, f.name, None)
    with pytest.raises(FrozenInstanceError):
        result.something = 1
    assert result == result
    assert result != replace(result)  # identity: tensors have no truth value
    assert isinstance(hash(result), int)


def test_shapes_and_kinds(result, tiny_subject):
    n, m = len(tiny_subject.answer), len(result.input_tokens)
    assert result.token_attr.shape == (n, m)
    assert result.seq_attr.shape == (m,)
    assert result.output_probs.shape == result.output_ids.shape == (n,)
    assert len(result.output_tokens) == n
    assert result.input_tokens[m - n :] == result.output_tokens
    for tensor in (*result.grid_attr, result.token_attr, result.output_probs, result.seq_attr):
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad
        assert float(tensor.min()) >= 0
    assert float(result.output_probs.max()) <= 1
    if result.units == "[0, 1]":
        assert max(float(m.max()) for m in result.grid_attr) <= 1 + 1e-6
        assert float(result.token_attr.max()) <= 1 + 1e-6
    else:
        assert result.units == "logits"


def test_names_of_methods(tiny_subject):
    s = tiny_subject
    named = {
        "LogitLens": LogitLens(s.model),
        "MSEA(LogitLens)": MSEA(s.model),
        "ARC(LogitLens)": ARC(s.model),
        "TokenActivationMap(LogitLens)": TokenActivationMap(s.model),
    }
    for name, method in named.items():
        assert method.attribute(s.inputs, s.answer).method == name


def test_image_attr_is_the_grid_in_pixels(result):
    (pixels,) = result.image_attr
    grid = result.grids[0]
    assert pixels.shape == (len(result.output_tokens), grid.height, grid.width) == (5, 16, 16)
    expected = reference.upsample(result.grid_attr[0].double(), (16, 16)).float()
    assert torch.allclose(pixels, expected, atol=1e-5)
    for target in (0, 3, -1):
        one = result.image_map(target)
        assert one.shape == (16, 16)
        assert torch.allclose(one, pixels[target])


def test_image_attr_of_two_images(of_two_images):
    maps = of_two_images.image_attr
    assert [m.shape for m in maps] == [(5, 16, 16)] * 2
    assert not torch.allclose(*maps)
    for image in (0, 1, -1):
        assert torch.allclose(of_two_images.image_map(2, image), maps[image][2])


@pytest.mark.parametrize(("target", "image"), [(5, 0), (-6, 0), (0, 1), (0, -2)])
def test_what_does_not_exist(result, target, image):
    with pytest.raises(IndexError, match=r"out of range: (5 tokens|there are 1 images)"):
        result.image_map(target, image)


def test_select(result):
    some = result.select([3, -5, 3])
    rows = [3, 0, 3]
    assert torch.equal(some.grid_attr[0], result.grid_attr[0][rows])
    assert torch.equal(some.token_attr, result.token_attr[rows])
    assert torch.equal(some.seq_attr, result.token_attr[rows].sum(0))
    assert some.output_ids.tolist() == result.output_ids[rows].tolist()
    assert torch.equal(some.output_probs, result.output_probs[rows])
    assert some.output_tokens == tuple(result.output_tokens[r] for r in rows)
    assert (some.input_tokens, some.units, some.scales) == (
        result.input_tokens, result.units, result.scales,
    )  # fmt: skip
    assert (some.relevance is None) == (result.relevance is None)
    if some.relevance is not None:
        assert torch.equal(some.relevance, result.relevance[rows])
    with pytest.raises(IndexError, match="5 tokens are explained"):
        result.select([5])


# ---- files ----------------------------------------------------------------------------------


def test_round_trip(result, tmp_path):
    path = tmp_path / "answer.safetensors"
    result.save(path)
    check_equal(result, MLLMAttributionResult.load(path))
    result.save(str(path))  # over the old one, and as a string
    check_equal(result, MLLMAttributionResult.load(str(path)))
    assert [p.name for p in tmp_path.iterdir()] == ["answer.safetensors"]


def test_round_trip_of_two_images_and_one_row(of_two_images, tmp_path):
    for n, item in enumerate((of_two_images, of_two_images.select([1]))):
        item.save(tmp_path / f"{n}")
        loaded = MLLMAttributionResult.load(tmp_path / f"{n}")
        check_equal(item, loaded)
        assert len(loaded.grid_attr) == 2
        assert torch.equal(loaded.image_map(0, 1), item.image_map(0, 1))


def test_loaded_results_know_the_picture(tiny_subject, tmp_path):
    s = tiny_subject
    result = LogitLens(s.model, s.processor).attribute(s.inputs, s.answer)
    result.save(tmp_path / "a")
    loaded = MLLMAttributionResult.load(tmp_path / "a")
    assert torch.equal(loaded.to_image(0, (40, 40)), result.to_image(0, (40, 40)))


def test_odd_labels_survive(result, tmp_path):
    tokens = tuple(f"{label}\n\"'\\é▁ \u2028" for label in result.input_tokens)
    odd = replace(result, input_tokens=tokens, scales=(0.1 + 0.2, 1.0))
    odd.save(tmp_path / "a")
    check_equal(odd, MLLMAttributionResult.load(tmp_path / "a"))


def test_file_holds_no_pickle(result, tmp_path):
    result.save(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        header = json.loads(file.metadata()["captum_mllm"])
        names = set(file.keys())
    assert header["format"] == 1
    assert names >= {"grid_attr.0", "token_attr", "output_ids", "output_probs"}
    with pytest.raises(Exception):  # noqa: B017, PT011
        pickle.loads((tmp_path / "a").read_bytes())


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path .*nothing.*no such file"):
        MLLMAttributionResult.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        MLLMAttributionResult.load(tmp_path)


def test_files_that_are_not_ours(result, tmp_path):
    path = tmp_path / "a"
    for data in (b"", b"hello", b"\0" * 100, pickle.dumps({"a": 1})):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"path .* is not a safetensors file"):
            MLLMAttributionResult.load(path)
    for metadata in (None, {"other": "1"}):
        save_file({"x": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"path .* was not written by captum_mllm"):
            MLLMAttributionResult.load(path)
    result.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"path .* is not a safetensors file"):
        MLLMAttributionResult.load(path)


def test_a_newer_format(result, tmp_path):
    path = tmp_path / "a"
    result.save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["captum_mllm"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["format"] = 2
    save_file(tensors, path, metadata={"captum_mllm": json.dumps(header)})
    with pytest.raises(ValueError, match=r"has format 2, this version reads format 1"):
        MLLMAttributionResult.load(path)


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_nothing_half_written(result, tmp_path, monkeypatch, fails):
    path = tmp_path / "a"
    other = result.select([0])
    other.save(path)
    before = path.read_bytes()
    write = Path.write_bytes

    def broken(self, data, *_):
        if fails == "write_bytes":
            write(self, data[:50])
        raise OSError("disk full")

    monkeypatch.setattr(Path, fails, broken)
    with pytest.raises(OSError, match="disk full"):
        result.save(path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        result.save(tmp_path / "no folder" / "a")


def test_every_field_is_saved(result, tmp_path):
    """A field added later and forgotten in save would show here."""
    changed = replace(
        result,
        units="other",
        scales=(0.5, 2.0),
        consistency=(0.25, 0.75),
        method="mine",
        relevance=torch.rand_like(result.token_attr),
        output_tokens=tuple("abcde"),
        grids=(dataclasses.replace(result.grids[0], rows=9, height=99),),
    )
    changed.save(tmp_path / "a")
    check_equal(changed, MLLMAttributionResult.load(tmp_path / "a"))


@pytest.mark.parametrize("header", ["{}", '{"format": 1}', "[1]", "no json"])
def test_damaged_headers_are_named(header, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "damaged.safetensors"
    save_file({"token_attr": torch.zeros(1, 1)}, path, metadata={"captum_mllm": header})
    with pytest.raises(ValueError, match=r"damaged\.safetensors"):
        MLLMAttributionResult.load(path)
