"""Direct logit attribution's formulas against loops over plain floats."""

import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import (
    added_to_scores,
    attention_rows,
    head_contributions,
    head_outputs,
    product_of_experts,
    visible_keys,
)
from tests.functional.cases import over_seeds, rand, randn
from tests.oracle import formulas

SINGLE = {"rtol": 1e-5, "atol": 1e-6}


def f32(*shape, seed=0):
    return randn(*shape, seed=seed).float()


@over_seeds
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_weights_equal_a_loop(seed, groups, softcap, sinks, biased):
    heads, rows, keys, dim = 4, 3, 5, 2
    query, key = f32(heads, rows, dim, seed=seed), f32(groups, keys, dim, seed=seed + 10)
    visible = rand(1, rows, keys, seed=seed) < 0.6
    visible[..., 0] = True
    bias = f32(heads, rows, keys, seed=seed + 20) if biased else None
    sink = f32(heads, seed=seed + 30) if sinks else None
    got = attention_rows(query, key, 0.6, visible, bias, softcap=softcap, sinks=sink)
    for h in range(heads):
        for r in range(rows):
            expected = formulas.attention_row(
                query[h, r].tolist(),
                key[h * groups // heads].tolist(),
                0.6,
                visible[0, r].tolist(),
                [0.0] * keys if bias is None else bias[h, r].tolist(),
                softcap,
                None if sink is None else float(sink[h]),
            )
            assert_close(got[h, r], torch.tensor(expected), **SINGLE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_keys_that_a_kernel_shows_by_itself(causal, window):
    rows = torch.tensor([0, 2, 5])
    visible, bias = visible_keys(rows, 6, causal=causal, window=window)
    expected = [
        [(not causal or k <= q) and (window is None or q - k < window) for k in range(6)]
        for q in rows.tolist()
    ]
    assert bias is None
    assert visible.tolist() == [expected]


def test_masks_of_both_kinds():
    shown = rand(1, 2, 6, 8) < 0.5
    rows = torch.tensor([4, 1])
    visible, bias = visible_keys(rows, 7, shown)
    assert bias is None
    assert torch.equal(visible, shown[0][:, [4, 1], :7])
    additive = torch.where(shown, f32(1, 2, 6, 8), torch.finfo(torch.float32).min)
    visible, bias = visible_keys(rows, 7, additive)
    assert torch.equal(visible, shown[0][:, [4, 1], :7])
    assert torch.equal(bias, additive[0][:, [4, 1], :7])


@over_seeds
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("heads_of_bias", [0, 1, 4])
def test_one_term_for_what_is_seen_and_added(seed, groups, softcap, heads_of_bias):
    query, key = f32(4, 3, 2, seed=seed), f32(groups, 5, 2, seed=seed + 10)
    visible = rand(1, 3, 5, seed=seed) < 0.6
    visible[..., 0] = True
    bias = f32(heads_of_bias, 3, 5, seed=seed + 20) if heads_of_bias else None
    term = added_to_scores(visible, bias)
    got = attention_rows(query, key, 0.6, bias=term, softcap=softcap)
    assert_close(got, attention_rows(query, key, 0.6, visible, bias, softcap=softcap), **SINGLE)
    assert not got[~visible.expand_as(got)].any()


def test_all_keys_are_seen_where_nothing_is_said():
    got = attention_rows(f32(4, 3, 2), f32(2, 5, 2, seed=1), 0.6)
    everything = torch.ones(1, 3, 5, dtype=torch.bool)
    assert_close(got, attention_rows(f32(4, 3, 2), f32(2, 5, 2, seed=1), 0.6, everything))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_in_half_precision(dtype):
    """The contributions are those of the rounded values, but for the rounding of ``u . v``."""
    weights = f32(4, 3, 50).softmax(-1)
    value, led = f32(2, 50, 16, seed=1).to(dtype), f32(4, 3, 16, seed=2).to(dtype)
    got = head_contributions(weights, value, led)
    assert got.dtype == torch.float32
    exact = head_contributions(weights, value.float(), led.float())
    assert_close(got, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3 * float(exact.abs().max()))


@over_seeds
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_contributions_equal_a_loop_and_add_up(seed, groups):
    heads, rows, keys, dim = 4, 3, 5, 2
    weights = f32(heads, rows, keys, seed=seed).softmax(-1)
    value, led = f32(groups, keys, dim, seed=seed + 1), f32(heads, rows, dim, seed=seed + 2)
    got, output = head_contributions(weights, value, led), head_outputs(weights, value)
    for h in range(heads):
        values = value[h * groups // heads].tolist()
        for r in range(rows):
            row = weights[h, r].tolist()
            expected = [
                a * formulas.dot(v, led[h, r].tolist()) for a, v in zip(row, values, strict=True)
            ]
            assert_close(got[h, r], torch.tensor(expected), **SINGLE)
            mixed = [formulas.dot(row, [v[d] for v in values]) for d in range(dim)]
            assert_close(output[h, r], torch.tensor(mixed), **SINGLE)
    # The sum over heads and positions is the projection's output in the direction.
    assert_close(got.sum((0, 2)), (output * led).sum((0, 2)), rtol=1e-5, atol=1e-5)


@over_seeds
@pytest.mark.parametrize(("beta", "floor"), [(0.3, 0.01), (1.0, 0.2), (2.0, 0.001)])
def test_product_equals_a_loop(seed, beta, floor):
    lens, direct = rand(3, 9, seed=seed), rand(3, 9, seed=seed + 1).square()
    got = product_of_experts(lens, direct, beta, floor)
    if beta == 0.3:
        assert torch.equal(got, product_of_experts(lens, direct, beta))  # the default floor
    for row in range(3):
        both = lens[row].tolist(), direct[row].tolist()
        expected = formulas.product_of_experts(*both, beta, floor)
        assert_close(got[row], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_product_is_invariant():
    lens, direct = rand(3, 9), rand(3, 9, seed=1)
    both = product_of_experts(lens, direct)
    order = torch.randperm(9)
    assert_close(product_of_experts(lens[:, order], direct[:, order]), both[:, order])
    assert_close(product_of_experts(lens, 7 * direct), both)  # the unit of direct does not matter
    assert_close(product_of_experts(3 * lens, direct), 3 * both)  # that of the lens is kept
    assert_close(both.amax(1), lens.amax(1))
    assert float(both.min()) == 0


def test_product_of_constant_maps():
    lens, flat = rand(2, 6), torch.full((2, 6), 0.5, dtype=torch.float64)
    zero = torch.zeros_like(flat)
    shown = (lens - lens.amin(1, keepdim=True)) / (lens.amax(1) - lens.amin(1))[:, None]
    for constant in (flat, zero):
        assert_close(product_of_experts(lens, constant), shown * lens.amax(1, keepdim=True))
        assert_close(product_of_experts(flat, constant), flat)
    assert not product_of_experts(zero, lens).any()


@pytest.mark.parametrize("level", [1e-36, 1e-23, 1e19, 1e36])
def test_a_product_of_experts_only_scales_with_the_level_of_the_lens(level):
    lens, direct = (rand(3, 40, seed=seed, dtype=torch.float32) for seed in (1, 2))
    found = product_of_experts(level * lens, level * direct)
    expected = product_of_experts(lens, direct)
    assert_close(found.double() / level, expected.double(), rtol=1e-4, atol=1e-5)
