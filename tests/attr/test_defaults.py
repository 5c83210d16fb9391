"""The literal defaults, and the options beyond the plain published methods, on real models."""

import copy
import inspect
import json
import re
from dataclasses import replace

import pytest
import torch
from captum.attr import Saliency
from torch.testing import assert_close

from captum_mllm import (
    ARC,
    MSEA,
    JointNormalization,
    LogitLens,
    MultiScaleAttribution,
    RankCorrelationDenoiser,
    TokenActivationMap,
)
from captum_mllm.adapters import find_adapter
from captum_mllm.functional import aggregate, calibrate, rank_correlation, upsample
from captum_mllm.metrics import otsu_threshold
from captum_mllm.model.inputs import read_sample
from captum_mllm.model.views import ScaleViews
from studies.choose import DEFAULTS
from studies.quality import RECORDS
from tests.oracle import families
from tests.oracle.comparing import with_two_images


def maps_of(model, inputs, answer, **options):
    return MSEA.paper(model, **options).attribute(inputs, answer).grid_attr[0]


# ---- defaults ---------------------------------------------------------------------------------

PUBLISHED = {  # MSEA.paper and ARC.paper
    MSEA: {"scales": (1.0, 1.25, 1.5), "scale_weights": "equal", "flip": "none"},
    ARC: {"alpha_max": None, "upsampling": 1, "calibration": None},
}


def defaults_of(kind):
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_option_is_kept_as_given_or_by_its_literal_default(model, kind):
    literal = defaults_of(kind)
    names = literal.keys() - {"processor", "layer"}
    measured, paper = kind(model), kind.paper(model)
    for name in names:
        assert getattr(measured, name) == literal[name], name
        assert getattr(paper, name) == PUBLISHED[kind].get(name, literal[name]), name


def test_an_option_replaces_the_published_setting(model):
    arc = ARC.paper(model, top_k=7, alpha_max=0.5, calibration=2.0)
    assert (arc.top_k, arc.alpha_max, arc.calibration) == (7, 0.5, 2.0)
    assert (arc.rbo_p, arc.upsampling) == (0.9, 1)
    assert MSEA.paper(model, scales=(1.0, 3.0)).scales == (1.0, 3.0)
    assert ARC(model, alpha_max=None, calibration=None).alpha_max is None
    denoiser = RankCorrelationDenoiser.paper(None, 10, strength=0.5)
    assert (denoiser.top_k, denoiser.strength, denoiser.calibration) == (10, 0.5, None)


def test_defaults_are_what_the_record_chose():
    record = json.loads((RECORDS / "choose.json").read_text())
    chosen = next(m for m in record["methods"] if m["name"] == "MSEA+ARC")["chosen"]
    chosen = chosen | {"flip": "horizontal" if chosen["mirrored"] else "none"}
    literal = defaults_of(MSEA) | defaults_of(ARC)
    names = literal.keys() & chosen.keys() - {"scale_weights"}
    assert {"scales", "aggregation", "flip", "alpha_max", "upsampling", "calibration"} <= names
    assert {n: literal[n] for n in names} == {
        n: tuple(chosen[n]) if n == "scales" else chosen[n] for n in names
    }
    assert {n: DEFAULTS[n] for n in literal.keys() & DEFAULTS.keys()} == {
        n: literal[n] for n in literal.keys() & DEFAULTS.keys()
    }
    # What was retired was not chosen.
    assert (chosen["scale_norm"], chosen["rank_filter"]) == ("none", False)
    # Weights tie there; the ones that suit models of one size too are taken.
    rounds = next(m for m in record["methods"] if m["name"] == "MSEA+ARC")["rounds"]
    tried = next(one for one in rounds if one["option"] == "scale weights")["tried"]
    f1 = {row["options"]["scale_weights"]: row["f1_iou"] for row in tried}
    assert literal["scale_weights"] == "adaptive"
    assert f1["adaptive"] >= max(f1.values()) - record["tie"]


