import builtins
import importlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from captum_mllm.metrics import (
    auc,
    average_precision,
    energy_in_mask,
    iou,
    obj_iou,
    oracle_iou,
    otsu_threshold,
    pointing_game,
    precision_recall,
)

MAP_METRICS = [auc, average_precision, energy_in_mask, obj_iou, oracle_iou, pointing_game]
over_metrics = pytest.mark.parametrize("metric", MAP_METRICS, ids=lambda m: m.__name__)
over_seeds = pytest.mark.parametrize("seed", range(8))


def scene(seed: int, shape=(7, 9), levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A map on [0, 1] that leans towards a random mask; few ``levels`` make ties."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.3
    values = (rng.random(shape) + 0.5 * mask) / 1.5
    return (values if levels is None else np.floor(values * levels) / levels), mask


# --- slow twins -------------------------------------------------------------------------------


def slow_otsu_upper_class(values: np.ndarray) -> np.ndarray:
    """Every split of the 256 bins in exact fractions, the first best one."""
    bins = [min(int(v * 256), 255) for v in values.ravel().tolist()]
    best, best_split = Fraction(-1), 255
    for split in range(255):
        low = [b for b in bins if b <= split]
        high = [b for b in bins if b > split]
        if not low or not high:
            continue
        gap = Fraction(sum(low), len(low)) - Fraction(sum(high), len(high))
        between = len(low) * len(high) * gap**2
        if between > best:
            best, best_split = between, split
    return np.array([b > best_split for b in bins]).reshape(values.shape)


def slow_iou(found: np.ndarray, mask: np.ndarray) -> float:
    a = {i for i, x in enumerate(found.ravel()) if x}
    b = {i for i, x in enumerate(mask.ravel()) if x}
    return len(a & b) / len(a | b)


def slow_average_precision(values: np.ndarray, mask: np.ndarray) -> float:
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(values.ravel()), reverse=True):
        found = values >= threshold
        recall = (found & mask).sum() / mask.sum()
        total += (recall - recall_before) * (found & mask).sum() / found.sum()
        recall_before = recall
    return total


def slow_auc(values: np.ndarray, mask: np.ndarray) -> float:
    """Share of (object, background) pairs in the right order, ties half."""
    pairs = [(x > y) + 0.5 * (x == y) for x in values[mask] for y in values[~mask]]
    return sum(pairs) / len(pairs)


# --- Otsu -------------------------------------------------------------------------------------


@over_seeds
@pytest.mark.parametrize("levels", [None, 3, 16, 256])
def test_otsu_splits_as_the_exact_twin(seed, levels):
    values, _ = scene(seed, levels=levels)
    upper = values > otsu_threshold(values)
    np.testing.assert_array_equal(upper, slow_otsu_upper_class(values))
    single = values.astype(np.float32)
    np.testing.assert_array_equal(single > otsu_threshold(single), upper)


@over_seeds
def test_otsu_agrees_with_scikit_image_up_to_the_end_of_the_bin(seed):
    filters = importlib.import_module("skimage.filters")
    values, _ = scene(seed)
    values.flat[:2] = 0.0, 1.0  # scikit-image spans its 256 bins over the range that it finds
    centre = filters.threshold_otsu(values, nbins=256)
    assert otsu_threshold(values) == pytest.approx(centre + 0.5 / 256, abs=1e-7)


def test_otsu_by_hand():
    # Bins 25 (.1), 26 (.102) and 230 (.9): the gap to the third is where the classes part. The
    # lowest of the equal splits ends with bin 26, its upper edge is 27/256.
    values = np.array([[0.1, 0.102, 0.9]])
    assert otsu_threshold(values) == pytest.approx(27 / 256, abs=1e-7)
    assert (values > otsu_threshold(values)).tolist() == [[False, False, True]]


@pytest.mark.parametrize("background", [0.0, 0.001, 0.003, 0.5 + 0.6 / 256])
def test_otsu_keeps_a_flat_background_out_wherever_in_its_bin_it_lies(background):
    # A threshold at the bin's centre would call the upper half of the bin bright.
    values = np.full((4, 4), background)
    values[1, 1] = 0.95
    assert (values > otsu_threshold(values)).sum() == 1


