"""Layouts found by probing against the adapters written by hand, token by token."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from captum_mllm import MSEA, LogitLens, TokenLogProb
from captum_mllm.adapters import DiscoveredAdapter, find_adapter, registry
from captum_mllm.adapters.layout import LayoutError, PictureLayout, PictureView, TokenLayout
from captum_mllm.adapters.painting import PixelSource, paint
from captum_mllm.methods import explain
from captum_mllm.model.discovery import discover, probe_layout
from captum_mllm.model.facts import head_law
from captum_mllm.validation import ArgumentError
from tests.oracle.families import NAMES, above, family, video
from tests.oracle.model_state import check_same, state
from tests.oracle.tiny import random_picture

SHAPES = ((60, 60), (90, 50), (48, 96))  # (width, height)


def smooth(size, seed=0):
    """A picture whose places differ, without noise of single pixels."""
    small = random_picture(seed, (size[0] // 8 + 1, size[1] // 8 + 1))
    return small.resize(size, Image.Resampling.BICUBIC)


def as_sets(views):
    return sorted((tokens.tolist() for tokens in views), key=str)


@pytest.fixture
def unregistered(monkeypatch):
    """No adapter is registered: every class is probed."""
    monkeypatch.setattr(registry, "_REGISTRY", {})


def without_own_layout(kin, *pictures):
    """The probed layout, or None where the family's processor drops a part of this picture."""
    inputs = kin.encode(*pictures)
    return probe_layout(kin.model, inputs, kin.processor, list(pictures)), inputs


# ---- the layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_probe_is_the_adapter(name):
    kin = family(name)
    adapter = find_adapter(kin.model)
    before = state(kin.model)
    for size in SHAPES:
        layout, inputs = without_own_layout(kin, smooth(size))
        (grid,) = adapter.grids(inputs)
        (picture,) = layout.pictures
        assert not layout.notes
        assert picture.runs == adapter.runs(grid)
        assert set(layout.placeholders) <= set(adapter.visual_ids)
        probed = as_sets(torch.tensor(view.tokens) for view in picture.views)
        assert probed == as_sets(view.tokens for view in adapter.views(grid))
        if grid.box is not None:
            assert np.allclose(picture.views[0].box, grid.box, atol=0.1)
    check_same(before, kin.model)


@pytest.mark.parametrize("name", ["Llava", "InternVL", "Gemma3", "Qwen2_5_VL", "LlavaNext"])
def test_several_pictures(name):
    kin = family(name)
    pictures = [smooth((60, 60)), smooth((90, 50), 1), smooth((48, 96), 2)]
    layout, inputs = without_own_layout(kin, *pictures)
    adapter = find_adapter(kin.model)
    assert len(layout.pictures) == 3
    for picture, grid in zip(layout.pictures, adapter.grids(inputs), strict=True):
        assert picture.runs == adapter.runs(grid)
        probed = as_sets(torch.tensor(view.tokens) for view in picture.views)
        assert probed == as_sets(view.tokens for view in adapter.views(grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", above(["Llava", "Qwen2_5_VL", "Qwen3VL", "InternVL"]))
def test_half_precision_is_probed_in_float32(name, dtype):
    kin, half = family(name), family(name, dtype=dtype)
    picture = smooth((60, 60))
    before = state(half.model)
    found = probe_layout(half.model, half.encode(picture), half.processor, picture)
    expected = probe_layout(kin.model, kin.encode(picture), kin.processor, picture)
    for one, other in zip(found.views, expected.views, strict=True):
        assert one.tokens == other.tokens
        assert np.allclose(one.box, other.box, atol=0.05)
    assert found.pictures[0].runs == expected.pictures[0].runs
    check_same(before, half.model)


@pytest.mark.parametrize("name", above(["Llava", "Qwen2_5_VL", "Gemma3"]))
def test_eager_attention(name):
    eager, sdpa = family(name, attn="eager"), family(name)
    picture = smooth((60, 60))
    layouts = [
        probe_layout(k.model, k.encode(picture), k.processor, picture) for k in (eager, sdpa)
    ]
    assert layouts[0].pictures == layouts[1].pictures


def test_state_after_an_interrupt():
    kin = family("Qwen2_5_VL")
    picture = smooth((60, 60))
    inputs, before = kin.encode(picture), state(kin.model)

    def stop(*_):
        raise KeyboardInterrupt

    handle = kin.model.get_encoder(modality="image").register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        probe_layout(kin.model, inputs, kin.processor, picture)
    handle.remove()
    check_same(before, kin.model)


# ---- refusals ----------------------------------------------------------------------------------


class Queries(nn.Module):
    """As many queries as patches, each looking all over the picture."""

    def __init__(self, n, dim):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.queries = nn.Parameter(torch.randn(n, dim, generator=generator))

    def forward(self, patches):
        queries = self.queries.expand(len(patches), -1, -1)
        return nn.functional.scaled_dot_product_attention(queries, patches, patches)


class Mixed(nn.Module):
    """A layer over positions, as in an MLP-Mixer."""

    def __init__(self, n, _dim):
        super().__init__()
        self.layer = nn.Linear(n, n)

    def forward(self, patches):
        return self.layer(patches.transpose(1, 2)).transpose(1, 2)


class Permuted(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.order = torch.randperm(n, generator=torch.Generator().manual_seed(0))

    def forward(self, patches):
        return patches[:, self.order]


def behind_the_tower(module):
    kin = family("Llava")
    inner = kin.model.model
    inner.multi_modal_projector = nn.Sequential(module, inner.multi_modal_projector)
    return kin


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Queries, "hears its own place"),
        (Mixed, "several of them"),
    ],
)
def test_tokens_without_places_are_refused(module, reason):
    plain = family("Llava")
    n, dim = 16, plain.model.config.vision_config.hidden_size
    kin = behind_the_tower(module(n, dim))
    picture = smooth((60, 60))
    with pytest.raises(LayoutError, match=reason):
        probe_layout(kin.model, kin.encode(picture), kin.processor, picture)


