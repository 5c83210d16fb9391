"""What the goal of `studies.quality` asks for, beside what the masks themselves score."""

import numpy as np

from captum_mllm.functional import upsample
from captum_mllm.metrics import obj_iou
from captum_mllm.reference.render import render_pil
from studies.evidence import SIDE, examples
from studies.sets import upper_bound

CELLS = (14, 28)  # rows and columns of the three families' grids at scales 1 and 2


def mask_scores(set_name: str, scenes: int) -> dict[str, float]:
    """Mean Obj-IoU of the masks themselves, brought to the grid of image tokens and back.

    Args:
        set_name: of the test sets.
        scenes: how many, from the first of the test split.

    Returns:
        Per number of cells along a side (as text) the mean over objects.
    """
    found: dict[str, list[float]] = {str(cells): [] for cells in CELLS}
    for example in examples(set_name, "test", range(scenes)):
        _, masks = render_pil(example.scene, SIDE)
        seen = masks[masks.flatten(1).any(1)]
        for cells in CELLS:
            maps = upsample(upper_bound(seen, (cells, cells)), (SIDE, SIDE))
            found[str(cells)] += np.atleast_1d(obj_iou(maps, seen)).tolist()
    return {cells: sum(own) / len(own) for cells, own in found.items()}


def needed_obj_iou(f1: float, func: float) -> float:
    """The Obj-IoU with which an F1-IoU is reached at some Func-IoU: the harmonic mean, solved.

    Args:
        f1: the F1-IoU that is wanted, in (0, 1].
        func: Func-IoU, in (0, 1].

    Returns:
        Obj-IoU; above 1 where no map could do it.

    Raises:
        ValueError: ``f1`` at or above twice ``func``, which no Obj-IoU reaches.

    Example:
        >>> round(needed_obj_iou(0.8, 1.0), 3)
        0.667
    """
    if f1 >= 2 * func:
        raise ValueError(f"f1 must be below 2 * func = {2 * func}, got {f1}.")
    return f1 * func / (2 * func - f1)
