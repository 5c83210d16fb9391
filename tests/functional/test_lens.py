"""The logit lens against its reference implementation."""

import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import lens_logits
from tests.functional.cases import TIGHT, over_seeds, randn
from tests.oracle import formulas


@over_seeds
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (2, 9, 4)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lens_equals_the_reference(seed, shape, with_bias):
    positions, classes, dim = shape
    hidden, weight = randn(positions, dim, seed=seed), randn(classes, dim, seed=seed + 100)
    bias = randn(classes, seed=seed + 200) if with_bias else None
    expected = formulas.lens_logits(hidden, weight, bias)
    assert_close(lens_logits(hidden, weight, bias), expected, **TIGHT)
    single = lens_logits(hidden.float(), weight.float(), None if bias is None else bias.float())
    assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lens_computes_half_precision_in_float32(dtype):
    hidden, weight = randn(6, 64).to(dtype), randn(4, 64, seed=1).to(dtype)
    bias = randn(4, seed=2).to(dtype)
    logits = lens_logits(hidden, weight, bias)
    assert logits.dtype == torch.float32
    expected = formulas.lens_logits(hidden, weight, bias).float()
    assert_close(logits, expected, rtol=1e-4, atol=1e-5)  # 1e-2 off if summed in bf16


def test_lens_is_signed_and_linear_in_the_hidden_state():
    hidden, weight = randn(5, 8), randn(3, 8, seed=1)
    assert lens_logits(hidden, weight).min() < 0
    both = lens_logits(2 * hidden + hidden.flip(0), weight)
    parts = 2 * lens_logits(hidden, weight) + lens_logits(hidden, weight).flip(1)
    assert_close(both, parts, **TIGHT)
