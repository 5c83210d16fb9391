"""The result object: fields, maps, files."""

import dataclasses
import json
import pickle
import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from captum_mllm import LogitLens, MLLMAttributionResult, TokenActivationMap
from captum_mllm.files import read_tensors, write_tensors
from captum_mllm.geometry import ImageGrid, Preprocessing
from captum_mllm.validation import ArgumentError
from tests.disks import full_disk
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
    odd = replace(result, input_tokens=tokens, scales=(0.1 + 0.2, 1.0), consistency=None)
    odd.save(tmp_path / "a")
    check_equal(odd, MLLMAttributionResult.load(tmp_path / "a"))


def test_file_holds_no_pickle(result, tmp_path):
    result.save(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        header = json.loads(file.metadata()["captum_mllm"])
        names = set(file.keys())
    assert header["format"] == 2
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
    deep = "[" * 100_000 + "]" * 100_000
    save_file({"x": torch.ones(2)}, path, metadata={"captum_mllm": deep})
    with pytest.raises(ValueError, match=r"path .*a' is damaged: "):
        MLLMAttributionResult.load(path)


def test_files_without_a_checksum(result, tmp_path):
    """As the first versions wrote them: they can't be told from damaged ones."""
    path = tmp_path / "a"
    result.save(path)
    header, tensors = read_tensors(path)
    header["format"] = 1
    save_file(tensors, path, metadata={"captum_mllm": json.dumps(header)})
    with pytest.raises(ValueError, match=r"path .* holds no checksum: .*save its content again"):
        MLLMAttributionResult.load(path)


def test_a_newer_format(result, tmp_path):
    path = tmp_path / "a"
    result.save(path)
    header, tensors = read_tensors(path)
    write_tensors(path, {**header, "format": 3, "further": 1}, tensors)
    with pytest.raises(ValueError, match=r"format is 3, and this version reads 2"):
        MLLMAttributionResult.load(path)


def refused(path, *, naming=""):
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        MLLMAttributionResult.load(path)
    assert naming in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of a result, a small one so that each of its bits can be tried."""
    path = tmp_path_factory.mktemp("saved") / "result"
    small_result().save(path)
    return path


def small_result():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    return MLLMAttributionResult(
        grid_attr=(random(2, 2, 3), random(2, 4, 2, 2)),
        token_attr=random(2, 4),
        input_tokens=("what", " is\n", '"é▁', "0" * 64),
        output_tokens=('"é▁', "0" * 64),
        output_ids=torch.tensor([7, 9]),
        output_probs=random(2),
        units="[0, 1]",
        grids=(
            ImageGrid(2, 3, 28, 42, picture=(30, 50), box=(0.0, -1.5, 50.0, 31.5)),
            ImageGrid(1, 1, 14, 14, steps=2, frames=4),
        ),
        relevance=random(2, 4),
        scales=(1.0, 2.0),
        consistency=(1.0, 0.5),
        preprocessing=Preprocessing(resize=(28, 42), shortest_edge=3, keeps_aspect=0),
        method="mine",
    )


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(saved, tmp_path, step):
    data, path = saved.read_bytes(), tmp_path / "flipped"
    check_equal(small_result(), MLLMAttributionResult.load(saved))
    for place in range(0, len(data), step):
        bit = 1 << place % 8
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        refused(path)


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_every_other_length_is_found(saved, tmp_path, step):
    data, path = saved.read_bytes(), tmp_path / "cut"
    others = [data[:n] for n in range(0, len(data), step)]
    others += [data + b"\0", data + data, data[:8] + b" " + data[8:], b"\0" + data]
    for other in others:
        path.write_bytes(other)
        refused(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
PLACES = [
    *((name,) for name in ("format", "input_tokens", "output_tokens", "scales", "consistency")),
    *((name,) for name in ("units", "method", "grids", "preprocessing")),
    *(("grids", 0, name) for name in ImageGrid(1, 1, 1, 1).to_dict()),
    *(("grids", 1, name) for name in ("steps", "frames", "rows")),
    *(("preprocessing", name) for name in Preprocessing().to_dict()),
    *(("input_tokens", 0), ("output_tokens", 1), ("scales", 0), ("consistency", 1), ("grids", 0)),
]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.sampled_from(PLACES), value=json_values, gone=st.booleans())
def test_fields_of_the_header_with_a_right_checksum(saved, tmp_path, place, value, gone):
    """Either the error names the file and the field, or the result holds the value as it came."""
    header, tensors = read_tensors(saved)
    inner = header
    for step in place[:-1]:
        inner = inner[step]
    if gone:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path = tmp_path / "other"
    write_tensors(path, header, tensors)
    try:
        result = MLLMAttributionResult.load(path)
    except ValueError:
        refused(path)
        return
    assert not (gone and isinstance(place[-1], str))
    result.save(path)
    again, _ = read_tensors(path)
    assert again == header


WRONG_TENSORS = [  # name, another tensor or None for none, what the message names
    ("token_attr", None, "token_attr is missing"),
    ("grid_attr.1", None, "grid_attr.1 is missing"),
    ("further", torch.ones(1), "tensors must not hold 'further'"),
    ("grid_attr.2", torch.ones(2, 2, 2), "tensors must not hold 'grid_attr.2'"),
    ("token_attr", torch.rand(4, 2), "token_attr must be float32 of shape (2, 4), got"),
    ("token_attr", torch.rand(2, 4).double(), "token_attr must be float32 of shape (2, 4), got f"),
    ("token_attr", torch.full((2, 4), float("nan")), "token_attr must be finite"),
    ("token_attr", torch.full((2, 4), 2.0), "token_attr must lie in [0, 1], got 2 to 2"),
    ("relevance", torch.full((2, 4), -1.0), "relevance must lie in [0, 1], got -1 to -1"),
    ("relevance", torch.rand(2, 3), "relevance must be float32 of shape (2, 4)"),
    ("output_probs", torch.tensor([0.5, 1.5]), "output_probs must lie in [0, 1]"),
    ("output_probs", torch.tensor([0.5, float("inf")]), "output_probs must be finite"),
    ("output_ids", torch.tensor([1]), "output_ids must be int64 of shape (2,)"),
    ("output_ids", torch.tensor([1.0, 2.0]), "output_ids must be int64 of shape (2,), got float32"),
    ("output_ids", torch.tensor([1, -2]), "output_ids must be >= 0, got -2"),
    ("grid_attr.0", torch.rand(1, 2, 3), "grid_attr.0 must be float32 of shape (2, *, *)"),
    ("grid_attr.0", torch.rand(2, 0, 3), "grid_attr.0 must be float32 of shape (2, *, *)"),
    ("grid_attr.1", torch.rand(2, 3, 2, 2), "grid_attr.1 must be float32 of shape (2, 4, *, *)"),
    ("grid_attr.0", torch.rand(2, 2, 3).bfloat16(), "float32 of shape (2, *, *), got bfloat16"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), WRONG_TENSORS)
def test_tensors_with_a_right_checksum(saved, tmp_path, name, tensor, message):
    header, tensors = read_tensors(saved)
    tensors.pop(name, None)
    write_tensors(tmp_path / "a", header, {**tensors, **({} if tensor is None else {name: tensor})})
    refused(tmp_path / "a", naming=message)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    probs = torch.tensor([0.5, float("nan")])
    with pytest.raises(ArgumentError, match="output_probs must be finite"):
        replace(small_result(), output_probs=probs).save(tmp_path / "a")
    with pytest.raises(ArgumentError, match=r"consistency must be a number in \[0, 1\] per scale"):
        replace(small_result(), consistency=(0.5,)).save(tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_nothing_half_written(result, tmp_path):
    path = tmp_path / "a"
    result.select([0]).save(path)
    before = path.read_bytes()
    for limit in (0, 1, 50, len(before) - 1):
        with full_disk(limit), pytest.raises(OSError, match="File too large"):
            result.save(path)
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        result.save(tmp_path / "no folder" / "a")


def test_every_field_is_saved(result, tmp_path):
    """A field added later and forgotten in save would show here."""
    changed = replace(
        result,
        units="logits",
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
