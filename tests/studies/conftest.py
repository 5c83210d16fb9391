"""Tests of the studies, and the examples in them, are slow: `make check` runs them.

Files in FAST mark their slow tests themselves, and their other tests run in `make test`.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAST = {"test_zoo.py", "test_zoo_faults.py"}
STUDIES = (ROOT / "tests" / "studies", ROOT / "docs" / "studies")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        in_studies = any(item.path.is_relative_to(folder) for folder in STUDIES)
        if in_studies and item.path.name not in FAST:
            item.add_marker(pytest.mark.slow)
