import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from captum_mllm.functional import rank_biased_overlap, top_k_rankings
from tests.oracle import formulas as reference

few = settings(max_examples=40, deadline=None)


def random_rankings(n: int, k: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(n)])


def rbo(a: list[int], b: list[int], p: float) -> float:
    return rank_biased_overlap(torch.tensor([a]), torch.tensor([b]), p=p).item()


# --- top_k_rankings ---------------------------------------------------------------------------


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
def test_top_k_equals_twin_where_most_values_tie(rows, k):
    logits = torch.tensor(rows)
    assert_close(top_k_rankings(logits, k), reference.top_k_rankings(logits, k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_top_k_equals_twin_in_every_float_type(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(5, 300, generator=generator)).to(dtype)
    if dtype == torch.bfloat16:
        assert any(len(row.unique()) < 300 for row in logits)  # bf16 ties: the case that matters
    assert_close(top_k_rankings(logits, 50), reference.top_k_rankings(logits, 50))


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
    assert_close(top_k_rankings(logits.T, 3), reference.top_k_rankings(logits.T, 3))


def test_top_k_is_a_prefix_of_a_deeper_ranking():
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)).round()
    assert_close(top_k_rankings(logits, 7), top_k_rankings(logits, 60)[:, :7])


def test_top_k_row_by_row_equals_all_rows():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2)).round()
    single = torch.cat([top_k_rankings(row[None], 9) for row in logits])
    assert_close(top_k_rankings(logits, 9), single)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_top_k_outside_the_vocabulary_raises(k):
    with pytest.raises(ValueError, match=rf"top_k must lie in 1\.\.5 .*got {k}"):
        top_k_rankings(torch.zeros(1, 5), k)


# --- rank_biased_overlap ----------------------------------------------------------------------


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
    expected = reference.rank_biased_overlap(a, b, p)
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
