"""Ours and captum's together: scales over its methods, its wrappers over ours, metrics, plots."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import ImageMaskInput, IntegratedGradients, LLMAttributionResult, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from torch.testing import assert_close

from captum_mllm import LogitLens, TokenLogProb
from captum_mllm.functional import resize_attributions, upsample
from captum_mllm.geometry import ImageGeometry, cell_mask
from captum_mllm.reference import load, make_scene, render_pil
from captum_mllm.reference.models import MODELS
from studies.prompts import default_inputs
from tests.oracle.families import above
from tests.oracle.layouts import kin_of, pictures_of
from tests.oracle.published import ARC, MSEA, MultiScaleAttribution

T = 2
ONE_SIZE = ("Gemma3", "LlavaNext")


@pytest.fixture(params=above())
def kin(request):
    return kin_of(request.param)


# ---- scales over captum's methods --------------------------------------------------------------


def test_scales_over_integrated_gradients(kin):
    """A hand-written loop; the sum is the mean over scales of what the score changes by."""
    f = TokenLogProb(kin.model, kin.encode(kin.wide_picture), kin.answer)
    method = IntegratedGradients(f)
    multi = MultiScaleAttribution(method, scales=(1.0, 1.5))
    x = f.pixels
    if kin.name in ONE_SIZE:
        with pytest.raises(ValueError, match=r"takes images of .* only.*MSEA\(model\)"):
            multi.attribute(x, target=T, n_steps=3)
        return
    got = multi.attribute(x, target=T, n_steps=3)
    size = tuple(x.shape[-2:])
    large = F.interpolate(x, size=[round(1.5 * side) for side in size], mode="bilinear")
    runs = [
        resize_attributions(method.attribute(image, target=T, n_steps=3), size)
        for image in (x, large)
    ]
    assert_close(got, torch.stack(runs).mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(runs[0], runs[1], atol=1e-3)
    assert_close(
        got.sum(), (runs[0].sum() + method.attribute(large, target=T, n_steps=3).sum()) / 2
    )


def test_scales_over_the_picture_and_noise_over_scales():
    """Wrappers nest: NoiseTunnel(MultiScaleAttribution(IntegratedGradients(f)))."""
    kin = kin_of("Qwen2VL")
    f = TokenLogProb(kin.model, kin.encode(), kin.answer)
    multi = MultiScaleAttribution(IntegratedGradients(f), scales=(1.0, 1.5))
    torch.manual_seed(3)
    got = NoiseTunnel(multi).attribute(f.pixels, nt_samples=2, stdevs=0.2, target=T, n_steps=2)
    torch.manual_seed(3)
    x = f.pixels.repeat(2, 1, 1, 1) + torch.normal(0, torch.full((2, *f.pixels.shape[1:]), 0.2))
    rows = [multi.attribute(row[None], target=T, n_steps=2) for row in x]
    assert_close(got, torch.cat(rows).mean(0, keepdim=True), rtol=1e-4, atol=1e-5)


# ---- captum's wrapper over ours ----------------------------------------------------------------


def by_loop(method, kin, inputs, frames):
    """The method on a mapping made by hand for each noisy frame."""
    from tests.oracle.frames import pixels_by_hand

    maps = []
    for row in frames:
        pixels = pixels_by_hand(kin, inputs, [kin.wide_picture], [row[None]])
        result = method.attribute({**inputs, "pixel_values": pixels}, kin.answer)
        grid = result.grids[0]
        maps.append(upsample(result.grid_attr[0], (grid.height, grid.width)))
    return torch.stack(maps)


@pytest.mark.parametrize("wrap", [MSEA, lambda model: ARC(MSEA(model))], ids=["MSEA", "ARC(MSEA)"])
def test_noise_tunnel_over_frames_equals_a_loop(kin, wrap):
    """In every family, Qwen's patches included: captum's noise falls on the picture."""
    inputs = kin.encode(kin.wide_picture)
    x = TokenLogProb(kin.model, inputs, kin.answer).pixels
    method = wrap(kin.model)
    torch.manual_seed(5)
    got = NoiseTunnel(method).attribute(
        x, nt_samples=3, stdevs=0.2, target=kin.answer[None], additional_forward_args=inputs
    )
    torch.manual_seed(5)
    noisy = x.repeat_interleave(3, 0) + torch.normal(0, torch.full((3, *x.shape[1:]), 0.2))
    expected = by_loop(method, kin, inputs, noisy)
    assert not torch.allclose(expected[0], expected[1])
    assert_close(got, expected.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)


def test_frames_of_another_shape_or_of_several_images_are_refused(kin):
    inputs = kin.encode(kin.wide_picture)
    x = TokenLogProb(kin.model, inputs, kin.answer).pixels
    with pytest.raises(ValueError, match="inputs must be versions of the canvas of one image"):
        LogitLens(kin.model).attribute(x[..., :-4], kin.answer, inputs)
    two = kin.encode(*pictures_of(kin, "two"))
    with pytest.raises(ValueError, match=r"which hold 2 image\(s\)"):
        LogitLens(kin.model).attribute(x, kin.answer, two)


# ---- captum's metrics on our results -----------------------------------------------------------


def test_our_maps_in_captums_infidelity(kin):
    """Infidelity by its definition: E (perturbation . attribution - change of the score)^2."""
    inputs = kin.encode(kin.wide_picture)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    maps = LogitLens(kin.model).attribute(inputs, kin.answer).grid_attr[0]
    attribution = f.from_maps(maps)[T : T + 1]
    noise = torch.randn(4, *f.pixels.shape[1:]) * 0.1
    waiting = iter(noise.split(2))

    def perturb(x):
        own = next(waiting)
        return own, x - own

    got = infidelity(
        f, perturb, f.pixels, attribution, target=T,
        n_perturb_samples=4, max_examples_per_batch=2,
    )  # fmt: skip
    with torch.no_grad():
        change = f(f.pixels)[0, T] - torch.cat([f(f.pixels - own[None])[:, T] for own in noise])
    expected = ((noise * attribution).sum((1, 2, 3)) - change).square().mean()
    assert_close(got, expected[None], rtol=1e-3, atol=1e-4)


def test_our_methods_in_captums_sensitivity(kin):
    """Sensitivity by its definition: the largest relative change of the maps."""
    inputs = kin.encode(kin.wide_picture)
    x = TokenLogProb(kin.model, inputs, kin.answer).pixels
    method = LogitLens(kin.model)
    noise = torch.randn(3, *x.shape[1:]) * 0.1

    got = sensitivity_max(
        method.attribute, x, perturb_func=lambda images: (images[0] + noise,), n_perturb_samples=3,
        target=kin.answer[None], additional_forward_args=inputs,
    )  # fmt: skip
    base, others = (method.attribute(v, kin.answer, inputs) for v in (x, x + noise))
    expected = (others - base).flatten(1).norm(dim=1).max() / base.norm()
    assert_close(got, expected[None], rtol=1e-3, atol=1e-5)


# ---- captum's plots of our results -------------------------------------------------------------


@pytest.fixture
def closing():
    yield
    plt.close("all")


def test_words_as_captums_result(kin, closing):
    result = ARC(kin.model, kin.processor).attribute(kin.encode(), kin.answer)
    theirs = result.to_captum()
    assert isinstance(theirs, LLMAttributionResult)
    assert torch.equal(theirs.token_attr, result.token_attr)
    assert torch.equal(theirs.seq_attr, result.seq_attr)
    assert torch.equal(theirs.output_probs, result.output_probs)
    assert theirs.input_tokens == list(result.input_tokens)
    assert theirs.output_tokens == list(result.output_tokens)
    _, ax = theirs.plot_token_attr()
    assert np.array_equal(ax.images[0].get_array(), result.token_attr.numpy())
    assert len(theirs.plot_seq_attr()[1].patches) == 2 * len(result.input_tokens)


@pytest.mark.parametrize("case", ["usual", "wide", "tall"])
def test_an_image_as_captums_result(kin, case, closing):
    """captum's heat map is the map of the cells, each over its own part of the picture."""
    picture = pictures_of(kin, case)[0]
    result = LogitLens(kin.model, kin.processor).attribute(kin.encode(picture), kin.answer)
    theirs = result.to_captum(picture)
    assert isinstance(theirs.inp, ImageMaskInput)
    assert_close(theirs.seq_attr, theirs.token_attr.sum(0))
    _, ax = theirs.plot_image_heatmap(target_token_pos=T, border_width=0, show_legends=False)
    drawn = torch.from_numpy(np.array(ax.images[1].get_array()))
    assert drawn.shape == (picture.height, picture.width)
    box = result.geometry(0, (picture.height, picture.width)).box
    maps = result.grid_attr[0][T]
    for y in range(0, picture.height, 3):
        for x in range(0, picture.width, 3):
            row = (y + 0.5 - box[1]) / (box[3] - box[1]) * maps.shape[0]
            col = (x + 0.5 - box[0]) / (box[2] - box[0]) * maps.shape[1]
            inside = 0 <= row < maps.shape[0] and 0 <= col < maps.shape[1]
            assert float(drawn[y, x]) == (float(maps[int(row), int(col)]) if inside else 0.0)