def test_an_irregular_layout_is_refused_until_allowed(unregistered):
    kin = behind_the_tower(Permuted(16))
    picture = smooth((60, 60))
    inputs = kin.encode(picture)
    lens = LogitLens(kin.model, kin.processor)
    with pytest.raises(LayoutError, match=r"do not follow one another row by row.*allow_irregular"):
        lens.attribute(inputs, kin.answer, images=picture)
    got = lens.attribute(inputs, kin.answer, images=picture, allow_irregular=True)
    order = kin.model.model.multi_modal_projector[0].order
    plain = family("Llava")
    expected = LogitLens(plain.model, plain.processor).attribute(inputs, kin.answer, images=picture)
    assert order.tolist() != sorted(order.tolist())
    assert got.grid_attr[0].shape == expected.grid_attr[0].shape


def test_pictures_and_processor_must_be_those_of_the_inputs(unregistered):
    kin = family("Llava")
    inputs = kin.encode(smooth((60, 60)))
    lens = LogitLens(kin.model, kin.processor)
    with pytest.raises(LayoutError, match="images=picture"):
        lens.attribute(inputs, kin.answer)
    with pytest.raises(LayoutError, match="processor"):
        LogitLens(kin.model).attribute(inputs, kin.answer, images=smooth((60, 60)))
    with pytest.raises(ArgumentError, match=r"images .* other pictures"):
        lens.attribute(inputs, kin.answer, images=smooth((60, 60), seed=5))
    with pytest.raises(TypeError, match="PIL"):
        lens.attribute(inputs, kin.answer, images="cat.png")
    other = family("Qwen2_5_VL")
    with pytest.raises(ArgumentError, match="is the processor that of another model"):
        LogitLens(kin.model, other.processor).attribute(inputs, kin.answer, images=smooth((60, 60)))


def test_a_video_is_not_probed(unregistered):
    kin = family("Qwen2VL")
    with pytest.raises(LayoutError, match="images=picture"):
        LogitLens(kin.model, kin.processor).attribute(video(kin), kin.answer)


