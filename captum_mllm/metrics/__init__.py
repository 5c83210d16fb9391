"""How good a map is: pure functions on numpy arrays or torch tensors, one value per example.

A map is ``(*examples, height, width)``, on [0, 1] where a function thresholds it; a mask has the
same shape. One map gives a ``float``, a batch gives an array of shape ``examples``. An example
whose mask is empty has nothing to find: its value is NaN, and :func:`paired_bootstrap` leaves it
out. A map that points at nothing gets the lowest value, never NaN, so that no method can gain by
staying silent.
"""

from captum_mllm.metrics.function_words import (
    FUNCTION_WORDS,
    f1_iou,
    func_iou,
    is_function_word,
    noun_threshold,
)
from captum_mllm.metrics.localization import (
    auc,
    average_precision,
    energy_in_mask,
    iou,
    obj_iou,
    oracle_iou,
    otsu_threshold,
    pointing_game,
    precision_recall,
)
from captum_mllm.metrics.statistics import Interval, paired_bootstrap

__all__ = [
    "FUNCTION_WORDS",
    "Interval",
    "auc",
    "average_precision",
    "energy_in_mask",
    "f1_iou",
    "func_iou",
    "iou",
    "is_function_word",
    "noun_threshold",
    "obj_iou",
    "oracle_iou",
    "otsu_threshold",
    "paired_bootstrap",
    "pointing_game",
    "precision_recall",
]