def test_otsu_splits_values_on_the_very_edges_of_bins():
    values = np.array([[10 / 256, 11 / 256]])
    assert (values > otsu_threshold(values)).tolist() == [[False, True]]
    single = values.astype(np.float32)
    assert (single > otsu_threshold(single)).tolist() == [[False, True]]


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_otsu_of_a_flat_map_leaves_nothing_above(level):
    flat = np.full((3, 5), level)
    assert otsu_threshold(flat) == level
    one_bin = np.linspace(0.5001, 0.503, 12).reshape(3, 4)  # bin 128 is [.5, .5039)
    assert not (one_bin > otsu_threshold(one_bin)).any()


def test_otsu_does_not_rescale_the_map():
    values, _ = scene(0)
    dim = otsu_threshold(values / 10)
    assert dim == pytest.approx(otsu_threshold(values) / 10, abs=2 / 256)
    assert dim < 0.1


@pytest.mark.parametrize("values", [[[0.0, 1.1]], [[-0.2, 0.5]], [[0.0, 25.0]]])
def test_otsu_outside_0_and_1_raises(values):
    with pytest.raises(ValueError, match=r"map must lie in \[0, 1\].*joint_min_max"):
        otsu_threshold(np.array(values))


def test_otsu_forgives_rounding_at_the_ends():
    assert 0 < otsu_threshold(np.array([[-1e-7, 1 + 1e-7]])) < 1


# --- IoU --------------------------------------------------------------------------------------


@over_seeds
def test_iou_equals_twin_and_is_symmetric(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 5, 6)) < 0.4
    assert iou(a, b) == pytest.approx(slow_iou(a, b), rel=1e-12)
    assert iou(a, b) == iou(b, a)
    assert iou(a, a) == 1


def test_iou_by_hand():
    a, b = np.array([[1, 1, 1, 0]]), np.array([[0, 1, 1, 1]])
    assert iou(a, b) == 0.5
    assert iou(a, 1 - a) == 0
    assert iou(a, np.zeros_like(a)) == 0
    assert math.isnan(iou(np.zeros_like(a), np.zeros_like(a)))


@over_seeds
@pytest.mark.parametrize("levels", [None, 4])
def test_obj_iou_and_oracle_iou_equal_twins(seed, levels):
    values, mask = scene(seed, levels=levels)
    assert obj_iou(values, mask) == pytest.approx(slow_iou(slow_otsu_upper_class(values), mask))
    best = max(slow_iou(values >= t, mask) for t in set(values.ravel()))
    assert oracle_iou(values, mask) == pytest.approx(best, rel=1e-12)
    assert oracle_iou(values, mask) >= obj_iou(values, mask)


def test_oracle_iou_by_hand():
    # Ranked: in, out, in, in, out of 3: 1/3, 1/4, 2/4, 3/4, 3/5.
    values, mask = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]]), np.array([[1, 0, 1, 1, 0]])
    assert oracle_iou(values, mask) == 0.75
    # Where the first two tie they come together: 1/4 at best before 3/4; where all tie: 3/5.
    assert oracle_iou(np.array([[0.9, 0.9, 0.1, 0.1, 0.1]]), mask) == 0.6
    assert oracle_iou(np.full((1, 5), 0.2), mask) == 0.6


@pytest.mark.parametrize("metric", [oracle_iou, average_precision, auc, pointing_game])
@over_seeds
def test_ranking_metrics_do_not_see_a_monotone_change(metric, seed):
    values, mask = scene(seed)
    assert metric(values**3, mask) == pytest.approx(metric(values, mask), rel=1e-12)
    assert metric(40 * values - 7, mask) == pytest.approx(metric(values, mask), rel=1e-12)


# --- average precision, AUC -------------------------------------------------------------------


