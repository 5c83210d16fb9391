"""Context weights, ECI, joint normalisation and rank filter, against reference implementations."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from captum_mllm.functional import (
    arc_subtract,
    context_weights,
    eci_subtract,
    joint_min_max,
    rank_gaussian_filter,
)
from captum_mllm.functional.tam import fit_alpha
from tests.functional.cases import EXACT, TIGHT, Case, over_seeds, over_shapes, rand, randn
from tests.oracle import formulas

# ---- context_weights ---------------------------------------------------------------------------


@over_shapes
@over_seeds
def test_context_weights_equal_the_reference(shape, seed):
    case = Case(shape, seed)
    expected = formulas.context_weights(case.scores, case.mask)
    assert_close(context_weights(case.scores, case.mask), expected, **TIGHT)
    single = context_weights(case.scores.float(), case.mask)
    assert_close(single, expected.float(), rtol=1e-5, atol=1e-6)


def test_context_weights_sum_to_1_over_the_context_only():
    case = Case((6, 9, 3), seed=1)
    weights = context_weights(case.scores, case.mask)
    assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    assert weights[~case.mask].abs().sum() == 0


def test_context_weights_without_scoring_context_are_0():
    scores = torch.tensor([[0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert_close(context_weights(scores, mask), torch.zeros(2, 3), rtol=0, atol=0)


def test_context_weights_ignore_what_is_no_context():
    scores = torch.tensor([[1.0, 3.0, torch.inf]])
    mask = torch.tensor([[True, True, False]])
    assert context_weights(scores, mask).tolist() == [[0.25, 0.75, 0.0]]


# ---- alpha and eci_subtract --------------------------------------------------------------------


@over_shapes
@over_seeds
@pytest.mark.parametrize("alpha_max", [None, 1.0, 0.2])
def test_eci_equals_the_reference(shape, seed, alpha_max):
    maps, contexts, weights, _ = Case(shape, seed).arc
    expected = formulas.eci_subtract(maps, contexts, weights, alpha_max)
    assert_close(eci_subtract(maps, contexts, weights, alpha_max), expected, **TIGHT)
    single = eci_subtract(maps.float(), contexts.float(), weights.float(), alpha_max)
    assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


@over_seeds
def test_alpha_is_the_least_squares_optimum(seed):
    # Read alpha off a cell that stays lit (there relu is silent), then disturb it.
    maps, contexts, weights, _ = Case((3, 5, 9), seed).arc
    contexts, weights = contexts + 0.1, weights + 0.1
    e = weights @ contexts
    maps = maps + e
    cleaned = eci_subtract(maps, contexts, weights)
    brightest = torch.where(cleaned > 0, e, 0.0).argmax(1, keepdim=True)
    assert (cleaned.gather(1, brightest) > 0).all()
    alpha = (maps - cleaned).gather(1, brightest) / e.gather(1, brightest)

    def residual(a):
        return (maps - a * e).square().sum(1)

    for factor in (0.9, 0.999, 1.001, 1.1):
        assert (residual(alpha * factor) > residual(alpha)).all()


def test_alpha_max_binds_only_where_alpha_is_larger():
    e = torch.tensor([[1.0, 0.0]])
    maps = torch.tensor([[5.0, 1.0], [0.5, 1.0]])  # alpha = 5 and 0.5
    cleaned = eci_subtract(maps, e, torch.ones(2, 1), alpha_max=1.0)
    assert cleaned.tolist() == [[4.0, 1.0], [0.0, 1.0]]
    free = eci_subtract(maps, e, torch.ones(2, 1))
    assert torch.equal(eci_subtract(maps, e, torch.ones(2, 1), alpha_max=5.0), free)


@pytest.mark.parametrize("level", [1e-38, 1e-23, 1e-10, 1e19, 1e20, 1e37])
@pytest.mark.parametrize("relevance", [None, 0.0, 0.4])
@pytest.mark.parametrize("alpha_max", [None, 0.25])
def test_the_level_of_float32_maps_only_scales_the_result(level, relevance, alpha_max):
    """Squares and sums of squares pass float32's range long before the maps themselves do."""
    case = Case((4, 6, 40), seed=3)
    maps, contexts, weights, _ = (x.float() for x in case.arc)

    def cleaned(maps, contexts):
        if relevance is None:
            return eci_subtract(maps, contexts, weights, alpha_max)
        shared = torch.full_like(weights, relevance)
        return arc_subtract(maps, contexts, weights, shared, alpha_max=alpha_max)

    base, moved = cleaned(maps, contexts), cleaned(level * maps, level * contexts)
    assert_close(moved.double() / level, base.double(), rtol=1e-4, atol=1e-4)
    if alpha_max is None:  # nor does the level of the context alone, which alpha makes up for
        assert_close(cleaned(maps, level * contexts), base, rtol=1e-4, atol=1e-4)
        assert_close(fit_alpha(level * maps, level * maps), torch.ones(4))


