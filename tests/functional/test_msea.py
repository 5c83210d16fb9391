"""Calibration, and what is done with maps of several scales, against slow twins."""

import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import (
    adaptive_weights,
    aggregate,
    calibrate,
    rank_correlation,
)
from tests.oracle import formulas as reference

TIGHT = {"rtol": 1e-9, "atol": 1e-12}
over_seeds = pytest.mark.parametrize("seed", range(4))


def sparse(*shape, seed=0):
    """Maps as relu leaves them: many equal zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).clamp(min=0)


# ---- calibration ------------------------------------------------------------------------------


@over_seeds
@pytest.mark.parametrize("tau", [0.3, 1.0, 1.5, 8.0])
def test_calibration_equals_twin(seed, tau):
    maps = sparse(5, 17, seed=seed)
    assert_close(calibrate(maps, tau), reference.calibrate(maps, tau), **TIGHT)


@over_seeds
def test_calibration_keeps_order_peak_and_proportion(seed):
    maps = sparse(4, 23, seed=seed) + 0.01
    found = calibrate(maps)
    for own, made in zip(maps, found, strict=True):
        assert own.argsort(stable=True).tolist() == made.argsort(stable=True).tolist()
    assert_close(found.amax(1), maps.amax(1))
    assert_close(calibrate(3 * maps), 3 * found)
    assert bool((found >= 0).all())


def test_calibration_of_flat_maps_and_of_nothing():
    flat = torch.tensor([[0.0, 0.0, 0.0], [0.4, 0.4, 0.4]])
    assert torch.equal(calibrate(flat), flat)
    assert bool(torch.isfinite(calibrate(torch.tensor([[0.0, 0.0, 1e-30]]))).all())


# ---- agreement, weights ---------------------------------------------------------------


@over_seeds
def test_rank_correlation_equals_twin(seed):
    a, b = sparse(6, 19, seed=seed), sparse(6, 19, seed=seed + 9)
    a[0], b[1] = 0.5, b[1] + a[1]
    assert_close(rank_correlation(a, b), reference.rank_correlation(a, b), **TIGHT)


@over_seeds
def test_rank_correlation_sees_order_alone(seed):
    a, b = sparse(3, 30, seed=seed), sparse(3, 30, seed=seed + 5)
    assert_close(rank_correlation(a.exp(), b), rank_correlation(a, 7 * b**3))
    assert_close(rank_correlation(a, a), torch.ones(3, dtype=torch.float64))
    moved = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    assert_close(rank_correlation(a[:, moved], b[:, moved]), rank_correlation(a, b))


def test_adaptive_weights():
    rho = torch.tensor([[1.0, 1.0], [0.5, -0.9], [0.0, 0.2]], dtype=torch.float64)
    c = torch.tensor([1.0, 0.5, 0.0])
    expected = [[max(0.01, r) ** 2 for r in row] for row in rho.tolist()]
    assert_close(adaptive_weights(rho), torch.tensor(expected, dtype=torch.float64))
    scaled = torch.tensor(expected, dtype=torch.float64) * c.double()[:, None]
    assert_close(adaptive_weights(rho, c), scaled)


@over_seeds
@pytest.mark.parametrize("how", ["mean"])
def test_weights_per_map_equal_one_map_at_a_time(seed, how):
    stack, weights = sparse(3, 4, 5, 6, seed=seed), sparse(3, 4, seed=seed + 1) + 0.1
    each = [reference.aggregate(stack[:, i], how, weights[:, i]) for i in range(4)]
    assert_close(aggregate(stack, how, weights), torch.stack(each), **TIGHT)


def test_weights_of_a_map_must_not_all_be_zero():
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="not all 0"):
        aggregate(sparse(2, 2, 3, 3), "mean", weights)
    with pytest.raises(ValueError, match=r"per scale \(2\), or per scale and map \(2, 2\)"):
        aggregate(sparse(2, 2, 3, 3), "mean", weights[:, :1])
