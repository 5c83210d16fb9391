"""What the presets hold, and the options beyond the plain published methods, on real models."""

import json
import re
from dataclasses import asdict, fields

import pytest
import torch
from captum.attr import Saliency
from torch.testing import assert_close

from captum_mllm import (
    ARC,
    MSEA,
    PRESETS,
    JointNormalization,
    LogitLens,
    MultiScaleAttribution,
    TokenActivationMap,
)
from captum_mllm.adapters import find_adapter
from captum_mllm.attr import Preset
from captum_mllm.functional import aggregate, calibrate, rank_correlation, upsample
from captum_mllm.metrics import otsu_threshold
from captum_mllm.model.inputs import read_sample
from captum_mllm.model.scales import ScaleViews
from studies.quality import RECORDS
from tests.oracle import families
from tests.oracle.comparing import with_two_images


def maps_of(model, inputs, answer, **options):
    return MSEA(model, **options).attribute(inputs, answer).grid_attr[0]


def plain(**options):
    return {"preset": "paper", **options}


# ---- presets ----------------------------------------------------------------------------------


def test_every_option_comes_from_the_preset_unless_given(model):
    for name, preset in PRESETS.items():
        msea, arc = MSEA(model, preset=name), ARC(model, preset=name)
        for field in ("scales", "aggregation", "scale_norm", "scale_weights", "mirrored"):
            assert getattr(msea, field) == getattr(preset, field), field
        for field in ("top_k", "rbo_p", "strength", "alpha_max"):
            assert getattr(arc, field) == getattr(preset, field), field
        for field in ("rank_filter", "upsampling", "calibration"):
            assert getattr(arc.finishing, field) == getattr(preset, field), field
    assert MSEA(model).scales == PRESETS["measured"].scales
    arc = ARC(model, preset="paper", top_k=7, alpha_max=0.5, calibration=2.0)
    assert (arc.top_k, arc.alpha_max, arc.finishing.calibration) == (7, 0.5, 2.0)
    assert (arc.rbo_p, arc.finishing.upsampling) == (0.9, 1)
    assert ARC(model, alpha_max=None, calibration=None).alpha_max is None


def test_paper_is_the_plain_published_idea():
    paper = PRESETS["paper"]
    assert (paper.aggregation, paper.top_k, paper.strength) == ("mean", 50, 1.0)
    assert (paper.scale_norm, paper.scale_weights, paper.mirrored) == ("none", "equal", False)
    assert (paper.alpha_max, paper.rank_filter, paper.upsampling) == (None, False, 1)
    assert paper.calibration is None


def test_measured_is_what_the_record_chose():
    record = json.loads((RECORDS / "choose.json").read_text())
    chosen = next(m for m in record["methods"] if m["name"] == "MSEA+ARC")["chosen"]
    measured = asdict(PRESETS["measured"])
    names = {field.name for field in fields(Preset)} - {"scale_weights"}
    assert {n: measured[n] for n in names} == {
        n: tuple(chosen[n]) if n == "scales" else chosen[n] for n in names
    }
    # Weights tie there; the ones that suit models of one size too are taken.
    rounds = next(m for m in record["methods"] if m["name"] == "MSEA+ARC")["rounds"]
    tried = next(one for one in rounds if one["option"] == "scale weights")["tried"]
    f1 = {row["options"]["scale_weights"]: row["f1_iou"] for row in tried}
    assert measured["scale_weights"] == "adaptive"
    assert f1["adaptive"] >= max(f1.values()) - record["tie"]