@over_seeds
@pytest.mark.parametrize("levels", [None, 4])
def test_average_precision_and_auc_equal_twins(seed, levels):
    values, mask = scene(seed, levels=levels)
    precision = slow_average_precision(values, mask)
    assert average_precision(values, mask) == pytest.approx(precision, rel=1e-10)
    assert auc(values, mask) == pytest.approx(slow_auc(values, mask), rel=1e-10)
    assert auc(-values, mask) == pytest.approx(1 - slow_auc(values, mask), rel=1e-10)


def test_average_precision_and_auc_by_hand():
    # Object pixels at ranks 1 and 3: precision 1 and 2/3, each for half of the recall.
    values, mask = np.array([[0.9, 0.8, 0.7, 0.6]]), np.array([[1, 0, 1, 0]])
    assert average_precision(values, mask) == pytest.approx((1 + 2 / 3) / 2)
    # Of the pairs (.9 .8) (.9 .6) (.7 .8) (.7 .6) three are in order.
    assert auc(values, mask) == 0.75


# --- pointing, energy, precision and recall ---------------------------------------------------


def test_pointing_game_by_hand():
    mask = np.array([[1, 0, 0, 0]])
    assert pointing_game(np.array([[0.9, 0.1, 0.0, 0.2]]), mask) == 1
    assert pointing_game(np.array([[0.8, 0.9, 0.0, 0.2]]), mask) == 0
    assert pointing_game(np.array([[0.9, 0.9, 0.0, 0.2]]), mask) == 0.5
    assert pointing_game(np.full((1, 4), -3.0), mask) == 0.25


def test_energy_in_mask_by_hand():
    mask = np.array([[1, 0], [1, 0]])
    assert energy_in_mask(np.array([[1.0, 2.0], [3.0, 4.0]]), mask) == 0.4
    assert energy_in_mask(np.array([[1.0, -2.0], [-3.0, 3.0]]), mask) == 0.25


@over_seeds
def test_energy_in_mask_equals_twin(seed):
    values, mask = scene(seed)
    values = values - 0.4
    pairs = list(zip(values.ravel().tolist(), mask.ravel().tolist(), strict=True))
    inside = math.fsum(v for v, m in pairs if m and v > 0)
    total = math.fsum(v for v, _ in pairs if v > 0)
    assert energy_in_mask(values, mask) == pytest.approx(inside / total, rel=1e-12)


@over_seeds
def test_precision_and_recall_equal_twin_and_make_up_obj_iou(seed):
    values, mask = scene(seed)
    found = slow_otsu_upper_class(values)
    precision, recall = precision_recall(values, mask)
    assert precision == pytest.approx((found & mask).sum() / found.sum())
    assert recall == pytest.approx((found & mask).sum() / mask.sum())
    assert obj_iou(values, mask) == pytest.approx(1 / (1 / precision + 1 / recall - 1))


def test_precision_and_recall_by_hand():
    values, mask = np.array([[0.9, 0.9, 0.9, 0.1, 0.1]]), np.array([[1, 0, 0, 1, 0]])
    assert precision_recall(values, mask) == (1 / 3, 0.5)


# --- what all share ---------------------------------------------------------------------------


@over_metrics
def test_perfect_map_gets_1(metric):
    _, mask = scene(0)
    assert metric(mask.astype(float), mask) == pytest.approx(1)


@over_metrics
def test_opposite_map_gets_the_least(metric):
    _, mask = scene(0)
    share = mask.mean()
    least = {average_precision: share, oracle_iou: share}.get(metric, 0.0)
    assert metric(1.0 - mask, mask) == pytest.approx(least)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (auc, 0.5),
        (average_precision, 0.25),
        (energy_in_mask, 0.0),
        (obj_iou, 0.0),
        (oracle_iou, 0.25),
        (pointing_game, 0.25),
    ],
)
def test_all_zero_map_gets_a_value_and_never_nan(metric, value):
    mask = np.array([[1, 0], [0, 0]])
    assert metric(np.zeros((2, 2)), mask) == value
    assert precision_recall(np.zeros((2, 2)), mask) == (0.0, 0.0)


@over_metrics
def test_empty_mask_gives_nan(metric):
    values, mask = scene(0)
    assert math.isnan(metric(values, np.zeros_like(mask)))
    assert all(math.isnan(x) for x in precision_recall(values, np.zeros_like(mask)))


