import itertools

import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import (
    arc_subtract,
    context_weights,
    eci_subtract,
    joint_min_max,
    rank_biased_overlap,
)
from tests.oracle import formulas as reference

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = [(1, 1, 1), (1, 3, 5), (4, 1, 7), (5, 6, 12), (3, 8, 2)]
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
over_seeds = pytest.mark.parametrize("seed", range(4))


class Case:
    """Random maps, contexts, weights and relevance of one shape (targets, tokens, cells)."""

    def __init__(self, shape=(4, 6, 10), seed=0, dtype=torch.float64):
        targets, tokens, cells = shape
        g = torch.Generator().manual_seed(seed)

        def positive(*size):
            return torch.randn(*size, generator=g, dtype=dtype).clamp(min=0) * 3

        self.maps = positive(targets, cells)
        self.contexts = positive(tokens, cells)
        self.scores = positive(targets, tokens)
        self.mask = torch.rand(targets, tokens, generator=g) < 0.7
        self.weights = context_weights(self.scores, self.mask)
        self.relevance = torch.rand(targets, tokens, generator=g, dtype=dtype)

    @property
    def arc(self):
        return self.maps, self.contexts, self.weights, self.relevance


# --- context_weights --------------------------------------------------------------------------


@over_shapes
@over_seeds
def test_context_weights_equal_twin(shape, seed):
    case = Case(shape, seed)
    expected = reference.context_weights(case.scores, case.mask)
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


# --- ECI and ARC ------------------------------------------------------------------------------


@over_shapes
@over_seeds
@pytest.mark.parametrize("alpha_max", [None, 1.0, 0.2])
def test_eci_equals_twin(shape, seed, alpha_max):
    maps, contexts, weights, _ = Case(shape, seed).arc
    expected = reference.eci_subtract(maps, contexts, weights, alpha_max)
    assert_close(eci_subtract(maps, contexts, weights, alpha_max), expected, **TIGHT)
    single = eci_subtract(maps.float(), contexts.float(), weights.float(), alpha_max)
    assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


@over_shapes
@over_seeds
@pytest.mark.parametrize(("strength", "alpha_max"), [(1.0, None), (0.5, None), (2.0, 0.7)])
def test_arc_equals_twin(shape, seed, strength, alpha_max):
    case = Case(shape, seed)
    expected = reference.arc_subtract(*case.arc, strength, alpha_max)
    assert_close(arc_subtract(*case.arc, strength, alpha_max), expected, **TIGHT)
    single = arc_subtract(*(x.float() for x in case.arc), strength, alpha_max)
    assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


def test_eci_case_computed_by_hand():
    # E = .5 [2 0 0] + .5 [0 2 0] = [1 1 0]; alpha = (3 + 1) / 2 = 2; [3 1 4] - 2 [1 1 0].
    maps = torch.tensor([[3.0, 1.0, 4.0]])
    contexts = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    weights = torch.tensor([[0.5, 0.5]])
    assert eci_subtract(maps, contexts, weights).tolist() == [[1.0, 0.0, 4.0]]
    assert eci_subtract(maps, contexts, weights, alpha_max=1.0).tolist() == [[2.0, 0.0, 4.0]]
    # The same with r = [1, 0]: only the second context's half is subtracted, alpha stays 2.
    relevance = torch.tensor([[1.0, 0.0]])
    assert arc_subtract(maps, contexts, weights, relevance).tolist() == [[3.0, 0.0, 4.0]]
    half = arc_subtract(maps, contexts, weights, relevance, strength=0.25)
    assert half.tolist() == [[3.0, 0.5, 4.0]]


@over_seeds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha_max", [None, 1.0])
def test_relevance_0_is_eci_bit_for_bit(seed, dtype, alpha_max):
    maps, contexts, weights, relevance = Case(seed=seed, dtype=dtype).arc
    arc = arc_subtract(maps, contexts, weights, torch.zeros_like(relevance), 1.0, alpha_max)
    eci = eci_subtract(maps, contexts, weights, alpha_max)
    assert torch.equal(arc, eci)
    assert not torch.equal(arc, maps)


@over_seeds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relevance_1_or_strength_0_leaves_the_map_alone_bit_for_bit(seed, dtype):
    maps, contexts, weights, relevance = Case(seed=seed, dtype=dtype).arc
    assert torch.equal(arc_subtract(maps, contexts, weights, torch.ones_like(relevance)), maps)
    assert torch.equal(arc_subtract(maps, contexts, weights, relevance, strength=0.0), maps)


def lipschitz_along(curve, bound, steps=200):
    """Largest step of ``curve`` over [0, 1] and the end-to-end change, both checked."""
    values = [curve(i / steps) for i in range(steps + 1)]
    for before, after in itertools.pairwise(values):
        assert ((before - after).abs() <= bound / steps * (1 + 1e-9) + 1e-12).all()
    assert (values[0] - values[-1]).abs().max() > 0


@over_seeds
def test_arc_is_continuous_and_monotone_in_relevance(seed):
    maps, contexts, weights, relevance = Case(seed=seed).arc
    # |d result / d r| <= alpha * sum_j w_tj A_j for a common r, with relu's slope at most 1.
    e = weights @ contexts
    alpha = (maps * e).sum(1) / e.square().sum(1)
    lipschitz_along(
        lambda r: arc_subtract(maps, contexts, weights, torch.full_like(relevance, r)),
        bound=alpha[:, None] * e,
    )
    lower = arc_subtract(maps, contexts, weights, relevance * 0.5)
    assert (arc_subtract(maps, contexts, weights, relevance) - lower).min() >= -1e-12