def test_other_attributors_keep_the_published_scales(model):
    wrapped = MultiScaleAttribution(Saliency(model))
    assert (wrapped.scales, wrapped.aggregation) == (PRESETS["paper"].scales, "mean")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: MSEA(m, preset="best"), "preset must be one of paper, measured, got 'best'"),
        (lambda m: ARC(m, preset="best"), "preset must be one of paper, measured, got 'best'"),
        (lambda m: MSEA(m, scale_norm="sum"), "scale_norm must be one of none, max, std"),
        (lambda m: MSEA(m, scale_weights="own"), "scale_weights must be one of equal, adaptive"),
        (
            lambda m: MSEA(m, aggregation="median", scale_weights="adaptive"),
            "scale_weights 'adaptive' needs an aggregation that takes weights",
        ),
        (
            lambda m: MSEA(Saliency(m), mirrored=True),
            "mirrored is for token attributions, and Saliency is none",
        ),
        (lambda m: ARC(m, calibration=0.0), "calibration must lie in 0 .. inf, got 0.0"),
        (lambda m: TokenActivationMap(m, upsampling=0), "upsampling must lie in 1 .. 64"),
        (lambda m: JointNormalization(m, upsampling=1.5), "upsampling must lie in 1 .. 64"),
        (
            lambda m: TokenActivationMap(m, parity=True, calibration=1.0),
            "calibration are not the released code's",
        ),
        (lambda m: ARC(JointNormalization(m)), "ARC needs raw maps"),
    ],
)
def test_mistakes(model, make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(model)


def test_the_median_takes_equal_weights_by_itself(model):
    assert MSEA(model, aggregation="median").scale_weights == "equal"


# ---- mirrored views ---------------------------------------------------------------------------


def test_mirrored_views_equal_runs_on_flipped_pixels(subject):
    """The mean of the maps as seen, and of those of the mirrored picture, mirrored back."""
    model, inputs, answer = subject.model, subject.inputs, subject.answer
    flipped = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    options = plain(scales=(1.0, 1.5))
    size = maps_of(model, inputs, answer, **options).shape[-2:]
    views = []
    for scale in (1.0, 1.5):
        one = plain(scales=(scale,))
        views.append(upsample(maps_of(model, inputs, answer, **one), size))
        views.append(upsample(maps_of(model, flipped, answer, **one).flip(-1), size))
    got = maps_of(model, inputs, answer, mirrored=True, **options)
    assert_close(got, torch.stack(views).mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, maps_of(model, inputs, answer, **options))


@pytest.mark.parametrize("name", families.NAMES)
def test_mirrored_views_of_a_mirrored_picture_are_mirrored(name):
    """What no family may lose on the way: tiles, overviews, patches, windows."""
    s = families.family(name)
    adapter = find_adapter(s.model)
    sample = read_sample(s.inputs, adapter)
    turned = {**s.inputs, **adapter.mirrored(sample.kwargs, sample.grids)}
    options = plain(scales=(1.0, 1.5), mirrored=True)
    one = maps_of(s.model, s.inputs, s.answer, **options)
    two = maps_of(s.model, turned, s.answer, **options)
    assert_close(two, one.flip(-1), rtol=1e-3, atol=1e-3 * float(one.max()))
    alone = plain(scales=(1.0, 1.5))
    there = maps_of(s.model, turned, s.answer, **alone).flip(-1)
    assert not torch.allclose(there, maps_of(s.model, s.inputs, s.answer, **alone), rtol=1e-3)


def test_mirrored_views_of_two_images(tiny_subject):
    s, (inputs, _) = tiny_subject, with_two_images(tiny_subject)
    both = MSEA(s.model, **plain(mirrored=True)).attribute(inputs, s.answer)
    assert len(both.grid_attr) == 2
    turned = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    again = MSEA(s.model, **plain(mirrored=True)).attribute(turned, s.answer)
    for one, two in zip(both.grid_attr, again.grid_attr, strict=True):
        assert_close(two, one.flip(-1), rtol=1e-3, atol=1e-4)


# ---- weights and levels of scales -------------------------------------------------------------


def test_adaptive_weights_equal_a_loop(subject):
    """Per token: weight of a scale is its squared rank correlation with scale 1, at least .0001."""
    model, inputs, answer = subject.model, subject.inputs, subject.answer
    scales = (1.0, 1.5, 0.5)
    each = [maps_of(model, inputs, answer, **plain(scales=(s,))) for s in scales]
    size = each[1].shape[-2:]
    expected = torch.zeros(len(answer), *size)
    total = torch.zeros(len(answer))
    for own in each:
        near = upsample(own, tuple(each[0].shape[-2:]))
        rho = rank_correlation(near.flatten(1), each[0].flatten(1))
        weight = (rho.clamp(min=0.01) ** 2).float()
        expected += weight[:, None, None] * upsample(own, size)
        total += weight
    got = maps_of(model, inputs, answer, **plain(scales=scales, scale_weights="adaptive"))
    assert_close(got, expected / total[:, None, None], rtol=1e-4, atol=1e-5)


def test_consistency_weighs_scales_in_adaptive_ones_alone(tiny_subject):
    s = tiny_subject
    options = plain(scales=(1.0, 1.5))
    views = MSEA(s.model, consistency=True, **options).views(s.inputs, s.answer)
    assert views.consistency[1] < 1
    rho = views.agreement()
    weights = rho.clamp(min=0.01) ** 2 * torch.tensor(views.consistency).double()[:, None]
    stack = torch.stack([upsample(v[0], tuple(views.maps[1][0].shape[-2:])) for v in views.maps])
    expected = aggregate(stack, "mean", weights)
    assert_close(views.merged(scale_weights="adaptive").maps[0], expected)
    assert_close(views.merged().maps[0], stack.mean(0))


def test_a_mirrored_view_counts_as_its_scale_does(tiny_subject):
    s = tiny_subject
    msea = MSEA(s.model, consistency=True, **plain(scales=(1.0, 1.5), mirrored=True))
    views = msea.views(s.inputs, s.answer)
    assert views.mirrored == (False, True, False, True)
    assert views.scales[::2] == views.scales[1::2]
    rho = views.agreement()
    assert torch.equal(rho[::2], rho[1::2])
    flat = views.base.maps[0].flatten(1).std(1) == 0
    assert_close(rho[0], torch.where(flat, 0.0, 1.0).double())
    assert views.consistency[0] == views.consistency[1] == 1.0
    assert views.consistency[2] == views.consistency[3] < 1
    assert views.merged().scales == (views.scales[0], views.scales[2])


@pytest.mark.parametrize("how", ["max", "std"])
def test_levels_of_scales(tiny_subject, how):
    s = tiny_subject
    options = plain(scales=(1.0, 1.5))
    views = MSEA(s.model, **options).views(s.inputs, s.answer)
    level = {"max": lambda m: m.amax((1, 2)), "std": lambda m: m.flatten(1).std(1, correction=0)}
    one, two = (view[0] for view in views.maps)
    ratio = level[how](one) / level[how](two).clamp(min=1e-12)
    ratio = torch.where(level[how](two) > 0, ratio, 1.0)
    size = tuple(two.shape[-2:])
    expected = (upsample(one, size) + ratio[:, None, None] * two) / 2
    assert_close(views.merged(scale_norm=how).maps[0], expected, rtol=1e-4, atol=1e-5)


def test_some_views_alone(tiny_subject):
    s = tiny_subject
    views = MSEA(s.model, **plain(scales=(1.0, 1.5, 0.5))).views(s.inputs, s.answer)
    assert isinstance(views, ScaleViews)
    some = views.only([0, 2])
    direct = MSEA(s.model, **plain(scales=(1.0, 0.5))).trace(s.inputs, s.answer)
    assert torch.equal(some.merged().maps[0], direct.maps[0])
    assert some.merged().scales == direct.scales


# ---- the last steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lens", "tam", "arc"])
def test_upsampling_and_calibration_come_last(subject, kind):
    s = subject
    make = {
        "lens": lambda **o: JointNormalization(s.model, **o),
        "tam": lambda **o: TokenActivationMap(s.model, **o),
        "arc": lambda **o: ARC(s.model, preset="paper", **o),
    }[kind]
    trace = LogitLens(s.model).trace(s.inputs, s.answer, top_k=50)
    before = make().attribute_trace(trace)
    (maps,) = before.grid_attr
    finer = upsample(maps, (3 * maps.shape[1], 3 * maps.shape[2]))
    got = make(upsampling=3, calibration=0.8).attribute_trace(trace)
    assert_close(got.grid_attr[0], calibrate(finer.flatten(1), 0.8).view_as(finer))
    assert torch.equal(got.token_attr, before.token_attr)
    assert got.units == before.units == "[0, 1]"
    low, high = got.grid_attr[0].aminmax()
    assert 0 <= float(low) <= float(high) <= 1


def test_one_deviation_spans_the_images(tiny_subject):
    s, (inputs, _) = tiny_subject, with_two_images(tiny_subject)
    lens = JointNormalization(s.model)
    trace = lens.trace(inputs, s.answer)
    both = torch.cat([m.flatten(1) for m in lens.attribute_trace(trace).grid_attr], 1)
    got = JointNormalization(s.model, calibration=1.0).attribute_trace(trace)
    assert_close(torch.cat([m.flatten(1) for m in got.grid_attr], 1), calibrate(both, 1.0))


def test_to_image_of_a_finer_grid(tiny_subject):
    s = tiny_subject
    got = ARC(s.model, s.processor).attribute(s.inputs, s.answer)
    pixels = got.to_image(0, (40, 40))
    assert pixels.shape == (len(s.answer), 40, 40)
    assert got.grids[0].rows * 2 == got.grid_attr[0].shape[1]


@pytest.mark.slow
def test_calibration_parts_plateau_and_object(shipped_subject):
    """What it is for: Otsu's threshold takes in less of the picture."""
    s = shipped_subject
    noun = -1
    areas = []
    for tau in (None, 1.5):
        lens = JointNormalization(s.model, s.processor, calibration=tau)
        own = lens.attribute(s.inputs, s.answer).grid_attr[0][noun].numpy()
        areas.append(float((own > otsu_threshold(own)).mean()))
    assert areas[1] < areas[0]


def test_the_defaults_leave_the_model_as_it_is(tiny_subject):
    s = tiny_subject
    before = {name: value.clone() for name, value in s.model.state_dict().items()}
    ARC(MSEA(s.model, s.processor)).attribute(s.inputs, s.answer)
    assert all(torch.equal(value, before[name]) for name, value in s.model.state_dict().items())
