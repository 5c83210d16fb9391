"""The controls of ``methods.explain``: noise, centre, shuffled weights, the masks themselves."""

import math
from collections import Counter

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from captum_mllm import ARC, JointNormalization
from captum_mllm.geometry import ImageGeometry
from captum_mllm.methods import explain
from captum_mllm.methods.controls import mask_shares, shuffled_copy
from captum_mllm.validation import ArgumentError
from tests.oracle.families import above, family
from tests.oracle.layouts import canvas_of, kin_of, pictures_of
from tests.oracle.model_state import check_same, state

# ---- noise and centre ---------------------------------------------------------------------------


def test_noise(shipped_subject):
    it = shipped_subject

    def drawn(seed=0):
        return explain("random", it.model, None, it.inputs, it.answer, seed=seed).grid_attr[0]

    maps = drawn()
    assert torch.equal(maps, drawn())
    assert not torch.equal(maps, drawn(1))
    assert not torch.equal(maps[0], maps[1])
    assert abs(float(maps.mean()) - 0.5) < 0.05
    shares = torch.histc(maps, 4, 0, 1) / maps.numel()
    assert float((shares - 0.25).abs().max()) < 0.05


def test_noise_leaves_the_global_generator_alone(model, inputs, answer):
    before = torch.get_rng_state()
    explain("random", model, None, inputs, answer)
    explain("randomised_model", model, None, inputs, answer)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sigma", [0.25, 0.1])
def test_centre(sigma):
    kin = kin_of("Qwen2VL")
    pictures = pictures_of(kin, "two")
    options = {} if sigma == 0.25 else {"sigma": sigma}
    got = explain("centre", kin.model, None, kin.encode(*pictures), kin.answer, **options)
    cells = [[[
        math.exp(-(((r + 0.5) / grid.rows - 0.5) ** 2 + ((c + 0.5) / grid.cols - 0.5) ** 2)
                 / (2 * sigma**2))
        for c in range(grid.cols)] for r in range(grid.rows)] for grid in got.grids]  # fmt: skip
    peak = max(v for own in cells for row in own for v in row)
    for maps, own in zip(got.grid_attr, cells, strict=True):
        for one in maps:
            assert_close(one, torch.tensor(own) / peak)
        assert_close(maps, maps.flip(-1))
        assert_close(maps, maps.flip(-2))


@pytest.mark.parametrize("sigma", [0, -1.0, math.inf, math.nan])
def test_a_width_of_nothing(sigma, model, inputs, answer):
    with pytest.raises(ValueError, match="sigma must lie greater than 0"):
        explain("centre", model, None, inputs, answer, sigma=sigma)


# ---- shuffled weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", above())
def test_shuffled_weights(name):
    model = family(name).model
    before = state(model)
    other = shuffled_copy(model, 0)
    check_same(before, model)
    own, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert own.keys() == theirs.keys()
    assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for p in theirs.values()}
    changed = 0
    for key, parameter in own.items():
        new = theirs[key]
        assert Counter(parameter.flatten().tolist()) == Counter(new.flatten().tolist())
        changed += not torch.equal(parameter, new)
    varied = sum(len(p.unique()) > 1 for p in own.values())
    assert changed >= varied - 1  # two values may fall back into their places
    again, another = shuffled_copy(model, 0), shuffled_copy(model, 1)
    weights = [m.get_output_embeddings().weight for m in (other, again, another)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (other.get_output_embeddings().weight is other.get_input_embeddings().weight)


def test_another_method_on_a_shuffled_model(model, processor, inputs, answer):
    other = shuffled_copy(model, 5)
    got = explain("randomised_model", model, processor, inputs, answer, seed=5)
    expected = JointNormalization(other).attribute(inputs, answer)
    assert torch.equal(got.grid_attr[0], expected.grid_attr[0])
    assert got.method == "randomised_model(JointNormalization(LogitLens))"
    own = explain("lens", model, processor, inputs, answer)
    assert not torch.allclose(own.grid_attr[0], got.grid_attr[0], atol=0.1)
    got = explain(
        "randomised_model", model, processor, inputs, answer, seed=5, of="arc", strength=0.5
    )
    expected = ARC(other, strength=0.5).attribute(inputs, answer)
    assert torch.equal(got.grid_attr[0], expected.grid_attr[0])
    got = explain(
        "randomised_model", model, None, inputs, answer, of="integrated_gradients", steps=3
    )
    expected = explain(
        "integrated_gradients", shuffled_copy(model, 0), None, inputs, answer, steps=3
    )
    assert torch.equal(got.grid_attr[0], expected.grid_attr[0])


def test_seed_and_masks_reach_the_other_method(model, processor, inputs, answer):
    given = {"seed": 5, "masks": {1: torch.ones(16, 16, dtype=torch.bool)}}
    for method in ("random", "mask"):
        got = explain("randomised_model", model, processor, inputs, answer, of=method, **given)
        expected = explain(method, model, processor, inputs, answer, **given)
        assert torch.equal(got.grid_attr[0], expected.grid_attr[0])


def test_weights_that_cannot_be_shuffled(model):
    offloaded = family("Llava").model
    offloaded.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"parameter 'lm_head\.weight' is offloaded"):
        shuffled_copy(offloaded, 0)
    quantised = torch.nn.Linear(2, 2)
    quantised.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"parameter 'weight' is of torch\.int8"):
        shuffled_copy(quantised, 0)


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_a_control_of_an_offloaded_model_says_what_to_do(where, inputs, answer, tmp_path):
    model = family("Llava").model
    if where == "disk":
        away = accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        away = accelerate.cpu_offload(model, execution_device="cpu")
    ran = []
    away.lm_head.register_forward_hook(lambda *_: ran.append(1))
    message = r"^model can't be copied .* is offloaded .*device_map='cpu'.*'random' or 'centre'"
    with pytest.raises(ArgumentError, match=message):
        explain("randomised_model", away, None, inputs, answer)
    assert not ran  # which takes long where weights are on disk


