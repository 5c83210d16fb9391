"""Calibration against its reference implementation."""

import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import calibrate
from tests.functional.cases import TIGHT, over_seeds, sparse
from tests.oracle import formulas


@over_seeds
@pytest.mark.parametrize("tau", [0.3, 1.0, 1.5, 8.0])
def test_calibration_equals_the_reference(seed, tau):
    maps = sparse(5, 17, seed=seed)
    assert_close(calibrate(maps, tau), formulas.calibrate(maps, tau), **TIGHT)


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
