"""Obj-IoU, Func-IoU and F1-IoU of words and whole answers, corrected and in parity."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.filters import threshold_otsu

from captum_mllm import LogitLens, TokenActivationMap
from captum_mllm.data import CategoryTable
from captum_mllm.functional import upsample
from captum_mllm.geometry import ImageGeometry, ImageGrid, Preprocessing
from captum_mllm.metrics import (
    FUNCTION_WORDS,
    MASK_METRICS,
    average_precision,
    f1_iou,
    func_iou,
    is_function_word,
    noun_threshold,
    obj_iou,
    otsu_threshold,
    precision_recall,
    score_words,
    word_obj_iou,
    word_scores_of,
)
from captum_mllm.result import MLLMAttributionResult


def reference_word_obj_iou(maps, words, labels, masks):
    """One word after the other; a neighbour with the same label replaces a worse value."""
    values, last = [], None
    for tokens, label in zip(words, labels, strict=True):
        if label is not None and label in masks:
            best = max(obj_iou(maps[t], masks[label]) for t in tokens)
            if label == last:
                values[-1] = max(values[-1], best)
            else:
                values.append(best)
        last = label
    return values


@pytest.mark.parametrize("seed", range(8))
def test_best_token_and_adjacent_words_once(seed):
    rng = np.random.default_rng(seed)
    maps = rng.random((9, 5, 6))
    masks = {name: rng.random((5, 6)) < 0.4 for name in "ab"}
    words, at = [], 0
    while at < 9:
        n = min(int(rng.integers(1, 4)), 9 - at)
        words.append(tuple(range(at, at + n)))
        at += n
    labels = [["a", "b", "c", None][k] for k in rng.integers(4, size=len(words))]
    found = word_obj_iou(maps, words, labels, masks)
    assert found.tolist() == pytest.approx(reference_word_obj_iou(maps, words, labels, masks))
    tensors = {name: torch.tensor(mask) for name, mask in masks.items()}
    assert word_obj_iou(torch.tensor(maps), words, labels, tensors).tolist() == found.tolist()


def test_by_hand():
    left, right = np.array([[0.9, 0.0]]), np.array([[0.0, 0.9]])
    masks = {"dog": np.array([[1, 0]])}
    maps = np.stack([right, left, right, left])
    words = [[0], [1], [2], [3]]
    assert word_obj_iou(maps, words, ["dog"] * 4, masks).tolist() == [1.0]
    assert word_obj_iou(maps, words, ["dog", None, "dog", "dog"], masks).tolist() == [0.0, 1.0]
    assert word_obj_iou(maps, words, ["cat", "cat", None, "dog"], masks).tolist() == [1.0]
    assert word_obj_iou(maps, words, [None] * 4, masks).shape == (0,)


def test_bad_words_are_errors():
    maps, masks = np.zeros((1, 2, 2)), {"a": np.ones((2, 2))}
    with pytest.raises(ValueError, match="labels must hold one entry per word, got 2 for 1"):
        word_obj_iou(maps, [[0]], ["a", "a"], masks)
    with pytest.raises(ValueError, match="at least one token"):
        word_obj_iou(maps, [[]], ["a"], masks)


def made_result(tokens, maps, preprocessing=None):
    """A result of jointly normalised maps on 4 x 4 cells, of a frame of 8 x 8 pixels."""
    n = len(tokens)
    return MLLMAttributionResult(
        grid_attr=(torch.as_tensor(np.stack(maps)).float(),),
        token_attr=torch.zeros(n, n),
        input_tokens=tuple(tokens),
        output_tokens=tuple(tokens),
        output_ids=torch.arange(n),
        output_probs=torch.ones(n),
        units="[0, 1]",
        grids=(ImageGrid(4, 4, 8, 8),),
        preprocessing=preprocessing,
    )


def cells(*where):
    made = np.zeros((4, 4))
    for row, col in where:
        made[row, col] = 1.0
    return made


def test_parity_differs_by_the_last_category():
    stretched = Preprocessing(resize=(8, 8))
    right = cells((0, 3), (1, 3), (2, 3), (3, 3))
    result = made_result([" a", " d", "og"], [cells(), cells((0, 0)), right], stretched)
    mask = np.zeros((16, 16), dtype=bool)
    mask[:, 12:] = True
    masks = {"dog": mask, "hot dog": ~mask}
    good, bad = score_words(result, masks), score_words(result, masks, parity=True)
    assert (good.mentions, bad.mentions) == (("dog",), ("hot dog",))
    pixels = upsample(result.grid_attr[0], (16, 16))
    assert good.obj.tolist() == pytest.approx([float(obj_iou(pixels[2], mask))], abs=1e-6)
    assert bad.obj.tolist() == pytest.approx(
        [max(obj_iou(pixels[t], ~mask) for t in (1, 2))], abs=1e-6
    )
    assert good.function_words == bad.function_words == ("a",)
    assert good.func.tolist() == [1.0]


def test_parity_ignores_the_crop():
    """A wide picture whose centre the model saw: parity stretches the map over all of it."""
    cropped = Preprocessing(shortest_edge=8, crop=(8, 8))
    left = cells((0, 0), (1, 0), (2, 0), (3, 0))
    result = made_result([" cat"], [left], cropped)
    mask = np.zeros((8, 24), dtype=bool)
    mask[:, 8:10] = True  # the leftmost quarter of the centre
    found, parity = (
        score_words(result, {"cat": mask}),
        score_words(result, {"cat": mask}, parity=True),
    )
    assert found.obj[0] > 0.6
    assert parity.obj[0] == 0.0
    whole = ImageGeometry.stretched(8, 24)
    given = score_words(result, {"cat": mask}, geometry=whole)
    assert given.obj[0] == pytest.approx(parity.obj[0], abs=1e-6)


def test_bad_answers_are_errors(model, processor, inputs, answer):
    raw = LogitLens(model, processor).attribute(inputs, answer)
    mask = {"dog": np.ones((40, 40))}
    with pytest.raises(ValueError, match="jointly normalised"):
        score_words(raw, mask)
    unit = TokenActivationMap(model, processor).attribute(inputs, answer)
    with pytest.raises(ValueError, match=r"\['zebu'\], which the table lacks"):
        score_words(unit, {"zebu": mask["dog"]})
    with pytest.raises(ValueError, match="masks must be"):
        score_words(unit, {})
    with pytest.raises(ValueError, match="masks must be"):
        score_words(unit, mask | {"cat": np.ones((2, 2))})
    unknown = replace(unit, preprocessing=None)
    with pytest.raises(ValueError, match="geometry"):
        score_words(unknown, mask)
    assert score_words(unknown, mask, parity=True).obj.shape[0] <= len(answer)


def test_user_tables_and_two_word_names(shipped):
    """The reference model on a scene: every object that it lists has a value."""
    from captum_mllm.reference import make_scene, render_pil
    from studies.prompts import default_inputs

    model, processor = shipped
    scene = make_scene(3)
    picture, own = render_pil(scene, 112)
    result = TokenActivationMap(model, processor).attribute(default_inputs(processor, picture))
    masks = {name: own[n] for n, name in enumerate(scene.categories)}
    found = score_words(result, masks, table=CategoryTable.of(scene.categories))
    assert sorted(found.mentions) == sorted(scene.categories)
    assert found.obj.min() > 0.1
    assert found.func.mean() > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_further_metrics_of_words(seed):
    """Each metric's best token; precision and recall of the token with the best Obj-IoU."""
    rng = np.random.default_rng(seed)
    maps, masks = rng.random((6, 5, 6)), {"a": rng.random((5, 6)) < 0.4, "c": np.zeros((5, 6))}
    words, labels = [[0, 1, 2], [3], [4], [5]], ["a", None, "b", "c"]
    found = word_scores_of(maps, words, labels, masks, list(MASK_METRICS))
    assert found.keys() == MASK_METRICS.keys()
    best = max(range(3), key=lambda t: obj_iou(maps[t], masks["a"]))
    for name, values in found.items():
        assert values.shape == (2,)  # "b" has no mask
        assert np.isnan(values[1])  # that of "c" is empty
        each = [MASK_METRICS[name](maps[t], masks["a"]) for t in range(3)]
        assert values[0] == (each[best] if name in ("precision", "recall") else max(each))
    ap = [average_precision(maps[t], masks["a"]) for t in range(3)]
    assert found["average_precision"][0] == max(ap)
    both = precision_recall(maps[best], masks["a"])
    assert (found["precision"][0], found["recall"][0]) == both
    with pytest.raises(ValueError, match=r"metrics: \['iou'\] are unknown; there are obj_iou"):
        word_scores_of(maps, words, labels, masks, ["iou"])