def test_captums_borders_and_legends_are_drawn(closing):
    kin = kin_of("Llava")
    result = LogitLens(kin.model, kin.processor).attribute(kin.encode(), kin.answer)
    theirs = result.to_captum(kin.picture)
    assert len(theirs.plot_image_heatmap()[1].texts) == 16  # a legend for each cell
    flat = result.select([0])
    flat.grid_attr[0].zero_()
    theirs = flat.to_captum(kin.picture)
    assert theirs.plot_image_heatmap(border_width=0, show_legends=False) is not None


def test_several_images_videos_and_errors():
    from tests.oracle.families import video

    kin = kin_of("Qwen2VL")
    pictures = pictures_of(kin, "two")
    result = LogitLens(kin.model, kin.processor).attribute(kin.encode(*pictures), kin.answer)
    assert result.to_captum(pictures[1], 1).token_attr.shape == (5, 15)
    with pytest.raises(TypeError, match="picture must be a PIL picture, got Tensor"):
        result.to_captum(torch.zeros(3))
    with pytest.raises(IndexError, match="image 2 is out of range"):
        result.to_captum(pictures[1], 2)
    bare = LogitLens(kin.model).attribute(kin.encode(*pictures), kin.answer)
    with pytest.raises(ValueError, match="geometry=ImageGeometry"):
        bare.to_captum(pictures[0])
    box = ImageGeometry.stretched(pictures[0].height, pictures[0].width)
    assert bare.to_captum(pictures[0], geometry=box).token_attr.shape == (5, 21)
    seen = LogitLens(kin.model, kin.processor).attribute(video(kin), kin.answer)
    with pytest.raises(ValueError, match="image 0 is a video"):
        seen.to_captum(pictures[0], geometry=box)


