"""The options that the records retired still compute what was recorded."""

import inspect

import pytest
import torch
from torch.testing import assert_close

from captum_mllm import ARC, MSEA, JointNormalization
from captum_mllm.functional import rank_gaussian_filter, upsample
from studies.retired import geometric_mean, match_levels, merged, rank_filtered
from tests.oracle import formulas


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["none", "max", "std"])
def test_levels_equal_the_reference_implementation(seed, how):
    maps, base = rand(4, 9, seed=seed), rand(4, 16, seed=seed + 50)
    maps[1], base[2] = 0, 0
    assert_close(match_levels(maps, base, how), formulas.match_levels(maps, base, how))


def test_levels_refuse_other_ways():
    with pytest.raises(ValueError, match=r"scale_norm must be one of none, max, std, got 'sum'"):
        inspect.unwrap(match_levels)(rand(1, 4), rand(1, 4), "sum")


@pytest.mark.parametrize("weighted", [False, True])
def test_geometric_mean_equals_the_reference_implementation(weighted):
    stack = rand(3, 4, 5)
    weights = rand(3, seed=1) + 0.1 if weighted else None
    expected = formulas.aggregate(stack, "geometric_mean", weights)
    assert_close(geometric_mean(stack, weights), expected)


def views_of(s, **options):
    return MSEA.paper(s.model, scales=(1.0, 1.5), **options).views(s.inputs, s.answer)


@pytest.mark.parametrize("how", ["max", "std"])
def test_levels_of_scales(tiny_subject, how):
    views = views_of(tiny_subject)
    level = {"max": lambda m: m.amax((1, 2)), "std": lambda m: m.flatten(1).std(1, correction=0)}
    one, two = (view[0] for view in views.maps)
    ratio = level[how](one) / level[how](two).clamp(min=1e-12)
    ratio = torch.where(level[how](two) > 0, ratio, 1.0)
    size = tuple(two.shape[-2:])
    expected = (upsample(one, size) + ratio[:, None, None] * two) / 2
    assert_close(merged(views, "mean", how).maps[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["equal", "adaptive"])
def test_what_was_not_retired_is_the_packages(tiny_subject, weights):
    views = views_of(tiny_subject, flip="horizontal")
    for aggregation in ("mean",) if weights == "adaptive" else ("mean", "median"):
        expected = views.merged(aggregation, weights)
        got = merged(views, aggregation, "none", weights)
        assert torch.equal(got.maps[0], expected.maps[0])
        assert got.scales == expected.scales


def test_geometric_mean_of_views(tiny_subject):
    views = views_of(tiny_subject)
    size = tuple(views.maps[1][0].shape[-2:])
    stack = torch.stack([upsample(view[0], size) for view in views.maps])
    got = merged(views, "geometric_mean").maps[0]
    assert_close(got, stack.prod(0).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [JointNormalization, ARC.paper])
def test_the_rank_filter_comes_before_the_last_steps(tiny_subject, kind):
    s = tiny_subject
    plain = kind(s.model, s.processor)
    trace = plain.trace(s.inputs, s.answer)
    (maps,) = plain.attribute_trace(trace).grid_attr
    (got,) = rank_filtered(kind(s.model, s.processor)).attribute_trace(trace).grid_attr
    assert_close(got, rank_gaussian_filter(maps))