def test_an_answer_with_further_metrics(shipped):
    from captum_mllm.reference import make_scene, render_pil

    model, processor = shipped
    scene = make_scene(1)
    picture, own = render_pil(scene, 96)
    masks = {name: own[n] for n, name in enumerate(scene.categories)}
    text = "USER: <image>\nwhat ? ASSISTANT:"
    inputs = processor(images=picture, text=text, return_tensors="pt")
    target = f"there is a {scene.categories[0]}"
    result = TokenActivationMap(model, processor).attribute(inputs, target=target)
    table = CategoryTable.of(scene.categories)
    found = score_words(result, masks, table=table, metrics=("auc", "obj_iou"))
    assert found.more["obj_iou"].tolist() == found.obj.tolist()
    pixels = result.to_image(0, (96, 96))
    tokens = range(3, len(result.output_tokens))
    expected = max(MASK_METRICS["auc"](pixels[t], masks[scene.categories[0]]) for t in tokens)
    assert found.more["auc"].tolist() == [expected]
    assert score_words(result, masks, table=table).more == {}


# ---- function words -----------------------------------------------------------------------------


def reference_otsu(values):
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


def reference_func_iou(maps, nouns, words, size):
    """As the text says it, word by word and cell by cell."""
    thresholds = []
    for tokens in nouns:
        of_tokens = []
        for token in tokens:
            big = F.interpolate(maps[token][None, None], size, mode="bilinear")[0, 0]
            of_tokens.append(reference_otsu(big.numpy()))
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
    expected = reference_func_iou(maps, nouns, words, size)
    np.testing.assert_allclose(func_iou(maps, nouns, words, size), expected, atol=1e-12)
    assert max(expected) > min(expected)


def test_threshold_is_the_mean_of_the_largest():
    maps = np.zeros((3, 2, 2))
    maps[0, 0, 0], maps[1, 0, 0], maps[2, 0, 0] = 0.9, 0.3, 0.5
    own = [otsu_threshold(m) for m in maps]
    assert noun_threshold(maps, [[0, 1], [2]], (2, 2)) == pytest.approx((own[0] + own[2]) / 2)


def test_reference_otsu_agrees_with_the_library():
    values = np.random.default_rng(0).random((32, 32)) ** 3
    counts = np.histogram(values, bins=256, range=(0, 1))
    edges = threshold_otsu(hist=(counts[0], counts[1][1:]))
    assert reference_otsu(values) == pytest.approx(edges)


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
