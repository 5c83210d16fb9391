"""The tables of the study of hallucinations: every score beside the token's own probability."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from captum_mllm.metrics import Interval
from studies.detection import auroc, best_threshold, drawn_weights, f1_at, interval

SEED, BASE = 0, "own probability"
NOTE = (
    "AUROC: the chance that a hallucinated noun scores above a real one, every score turned "
    "beforehand so that high should mean hallucinated (low own probability, decodability, reliance "
    "and peak; high rank, entropy and area); below .5 it points the wrong way. Turned on "
    "validation: AUROC with the way that validation scenes choose. F1: of the "
    "hallucinated, at the threshold that is best on validation, on test. *Partner nouns* alone is "
    "the hard comparison: the same eight words, their object absent or in view. Scores without a "
    "method's name are those of `hallucination_scores` (entropy and area of the raw lens); with "
    "one, of that method's jointly normalised map (of a word's tokens the most decodable). Peak: "
    "how far the map outshines the text before the word. Decodability over scales: at 1, 1.25, "
    "1.5, the best or the mean."
)


def cell(found: Interval, sign: str = "") -> str:
    """A value with its interval."""
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def subset(columns: Mapping[str, Any], partners: bool) -> dict[str, Any]:
    """Nouns of a record as arrays.

    Args:
        columns: from :func:`studies.hallucination.measure`.
        partners: the partners of the planted rule alone, or all.

    Returns:
        ``scenes``, ``positive`` (hallucinated) and ``scores`` by name.
    """
    kept = np.array(columns["partner"], dtype=bool) | (not partners)
    return {
        "scenes": np.array(columns["number"])[kept],
        "positive": np.array(columns["hallucinated"], dtype=bool)[kept],
        "scores": {name: np.array(v, dtype=float)[kept] for name, v in columns["scores"].items()},
    }


def leads(
    validation: Mapping[str, Any], test: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """AUROC and F1 of every score under every draw of scenes.

    Args:
        validation: from :func:`subset`; the thresholds of F1 are chosen on it.
        test: the same of the scenes that are reported.

    Returns:
        Two mappings: name -> (1 + draws,), see :func:`studies.detection.interval`.
    """
    weights = drawn_weights(test["scenes"], seed=SEED)
    areas, f1s = {}, {}
    for name, values in test["scores"].items():
        least = best_threshold(validation["scores"][name], validation["positive"])
        areas[name] = auroc(values, test["positive"], weights)
        f1s[name] = f1_at(values, test["positive"], weights, least)
    return areas, f1s


def rows(
    validation: Mapping[str, Any], areas: Mapping[str, np.ndarray], f1s: Mapping[str, np.ndarray]
) -> str:
    """Markdown: a row per score.

    Args:
        validation: from :func:`subset`; tells which way each score points.
        areas: from :func:`leads`.
        f1s: from :func:`leads`.
    """
    lines = [
        "| score | AUROC | - own probability | turned on validation | F1 | - own probability |",
        "|" + " --- |" * 6,
    ]
    truth = validation["positive"]
    for name, area in areas.items():
        right = auroc(validation["scores"][name], truth, np.ones((1, len(truth))))[0] >= 0.5
        turned = f"{area[0]:.3f}" if right else f"{1 - area[0]:.3f} (turned)"
        cells = [name, cell(interval(area)), "-", turned, cell(interval(f1s[name])), "-"]
        if name != BASE:
            cells[2] = cell(interval(area - areas[BASE]), "+")
            cells[5] = cell(interval(f1s[name] - f1s[BASE]), "+")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(areas: Mapping[str, np.ndarray]) -> str:
    """One sentence: which scores beat the word's own probability in AUROC, and which lose to it.

    Args:
        areas: from :func:`leads`.
    """
    gains = {name: interval(area - areas[BASE]) for name, area in areas.items() if name != BASE}
    better = [name for name, gain in gains.items() if gain.low > 0]
    worse = [name for name, gain in gains.items() if gain.high < 0]
    return (
        f"Of {len(gains)} scores {len(better)} beat the word's own probability (interval above 0"
        f"{': ' if better else ''}{'; '.join(better)}), {len(worse)} lose to it; the other "
        f"{len(gains) - len(better) - len(worse)} can't be told from it."
    )


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: all nouns, then partner nouns alone.

    Args:
        found: "validation" and "test" -> columns.
    """
    blocks = []
    for title, partners in (("All nouns", False), ("Partner nouns alone", True)):
        validation, test = (subset(found[split], partners) for split in ("validation", "test"))
        truth = test["positive"]
        areas, f1s = leads(validation, test)
        share = truth.mean() if len(truth) else float("nan")
        blocks.append(
            f"**{title}**: {len(truth)} of {len(np.unique(test['scenes']))} scenes' answers, "
            f"{int(truth.sum())} hallucinated; calling all of them hallucinated gives F1 "
            f"{2 * share / (1 + share):.3f}. {verdict(areas)}"
        )
        blocks.append(rows(validation, areas, f1s))
    return "\n\n".join(blocks)
