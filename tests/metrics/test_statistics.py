import itertools
import math

import numpy as np
import pytest
import torch

from captum_mllm.metrics import f1_iou, paired_bootstrap, paired_bootstrap_f1

NAN = math.nan


def slow_bootstrap(rows, *, n_resamples, seed, level):
    """Draw scenes one by one, pool their values, sort the means, read the ends off."""
    scenes = [[x for x in row if not math.isnan(x)] for row in rows]
    scenes = [s for s in scenes if s]
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n_resamples):
        pooled = []
        for i in rng.integers(len(scenes), size=len(scenes)):
            pooled += scenes[i]
        means.append(math.fsum(pooled) / len(pooled))
    means.sort()

    def end(q):
        place = q * (len(means) - 1)
        left = math.floor(place)
        right = min(left + 1, len(means) - 1)
        return means[left] + (place - left) * (means[right] - means[left])

    pooled = [x for s in scenes for x in s]
    tail = (1 - level) / 2
    return math.fsum(pooled) / len(pooled), end(tail), end(1 - tail)


def random_rows(seed, scenes=11, values=4):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(scenes, values))
    rows[rng.random(rows.shape) < 0.3] = NAN
    rows[2] = NAN
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_bootstrap_equals_twin(seed, level):
    settings = {"n_resamples": 200, "seed": seed, "level": level}
    a, b = random_rows(seed), random_rows(seed + 100)
    expected = slow_bootstrap(a.tolist(), **settings)
    np.testing.assert_allclose(paired_bootstrap(a, **settings), expected, rtol=1e-10)
    expected = slow_bootstrap((a - b).tolist(), **settings)
    np.testing.assert_allclose(paired_bootstrap(a, b, **settings), expected, rtol=1e-10)


def test_bootstrap_of_two_scenes_matches_all_draws_by_hand():
    # Two scenes, 0 and 1: the draws 00 01 10 11 have means 0 .5 .5 1, a quarter, half, quarter.
    mean, low, high = paired_bootstrap([0.0, 1.0], seed=0)
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    # 40 % in the middle lie inside the half of the draws that give .5.
    assert paired_bootstrap([0.0, 1.0], seed=0, level=0.4) == (0.5, 0.5, 0.5)


def test_bootstrap_approaches_the_exact_interval_of_all_draws():
    values = [0.0, 0.1, 0.5, 0.7]
    every = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    exact = np.quantile(every, [0.1, 0.9])
    interval = paired_bootstrap(values, seed=1, n_resamples=20_000, level=0.8)
    np.testing.assert_allclose(interval[1:], exact, atol=0.026)  # one step between draws


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        _, low, high = paired_bootstrap(rng.normal(size=40), seed=seed, n_resamples=200, level=0.8)
        hits += low <= 0 <= high
    assert 0.68 <= hits / 200 <= 0.88


def test_bootstrap_is_paired():
    # Scenes differ by far more than the methods do; only pairing sees the constant difference.
    a = np.linspace(0, 100, 30)
    np.testing.assert_allclose(paired_bootstrap(a + 0.25, a, seed=0), [0.25] * 3, rtol=1e-9)
    _, low, high = paired_bootstrap(a, seed=0)
    assert high - low > 10


def test_bootstrap_resamples_whole_scenes():
    # Ten equal values in each of five scenes are worth five values, not fifty.
    scenes = np.arange(5.0)
    repeated = paired_bootstrap(np.repeat(scenes[:, None], 10, axis=1), seed=3)
    np.testing.assert_allclose(repeated, paired_bootstrap(scenes, seed=3), rtol=1e-12)
    flat = paired_bootstrap(np.repeat(scenes, 10), seed=3)
    assert flat.high - flat.low < 0.6 * (repeated.high - repeated.low)


def test_bootstrap_mean_is_over_values():
    rows = np.array([[1.0, 1.0, 1.0], [5.0, NAN, NAN]])
    assert paired_bootstrap(rows, seed=0).mean == 2.0


def test_bootstrap_leaves_a_scene_without_value_out_in_both():
    a, b = [1.0, NAN, 3.0, 4.0], [0.5, 7.0, NAN, 2.0]
    kept = paired_bootstrap([1.0, 4.0], [0.5, 2.0], seed=4)
    assert paired_bootstrap(a, b, seed=4) == kept
    assert kept.mean == 1.25


def test_bootstrap_swapping_the_methods_flips_the_sign():
    a, b = random_rows(0), random_rows(1)
    forth, back = paired_bootstrap(a, b, seed=5), paired_bootstrap(b, a, seed=5)
    np.testing.assert_allclose([-back.mean, -back.high, -back.low], forth, rtol=1e-9)


def test_bootstrap_shift_and_scale_move_the_interval():
    a = random_rows(0)
    base = np.array(paired_bootstrap(a, seed=6))
    np.testing.assert_allclose(paired_bootstrap(3 * a + 2, seed=6), 3 * base + 2, rtol=1e-9)


