"""torchvision made importable where its build does not fit torch's."""

import importlib.util

import torch


def torchvision_ready() -> bool:
    """Make torchvision importable if it is there; False if it is not.

    The usual build beside a CPU build of torch fails to import, as its compiled operators do not
    load. Pictures need none of them, so the two that it asks for are declared.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", signature)
        importlib.import_module("torchvision")
    return True