@pytest.mark.parametrize("level", [1e-40, 1e-23, 1e20, 1e38])
def test_the_level_of_float32_scores_does_not_change_context_weights(level):
    case = Case((4, 6, 3), seed=2)
    scores = case.scores.float() / 10
    weights = context_weights(level * scores, case.mask)
    assert_close(weights, context_weights(scores, case.mask), rtol=1e-3, atol=1e-4)


def test_half_precision_holds_the_sums_over_many_cells():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 90_000, generator=generator).half()
    contexts = torch.rand(3, 90_000, generator=generator).half()
    weights = torch.full((2, 3), 1 / 3).half()
    exact = eci_subtract(maps.double(), contexts.double(), weights.double())
    assert_close(eci_subtract(maps, contexts, weights).double(), exact, rtol=0, atol=5e-3)


# ---- joint_min_max -----------------------------------------------------------------------------


@over_shapes
@over_seeds
def test_joint_min_max_equals_the_reference(shape, seed):
    case = Case(shape, seed)
    expected = formulas.joint_min_max(case.maps, case.scores, case.mask)
    for ours, theirs in zip(
        joint_min_max(case.maps, case.scores, case.mask), expected, strict=True
    ):
        assert_close(ours, theirs, **TIGHT)
    singles = joint_min_max(case.maps.float(), case.scores.float(), case.mask)
    for ours, theirs in zip(singles, expected, strict=True):
        assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)


def test_joint_min_max_case_computed_by_hand():
    # Values that count: cells 2 and 4, score 10; low 2, span 8. The 100 is not earlier.
    maps, scores = torch.tensor([[2.0, 4.0]]), torch.tensor([[10.0, 100.0]])
    unit_maps, unit_scores = joint_min_max(maps, scores, torch.tensor([[True, False]]))
    assert unit_maps.tolist() == [[0.0, 0.25]]
    assert unit_scores.tolist() == [[1.0, 0.0]]


def test_joint_min_max_spans_0_to_1_over_what_counts():
    case = Case((8, 6, 10), seed=7)
    unit_maps, unit_scores = joint_min_max(case.maps, case.scores, case.mask)
    for row in range(8):
        counts = torch.cat([unit_maps[row], unit_scores[row][case.mask[row]]])
        assert counts.min() == 0
        assert counts.max() == 1
    assert unit_scores[~case.mask].abs().sum() == 0


def test_joint_min_max_keeps_a_map_dark_that_text_outshines():
    maps = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    scores = torch.tensor([[100.0], [0.5]])
    unit_maps, _ = joint_min_max(maps, scores, torch.ones(2, 1, dtype=torch.bool))
    assert_close(unit_maps[:, 1], torch.tensor([0.01, 1.0]))


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_joint_min_max_of_flat_values_is_0(level):
    maps, scores = torch.full((1, 4), level), torch.tensor([[level, level + 1]])
    mask = torch.tensor([[True, False]])
    unit_maps, unit_scores = joint_min_max(maps, scores, mask)
    assert_close(unit_maps, torch.zeros(1, 4), rtol=0, atol=0)
    assert_close(unit_scores, torch.zeros(1, 2), rtol=0, atol=0)


def test_joint_min_max_without_any_text():
    maps = torch.tensor([[1.0, 2.0, 5.0]])
    none = torch.zeros(1, 0)
    unit_maps, unit_scores = joint_min_max(maps, none, none.bool())
    assert unit_maps.tolist() == [[0.0, 0.25, 1.0]]
    assert unit_scores.shape == (1, 0)


def test_joint_min_max_does_not_see_a_common_scale_or_shift():
    case = Case(seed=8)
    base = joint_min_max(case.maps, case.scores, case.mask)
    moved = joint_min_max(5 * case.maps + 2, 5 * case.scores + 2, case.mask)
    for ours, theirs in zip(moved, base, strict=True):
        assert_close(ours, theirs, **TIGHT)


# ---- rank_gaussian_filter ----------------------------------------------------------------------

GRIDS = [(1, 1), (1, 6), (6, 1), (2, 2), (2, 5), (3, 3), (5, 4), (8, 8)]


@over_seeds
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", ["dense", "relu", "signed", "nearly flat"])
def test_filter_equals_the_reference(seed, grid, kind):
    maps = {
        "dense": rand(*grid, seed=seed),
        "relu": randn(*grid, seed=seed).clamp(min=0),
        "signed": randn(*grid, seed=seed),  # windows of mean <= 0 give 0
        "nearly flat": 1 + 1e-3 * rand(*grid, seed=seed),
    }[kind]
    expected = formulas.rank_gaussian_filter(maps)
    assert_close(rank_gaussian_filter(maps), expected, **TIGHT)
    if kind in ("dense", "relu"):
        assert_close(rank_gaussian_filter(maps.float()), expected.float(), rtol=1e-4, atol=1e-6)


