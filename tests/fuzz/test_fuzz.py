"""No damaged file and no contradicting input ends in a raw error or a silently wrong value."""

import pytest

from tests.fuzz.areas import AREAS
from tests.fuzz.harness import BAD, Case, fuzz, is_clear, judge


@pytest.mark.parametrize("name", AREAS)
def test_few_cases(name):
    tally = fuzz(AREAS[name].draw_case, AREAS[name].few)
    assert not any(tally.counts[bad] for bad in BAD)


@pytest.mark.slow
@pytest.mark.parametrize("name", AREAS)
def test_many_cases(name):
    tally = fuzz(AREAS[name].draw_case, AREAS[name].many)
    print(dict(tally.counts))
    assert not any(tally.counts[bad] for bad in BAD)
