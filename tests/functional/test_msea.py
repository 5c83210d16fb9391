"""Aggregation over scales, rank correlation and weights, against reference implementations."""

import inspect

import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import adaptive_weights, aggregate, rank_correlation
from tests.functional.cases import TIGHT, over_seeds, rand, randn, sparse
from tests.oracle import formulas

unchecked = inspect.unwrap  # users run without the tests' type checks


# ---- aggregate ---------------------------------------------------------------------------------


@over_seeds
@pytest.mark.parametrize("n_scales", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("how", "weighted"),
    [
        ("mean", False),
        ("mean", True),
        ("median", False),
    ],
)
def test_aggregate_equals_the_reference(seed, n_scales, how, weighted):
    stack = randn(n_scales, 2, 3, 4, seed=seed).clamp(min=0)
    weights = rand(n_scales, seed=seed + 50) + 0.1 if weighted else None
    expected = formulas.aggregate(stack, how, weights)
    assert_close(aggregate(stack, how, weights), expected, **TIGHT)
    single = aggregate(stack.float(), how, None if weights is None else weights.float())
    assert_close(single, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "median"])
def test_aggregate_of_a_single_scale_is_that_scale_bit_for_bit(how):
    stack = rand(1, 5, 5, dtype=torch.float32)
    assert torch.equal(aggregate(stack, how), stack[0])


@pytest.mark.parametrize("how", ["mean", "median"])
def test_aggregate_does_not_see_the_order_of_scales_and_keeps_agreement(how):
    stack = rand(5, 3, 3)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(aggregate(stack[order], how), aggregate(stack, how), **TIGHT)
    same = stack[:1].expand(4, 3, 3)
    assert_close(aggregate(same, how), stack[0], **TIGHT)
    assert_close(aggregate(7 * stack, how), 7 * aggregate(stack, how), **TIGHT)


def test_aggregate_values_by_hand():
    stack = torch.tensor([[1.0], [2.0], [6.0], [108.0]], dtype=torch.float64)
    assert aggregate(stack, "mean").item() == 29.25
    assert aggregate(stack, "median").item() == 4.0
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    assert aggregate(stack, "mean", weights).item() == 5.0


def test_aggregate_sees_only_the_ratios_of_weights():
    stack, weights = rand(3, 4), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert_close(aggregate(stack, "mean", 9 * weights), aggregate(stack, "mean", weights), **TIGHT)
    ones = torch.ones(3, dtype=torch.float64)
    assert_close(aggregate(stack, "mean", ones), aggregate(stack, "mean"), **TIGHT)


def test_aggregate_weight_0_drops_a_scale_even_where_it_is_0():
    stack = torch.tensor([[0.0, 5.0], [2.0, 3.0]])
    dropped = aggregate(stack, "mean", torch.tensor([0.0, 1.0]))
    assert_close(dropped, torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("how", ["mean", "median"])
def test_aggregate_of_half_precision_does_not_overflow(how, n):
    stack = torch.full((n, 2, 5), 60_000.0, dtype=torch.float16)
    assert torch.equal(aggregate(stack, how), stack[0])
    weights = torch.full((n,), 60_000.0, dtype=torch.float16)
    assert torch.equal(aggregate(stack, "mean", weights), stack[0])


@pytest.mark.parametrize("how", ["mean", "median"])
def test_aggregate_of_the_smallest_half_is_not_0(how):
    stack = torch.full((4, 2, 5), 2.0**-24, dtype=torch.float16)
    assert torch.equal(aggregate(stack, how), stack[0])


def test_aggregate_keeps_the_type_of_the_maps():
    stack = rand(3, 4, dtype=torch.float32)
    weights = torch.ones(3, dtype=torch.float64)
    assert aggregate(stack, "mean", weights).dtype == torch.float32


@pytest.mark.parametrize(
    ("how", "weights", "message"),
    [
        ("max", None, "aggregation must be one of mean, median, got 'max'"),
        ("median", [1.0, 1.0], "takes no weights"),
        ("mean", [1.0], r"one value per scale \(2\), or .* got \(1,\)"),
        ("mean", [1.0, -1.0], ">= 0 and not all 0"),
        ("mean", [0.0, 0.0], ">= 0 and not all 0"),
    ],
)
def test_aggregate_errors_say_what_is_wrong(how, weights, message):
    stack = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(ValueError, match=message):
        unchecked(aggregate)(stack, how, None if weights is None else torch.tensor(weights))


@over_seeds
def test_weights_per_map_equal_one_map_at_a_time(seed):
    stack, weights = sparse(3, 4, 5, 6, seed=seed), sparse(3, 4, seed=seed + 1) + 0.1
    each = [formulas.aggregate(stack[:, i], "mean", weights[:, i]) for i in range(4)]
    assert_close(aggregate(stack, "mean", weights), torch.stack(each), **TIGHT)


def test_weights_of_a_map_must_not_all_be_zero():
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="not all 0"):
        aggregate(sparse(2, 2, 3, 3), "mean", weights)
    with pytest.raises(ValueError, match=r"per scale \(2\), or per scale and map \(2, 2\)"):
        aggregate(sparse(2, 2, 3, 3), "mean", weights[:, :1])


# ---- agreement of scales -------------------------------------------------------------------------


@over_seeds
def test_rank_correlation_equals_the_reference(seed):
    a, b = sparse(6, 19, seed=seed), sparse(6, 19, seed=seed + 9)
    a[0], b[1] = 0.5, b[1] + a[1]
    assert_close(rank_correlation(a, b), formulas.rank_correlation(a, b), **TIGHT)


@over_seeds
def test_rank_correlation_sees_order_alone(seed):
    a, b = sparse(3, 30, seed=seed), sparse(3, 30, seed=seed + 5)
    assert_close(rank_correlation(a.exp(), b), rank_correlation(a, 7 * b**3))
    assert_close(rank_correlation(a, a), torch.ones(3, dtype=torch.float64))
    moved = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    assert_close(rank_correlation(a[:, moved], b[:, moved]), rank_correlation(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_correlation_takes_rounding_residue_for_a_tie(dtype):
    """Interpolating a plateau gives it back with the last bits changed; that is no order."""
    a, b = rand(2, 400, seed=3, dtype=dtype), rand(2, 400, seed=4, dtype=dtype)
    a, b = torch.where(a < 0.6, 0.37, a), torch.where(b < 0.5, 0.0, b)
    noise = 4 * torch.finfo(dtype).eps * rand(2, 400, seed=5, dtype=dtype)
    exact = formulas.rank_correlation(a.double(), b.double())
    assert_close(rank_correlation(a + noise, b + noise.flip(1)), exact, rtol=0, atol=1e-4)
    level = 1e-30
    assert_close(rank_correlation(level * (a + noise), b), exact, rtol=0, atol=1e-4)


def test_adaptive_weights():
    rho = torch.tensor([[1.0, 1.0], [0.5, -0.9], [0.0, 0.2]], dtype=torch.float64)
    c = torch.tensor([1.0, 0.5, 0.0])
    expected = [[max(0.01, r) ** 2 for r in row] for row in rho.tolist()]
    assert_close(adaptive_weights(rho), torch.tensor(expected, dtype=torch.float64))
    scaled = torch.tensor(expected, dtype=torch.float64) * c.double()[:, None]
    assert_close(adaptive_weights(rho, c), scaled)
