"""Rankings, rank-biased overlap and ARC, against reference implementations."""

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from captum_mllm.functional import arc_subtract, eci_subtract, rank_biased_overlap, top_k_rankings
from tests.functional.cases import TIGHT, Case, over_seeds, over_shapes
from tests.oracle import formulas

few = settings(max_examples=40, deadline=None)


def random_rankings(n: int, k: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(n)])


def peak_of(run):
    """What a call returns, and by how many bytes its tensors stood at once at the most."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        value = run()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return value, peak


# ---- top_k_rankings ----------------------------------------------------------------------------


@few
@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([-math.inf, -3.5, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 2.0, math.inf]),
            min_size=6,
            max_size=6,
        ),
        min_size=1,
        max_size=4,
    ),
    k=st.integers(1, 6),
)
def test_top_k_equals_the_reference_where_most_values_tie(rows, k):
    logits = torch.tensor(rows)
    assert_close(top_k_rankings(logits, k), formulas.top_k_rankings(logits, k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_top_k_equals_the_reference_in_every_float_type(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(5, 300, generator=generator)).to(dtype)
    if dtype == torch.bfloat16:
        assert any(len(row.unique()) < 300 for row in logits)  # bf16 ties: the case that matters
    assert_close(top_k_rankings(logits, 50), formulas.top_k_rankings(logits, 50))


def test_top_k_breaks_all_ties_by_the_lower_id():
    same = torch.full((2, 1000), -7.25)
    assert_close(top_k_rankings(same, 40), torch.arange(40).expand(2, 40))


def test_top_k_holds_negative_zero_equal_to_zero():
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 1.0, -1.0]])
    assert top_k_rankings(logits, 4).tolist() == [[0, 1, 2, 3], [2, 0, 1, 3]]


def test_top_k_orders_negative_values():
    logits = torch.tensor([[-1.0, -2.0, -0.5, -1e30, -1e-30]])
    assert top_k_rankings(logits, 5).tolist() == [[4, 2, 0, 1, 3]]


def test_top_k_of_a_strided_view_reads_the_right_values():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert_close(top_k_rankings(logits.T, 3), formulas.top_k_rankings(logits.T, 3))


def test_top_k_is_a_prefix_of_a_deeper_ranking():
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)).round()
    assert_close(top_k_rankings(logits, 7), top_k_rankings(logits, 60)[:, :7])


def test_top_k_row_by_row_equals_all_rows():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2)).round()
    single = torch.cat([top_k_rankings(row[None], 9) for row in logits])
    assert_close(top_k_rankings(logits, 9), single)


def test_top_k_of_many_rows_needs_little_memory_beside_the_logits():
    """They take 61 MB; all keys at once would take eight times as much."""
    logits = torch.randn(300, 51_000, generator=torch.Generator().manual_seed(3)).round()
    rankings, peak = peak_of(lambda: top_k_rankings(logits, 50))
    assert peak < 1.5 * logits.nbytes
    for row in (0, 150, 299):
        assert_close(rankings[row], top_k_rankings(logits[row : row + 1], 50)[0])
    assert top_k_rankings(logits[:0], 50).shape == (0, 50)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_top_k_outside_the_vocabulary_raises(k):
    with pytest.raises(ValueError, match=rf"top_k must lie in 1\.\.5 .*got {k}"):
        top_k_rankings(torch.zeros(1, 5), k)


# ---- rank_biased_overlap -----------------------------------------------------------------------


def rbo(a: list[int], b: list[int], p: float) -> float:
    return rank_biased_overlap(torch.tensor([a]), torch.tensor([b]), p=p).item()


@few
@given(
    k=st.integers(1, 12),
    extra=st.integers(0, 12),
    n_a=st.integers(1, 4),
    n_b=st.integers(1, 4),
    p=st.floats(0.01, 0.99),
    seed=st.integers(0, 10_000),
)
def test_rbo_equals_the_prefix_set_definition(k, extra, n_a, n_b, p, seed):
    a = random_rankings(n_a, k, k + extra, seed)
    b = random_rankings(n_b, k, k + extra, seed + 1)
    expected = formulas.rank_biased_overlap(a, b, p)
    assert_close(rank_biased_overlap(a, b, p), expected, rtol=1e-10, atol=1e-14)


# Values by hand, from 1/(sum of weights) * sum_d p^(d-1) * |common in the first d| / d.
# Agreements per depth stand on the right.
BY_HAND = [
    # k = 1: the only depth agrees or does not.
    ([4], [4], 0.3, 1.0),
    ([4], [5], 0.3, 0.0),
    # k = 2, [1 2] and [2 1]: 0, 2/2 -> p / (1 + p); p = 1/2 -> 1/3.
    ([1, 2], [2, 1], 0.5, 1 / 3),
    # k = 2, [1 2] and [1 3]: 1, 1/2 -> (1 + p/2) / (1 + p); p = 1/2 -> (5/4) / (3/2) = 5/6.
    ([1, 2], [1, 3], 0.5, 5 / 6),
    # k = 2, [1 2] and [3 1]: 0, 1/2 -> (p/2) / (1 + p); p = 1/2 -> (1/4) / (3/2) = 1/6.
    ([1, 2], [3, 1], 0.5, 1 / 6),
    # k = 3, a reversed list: 0, 1/2, 3/3 -> (p/2 + p^2) / (1 + p + p^2);
    # p = 1/2 -> (1/4 + 1/4) / (7/4) = 2/7.
    ([1, 2, 3], [3, 2, 1], 0.5, 2 / 7),
    # k = 3, a rotated list, [1 2 3] and [2 3 1]: 0, 1/2, 3/3 -> 2/7 again.
    ([1, 2, 3], [2, 3, 1], 0.5, 2 / 7),
    # k = 3, only the last ids differ: 1, 2/2, 2/3 -> (1 + p + 2p^2/3) / (1 + p + p^2);
    # p = 1/2 -> (5/3) / (7/4) = 20/21.
    ([1, 2, 3], [1, 2, 4], 0.5, 20 / 21),
    # k = 3, one common id at ranks 3 and 1: 0, 0, 1/3; p = 0.9 -> 0.27 / 2.71.
    ([1, 2, 3], [3, 4, 5], 0.9, 0.27 / 2.71),
]


@pytest.mark.parametrize(("a", "b", "p", "value"), BY_HAND)
def test_rbo_equals_values_derived_by_hand(a, b, p, value):
    assert rbo(a, b, p) == pytest.approx(value, rel=1e-12, abs=1e-15)
    assert rbo(b, a, p) == pytest.approx(value, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_rbo_of_one_common_id_at_the_top_has_a_closed_form(k, p):
    # Agreement 1/d at depth d: sum_d p^(d-1)/d over sum_d p^(d-1).
    a, b = [0, *range(1, k)], [0, *range(100, 99 + k)]
    by_hand = sum(p ** (d - 1) / d for d in range(1, k + 1)) * (1 - p) / (1 - p**k)
    assert rbo(a, b, p) == pytest.approx(by_hand, rel=1e-10)


def test_rbo_approaches_the_average_overlap_as_p_approaches_1():
    # All depths weigh the same: mean of 0, 1/2, 1. Holds only if nothing cancels near p = 1.
    assert rbo([1, 2, 3], [3, 2, 1], 1 - 1e-15) == pytest.approx(0.5, rel=1e-10)


def test_rbo_approaches_agreement_of_the_first_rank_as_p_approaches_0():
    assert rbo([1, 2, 3], [1, 3, 2], 1e-12) == pytest.approx(1.0, rel=1e-10)
    assert rbo([1, 2, 3], [2, 1, 3], 1e-12) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.98, 1 - 1e-12])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_rbo_is_1_on_identical_and_0_on_disjoint_rankings(p, k):
    a = random_rankings(1, k, 200, seed=k)
    same, apart = rank_biased_overlap(a, a, p), rank_biased_overlap(a, a + 1000, p)
    assert_close(same, torch.ones(1, 1, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(apart, torch.zeros(1, 1, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.9, 0.99])
def test_rbo_is_symmetric_and_within_0_and_1(p):
    a, b = random_rankings(30, 20, 25, seed=0), random_rankings(20, 20, 25, seed=1)
    ab = rank_biased_overlap(a, b, p)
    assert_close(ab, rank_biased_overlap(b, a, p).T, rtol=1e-12, atol=0)
    every = rank_biased_overlap(a, a, p)
    for values in (ab, every):
        assert values.min() >= 0
        assert values.max() <= 1


@pytest.mark.parametrize("p", [0.43, 0.57, 0.59, 0.67])
def test_rbo_of_identical_rankings_never_passes_1_by_rounding(p):
    assert rbo([1, 2], [1, 2], p) <= 1  # the plain sum gives 1.0000000000000002


@pytest.mark.parametrize("k", [1, 2, 5, 50, 200])
def test_rbo_of_identical_rankings_is_1_to_the_last_bit(k):
    a = random_rankings(12, k, 2 * k, seed=k)
    for p in torch.linspace(0.01, 0.99, 50).tolist():
        assert (rank_biased_overlap(a, a, p).diagonal() == 1).all()
        assert (rank_biased_overlap(a[:1], a[:1], p) == 1).all()


def test_rbo_of_many_rankings_needs_little_memory():
    """The overlaps themselves take 5 MB; a value per pair and rank would take 256 MB."""
    a = random_rankings(800, 50, 2_000, seed=0)
    b = a.flip(0)
    together, peak = peak_of(lambda: rank_biased_overlap(a, b))
    assert peak < 100e6
    for rows in (slice(0, 3), slice(411, 414), slice(797, 800)):
        single = rank_biased_overlap(a[rows], b[rows])
        assert_close(single, together[rows, rows], rtol=1e-14, atol=0)


def test_rbo_does_not_depend_on_the_names_of_the_ids():
    a, b = random_rankings(5, 10, 15, seed=0), random_rankings(6, 10, 15, seed=1)
    rename = torch.randperm(10_000, generator=torch.Generator().manual_seed(2))[:15] * 2**33
    renamed = rank_biased_overlap(rename[a], rename[b])
    assert_close(renamed, rank_biased_overlap(a, b), rtol=0, atol=0)


def test_rbo_of_all_pairs_equals_pair_by_pair():
    a, b = random_rankings(5, 10, 15, seed=3), random_rankings(4, 10, 15, seed=4)
    together = rank_biased_overlap(a, b)
    for i in range(5):
        for j in range(4):
            single = rank_biased_overlap(a[i : i + 1], b[j : j + 1])
            assert_close(single, together[i : i + 1, j : j + 1], rtol=1e-14, atol=0)


def test_rbo_falls_as_a_swap_moves_up_the_list():
    # Swapping ranks r and r+1 breaks the agreement at depth r alone, by 1/r of its weight.
    base = list(range(8))
    values = []
    for r in range(7):
        swapped = base.copy()
        swapped[r], swapped[r + 1] = swapped[r + 1], swapped[r]
        values.append(rbo(base, swapped, 0.9))
    assert values == sorted(values)
    assert values[0] < values[-1] < 1


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_rbo_p_outside_0_and_1_raises(p):
    with pytest.raises(ValueError, match="rbo_p must lie strictly between 0 and 1"):
        rbo([1, 2], [1, 2], p)


def test_rbo_repeated_id_raises_and_names_the_argument():
    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3], [4, 5, 4]])
    with pytest.raises(ValueError, match="rankings_a must hold distinct ids"):
        rank_biased_overlap(bad, good)
    with pytest.raises(ValueError, match="rankings_b must hold distinct ids"):
        rank_biased_overlap(good, bad)


def test_rbo_of_different_depths_raises():
    unchecked = inspect.unwrap(rank_biased_overlap)  # users run without the tests' type checks
    with pytest.raises(ValueError, match="must have the same depth, got 3 and 2"):
        unchecked(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2]]))


# ---- arc_subtract ------------------------------------------------------------------------------


@over_shapes
@over_seeds
@pytest.mark.parametrize(("strength", "alpha_max"), [(1.0, None), (0.5, None), (2.0, 0.7)])
def test_arc_equals_the_reference(shape, seed, strength, alpha_max):
    case = Case(shape, seed)
    expected = formulas.arc_subtract(*case.arc, strength, alpha_max)
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


def test_alpha_is_fitted_to_the_whole_interference_not_to_the_irrelevant_part():
    # One context: E = (1 - r) E0. A fit to E would subtract the same whatever r is.
    maps, context = torch.tensor([[4.0, 9.0]]), torch.tensor([[2.0, 0.0]])
    cleaned = [
        arc_subtract(maps, context, torch.ones(1, 1), torch.tensor([[r]]))[0, 0].item()
        for r in (0.0, 0.25, 0.5, 1.0)
    ]
    assert cleaned == [0.0, 1.0, 2.0, 4.0]


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
    expected = formulas.arc_subtract(maps, contexts, weights, relevance)
    assert_close(cleaned, expected.float(), rtol=1e-5, atol=1e-6)