# ---- facts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", above(NAMES))
def test_facts_are_those_of_the_adapter(name, unregistered, monkeypatch):
    kin = family(name)
    picture = smooth((60, 60))
    adapter = find_adapter(kin.model)
    discover(adapter, kin.processor, kin.encode(picture), picture)
    monkeypatch.undo()
    by_hand = find_adapter(kin.model)
    assert isinstance(adapter, DiscoveredAdapter)
    assert not isinstance(by_hand, DiscoveredAdapter)
    assert adapter.final_norm is by_hand.final_norm
    assert list(adapter.layers) == list(by_hand.layers)
    assert adapter.head is by_hand.head
    assert adapter.bidirectional_prompt == by_hand.bidirectional_prompt
    assert (adapter.facts.scale, adapter.facts.cap) == (1.0, None)
    # Those that were seen to matter on this prompt; some matter on other prompts only.
    assert set(adapter.required) <= set(by_hand.required)
    if name in ("Gemma3", "Qwen2_5_VL"):
        assert adapter.required


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("cap", [None, 20.0, 30.0])
def test_head_law(scale, cap):
    linear = 40 * torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = scale * linear if cap is None else cap * torch.tanh(scale * linear / cap)
    found_scale, found_cap = head_law(linear, logits)
    assert found_scale == pytest.approx(scale, rel=2e-3)
    assert found_cap == cap if cap is None else found_cap == pytest.approx(cap, rel=2e-3)


def test_an_unknown_head_law_is_refused():
    linear = torch.linspace(-30, 30, 200, dtype=torch.float64)
    with pytest.raises(LayoutError, match="neither"):
        head_law(linear, linear.abs())


# ---- what users call ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", above(NAMES))
def test_maps_are_those_of_the_adapter(name, unregistered, monkeypatch, capsys):
    kin, again = family(name), family(name)
    picture = smooth((60, 60))
    inputs = kin.encode(picture)
    lens = LogitLens(kin.model, kin.processor)
    got = lens.attribute(inputs, kin.answer, images=picture)
    assert f"probed {type(kin.model).__name__}" in capsys.readouterr().err
    known = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)  # by its pixels
    assert capsys.readouterr().err == ""
    assert_close(known.grid_attr[0], got.grid_attr[0], rtol=0, atol=0)
    monkeypatch.undo()
    expected = LogitLens(again.model, again.processor).attribute(inputs, kin.answer)
    size = float(expected.grid_attr[0].abs().max())
    assert_close(got.grid_attr[0], expected.grid_attr[0], rtol=0.02, atol=0.01 * size)
    assert_close(got.output_probs, expected.output_probs)
    assert_close(got.token_attr, expected.token_attr)


@pytest.mark.parametrize("name", above(["Llava", "InternVL", "Gemma3", "Qwen2_5_VL"]))
def test_windows_flips_and_canvases(name, unregistered):
    kin = family(name)
    picture = smooth((60, 60))
    inputs = kin.encode(picture)
    before = state(kin.model)
    flips = ("none", "horizontal", "half_turn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = [
            MSEA(kin.model, kin.processor, scales=(1.0, 1.5), flip=flip)
            .attribute(inputs, kin.answer, images=picture)
            .grid_attr[0]
            for flip in flips
        ]
    assert len({tuple(m.shape[1:]) for m in maps}) == 1
    rows, cols = find_adapter(kin.model).grids(inputs)[0].shape
    assert abs(maps[0].shape[1] - 1.5 * rows) <= 1
    assert abs(maps[0].shape[2] - 1.5 * cols) <= 1
    assert not torch.equal(maps[0], maps[1])
    score = TokenLogProb(kin.model, inputs, kin.answer)
    adapter = find_adapter(kin.model)
    grids = adapter.grids(inputs)
    own = adapter.with_canvases(inputs, grids, adapter.canvases(inputs, grids))
    for key, value in own.items():
        assert torch.equal(value, inputs[key])
    pixels = score.pixels.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(pixels)[0, 0], pixels)
    assert float(gradient.abs().sum()) > 0
    check_same(before, kin.model)


@pytest.mark.parametrize("flip", ["none", "half_turn"])
def test_native_resolution_is_scaled_by_size(flip, unregistered, monkeypatch):
    kin, again = family("Qwen2VL"), family("Qwen2VL")
    picture = smooth((64, 48))
    inputs, options = kin.encode(picture), {"scales": (1.0, 1.5), "flip": flip}
    before = state(kin.model)
    got = MSEA(kin.model, kin.processor, **options).attribute(inputs, kin.answer, images=picture)
    check_same(before, kin.model)
    monkeypatch.undo()
    by_hand = MSEA(again.model, again.processor, **options)
    expected = by_hand.attribute(inputs, kin.answer, images=picture)
    assert got.scales == pytest.approx(expected.scales)
    one, other = got.grid_attr[0], expected.grid_attr[0]
    assert one.shape == other.shape
    assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.95  # another way of resizing


