"""Func-IoU and F1-IoU against hand-computed cases and a slow twin."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.filters import threshold_otsu

from captum_mllm.metrics import (
    FUNCTION_WORDS,
    f1_iou,
    func_iou,
    is_function_word,
    noun_threshold,
    otsu_threshold,
)


def slow_otsu(values):
    """Every split of 256 bins tried; the level just below the upper edge of the lower class."""
    bins = np.minimum((values.ravel() * 256).astype(int), 255)
    best, split = -1.0, None
    for k in range(255):
        low, high = bins[bins <= k], bins[bins > k]
        if len(low) and len(high):
            between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, split = between, k
    return values.max() if split is None else (split + 1) / 256


def slow_func_iou(maps, nouns, words, size):
    """As the text says it, word by word and cell by cell."""
    thresholds = []
    for tokens in nouns:
        of_tokens = []
        for token in tokens:
            big = F.interpolate(maps[token][None, None], size, mode="bilinear")[0, 0]
            of_tokens.append(slow_otsu(big.numpy()))
        thresholds.append(max(of_tokens))
    level = sum(thresholds) / len(thresholds)
    out = []
    for tokens in words:
        shares = []
        for token in tokens:
            cells = [float(v) for v in maps[token].flatten()]
            shares.append(sum(v < level for v in cells) / len(cells))
        out.append(sum(shares) / len(shares))
    return out


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (3, 7), (1, 5)])
def test_func_iou_is_its_definition(seed, rows, cols):
    g = torch.Generator().manual_seed(seed)
    maps = torch.rand(7, rows, cols, generator=g, dtype=torch.float64)
    maps[3] *= 0.2  # so that the words differ
    nouns, words, size = [[0, 1], [2]], [[3], [4, 5], [6]], (5 * rows, 3 * cols)
    expected = slow_func_iou(maps, nouns, words, size)
    np.testing.assert_allclose(func_iou(maps, nouns, words, size), expected, atol=1e-12)
    assert max(expected) > min(expected)


def test_threshold_is_the_mean_of_the_largest():
    maps = np.zeros((3, 2, 2))
    maps[0, 0, 0], maps[1, 0, 0], maps[2, 0, 0] = 0.9, 0.3, 0.5
    own = [otsu_threshold(m) for m in maps]
    assert noun_threshold(maps, [[0, 1], [2]], (2, 2)) == pytest.approx((own[0] + own[2]) / 2)


def test_otsu_twin_agrees_with_the_library():
    values = np.random.default_rng(0).random((32, 32)) ** 3
    counts = np.histogram(values, bins=256, range=(0, 1))
    edges = threshold_otsu(hist=(counts[0], counts[1][1:]))
    assert slow_otsu(values) == pytest.approx(edges)


def test_strictly_below():
    """A cell at the threshold is lit: a flat noun's threshold is its own value."""
    maps = np.full((2, 2, 2), 0.5)
    assert func_iou(maps, [[0]], [[1]], (2, 2)).tolist() == [0.0]
    maps[1] = 0.25
    assert func_iou(maps, [[0]], [[1]], (2, 2)).tolist() == [1.0]


def test_without_nouns_there_is_no_value():
    assert np.isnan(func_iou(np.zeros((2, 2, 2)), [], [[0], [1]], (2, 2))).all()
    assert math.isnan(noun_threshold(np.zeros((2, 2, 2)), [], (2, 2)))


def test_maps_of_other_tokens_do_not_matter():
    maps = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(3)).double()
    assert func_iou(maps, [[0]], [[1]], (5, 5)) == func_iou(maps[:2], [[0]], [[1]], (5, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[]], [[1]]), "nouns must name at least one token"),
        (([[0]], [[]]), "function_words must name at least one token"),
    ],
)
def test_empty_words_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        func_iou(np.zeros((2, 2, 2)), *arguments, (2, 2))


def test_maps_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match="normalise it"):
        func_iou(np.full((2, 2, 2), 3.0), [[0]], [[1]], (2, 2))


@pytest.mark.parametrize(
    ("obj", "func", "published"),
    # Qwen2-VL-2B as TAM publishes it: base, ECI, filter, both
    [
        (0.2123, 0.5193, 0.3014),
        (0.2241, 0.6903, 0.3384),
        (0.2482, 0.4334, 0.3157),
        (0.2737, 0.6844, 0.3910),
    ],
)
def test_f1_of_published_figures(obj, func, published):
    assert f1_iou(obj, func) == pytest.approx(published, abs=1e-4)


def test_f1_edges():
    assert f1_iou(0, 0) == 0
    assert f1_iou(1, 1) == 1
    with pytest.raises(ValueError, match="func must lie"):
        f1_iou(0.5, 1.5)


@pytest.mark.parametrize("word", ["the", "And", " there", "yes", "whose", "should", "\u2019s"])
def test_function_words(word):
    assert is_function_word(word)


@pytest.mark.parametrize("word", ["dog", "on", "in", "is", "left", "small", "of", "to", "."])
def test_other_words(word):
    assert not is_function_word(word)


def test_list_holds_words_only():
    assert all(word == word.lower().strip() and word for word in FUNCTION_WORDS)
