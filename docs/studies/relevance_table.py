"""The tables of the study of relevance: every measure beside rank-biased overlap."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captum_mllm.metrics import paired_bootstrap
from studies.relevance_measures import MEASURES

SEED, BASE = 0, "rbo"
ALPHAS = {"": None, " bounded": 1.0}  # ending of a figure's name -> alpha_max
GROUPS = {"nouns": "noun", "words": None}  # group of targets -> their role, None: all
IMAGE = {"ap": "AP", "own": "energy on own object", "others": "on other objects"}
TEXT = {
    "share_named": "share, of object words",
    "share_all": "share, of all words",
    "auc_r": "AUC of r",
    "auc_kept": "AUC of s r",
}
NOTE = (
    "Image side: average precision of the pixels on the target's object, share of the cleaned "
    "map's energy on it and on the other objects, share of the raw map removed. In *twins* the "
    "other of its kind is another object. Text side (all target words whose context has words "
    "about their object and about others): share of the text attribution s r on words about the "
    "target's object, among words about objects and among all; area under the ROC curve of r, and "
    "of s r, for words about the right object against words about others; keeps: targets of which "
    "r leaves anything (a share of nothing counts as 0). *none* keeps no text at all; *keep* is "
    "the raw text score."
)


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """Values of a record, null as NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def mean_of(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN where all is."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def differences(columns: Mapping[str, Any], figures: Mapping[str, str], single: str) -> str:
    """Markdown: a row per measure; means, and how far they lie from rank-biased overlap's.

    Args:
        columns: measure -> figure -> one value per example.
        figures: figure -> title.
        single: a last figure, of which the mean is given alone, as ``"figure: title"``.
    """
    last, title = single.split(": ")
    heads = ["relevance", *(h for name in figures.values() for h in (name, "- RBO [95 %]")), title]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name in MEASURES:
        cells = [name]
        for figure in figures:
            own, base = numbers(columns[name][figure]), numbers(columns[BASE][figure])
            change = paired_bootstrap(own, base, seed=SEED)
            cells.append(f"{mean_of(own):.3f}")
            shown = f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
            cells.append("-" if name == BASE else shown)
        lines.append(f"| {' | '.join(cells)} | {mean_of(numbers(columns[name][last])):.3f} |")
    return "\n".join(lines)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of all models and sets.

    Args:
        found: model -> set -> columns of :func:`studies.relevance.measure`.
    """
    blocks = []
    for name, sets in found.items():
        for set_name, columns in sets.items():
            for group in GROUPS:
                for suffix, bound in ALPHAS.items():
                    alpha = "alpha unbounded" if bound is None else f"alpha <= {bound:g}"
                    image = {key + suffix: title for key, title in IMAGE.items()}
                    words = f"{sum(columns[group]['words'])} {group}"
                    blocks.append(f"**{name}, {set_name}: image side, {words}, {alpha}**")
                    removed = f"removed{suffix}: removed"
                    blocks.append(differences(columns[group], image, removed))
            blocks.append(f"**{name}, {set_name}: text side**")
            blocks.append(differences(columns["words"], TEXT, "keeps: keeps"))
    return "\n\n".join(blocks)