def test_a_flip_of_a_symmetric_window_is_the_processors(unregistered):
    kin = family("Llava")
    picture = smooth((90, 50))
    inputs = kin.encode(picture)
    adapter = find_adapter(kin.model)
    discover(adapter, kin.processor, inputs, picture)
    grids = adapter.grids(inputs)
    assert adapter.can_flip(grids, (-1,))
    flipped = adapter.flipped(inputs, grids, (-1,))["pixel_values"]
    assert_close(flipped, inputs["pixel_values"].flip(-1), rtol=0, atol=0.1)
    whole = adapter.window_pixels(inputs, grids, [(0.0, 0.0, 1.0, 1.0)])["pixel_values"]
    assert_close(whole, inputs["pixel_values"], rtol=0, atol=0.1)
    half = adapter.window_pixels(inputs, grids, [(0.0, 0.0, 0.5, 0.5)])["pixel_values"]
    expected = nn.functional.interpolate(
        inputs["pixel_values"][..., :8, :8], size=(16, 16), mode="bilinear"
    )
    correlation = np.corrcoef(half.flatten(), expected.flatten())[0, 1]
    assert correlation > 0.9


# ---- layouts as files, paint -------------------------------------------------------------------


def test_a_layout_is_saved_and_used_again(tmp_path, unregistered, capsys):
    kin = family("InternVL")
    picture = smooth((90, 50))
    inputs = kin.encode(picture)
    layout = probe_layout(kin.model, inputs, kin.processor, picture)
    layout.save(tmp_path / "layout.json")
    again = TokenLayout.load(tmp_path / "layout.json")
    assert again == layout
    other = family("InternVL")
    assert probe_layout(other.model, inputs, other.processor, picture, layout=again) == layout
    lens = LogitLens(other.model, other.processor)
    assert lens.attribute(inputs, kin.answer, images=picture).grid_attr
    assert capsys.readouterr().err == ""  # nothing was probed
    small = smooth((60, 60))
    inputs = kin.encode(small)
    with pytest.raises(ArgumentError, match="layout is of pictures"):
        probe_layout(kin.model, inputs, kin.processor, small, layout=again)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 2}', '{"format": 1, "pictures": 3}', "[" * 99_999],
    ids=lambda t: t[:30],
)
def test_a_damaged_layout_names_what_is_wrong(tmp_path, text):
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"layout\.json"):
        TokenLayout.load(tmp_path / "layout.json")


def test_every_damage_to_a_layout_is_found(tmp_path):
    path = tmp_path / "layout.json"
    view = PictureView(((0, 1), (2, -1)), (0.0, 0.0, 28.0, 28.5), 14.0)
    layout = TokenLayout((PictureLayout((28, 28), (view,), (4,)),), (3, 4, 5, 6), ("é",), 1, 2, 3)
    layout.save(path)
    data = path.read_bytes()
    assert TokenLayout.load(path) == layout
    flipped = [
        data[:n] + bytes([data[n] ^ 1 << n % 8]) + data[n + 1 :] for n in range(0, len(data), 5)
    ]
    for other in [*flipped, *(data[:n] for n in range(0, len(data), 5)), b"[" * 100_000]:
        path.write_bytes(other)
        with pytest.raises(ArgumentError, match=r"layout\.json"):
            TokenLayout.load(path)


@pytest.mark.parametrize("name", above(NAMES))
def test_painted_places_are_those_that_show_in_the_pixels(name):
    """The pixels follow from what the picture shows at the painted places."""
    kin = family(name)
    picture = smooth((60, 60))
    inputs = kin.encode(picture)
    source = PixelSource.of(kin.processor, [picture], inputs)
    painted, _ = paint(source, [(60, 60)])
    at = painted.shows.nonzero()[:, 0]
    x, y = (v[at].floor().clamp(0, 59).long() for v in (painted.x, painted.y))
    shown = torch.from_numpy(np.array(picture))[y, x].gather(1, painted.channel[at, None])[:, 0]
    level = painted.black[at] + (painted.white - painted.black)[at] * shown / 255
    assert int((painted.channel[at] < 0).sum()) == 0
    correlation = np.corrcoef(level, painted.flat(inputs)[at])[0, 1]
    assert correlation > 0.97


