"""The table of the study of test sets: means with intervals, hallucinations, what they mean."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captum_mllm.metrics import f1_iou, paired_bootstrap
from captum_mllm.reference.sets import make_example
from studies.training.evaluate_model import share

SEED = 0
Row = dict[str, list[float]]  # one example's values, see `sets.measure`
NOTE = (
    "Exact answers: the greedy answer to the default question (in every set) names exactly the "
    "right objects. Nouns read: the reference answer's next noun is what the model predicts "
    "itself, given all before it; in *interference* a long second answer is something that no "
    "model was trained on. Bound: what the object's mask itself scores at the grid's resolution "
    "(share of every cell covered); no strict limit, cells fitted to a metric could score a "
    "little more. Context's share: of a noun's raw map, what estimated causal inference takes off "
    "as interference of the words before it.\n\n"
    "Func-IoU near 1: function words light up nowhere. A base map depends on the picture and the "
    "token alone, so longer or repetitive text can't light it up or darken it; what differs "
    "between sets is which function words are asked for and how high their nouns' threshold lies "
    "(peaks of small objects). Above .97 a set says nothing about interference *by Func-IoU* in "
    "that model. What the text before a word does to it shows in the context's share: what "
    "subtracting methods do with the same raw maps."
)


def padded(rows: Sequence[Row], metric: str) -> np.ndarray:
    """(examples, most values), NaN where an example has fewer."""
    longest = max(1, *(len(row[metric]) for row in rows))
    out = np.full((len(rows), longest), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row[metric])] = row[metric]
    return out


def table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for each model and set.

    Args:
        measured: model -> set -> what :func:`evaluate` returns.
    """
    lines = [
        "| model | set | exact answers | nouns read | Obj-IoU | its bound | AP | its bound | "
        "Func-IoU | F1-IoU | context's share |",
        "|" + " --- |" * 11,
    ]
    for name, sets in measured.items():
        for set_name, found in sets.items():
            rows = found["rows"]
            right = share(sum(found["exact"]), len(found["exact"]))
            cells = [name, set_name, f"{100 * right['share']:.1f} %"]
            means = {}
            for metric in ("read", "obj_iou", "bound_iou", "average_precision", "bound_ap"):
                means[metric] = paired_bootstrap(padded(rows, metric), seed=SEED)
            for metric in ("func_iou", "removed"):
                means[metric] = paired_bootstrap(padded(rows, metric), seed=SEED)
            cells.append(f"{100 * means['read'].mean:.1f} %")
            for metric in ("obj_iou", "bound_iou", "average_precision", "bound_ap", "func_iou"):
                mean, low, high = means[metric]
                bound = metric.startswith("bound")
                cells.append(f"{mean:.3f}" if bound else f"{mean:.3f} [{low:.3f}, {high:.3f}]")
            cells.append(f"{f1_iou(means['obj_iou'].mean, means['func_iou'].mean):.3f}")
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*means["removed"]))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hallucinations(measured: Mapping[str, Mapping[str, Any]], split: str) -> str:
    """Markdown: how often answers on the biased set name the partner, absent or in view.

    Args:
        measured: model -> set -> what :func:`evaluate` returns.
        split: "test" or "validation".
    """
    lines = [
        "| model | partner absent, named | 95 % | partner in view, named | 95 % |",
        "|" + " --- |" * 5,
    ]
    for name, sets in measured.items():
        cells = [name]
        for odd in (0, 1):  # every other example breaks the rule
            numbers = range(odd, len(sets.get("biased", {}).get("named", ())), 2)
            hits = sum(_partner(n, split) in sets["biased"]["named"][n] for n in numbers)
            if not numbers:
                break
            found = share(hits, len(numbers))
            low, high = found["interval_95"]
            cells += [f"{hits} of {len(numbers)} ({found['share']:.0%})".replace("%", " %")]
            cells += [f"{100 * low:.0f} to {100 * high:.0f} %"]
        if len(cells) == 5:
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _partner(number: int, split: str) -> str | None:
    """What the planted rule wants in one example of the biased set."""
    planted = make_example("biased", number, split).planted
    return planted[1] if planted else None


def rounded(values: Any) -> Any:
    """The same with numbers to four digits: the record is read from them, and stays small."""
    if isinstance(values, Mapping):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return round(values, 4) if isinstance(values, float) else values