# ---- the masks themselves -----------------------------------------------------------------------


def shares_by_dust(mask, box, size, grains=60):
    """Share of each cell's part in the picture that is masked, by points."""
    left, upper, right, lower = box
    out = torch.zeros(size)
    for r in range(size[0]):
        for c in range(size[1]):
            y = upper + (r + (np.arange(grains) + 0.5) / grains) / size[0] * (lower - upper)
            x = left + (c + (np.arange(grains) + 0.5) / grains) / size[1] * (right - left)
            y, x = y[(y >= 0) & (y < mask.shape[0])], x[(x >= 0) & (x < mask.shape[1])]
            if len(y) and len(x):
                out[r, c] = mask[np.ix_(y.astype(int), x.astype(int))].float().mean()
    return out


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 11.0, 7.0), (2.0, 0.0, 9.0, 7.0), (-3.0, -2.0, 14.0, 9.0), (0.5, 1.25, 8, 5)]
)
def test_shares_of_cells(box):
    mask = torch.rand(7, 11) > 0.5
    got = mask_shares(mask, box, (3, 4))
    assert_close(got, shares_by_dust(mask, box, (3, 4)), rtol=0, atol=0.03)


@pytest.mark.parametrize("name", above())
def test_masks_on_the_models_grid(name):
    """Of two pictures, one of which lacks the object."""
    kin = kin_of(name)
    pictures = pictures_of(kin, "two")
    inputs = kin.encode(*pictures)
    masks = [torch.rand(p.height, p.width) > 0.6 for p in pictures]
    given = {1: masks, 3: (None, masks[1])}
    got = explain("mask", kin.model, kin.processor, inputs, kin.answer, masks=given)
    for i, picture in enumerate(pictures):
        if name == "LlavaNext":
            box = canvas_of(picture).box
        elif name == "Llava":  # the centre of the wide and of the tall picture
            off_x, off_y = (picture.width - 16) / 2, (picture.height - 16) / 2
            box = (off_x, off_y, off_x + 16, off_y + 16)
        else:
            box = (0, 0, picture.width, picture.height)
        maps = got.grid_attr[i]
        expected = shares_by_dust(masks[i], box, (maps.shape[-2], maps.shape[-1]))
        assert_close(maps[1], expected, rtol=0, atol=0.04)
        assert torch.equal(maps[3], maps[1] * (i == 1))
        assert not bool(maps[[0, 2, 4]].any())
    assert got.method == "mask"


def test_what_the_crop_leaves_out_is_not_seen(model, processor):
    picture = Image.new("RGB", (28, 16))
    inputs = dict(processor(images=picture, text="USER: <image> what ?", return_tensors="pt"))
    left = torch.zeros(16, 28, dtype=torch.bool)
    left[:, :6] = True
    got = explain("mask", model, processor, inputs, [20, 31], masks={0: left, 1: ~left})
    assert not bool(got.grid_attr[0][0].any())
    assert torch.equal(got.grid_attr[0][1], torch.ones(4, 4))
    box = ImageGeometry((0.0, 0.0, 12.0, 16.0))
    got = explain("mask", model, None, inputs, [20, 31], masks={0: left}, geometry=box)
    assert torch.equal(got.grid_attr[0][0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="geometry=ImageGeometry"):
        explain("mask", model, None, inputs, [20, 31], masks={0: left})


def test_a_small_object_keeps_its_small_share(model, processor, inputs, answer):
    small = np.zeros((16, 16), dtype=bool)
    small[0, 0] = True
    got = explain("mask", model, processor, inputs, answer, masks={2: small})
    assert float(got.grid_attr[0][2, 0, 0]) == 1 / 16
    assert float(got.grid_attr[0].sum()) == 1 / 16


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([1], TypeError, "masks must map positions in the answer to masks, got list"),
        ({5: None}, ValueError, r"positions 0\.\.4 in the answer, got \[5\]"),
        ({-1: None, 0: None}, ValueError, r"got \[-1\]"),
        ({"0": None}, ValueError, r"got \['0'\]"),
        ({0: [None, None]}, ValueError, r"masks\[0\] must hold one mask .* 1 images, got 2"),
        ({0: torch.ones(16, 16)}, TypeError, r"masks\[0\] must be bool .*float32 \(16, 16\)"),
        ({0: torch.ones(1, 16, 16).bool()}, TypeError, r"bool \(1, 16, 16\)"),
    ],
)
def test_errors_of_masks(masks, error, message, model, processor, inputs, answer):
    with pytest.raises(error, match=message):
        explain("mask", model, processor, inputs, answer, masks=masks)