def test_other_attributors_keep_the_published_scales(model):
    wrapped = MultiScaleAttribution(Saliency(model))
    assert (wrapped.scales, wrapped.aggregation) == (PUBLISHED[MSEA]["scales"], "mean")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: MSEA(m, scale_weights="own"), "scale_weights must be one of equal, adaptive"),
        (
            lambda m: MSEA(m, aggregation="geometric_mean"),
            "aggregation must be one of mean, median",
        ),
        (
            lambda m: MSEA(ARC(m)),
            "ARC gives maps in [0, 1], and MSEA aggregates logits. Aggregate "
            "first: write ARC(MSEA(...))",
        ),
        (lambda m: MSEA(TokenActivationMap(m)), "write TokenActivationMap(MSEA(...))"),
        (lambda m: MultiScaleAttribution(ARC(m)), "write ARC(MSEA(...))"),
        (lambda m: MSEA(MSEA(m)), "multi-scale already"),
        (
            lambda m: MultiScaleAttribution(LogitLens(m), resize="density"),
            "resize='density' is for tensors, and LogitLens is a token attribution",
        ),
        (lambda m: ARC(m, calibration=0.0), "calibration must lie in 0 .. inf, got 0.0"),
        (lambda m: ARC(m, calibration="adapt"), "calibration must be one of adaptive, got 'adapt'"),
        (lambda m: TokenActivationMap(m, upsampling=0), "upsampling must lie in 1 .. 64"),
        (lambda m: JointNormalization(m, upsampling=1.5), "upsampling must lie in 1 .. 64"),
        (
            lambda m: TokenActivationMap(m, parity=True, calibration=1.0),
            "calibration are not the released code's",
        ),
        (
            lambda m: ARC(JointNormalization(m)),
            "ARC needs logits, but JointNormalization gives maps in [0, 1]",
        ),
    ],
)
def test_mistakes(model, make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(model)


def test_msea_over_a_tensor_attributor_names_the_class_for_tensors(model):
    with pytest.raises(TypeError, match=re.escape("write MultiScaleAttribution(Saliency(...))")):
        MSEA(Saliency(model))


@pytest.mark.parametrize("name", ["preset", "scale_norm", "rank_filter"])
def test_retired_options_are_errors(model, name):
    for kind in (MSEA, ARC, JointNormalization):
        with pytest.raises(TypeError, match=name):
            kind(model, **{name: "max"})


def test_over_a_token_attribution_it_is_msea(tiny_subject):
    s = tiny_subject
    lens = LogitLens(s.model, s.processor)
    one = MultiScaleAttribution(lens)
    assert type(one) is MSEA
    assert one.scales == MSEA(s.model).scales
    two = MultiScaleAttribution(lens, (1.0, 1.5), aggregation="median")
    assert (two.scales, two.aggregation, two.flip) == ((1.0, 1.5), "median", "horizontal")
    got, expected = (m.attribute(s.inputs, s.answer) for m in (one, MSEA(s.model, s.processor)))
    assert torch.equal(got.grid_attr[0], expected.grid_attr[0])
    assert ARC(one).name == "ARC(MSEA(LogitLens))"


def test_run_options_are_checked(tiny_subject):
    s = tiny_subject
    for method in (LogitLens(s.model), MSEA(s.model), ARC(s.model)):
        with pytest.raises(TypeError, match=r"does not take 'explains'; its options are explain,"):
            method.attribute(s.inputs, s.answer, explains="all")
        with pytest.raises(TypeError, match=r"does not take 'explains'"):
            method.trace(s.inputs, s.answer, explains="all")


def test_the_median_takes_equal_weights_by_itself(model):
    assert MSEA(model, aggregation="median").scale_weights == "equal"


# ---- mirrored views ---------------------------------------------------------------------------


def test_mirrored_views_equal_runs_on_flipped_pixels(subject):
    """The mean of the maps as seen, and of those of the mirrored picture, mirrored back."""
    model, inputs, answer = subject.model, subject.inputs, subject.answer
    flipped = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    options = {"scales": (1.0, 1.5)}
    size = maps_of(model, inputs, answer, **options).shape[-2:]
    views = []
    for scale in (1.0, 1.5):
        one = {"scales": (scale,)}
        views.append(upsample(maps_of(model, inputs, answer, **one), size))
        views.append(upsample(maps_of(model, flipped, answer, **one).flip(-1), size))
    got = maps_of(model, inputs, answer, flip="horizontal", **options)
    assert_close(got, torch.stack(views).mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, maps_of(model, inputs, answer, **options))


@pytest.mark.parametrize("name", families.above())
def test_mirrored_views_of_a_mirrored_picture_are_mirrored(name):
    """What no family may lose on the way: tiles, overviews, patches, windows."""
    s = families.family(name)
    adapter = find_adapter(s.model)
    sample = read_sample(s.inputs, adapter)
    turned = {**s.inputs, **adapter.flipped(sample.kwargs, sample.grids, (-1,))}
    options = {"scales": (1.0, 1.5), "flip": "horizontal"}
    one = maps_of(s.model, s.inputs, s.answer, **options)
    two = maps_of(s.model, turned, s.answer, **options)
    assert_close(two, one.flip(-1), rtol=1e-3, atol=1e-3 * float(one.max()))
    alone = {"scales": (1.0, 1.5)}
    there = maps_of(s.model, turned, s.answer, **alone).flip(-1)
    assert not torch.allclose(there, maps_of(s.model, s.inputs, s.answer, **alone), rtol=1e-3)


def test_mirrored_views_of_two_images(tiny_subject):
    s, (inputs, _) = tiny_subject, with_two_images(tiny_subject)
    both = MSEA.paper(s.model, flip="horizontal").attribute(inputs, s.answer)
    assert len(both.grid_attr) == 2
    turned = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    again = MSEA.paper(s.model, flip="horizontal").attribute(turned, s.answer)
    for one, two in zip(both.grid_attr, again.grid_attr, strict=True):
        assert_close(two, one.flip(-1), rtol=1e-3, atol=1e-4)


# ---- weights and levels of scales -------------------------------------------------------------


def test_adaptive_weights_equal_a_loop(subject):
    """Per token: weight of a scale is its squared rank correlation with scale 1, at least .0001."""
    model, inputs, answer = subject.model, subject.inputs, subject.answer
    scales = (1.0, 1.5, 0.5)
    each = [maps_of(model, inputs, answer, scales=(s,)) for s in scales]
    size = each[1].shape[-2:]
    expected = torch.zeros(len(answer), *size)
    total = torch.zeros(len(answer))
    for own in each:
        near = upsample(own, tuple(each[0].shape[-2:]))
        rho = rank_correlation(near.flatten(1), each[0].flatten(1))
        weight = (rho.clamp(min=0.01) ** 2).float()
        expected += weight[:, None, None] * upsample(own, size)
        total += weight
    got = maps_of(model, inputs, answer, scales=scales, scale_weights="adaptive")
    assert_close(got, expected / total[:, None, None], rtol=1e-4, atol=1e-5)


def test_consistency_weighs_scales_in_adaptive_ones_alone(tiny_subject):
    s = tiny_subject
    options = {"scales": (1.0, 1.5)}
    views = MSEA.paper(s.model, consistency=True, **options).views(s.inputs, s.answer)
    assert views.consistency[1] < 1
    rho = views.agreement()
    weights = rho.clamp(min=0.01) ** 2 * torch.tensor(views.consistency).double()[:, None]
    stack = torch.stack([upsample(v[0], tuple(views.maps[1][0].shape[-2:])) for v in views.maps])
    expected = aggregate(stack, "mean", weights)
    assert_close(views.merged(scale_weights="adaptive").maps[0], expected)
    assert_close(views.merged().maps[0], stack.mean(0))


@pytest.mark.parametrize("agreed", [(1e-60, 5e-61), (1e-300, 5e-301), (5e-40, 2.5e-40)])
def test_scales_that_hardly_predict_the_answer_still_have_ratios(tiny_subject, agreed):
    s = tiny_subject
    views = MSEA.paper(s.model, consistency=True, scales=(1.0, 1.5, 0.5)).views(s.inputs, s.answer)
    others = replace(views.select([1, 2]), consistency=agreed)
    alike = replace(others, consistency=(1.0, 0.5))
    expected, found = (v.merged(scale_weights="adaptive") for v in (alike, others))
    assert_close(found.maps[0], expected.maps[0])
    assert found.consistency == agreed
    none = replace(others, consistency=(0.0, 0.0)).merged(scale_weights="adaptive")
    equal = replace(others, consistency=None).merged(scale_weights="adaptive")
    assert torch.equal(none.maps[0], equal.maps[0])


def test_a_mirrored_view_counts_as_its_scale_does(tiny_subject):
    s = tiny_subject
    msea = MSEA.paper(s.model, consistency=True, scales=(1.0, 1.5), flip="horizontal")
    views = msea.views(s.inputs, s.answer)
    assert views.flipped == (False, True, False, True)
    assert views.scales[::2] == views.scales[1::2]
    rho = views.agreement()
    assert torch.equal(rho[::2], rho[1::2])
    flat = views.base.maps[0].flatten(1).std(1) == 0
    assert_close(rho[0], torch.where(flat, 0.0, 1.0).double())
    assert views.consistency[0] == views.consistency[1] == 1.0
    assert views.consistency[2] == views.consistency[3] < 1
    assert views.merged().scales == (views.scales[0], views.scales[2])


def test_some_views_alone(tiny_subject):
    s = tiny_subject
    views = MSEA.paper(s.model, scales=(1.0, 1.5, 0.5)).views(s.inputs, s.answer)
    assert isinstance(views, ScaleViews)
    some = views.select([0, 2])
    direct = MSEA.paper(s.model, scales=(1.0, 0.5)).trace(s.inputs, s.answer)
    assert torch.equal(some.merged().maps[0], direct.maps[0])
    assert some.merged().scales == direct.scales


def test_agreement_does_not_depend_on_the_order_of_views(tiny_subject):
    s = tiny_subject
    views = MSEA.paper(s.model, scales=(1.0, 1.5), flip="horizontal").views(s.inputs, s.answer)
    order = [3, 0, 2, 1]
    assert torch.equal(views.select(order).agreement(), views.agreement()[order])
    with pytest.raises(ValueError, match=r"flipped only.*scale_weights='equal'"):
        views.select([0, 3]).merged(scale_weights="adaptive")
    assert len(views.select([0, 3]).merged().maps) == 1
    with pytest.raises(ValueError, match="scale_weights must be one of equal, adaptive"):
        views.merged(scale_weights="own")


def test_a_wrapper_of_tensors_can_be_copied(model):
    wrapped = MultiScaleAttribution(Saliency(model), (1.0, 1.5), resize="density")
    for twin in (copy.copy(wrapped), copy.deepcopy(wrapped)):
        assert type(twin) is MultiScaleAttribution
        assert (twin.scales, twin.resize) == ((1.0, 1.5), "density")


# ---- the last steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lens", "tam", "arc"])
def test_upsampling_and_calibration_come_last(subject, kind):
    s = subject
    make = {
        "lens": lambda **o: JointNormalization(s.model, **o),
        "tam": lambda **o: TokenActivationMap(s.model, **o),
        "arc": lambda **o: ARC.paper(s.model, **o),
    }[kind]
    trace = LogitLens(s.model).trace(s.inputs, s.answer, top_k=50)
    before = make().attribute_trace(trace)
    (maps,) = before.grid_attr
    finer = upsample(maps, (3 * maps.shape[1], 3 * maps.shape[2]))
    for tau in (0.8, "adaptive"):
        got = make(upsampling=3, calibration=tau).attribute_trace(trace)
        assert_close(got.grid_attr[0], calibrate(finer.flatten(1), tau).view_as(finer))
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
