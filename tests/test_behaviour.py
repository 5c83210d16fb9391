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
        if off > 1e-5 * max(old[axes + 1], 1e-12):
            wrong[name] = off
    assert not wrong
