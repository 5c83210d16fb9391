"""How good a map is: mostly pure functions on numpy arrays or torch tensors, a value per example.

A map is ``(*examples, height, width)``, on [0, 1] where a function thresholds it; a mask has the
same shape. One map gives a ``float``, a batch gives an array of shape ``examples``. An example
whose mask is empty has no object to find: its value is NaN, and :func:`paired_bootstrap` leaves it
out. A map that points nowhere gets the lowest value, never NaN, so that no method gains by an
empty map.

:func:`insertion_deletion` and :func:`hallucination_scores` run the model; :func:`score_words`
combines an answer's words, their categories and the masks.
"""

from captum_mllm.metrics.answers import (
    FUNCTION_WORDS,
    MASK_METRICS,
    WordScores,
    f1_iou,
    func_iou,
    is_function_word,
    noun_threshold,
    score_words,
    word_obj_iou,
    word_scores_of,
)
from captum_mllm.metrics.faithfulness import (
    Faithfulness,
    curve_at,
    curve_auc,
    insertion_deletion,
)
from captum_mllm.metrics.hallucination import (
    HallucinationScores,
    hallucination_scores,
    log_normalizer,
    map_entropy,
    mass_area,
    rank_of,
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
from captum_mllm.metrics.statistics import Interval, paired_bootstrap, paired_bootstrap_f1

__all__ = [
    "FUNCTION_WORDS",
    "MASK_METRICS",
    "Faithfulness",
    "HallucinationScores",
    "Interval",
    "WordScores",
    "auc",
    "average_precision",
    "curve_at",
    "curve_auc",
    "energy_in_mask",
    "f1_iou",
    "func_iou",
    "hallucination_scores",
    "insertion_deletion",
    "iou",
    "is_function_word",
    "log_normalizer",
    "map_entropy",
    "mass_area",
    "noun_threshold",
    "obj_iou",
    "oracle_iou",
    "otsu_threshold",
    "paired_bootstrap",
    "paired_bootstrap_f1",
    "pointing_game",
    "precision_recall",
    "rank_of",
    "score_words",
    "word_obj_iou",
    "word_scores_of",
]
