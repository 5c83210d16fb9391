"""Tests with real video processors: `make video` runs them in a process of their own.

They need torchvision, which must not be in the environment of the other tests: these prove that
the package does without it. There is no build for a CPU's torch among the packages, and the usual
one fails to import there, as its compiled operators don't load; pictures and videos need none of
them, so two are declared before the first import.
"""

import importlib.util
from pathlib import Path

_FOUND = importlib.util.find_spec("torchvision")
# Without torchvision nothing here is collected, so that `pytest tests` leaves these tests out.
collect_ignore_glob = [] if _FOUND else ["test_*.py"]

if _FOUND and ".torchvision" in Path(_FOUND.origin).parts:  # the usual build, by `make video`
    import torch

    for operator in ("nms", "qnms"):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operator}", signature)
