"""No damaged file and no contradicting input ends in a raw error or a silently wrong value."""

import time
import warnings
from collections import Counter

import numpy as np
import pytest

from captum_mllm.validation import ArgumentError, check_choice
from tests.fuzz.areas import AREAS, table
from tests.fuzz.harness import BAD, Case, Tally, fuzz, is_clear, judge


@pytest.mark.parametrize("name", AREAS)
def test_few_cases(name):
    tally = fuzz(AREAS[name].draw_case, AREAS[name].few)
    assert not any(tally.counts[bad] for bad in BAD)


@pytest.mark.slow
@pytest.mark.parametrize("name", AREAS)
def test_many_cases(name):
    tally = fuzz(AREAS[name].draw_case, AREAS[name].many)
    assert not any(tally.counts[bad] for bad in BAD)


# ---- the judge can find each of its outcomes ----------------------------------------------------


def outcome(run, is_right=bool, **bounds):
    return judge(Case("what", run, is_right, ["kind"]), **bounds)[0]


def warn(text):
    warnings.warn(text, stacklevel=1)
    return False


def test_the_outcomes():
    assert outcome(lambda: True) == "right value"
    assert outcome(lambda: False) == "wrong value"
    assert outcome(lambda: warn("kind is odd")) == "told"
    assert outcome(lambda: warn("something is odd")) == "wrong value"
    assert outcome(lambda: check_choice("kind", 1, ("a", "b"))) == "clear error"
    assert outcome(lambda: check_choice("other", 1, ("a", "b"))) == "raw error"
    assert outcome(lambda: {}["kind"]) == "raw error"
    assert outcome(lambda: time.sleep(5), seconds=0.1) == "too slow"
    assert outcome(lambda: np.ones(400 << 20, np.uint8).any(), mib=20) == "too large"


def test_an_error_is_clear_where_the_package_raises_it_and_names_what_is_wrong():
    def caught(run):
        with pytest.raises(Exception) as found:  # noqa: PT011
            run()
        return found.value

    assert is_clear(caught(lambda: check_choice("kind", 1, ("a",))), ["kind"])
    assert not is_clear(caught(lambda: check_choice("kind", 1, ("a",))), ["size"])
    assert not is_clear(caught(lambda: int("kind")), ["kind"])  # not raised by the package
    assert not is_clear(ArgumentError("kind", "is odd."), ["kind"])  # raised nowhere


def test_failures_are_counted_or_raised():
    def case(data):
        return Case("always wrong", lambda: 1, lambda _: False, [])

    tally = fuzz(case, 5, strict=False)
    assert set(tally.counts) == {"wrong value"}
    assert tally.failures == {"wrong value: always wrong": "always wrong"}
    with pytest.raises(AssertionError, match="wrong value: always wrong"):
        fuzz(case, 5)
    assert "| x | 1 | 1 | 0 |" in table({"x": Tally(Counter(["right value"]))})
