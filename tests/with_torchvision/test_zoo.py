"""The zoo's classes whose image processor or tower needs torchvision or timm, and all others."""

import pytest

from studies.zoo import KINDS
from tests.oracle.zoo import check_kind, needs_new_transformers

pytestmark = needs_new_transformers


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_or_says_why(kind):
    check_kind(kind)