@over_seeds
def test_arc_is_continuous_and_monotone_in_strength(seed):
    case = Case(seed=seed)
    maps, contexts, weights, relevance = case.arc
    e = weights @ contexts
    alpha = (maps * e).sum(1) / e.square().sum(1)
    irrelevant = (weights * (1 - relevance)) @ contexts
    lipschitz_along(
        lambda s: arc_subtract(*case.arc, strength=s), bound=alpha[:, None] * irrelevant
    )
    weak, strong = arc_subtract(*case.arc, strength=0.5), arc_subtract(*case.arc, strength=1.0)
    assert (weak - strong).min() >= 0


@pytest.mark.parametrize("c", [1e-3, 0.5, 7.0, 1e4])
def test_scaling_all_maps_scales_the_result(c):
    maps, contexts, weights, relevance = Case(seed=2).arc
    for scaled, base in (
        (eci_subtract(c * maps, c * contexts, weights), eci_subtract(maps, contexts, weights)),
        (
            arc_subtract(c * maps, c * contexts, weights, relevance, 0.6, 0.9),
            arc_subtract(maps, contexts, weights, relevance, 0.6, 0.9),
        ),
    ):
        assert_close(scaled, c * base, rtol=1e-10, atol=1e-10 * c)


@pytest.mark.parametrize("c", [1e-3, 0.5, 7.0, 1e4])
def test_scaling_the_contexts_alone_changes_nothing(c):
    # alpha is a fit: it takes the contexts' scale out again.
    maps, contexts, weights, relevance = Case(seed=2).arc
    scaled = arc_subtract(maps, c * contexts, weights, relevance)
    assert_close(scaled, arc_subtract(maps, contexts, weights, relevance), **TIGHT)


def test_permuting_cells_permutes_the_result():
    maps, contexts, weights, relevance = Case(seed=3).arc
    order = torch.randperm(maps.shape[1], generator=torch.Generator().manual_seed(0))
    permuted = arc_subtract(maps[:, order], contexts[:, order], weights, relevance)
    base = arc_subtract(maps, contexts, weights, relevance)
    assert_close(permuted, base[:, order], **TIGHT)


def test_permuting_context_tokens_changes_nothing():
    maps, contexts, weights, relevance = Case(seed=3).arc
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(0))
    permuted = arc_subtract(maps, contexts[order], weights[:, order], relevance[:, order])
    assert_close(permuted, arc_subtract(maps, contexts, weights, relevance), **TIGHT)


def test_each_target_is_cleaned_on_its_own():
    case = Case(seed=4)
    maps, contexts, weights, relevance = case.arc
    single = torch.cat(
        [
            arc_subtract(maps[i : i + 1], contexts, weights[i : i + 1], relevance[i : i + 1])
            for i in range(len(maps))
        ]
    )
    assert_close(arc_subtract(*case.arc), single, **TIGHT)


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


def test_alpha_is_fitted_to_the_whole_interference_not_to_the_irrelevant_part():
    # One context: E = (1 - r) E0. A fit to E would subtract the same whatever r is.
    maps, context = torch.tensor([[4.0, 9.0]]), torch.tensor([[2.0, 0.0]])
    cleaned = [
        arc_subtract(maps, context, torch.ones(1, 1), torch.tensor([[r]]))[0, 0].item()
        for r in (0.0, 0.25, 0.5, 1.0)
    ]
    assert cleaned == [0.0, 1.0, 2.0, 4.0]


def test_alpha_max_binds_only_where_alpha_is_larger():
    e = torch.tensor([[1.0, 0.0]])
    maps = torch.tensor([[5.0, 1.0], [0.5, 1.0]])  # alpha = 5 and 0.5
    cleaned = eci_subtract(maps, e, torch.ones(2, 1), alpha_max=1.0)
    assert cleaned.tolist() == [[4.0, 1.0], [0.0, 1.0]]
    free = eci_subtract(maps, e, torch.ones(2, 1))
    assert torch.equal(eci_subtract(maps, e, torch.ones(2, 1), alpha_max=5.0), free)


def test_context_that_is_0_subtracts_nothing():
    maps, contexts, weights, relevance = Case(seed=5).arc
    for no_context in (
        arc_subtract(maps, torch.zeros_like(contexts), weights, relevance),
        arc_subtract(maps, contexts, torch.zeros_like(weights), relevance),
        eci_subtract(torch.zeros_like(maps), contexts, weights) + maps,
        arc_subtract(maps, contexts[:0], weights[:, :0], relevance[:, :0]),
    ):
        assert torch.equal(no_context, maps)


def test_cleaned_maps_lie_between_0_and_the_map():
    case = Case((6, 5, 30), seed=6)
    for cleaned in (arc_subtract(*case.arc), eci_subtract(*case.arc[:3])):
        assert cleaned.min() >= 0
        assert (cleaned <= case.maps).all()


def test_relevance_comes_straight_from_rbo_in_float64():
    maps, contexts, weights, _ = Case((2, 3, 4), dtype=torch.float32).arc
    a = torch.tensor([[1, 2], [3, 4]])
    relevance = rank_biased_overlap(a, torch.tensor([[1, 2], [2, 1], [5, 6]]))
    cleaned = arc_subtract(maps, contexts, weights, relevance)
    assert cleaned.dtype == torch.float32
    expected = reference.arc_subtract(maps, contexts, weights, relevance)
    assert_close(cleaned, expected.float(), rtol=1e-5, atol=1e-6)


# --- joint_min_max ----------------------------------------------------------------------------


@over_shapes
@over_seeds
def test_joint_min_max_equals_twin(shape, seed):
    case = Case(shape, seed)
    expected = reference.joint_min_max(case.maps, case.scores, case.mask)
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
