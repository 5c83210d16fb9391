"""How good a map is: mostly pure functions on numpy arrays or torch tensors, a value per example.

A map is ``(*examples, height, width)``, on [0, 1] where a function thresholds it; a mask has the
same shape. One map gives a ``float``, a batch gives an array of shape ``examples``. An example
whose mask is empty has no object to find: its value is NaN, and :func:`paired_bootstrap` leaves it
out. A map that points nowhere gets the lowest value, never NaN, so that no method gains by an
empty map.

:func:`insertion_deletion`, :func:`linear_datamodeling_score`, :func:`keep_and_remove`,
:func:`hallucination_scores` and :func:`sample_gates` run the model; :func:`score_words` combines an
answer's words, their categories and the masks.
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
from captum_mllm.metrics.datamodeling import (
    DatamodelingScores,
    linear_datamodeling_score,
    subset_correlation,
)
from captum_mllm.metrics.diagnostics import border_mass, centroid_distance
from captum_mllm.metrics.faithfulness import (
    Faithfulness,
    curve_at,
    curve_auc,
    insertion_deletion,
)
from captum_mllm.metrics.gates import SampleGates, gates_table, sample_gates
from captum_mllm.metrics.hallucination import (
    HallucinationScores,
    hallucination_scores,
    log_normalizer,
    map_entropy,
    mass_area,
    rank_of,
)
from captum_mllm.metrics.keep_and_remove import KeepAndRemove, keep_and_remove
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
from captum_mllm.metrics.log_odds import relative_log_odds
from captum_mllm.metrics.statistics import (
    Interval,
    WinsTiesLosses,
    paired_bootstrap,
    paired_bootstrap_f1,
    wins_ties_losses,
)

__all__ = [
    "FUNCTION_WORDS",
    "MASK_METRICS",
    "DatamodelingScores",
    "Faithfulness",
    "HallucinationScores",
    "Interval",
    "KeepAndRemove",
    "SampleGates",
    "WinsTiesLosses",
    "WordScores",
    "auc",
    "average_precision",
    "border_mass",
    "centroid_distance",
    "curve_at",
    "curve_auc",
    "energy_in_mask",
    "f1_iou",
    "func_iou",
    "gates_table",
    "hallucination_scores",
    "insertion_deletion",
    "iou",
    "is_function_word",
    "keep_and_remove",
    "linear_datamodeling_score",
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
    "relative_log_odds",
    "sample_gates",
    "score_words",
    "subset_correlation",
    "wins_ties_losses",
    "word_obj_iou",
    "word_scores_of",
]