def test_bootstrap_widens_with_the_level_and_repeats_with_the_seed():
    a = random_rows(0)
    narrow, wide = (paired_bootstrap(a, seed=7, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert paired_bootstrap(a, seed=7) == paired_bootstrap(a, seed=7)
    assert paired_bootstrap(a, seed=7) != paired_bootstrap(a, seed=8)


def test_bootstrap_takes_tensors_lists_and_arrays():
    values = [0.25, 0.5, 1.0]
    expected = paired_bootstrap(values, seed=0)
    assert paired_bootstrap(np.array(values), seed=0) == expected
    assert paired_bootstrap(torch.tensor(values, requires_grad=True), seed=0) == expected
    assert paired_bootstrap(torch.tensor(values).bfloat16(), seed=0) == expected


@pytest.mark.parametrize("nothing", [[], [NAN, NAN], np.full((3, 2), NAN), np.empty((3, 0))])
def test_bootstrap_without_any_value_is_nan(nothing):
    assert all(math.isnan(x) for x in paired_bootstrap(nothing, seed=0))


def test_bootstrap_of_one_scene_has_no_width():
    assert paired_bootstrap([0.3], seed=0) == (0.3, 0.3, 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": [1.0, 2.0], "b": [1.0]}, r"a and b must have the same shape.*pad"),
        ({"a": 1.0}, r"a must be \(scenes,\) or \(scenes, values\), got shape \(\)"),
        ({"a": [1.0], "b": [[[1.0]]]}, r"b must be \(scenes,\) or \(scenes, values\)"),
        ({"a": [1.0, math.inf]}, "a must be finite or NaN"),
        ({"a": [1.0], "level": 1.0}, "level must lie strictly between 0 and 1, got 1.0"),
        ({"a": [1.0], "level": 95}, "level must lie strictly between 0 and 1, got 95"),
        ({"a": [1.0], "n_resamples": 0}, "n_resamples must be at least 1, got 0"),
    ],
)
def test_bootstrap_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(**arguments, seed=0)


def slow_f1(scenes):
    """F1-IoU of scenes of (obj values, func values), pooled; None without one of the two."""
    pooled = [[x for scene in scenes for x in scene[part] if not math.isnan(x)] for part in (0, 1)]
    if not all(pooled):
        return None
    return f1_iou(*(math.fsum(values) / len(values) for values in pooled))


def slow_bootstrap_f1(a, b, *, n_resamples, seed, level):
    """Draw scenes, pool both kinds of values of both methods, take the harmonic means."""
    scenes = []
    for obj, func, other_obj, other_func in zip(*a, *(b or a), strict=True):
        pairs = [
            [(x, y) for x, y in zip(own, other, strict=True) if not math.isnan(x + y)]
            for own, other in ((obj, other_obj), (func, other_func))
        ]
        first, second = ([[pair[k] for pair in part] for part in pairs] for k in (0, 1))
        if any(pairs):
            scenes.append((first, second))

    def gap(drawn):
        own, other = (slow_f1([scene[k] for scene in drawn]) for k in (0, 1))
        return None if own is None else own - other if b else own

    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_resamples):
        drawn = gap([scenes[i] for i in rng.integers(len(scenes), size=len(scenes))])
        found += [] if drawn is None else [drawn]
    tail = (1 - level) / 2
    return gap(scenes), *np.quantile(found, [tail, 1 - tail])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scenes", [2, 11])
def test_bootstrap_of_f1_equals_twin(seed, scenes):
    settings = {"n_resamples": 100, "seed": seed, "level": 0.9}
    rng = np.random.default_rng(seed)

    def method():
        parts = [rng.random((scenes, values)) for values in (3, 5)]
        for values in parts:
            values[rng.random(values.shape) < 0.4] = NAN
            values[0, 0] = 0.5
        return tuple(parts)

    a, b = method(), method()
    a[0][-1], a[1][-1] = NAN, NAN  # a scene without any value
    lists = [[part.tolist() for part in pair] for pair in (a, b)]
    np.testing.assert_allclose(
        paired_bootstrap_f1(a, **settings), slow_bootstrap_f1(lists[0], None, **settings)
    )
    np.testing.assert_allclose(
        paired_bootstrap_f1(a, b, **settings), slow_bootstrap_f1(*lists, **settings)
    )


def test_bootstrap_of_f1_by_hand_and_at_its_edges():
    # Obj .5 and 0 in two scenes, Func 1 and 1: F1 of the draws 00 01 10 11 is 2/3, .4, .4, 0.
    found = paired_bootstrap_f1(([0.5, 0.0], [1.0, 1.0]), seed=0)
    np.testing.assert_allclose(found, (0.4, 0.0, 2 / 3))
    assert paired_bootstrap_f1(([0.0], [0.0]), seed=0) == (0.0, 0.0, 0.0)
    for pair in (([NAN], [1.0]), ([0.5], [NAN]), ([], [])):
        assert all(math.isnan(x) for x in paired_bootstrap_f1(pair, seed=0))
    apart = ([[0.5], [NAN]], [[NAN], [0.5]])  # the one resample draws one scene twice
    found = paired_bootstrap_f1(apart, seed=3, n_resamples=1)
    assert found.mean == 0.5
    drawn = np.random.default_rng(3).integers(2, size=2)
    assert math.isnan(found.low) == (drawn[0] == drawn[1])
    with pytest.raises(ValueError, match="same scenes, got 2 and 1"):
        paired_bootstrap_f1(([0.1, 0.2], [0.1]), seed=0)
    with pytest.raises(ValueError, match=r"a's Func-IoU and b's Func-IoU must have the same shape"):
        paired_bootstrap_f1(([0.1], [0.1]), ([0.1], [[0.1, 0.2]]), seed=0)
