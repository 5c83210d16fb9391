"""A disk that is full, by a limit of the operating system."""

import contextlib

import pytest


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond ``size`` bytes: writing fails as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