def test_full_mask_gives_nan_for_auc_only():
    values, mask = scene(0)
    full = np.ones_like(mask)
    assert math.isnan(auc(values, full))
    assert average_precision(values, full) == pytest.approx(1)
    assert pointing_game(values, full) == 1


@over_metrics
def test_batch_equals_one_by_one_and_torch_equals_numpy(metric):
    maps, masks = (np.stack(x) for x in zip(*(scene(s) for s in range(6)), strict=True))
    masks[4] = False
    single = np.array([metric(m, k) for m, k in zip(maps, masks, strict=True)])
    batch = metric(maps, masks)
    np.testing.assert_array_equal(batch, single)
    assert np.isnan(batch).tolist() == [False, False, False, False, True, False]
    nested = metric(maps.reshape(2, 3, 7, 9), masks.reshape(2, 3, 7, 9))
    np.testing.assert_array_equal(nested, single.reshape(2, 3))
    tensors = metric(torch.tensor(maps, requires_grad=True), torch.tensor(masks))
    np.testing.assert_array_equal(tensors, single)
    assert isinstance(metric(maps[0], masks[0]), float)


def test_batches_of_otsu_iou_and_precision_recall():
    maps, masks = (np.stack(x) for x in zip(*(scene(s) for s in range(3)), strict=True))
    np.testing.assert_array_equal(otsu_threshold(maps), [otsu_threshold(m) for m in maps])
    found = maps > 0.5
    singles = [iou(f, k) for f, k in zip(found, masks, strict=True)]
    np.testing.assert_array_equal(iou(found, masks), singles)
    precision, recall = precision_recall(maps, masks)
    pairs = [precision_recall(m, k) for m, k in zip(maps, masks, strict=True)]
    np.testing.assert_array_equal(np.stack([precision, recall], axis=1), pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_maps_are_read(dtype):
    values, mask = scene(0)
    low = torch.tensor(values).to(dtype)
    assert auc(low, torch.tensor(mask)) == pytest.approx(auc(values, mask), abs=0.02)


@over_metrics
def test_inputs_are_left_alone(metric):
    values, mask = scene(0)
    before = values.copy(), mask.copy()
    metric(values, mask)
    np.testing.assert_array_equal(values, before[0])
    np.testing.assert_array_equal(mask, before[1])


@over_metrics
def test_wrong_inputs_raise_and_name_the_argument(metric):
    values, mask = scene(0)
    with pytest.raises(ValueError, match=r"map and mask must have the same shape.*upsample"):
        metric(values, mask[:-1])
    with pytest.raises(ValueError, match="mask must be bool or hold only 0 and 1; pass mask > 0"):
        metric(values, mask * 255)
    with pytest.raises(ValueError, match="map must not hold NaN, got 1"):
        metric(np.where(np.arange(63).reshape(7, 9) == 5, np.nan, values), mask)
    endless = np.where(np.arange(63).reshape(7, 9) == 5, np.inf, values)
    with pytest.raises(ValueError, match="map must be finite, got 1 infinite"):
        metric(endless, mask)


def test_wrong_shapes_raise():
    with pytest.raises(ValueError, match=r"pred_mask and mask must have the same shape"):
        iou(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(
        ValueError, match=r"map must be \(\.\.\., height, width\), got shape \(0, 3\)"
    ):
        otsu_threshold(np.zeros((0, 3)))


@pytest.mark.parametrize(
    ("metric", "package"),
    [(auc, "sklearn"), (average_precision, "sklearn"), (obj_iou, "skimage")],
)
def test_missing_extra_is_named(metric, package, monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name.startswith(package):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    values, mask = scene(0)
    with pytest.raises(ImportError, match=r'pip install "captum-mllm\[metrics\]"'):
        metric(values, mask)


def test_metrics_without_the_extra_run(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(("sklearn", "skimage")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    values, mask = scene(0)
    for metric in (oracle_iou, pointing_game, energy_in_mask):
        assert 0 <= metric(values, mask) <= 1