def test_a_picture_of_fewer_pixels_than_cells():
    kin = kin_of("Llava")
    result = LogitLens(kin.model).attribute(kin.encode(), kin.answer)
    small = kin.picture.resize((2, 3))
    box = ImageGeometry((0.0, 0.0, 2.0, 3.0))
    theirs = result.to_captum(small, geometry=box)
    maps = result.grid_attr[0]
    expected = torch.stack([maps[:, r, c] for r in (0, 2, 3) for c in (1, 3)], 1)
    assert torch.equal(theirs.token_attr, expected)


def test_cells_smaller_than_a_pixel_are_left_out():
    assert cell_mask(ImageGeometry.stretched(1, 2), (1, 2), (1, 5)).unique().tolist() == [1, 3]


# ---- the trained models ------------------------------------------------------------------------


STEPS = {"llava": 48, "qwen2vl": 96, "internvl": 96, "biased": 96}


CASES = [
    (name, scene) for name in MODELS for scene in ((0, 1, 2, 3) if name == "llava" else (0, 3))
]


@pytest.mark.parametrize(
    ("name", "scene"),
    [c if c == ("llava", 3) else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_integrated_gradients_are_complete_on_the_reference_models(name, scene):
    """Attributions of pixels sum to what the picture changes, against a picture of nothing."""
    model, processor = load(name)
    picture, _ = render_pil(make_scene(scene), 112)
    f = TokenLogProb(model, default_inputs(processor, picture), None, processor, sequence=True)
    attribution, delta = IntegratedGradients(f).attribute(
        f.pixels, n_steps=STEPS[name], internal_batch_size=4, return_convergence_delta=True
    )
    with torch.no_grad():
        change = float(f(f.pixels) - f(f.pixels * 0))
    assert abs(change) > 10
    assert_close(float(delta), float(attribution.sum()) - change, rtol=1e-3, atol=1e-3)
    assert abs(float(delta)) < 0.05 * abs(change)
    assert f.to_image(attribution, picture).shape == (1, picture.height, picture.width)