@pytest.mark.parametrize("method", ["lens", "gradcam", "attention", "ablation", "randomised_model"])
def test_other_methods_know_the_pictures(method, unregistered):
    kin = family("Llava")
    picture = smooth((60, 60))
    inputs = kin.encode(picture)
    result = explain(method, kin.model, kin.processor, inputs, kin.answer, images=picture)
    assert tuple(result.grid_attr[0].shape) == (len(kin.answer), 4, 4)
    assert float(result.grid_attr[0].max()) > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode, unregistered):
    kin = family("Llava")
    picture = smooth((60, 60))
    with mode():
        inputs = kin.encode(picture)
        result = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer, images=picture)
    assert float(result.grid_attr[0].max()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_own_canvases_give_the_same_pixels_in_half_precision(dtype, unregistered):
    kin = family("Llava", dtype=dtype)
    picture = smooth((60, 60))
    inputs = kin.encode(picture)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    adapter = find_adapter(kin.model)
    discover(adapter, kin.processor, inputs, picture)
    grids = adapter.grids(inputs)
    canvases = adapter.canvases(inputs, grids)
    same = adapter.with_canvases(inputs, grids, canvases)["pixel_values"]
    assert torch.equal(same, inputs["pixel_values"])
    other = adapter.with_canvases(inputs, grids, [canvas + 0.5 for canvas in canvases])
    assert_close(
        other["pixel_values"].float(), inputs["pixel_values"].float() + 0.5, atol=0.02, rtol=0
    )
    single = {**inputs, "pixel_values": inputs["pixel_values"].float()}
    assert adapter.discovery.find(single) is not None  # the same pixels in another precision


def test_pictures_of_equal_pixels_are_told_apart(unregistered):
    kin = family("Qwen2_5_VL")
    lens = LogitLens(kin.model, kin.processor)
    shapes = []
    for size in ((64, 32), (32, 64)):
        grey = Image.new("RGB", size, (90, 90, 90))
        probe_layout(kin.model, kin.encode(smooth(size)), kin.processor, smooth(size))
        result = lens.attribute(kin.encode(grey), kin.answer, images=grey)
        shapes.append(tuple(result.grid_attr[0].shape[1:]))
        assert result.grids[0].picture == (size[1], size[0])
    assert shapes == [(4, 8), (8, 4)]


def test_an_interrupted_scale_leaves_nothing_behind(unregistered, monkeypatch):
    kin = family("Qwen2VL")
    picture = smooth((64, 48))
    inputs = kin.encode(picture)
    msea = MSEA(kin.model, kin.processor, scales=(1.0, 2.0), flip="none")
    LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer, images=picture)

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("captum_mllm.model.discovery.find_layout", stop)
        with pytest.raises(KeyboardInterrupt):
            msea.attribute(inputs, kin.answer, images=picture)
    rows, cols = msea.attribute(inputs, kin.answer).grid_attr[0].shape[1:]
    assert (rows, cols) > (6, 8)  # as large as the processor allows, and no longer scale 1's


def test_windows_and_flips_do_not_push_samples_out(unregistered):
    kin = family("Llava")
    pictures = [smooth((60, 60), seed) for seed in range(3)]
    msea = MSEA(kin.model, kin.processor, scales=(1.0, 1.5, 2.0))
    for picture in pictures:
        msea.attribute(kin.encode(picture), kin.answer, images=picture)
    for picture in pictures:
        assert LogitLens(kin.model).attribute(kin.encode(picture), kin.answer).grid_attr


def test_transparent_pictures_are_shown_as_the_processor_shows_them(unregistered):
    kin = family("Llava")
    picture = smooth((60, 60)).convert("RGBA")
    picture.putalpha(smooth((60, 60), 1).convert("L"))
    inputs = kin.encode(picture)
    discover(find_adapter(kin.model), kin.processor, inputs, picture)
    adapter = find_adapter(kin.model)
    whole = adapter.window_pixels(inputs, adapter.grids(inputs), [(0.0, 0.0, 1.0, 1.0)])
    assert_close(whole["pixel_values"], inputs["pixel_values"], rtol=0, atol=0.1)


def test_what_is_no_multimodal_model_is_refused():
    kin = family("Llava")
    with pytest.raises(ValueError, match="no adapter for Linear"):
        probe_layout(nn.Linear(2, 2), kin.encode(), kin.processor, kin.picture)
