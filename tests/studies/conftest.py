"""Tests of the studies, and the examples in them, are slow: `make check` runs them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = (ROOT / "tests" / "studies", ROOT / "docs" / "studies")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in STUDIES):
            item.add_marker(pytest.mark.slow)
