"""Every method computes what was recorded before the package was rearranged into rooms."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.oracle.behaviour import SUBJECTS, record

RECORD = Path(__file__).parent / "behaviour.npz"


@cache
def recorded():
    with np.load(RECORD) as file:
        return dict(file)


def test_the_record_is_of_all_subjects():
    assert {name.split("/")[0] for name in recorded()} == set(SUBJECTS)
    assert len(recorded()) == 1522


# Differences of log-probabilities near 0, and ranks of nearly equal cells: on another processor
# (both with AVX-512) the same commit differs by up to .0074, .0060, .0002, .0001 and .00005.
ROUNDED = {
    "explain_ablation": 2e-2,
    "integrated_gradients": 2e-2,
    "/ig": 2e-3,
    "saliency": 2e-2,
    "gradcam": 1e-3,
    "hall_log_prob": 1e-3,
    "/ap": 2e-4,
}


def tolerance(name):
    return max((value for part, value in ROUNDED.items() if part in name), default=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_values_are_those_of_the_record(subject):
    """To 1e-5 of each array's largest value: processors and versions of torch round differently."""
    before = {k: v for k, v in recorded().items() if k.startswith(f"{subject}/")}
    now = record(subject)
    assert now.keys() == before.keys()
    wrong = {}
    for name, old in before.items():
        new, axes = now[name], int(old[0])
        if new.shape != old.shape or not np.array_equal(new[: axes + 1], old[: axes + 1]):
            wrong[name] = "another shape"
            continue
        off = np.nanmax(np.abs(new[axes + 1 :] - old[axes + 1 :]), initial=0.0)
        if off > tolerance(name) * max(old[axes + 1], 1e-12):
            wrong[name] = off
    assert not wrong