def test_filter_of_a_spike_computed_by_hand():
    # The window of the spike holds eight 0 and one 1: mean 1/9, variance 1/9 - 1/81 = 8/81,
    # sigma^2 = 8/81 * 81 = 8. The 1 has rank 8: exp(-16/16) over sum_r exp(-(r-4)^2 / 16).
    spike = torch.zeros(5, 5, dtype=torch.float64)
    spike[2, 2] = 1.0
    e = torch.tensor([-16.0, -9, -4, -1, 0, -1, -4, -9, -16], dtype=torch.float64) / 16
    value = torch.exp(e[8]) / torch.exp(e).sum()
    filtered = rank_gaussian_filter(spike)
    assert_close(filtered[1:4, 1:4], value.expand(3, 3), **TIGHT)
    # Elsewhere the window either misses the spike or is one of the nine above.
    assert filtered.sum() == pytest.approx(9 * value.item())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("level", [0.0, 1e-30, 0.1, 3.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_keeps_a_constant_bit_for_bit(grid, level, dtype):
    flat = torch.full(grid, level, dtype=dtype)
    assert_close(rank_gaussian_filter(flat), flat, **EXACT)


def test_filter_of_a_map_with_flat_and_zero_regions_equals_the_reference():
    maps = torch.zeros(8, 8, dtype=torch.float64)
    maps[:, 4:] = 2.0
    filtered = rank_gaussian_filter(maps)
    assert_close(filtered, formulas.rank_gaussian_filter(maps), **TIGHT)
    assert_close(filtered[:, :3], torch.zeros(8, 3, dtype=torch.float64), **EXACT)
    assert_close(filtered[:, 5:], torch.full((8, 3), 2.0, dtype=torch.float64), **EXACT)


@over_seeds
@pytest.mark.parametrize("axis", [0, 1])
def test_filter_commutes_with_flips_and_transposition(seed, axis):
    maps = randn(6, 5, seed=seed).clamp(min=0)
    filtered = rank_gaussian_filter(maps)
    assert_close(rank_gaussian_filter(maps.flip(axis)), filtered.flip(axis), **TIGHT)
    assert_close(rank_gaussian_filter(maps.T), filtered.T, **TIGHT)


@over_seeds
def test_filter_of_a_window_does_not_see_the_order_of_its_cells(seed):
    window = rand(9, seed=seed)
    shuffled = window[torch.randperm(9, generator=torch.Generator().manual_seed(seed))]
    centre = rank_gaussian_filter(window.reshape(3, 3))[1, 1]
    assert_close(rank_gaussian_filter(shuffled.reshape(3, 3))[1, 1], centre, **TIGHT)


def test_filter_sorts_every_window_of_zeros_and_ones():
    # What compares and swaps in a fixed order sorts everything if it sorts all of these.
    bits = (torch.arange(512)[:, None] >> torch.arange(9)) & 1
    centre = rank_gaussian_filter(bits.double().reshape(512, 3, 3))[:, 1, 1]
    for ones in range(10):
        alike = centre[bits.sum(1) == ones]
        expected = formulas.rank_gaussian_filter((torch.arange(9) < ones).double().reshape(3, 3))
        assert_close(alike, expected[1, 1].expand_as(alike), **TIGHT)


@pytest.mark.parametrize("c", [1e-30, 1e-20, 1e-3, 1.0, 1e3, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_is_positively_homogeneous(c, dtype):
    maps = randn(7, 7, dtype=dtype).clamp(min=0)
    filtered = rank_gaussian_filter(c * maps)
    assert filtered.isfinite().all()
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    assert_close(filtered / c, rank_gaussian_filter(maps), rtol=rtol, atol=rtol * 1e-3)


def test_filter_of_values_60_orders_of_magnitude_apart_is_finite():
    maps = torch.where(rand(9, 9) < 0.5, 1e-30, 1e30).float()
    filtered = rank_gaussian_filter(maps)
    assert filtered.isfinite().all()
    expected = formulas.rank_gaussian_filter(maps.double())
    assert_close(filtered, expected.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_filter_takes_values_at_the_end_of_the_dtype(dtype):
    unit = rand(7, 7, dtype=torch.float64)
    maps = (unit * torch.finfo(dtype).max).to(dtype)
    filtered = rank_gaussian_filter(maps)
    expected = formulas.rank_gaussian_filter(maps.double() / torch.finfo(dtype).max)
    eps = torch.finfo(dtype).eps
    assert_close(filtered.double() / torch.finfo(dtype).max, expected, rtol=4 * eps, atol=4 * eps)


def test_filter_stays_within_each_window():
    maps = randn(6, 6).clamp(min=0)
    padded = F.pad(maps[None, None], (1, 1, 1, 1), mode="reflect")
    high = F.max_pool2d(padded, 3, stride=1)[0, 0]
    low = -F.max_pool2d(-padded, 3, stride=1)[0, 0]
    filtered = rank_gaussian_filter(maps)
    assert ((filtered >= low - 1e-12) & (filtered <= high + 1e-12)).all()


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (0,)], ids=str)
def test_filter_of_a_batch_equals_one_by_one(lead):
    maps = rand(*lead, 5, 4)
    filtered = rank_gaussian_filter(maps)
    assert filtered.shape == maps.shape
    for ours, single in zip(filtered.reshape(-1, 5, 4), maps.reshape(-1, 5, 4), strict=True):
        assert_close(ours, rank_gaussian_filter(single), **TIGHT)
