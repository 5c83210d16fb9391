"""Calibration against its reference implementation."""

import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import calibrate
from tests.functional.cases import TIGHT, over_seeds, rand, sparse
from tests.oracle import formulas


@over_seeds
@pytest.mark.parametrize("tau", [0.02, 0.3, 1.0, 1.5, 8.0, "adaptive"])
def test_calibration_equals_the_reference(seed, tau):
    maps = sparse(5, 17, seed=seed)
    assert_close(calibrate(maps, tau), formulas.calibrate(maps, tau), **TIGHT)


@over_seeds
@pytest.mark.parametrize("tau", [1.5, "adaptive"])
def test_calibration_keeps_order_peak_and_proportion(seed, tau):
    maps = sparse(4, 23, seed=seed) + 0.01
    found = calibrate(maps, tau)
    for own, made in zip(maps, found, strict=True):
        assert own.argsort(stable=True).tolist() == made.argsort(stable=True).tolist()
    assert_close(found.amax(1), maps.amax(1))
    assert_close(calibrate(3 * maps, tau), 3 * found)
    assert bool((found >= 0).all())


@over_seeds
def test_the_adaptive_fall_is_that_of_the_mean(seed):
    """The map's mean would fall to exp(-1 / .4) = 8.2 % of the peak, whatever the map's shape."""
    maps = torch.cat([sparse(4, 23, seed=seed), sparse(4, 23, seed=seed).square()])
    middle = maps.mean(1, keepdim=True)
    peak = maps.amax(1, keepdim=True)
    again = calibrate(maps, "adaptive")
    rate = (again / peak).log() / (maps - peak)
    at_mean = peak * (rate.nanmean(1, keepdim=True) * (middle - peak)).exp()
    assert_close(at_mean / peak, torch.full_like(peak, 0.0821), rtol=1e-3, atol=0)


@pytest.mark.parametrize("tau", [1.5, "adaptive"])
def test_calibration_of_flat_maps_and_of_nothing(tau):
    flat = torch.tensor([[0.0, 0.0, 0.0], [0.4, 0.4, 0.4]])
    assert torch.equal(calibrate(flat, tau), flat)
    assert bool(torch.isfinite(calibrate(torch.tensor([[0.0, 0.0, 1e-30]]), tau)).all())


def nine_bright(bright):
    maps = 0.1 * rand(1, 100_352, dtype=torch.float32)
    maps[0, :9] += bright
    return maps


def one_spike():
    maps = rand(1, 40_000, dtype=torch.float32)
    maps[0, 7] = 300.0
    return maps


@pytest.mark.parametrize("tau", [0.3, 1.5, "adaptive"])
@pytest.mark.parametrize("maps", [nine_bright(1), nine_bright(10), one_spike()], ids=range(3))
def test_calibration_of_large_float32_maps_loses_no_order_that_float32_holds(maps, tau):
    exact, found = calibrate(maps.double(), tau), calibrate(maps, tau)
    assert exact.unique().numel() == maps.unique().numel()
    assert float(found.min()) > 0
    assert torch.equal(found, exact.float())
    order = maps[0].argsort(stable=True)
    assert bool((found[0, order].diff() >= 0).all())
    assert found.unique().numel() > 0.75 * maps.unique().numel()


@pytest.mark.parametrize("tau", [1.5, "adaptive"])
@pytest.mark.parametrize("level", [1e-34, 1e-23, 1e19, 1e38])
def test_calibration_does_not_see_the_level(level, tau):
    maps = sparse(4, 23, seed=3).float() / 10
    found = calibrate(level * maps, tau).double() / level
    assert_close(found, calibrate(maps, tau).double(), rtol=1e-3, atol=1e-3)
    deep = calibrate(1e-200 * maps.double(), tau) * 1e200
    assert_close(deep, calibrate(maps.double(), tau), **TIGHT)


@pytest.mark.parametrize("tau", [0.1, 1.5, "adaptive"])
@pytest.mark.parametrize(
    ("level", "dtype"),
    [(1e-30, torch.float32), (1e-18, torch.float32), (1.0, torch.float16), (1.0, torch.bfloat16)],
)
def test_calibration_of_a_spike_keeps_the_rest_in_its_dtype(level, dtype, tau):
    maps = torch.linspace(0, 0.9, 200)[None]
    maps[0, 7] = 90.0  # without bound the others would fall below what the dtype can hold
    maps = (level * maps).to(dtype)
    found = calibrate(maps, tau)
    assert float(found.min()) > 0
    assert float(found.max()) == float(maps.max())
    order = maps[0].argsort(stable=True)
    assert bool((found[0, order].diff() >= 0).all())
    if dtype == torch.float32:
        assert found.unique().numel() == maps.unique().numel()


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_a_wrong_tau_is_an_error(tau):
    with pytest.raises(ValueError, match="tau must be above 0, or 'adaptive', got"):
        calibrate(torch.rand(2, 3), tau)
