"""Area under the ROC curve, F1 and their intervals against loops; joining of a study's parts."""

import numpy as np
import pytest

from studies.detection import auroc, best_threshold, drawn_weights, f1_at, interval
from studies.processes import joined, measured, shares

over_seeds = pytest.mark.parametrize("seed", range(8))


def words(seed, n=23, scenes=7):
    """Scores with ties, kinds, scenes and weights."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    positive[:2] = True, False
    scores = rng.integers(0, 9, n) / 2 + positive * rng.integers(0, 2)
    return scores, positive, rng.integers(0, scenes, n), rng.integers(0, 4, (5, n)).astype(float)


def slow_auroc(scores, positive, counts):
    wins = pairs = 0.0
    for s, own, c in zip(scores, positive, counts, strict=True):
        for other, kind, d in zip(scores, positive, counts, strict=True):
            if own and not kind:
                pairs += c * d
                wins += c * d * (1.0 if s > other else 0.5 if s == other else 0.0)
    return wins / pairs if pairs else float("nan")


def slow_f1(scores, positive, counts, threshold):
    hit = missed = wrong = 0.0
    for s, own, c in zip(scores, positive, counts, strict=True):
        called = s >= threshold
        hit += c * (called and own)
        missed += c * (own and not called)
        wrong += c * (called and not own)
    return 2 * hit / (2 * hit + missed + wrong) if hit + missed else float("nan")


@over_seeds
def test_auroc_counts_pairs(seed):
    scores, positive, _, weights = words(seed)
    expected = [slow_auroc(scores, positive, row) for row in weights]
    np.testing.assert_allclose(auroc(scores, positive, weights), expected, atol=1e-12)


@over_seeds
def test_f1_counts_words(seed):
    scores, positive, _, weights = words(seed)
    for threshold in (-1.0, 1.5, 2.0, 99.0):
        expected = [slow_f1(scores, positive, row, threshold) for row in weights]
        np.testing.assert_allclose(
            f1_at(scores, positive, weights, threshold), expected, atol=1e-12
        )


@over_seeds
def test_best_threshold_is_the_best_of_all(seed):
    scores, positive, _, _ = words(seed)
    ones = np.ones(len(scores))
    options = {float(s): slow_f1(scores, positive, ones, s) for s in scores}
    highest = max(options.values())
    assert best_threshold(scores, positive) == max(
        s for s, value in options.items() if value == pytest.approx(highest, abs=1e-12)
    )


def test_without_positives_or_negatives_there_is_no_value():
    scores, none, ones = np.array([1.0, 2.0]), np.zeros(2, bool), np.ones((1, 2))
    assert np.isnan(auroc(scores, none, ones)).all()
    assert np.isnan(auroc(scores, ~none, ones)).all()
    assert np.isnan(f1_at(scores, none, ones, 0.0)).all()
    with pytest.raises(ValueError, match="positive holds no True"):
        best_threshold(scores, none)
    empty = np.zeros(0)
    nothing = auroc(empty, empty.astype(bool), drawn_weights(empty, seed=0))
    assert np.isnan(nothing).all()
    assert np.isnan(interval(nothing)).all()
    few = interval(np.array([0.5, np.nan, 0.25, np.nan, 0.75]), level=0.5)
    assert few == (0.5, 0.375, 0.625)


@over_seeds
def test_scenes_are_drawn_whole(seed):
    scenes = np.array([5, 2, 5, 9, 2, 2])
    weights = drawn_weights(scenes, seed=seed, n_resamples=50)
    assert weights.shape == (51, 6)
    assert weights[0].tolist() == [1.0] * 6
    rng = np.random.default_rng(seed)
    for row in weights[1:]:
        drawn = np.array([2, 5, 9])[rng.integers(3, size=3)].tolist()
        assert row.tolist() == [drawn.count(scene) for scene in scenes]


@over_seeds
def test_interval_is_of_resampled_words(seed):
    """Every draw written out: the drawn scenes' words, one after the other."""
    scores, positive, scenes, _ = words(seed)
    other = np.roll(scores, 3)
    rng, own = np.random.default_rng(seed), sorted(set(scenes.tolist()))
    draws = []
    for _ in range(200):
        at = [
            w
            for n in rng.integers(len(own), size=len(own))
            for w in np.flatnonzero(scenes == own[n])
        ]
        ones = np.ones(len(at))
        pair = [slow_auroc(s[at], positive[at], ones) for s in (scores, other)]
        draws.append(pair[0] - pair[1])
    weights = drawn_weights(scenes, seed=seed, n_resamples=200)
    found = interval(auroc(scores, positive, weights) - auroc(other, positive, weights))
    low, high = np.nanquantile(draws, [0.025, 0.975])
    np.testing.assert_allclose(found[1:], [low, high], atol=1e-9)
    ones = np.ones(len(scores))
    whole = slow_auroc(scores, positive, ones) - slow_auroc(other, positive, ones)
    assert found.mean == pytest.approx(whole)


# --- parts of a study -------------------------------------------------------------------------


def squares(name, examples, first, split, offset=0):
    """Columns of made-up examples; those from 7 to 8 find nothing."""
    numbers = [n for n in range(first, first + examples) if n not in (7, 8)]
    if not numbers:
        return {}
    values = [n * n + offset for n in numbers]
    return {"number": numbers, "by": {name: values, split: [str(v) for v in values]}}


def test_parts_join_to_the_whole():
    whole = squares("m", 12, 3, "test", offset=1)
    for size in (1, 2, 5, 12, 40):
        parts = [squares("m", n, first, "test", offset=1) for n, first in shares(12, 3, size)]
        assert joined(parts) == whole
        assert measured(squares, "m", 12, 3, "test", size=size, offset=1) == whole
    assert joined([]) == joined([{}, {}]) == {}


def test_wrong_parts_are_named():
    with pytest.raises(ValueError, match="parts must hold the same columns"):
        joined([{"a": [1]}, {"b": [1]}])
    with pytest.raises(ValueError, match="examples and size must be at least 1"):
        shares(0, 0, 5)
    with pytest.raises(ValueError, match="processes must be at least 1"):
        measured(squares, "m", 3, 0, "test", processes=0)
