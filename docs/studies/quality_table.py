"""Tables of `studies.quality`: means, paired intervals, and how far the goals are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captum_mllm.metrics import Interval, paired_bootstrap, paired_bootstrap_f1
from studies.quality_bounds import needed_obj_iou
from studies.quality_time import ratios

SEED = 0
BEST, TUNED, PUBLISHED = "MSEA+ARC, chosen", "TAM, chosen", "TAM, published"
UNSUBTRACTED = "MSEA, chosen"
Own = Mapping[str, Mapping[str, list[list[float | None]]]]  # row -> metric -> scene -> values
HALF = 0.5  # of the best fixed choice's gain, that the mean over ranges should keep
GOAL = 0.145  # relative gain in F1-IoU over TAM as well tuned


def padded(values: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Scenes of different lengths as one array, NaN where there is nothing.

    Example:
        >>> padded([[1.0], [2.0, None]]).tolist()
        [[1.0, nan], [2.0, nan]]
    """
    width = max((len(own) for own in values), default=0) or 1
    out = np.full((len(values), width), np.nan)
    for row, own in zip(out, values, strict=True):
        row[: len(own)] = [np.nan if value is None else value for value in own]
    return out


def interval(own: Own, row: str, metric: str, against: str | None = None) -> Interval:
    """A row's mean, or its difference to another row, with a 95 % interval over scenes.

    Args:
        own: values of one training and set.
        row: its name.
        metric: of the record, or "f1_iou".
        against: another row, or None.
    """
    if metric == "f1_iou":
        a, b = (
            None if name is None else tuple(padded(own[name][m]) for m in ("obj_iou", "func_iou"))
            for name in (row, against)
        )
        return paired_bootstrap_f1(a, b, seed=SEED)  # type: ignore[arg-type]
    other = None if against is None else padded(own[against][metric])
    return paired_bootstrap(padded(own[row][metric]), other, seed=SEED)


def cell(found: Interval, sign: bool = False) -> str:
    """An interval as it is shown."""
    form = "+.3f" if sign else ".3f"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def methods_table(own: Own) -> str:
    """All methods, with the best one's difference to each."""
    rows = []
    for name in own:
        means = [cell(interval(own, name, m)) for m in ("obj_iou", "func_iou", "f1_iou")]
        means.append(cell(interval(own, name, "average_precision")))
        means.append(f"{interval(own, name, 'oracle_iou').mean:.3f}")
        less = [
            "-" if name == BEST else cell(interval(own, BEST, m, name), sign=True)
            for m in ("f1_iou", "average_precision")
        ]
        rows.append([name, *means, *less])
    head = ["method", "Obj-IoU", "Func-IoU", "F1-IoU", "AP", "oracle IoU"]
    return grid([*head, f"F1: {BEST} minus it", "AP: likewise"], rows)


def goals_table(measured: Mapping[str, Any]) -> str:
    """MSEA+ARC against TAM as well tuned, and as published."""
    rows = []
    for training, sets in measured.items():
        for set_name, own in sets.items():
            f1 = {name: interval(own, name, "f1_iou").mean for name in (BEST, TUNED, PUBLISHED)}
            gains = [f1[BEST] / f1[name] - 1 for name in (TUNED, PUBLISHED)]
            obj = interval(own, BEST, "obj_iou", TUNED)
            ap = interval(own, BEST, "average_precision", TUNED)
            met = [gains[0] >= GOAL, obj.low > 0 or obj.mean >= 0, ap.low > 0]
            rows.append(
                [
                    f"{training}, {set_name}",
                    f"{gains[0]:+.1%}",
                    cell(interval(own, BEST, "f1_iou", TUNED), sign=True),
                    cell(obj, sign=True),
                    cell(ap, sign=True),
                    f"{gains[1]:+.1%}",
                    ", ".join("yes" if one else "no" for one in met),
                ]
            )
    head = [
        "training, set",
        "F1, relative",
        "F1",
        "Obj-IoU",
        "AP",
        "F1 over TAM as published",
        f"goals met (+{GOAL:.1%} F1; no less Obj-IoU; AP's interval above 0)",
    ]
    return grid(head, rows)


def needs_table(measured: Mapping[str, Any], bounds: Mapping[str, Mapping[str, float]]) -> str:
    """The Obj-IoU that the goal asks for, beside the one reached and what the masks score.

    Args:
        measured: training -> set -> values of the methods.
        bounds: set -> cells along a side -> Obj-IoU of the masks themselves.
    """
    rows = []
    for training, sets in measured.items():
        for set_name, own in sets.items():
            wanted = interval(own, TUNED, "f1_iou").mean * (1 + GOAL)
            func = interval(own, BEST, "func_iou").mean
            figures = [
                wanted,
                needed_obj_iou(wanted, func),
                interval(own, BEST, "obj_iou").mean,
                interval(own, UNSUBTRACTED, "obj_iou").mean,
                *bounds[set_name].values(),
            ]
            rows.append([f"{training}, {set_name}", *(f"{value:.3f}" for value in figures)])
    cells = next(iter(bounds.values()))
    head = ["training, set", "F1-IoU wanted", "Obj-IoU it takes", f"{BEST}", UNSUBTRACTED]
    return grid([*head, *(f"the mask on {n} x {n} cells" for n in cells)], rows)


def faithfulness_table(own: Own) -> str:
    """Insertion and deletion of every row; the best one's difference to each."""
    rows = []
    sensitive = interval(own, BEST, "sensitive").mean
    for name in own:
        cells = [f"{interval(own, name, 'average_precision').mean:.3f}"]
        for replaced in ("blur",):
            cells += [
                f"{interval(own, name, f'insertion, {replaced}').mean:.3f}",
                f"{interval(own, name, f'deletion, {replaced}').mean:.3f}",
                cell(interval(own, name, f"difference, {replaced}")),
            ]
        less = "-"
        if name != BEST:
            less = cell(interval(own, BEST, "difference, blur", name), sign=True)
        rows.append([name, *cells, less])
    head = ["method", "AP"]
    for replaced in ("blur",):
        head += [f"insertion, {replaced}", f"deletion, {replaced}", f"difference, {replaced}"]
    text = grid([*head, f"difference, blur: {BEST} minus it"], rows)
    return f"{text}\n\nVisually sensitive: {sensitive:.0%} of the nouns."


def ranges_table(own: Own) -> str:
    """F1-IoU's gain of every range over a single scale, with equal and adaptive weights."""
    names = [name for name in own if name != "single"]
    ranges = list(dict.fromkeys(name.split(",")[0] for name in names))
    ways = list(dict.fromkeys(name.partition(", ")[2] for name in names))
    gains = {name: interval(own, name, "f1_iou", "single") for name in names}
    rows = [[one, *(cell(gains[f"{one}, {way}"], sign=True) for way in ways)] for one in ranges]
    for label, value in (
        ("mean over ranges", lambda some: f"{np.mean([g.mean for g in some]):+.3f}"),
        ("best range", lambda some: f"{max(g.mean for g in some):+.3f}"),
        ("intervals wholly below 0", lambda some: str(sum(g.high < 0 for g in some))),
    ):
        rows.append([label, *(value([gains[f"{one}, {way}"] for one in ranges]) for way in ways)])
    return grid(["scales", *ways], rows)


def sensitivity_table(
    measured: Mapping[str, Any], times: Mapping[str, Mapping[str, list[float]]]
) -> str:
    """F1-IoU, average precision and time of every value, training by training.

    Args:
        measured: training -> set -> values.
        times: training -> row -> seconds; may lack trainings.
    """
    trainings = {name: sets["plain"] for name, sets in measured.items()}
    took = {name: ratios(times[name]) for name in trainings if name in times}
    rows = []
    for row in next(iter(trainings.values())):
        cells = [row]
        for name, own in trainings.items():
            cells += [cell(interval(own, row, m)) for m in ("f1_iou", "average_precision")]
            if name in took:
                cells.append(f"{took[name][row]:.1f}")
        rows.append(cells)
    head = [""]
    for name in trainings:
        head += [f"{name}: F1-IoU", "AP", *(["time"] if name in took else [])]
    return grid(head, rows)


def _time_note(times: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    if not times:
        return []
    runs = min(len(own) for rows in times.values() for own in rows.values())
    return [
        f"Time: for all tokens of an answer, as a multiple of the plain logit lens's; one thread, "
        f"medians of {runs} interleaved runs."
    ]


def tables(record: Mapping[str, Any]) -> str:
    """The record's Markdown.

    Args:
        record: of `studies.quality`.
    """
    measured = record["measured"]
    weights = ", ".join(f"{name} {value[:12]}" for name, value in record["weights"].items())
    parts = {"scenes": "methods", "ranges": "ranges and sensitivity", "judged": "faithfulness"}
    counts = ", ".join(f"{record[n]} for {what}" for n, what in parts.items() if n in record)
    text = [
        f"`make study NAME=quality`: the first examples of the test split of each "
        f"set ({counts}), reference answers "
        f"teacher-forced, settings as `studies.choose` chose them on validation scenes "
        f"(`choose.md`), but for the weights of scales, a tie there: adaptive; "
        f"means over words, 95 % intervals by a paired bootstrap over scenes (seed "
        f"{SEED}, 2,000 resamples). Insertion and deletion in {record['steps']} steps, of the "
        f"nouns. *openmoji* is a style of drawing never trained on. Small models of synthetic "
        f"scenes; weights {weights}."
    ]
    if "methods" in measured:
        text += ["## MSEA+ARC against TAM", goals_table(measured["methods"])]
        if "bounds" in record:
            text += [
                f"What the goal of {GOAL:+.1%} asks of Obj-IoU, at MSEA+ARC's Func-IoU, and what "
                f"the masks themselves score by the same threshold on the grids of scales 1 and 2:",
                needs_table(measured["methods"], record["bounds"]),
            ]
        for training, sets in measured["methods"].items():
            for set_name, own in sets.items():
                text += [f"## Methods: {training}, {set_name}", methods_table(own)]
    for training, sets in measured.get("faithfulness", {}).items():
        text += [f"## Faithfulness: {training}", faithfulness_table(sets["plain"])]
    for training, sets in measured.get("ranges", {}).items():
        text += [f"## Ranges of scales: {training}, gain in F1-IoU", ranges_table(sets["plain"])]
    if "sensitivity" in measured:
        text += [
            "## Sensitivity (k and p with alpha unbounded, scales as chosen else)",
            *_time_note(record.get("seconds", {})),
            sensitivity_table(measured["sensitivity"], record.get("seconds", {})),
        ]
    return "\n\n".join(text) + "\n"


README_ROWS = {
    "LogitLens, published": "LogitLens",
    "TAM, published": "TAM as published",
    "TAM, chosen": "TAM, tuned and calibrated as well",
    "MSEA+ARC, published": "MSEA+ARC, published settings",
    "MSEA, chosen": "MSEA, defaults, calibrated likewise",
    BEST: "MSEA+ARC, defaults",
    "chosen, single scale blurred by 0.75 cells": "control: ARC, one scale blurred",
    "chosen, 9 half-cell shifts": "control: ARC, 9 half-cell shifts",
}


def readme_table(record: Mapping[str, Any], set_name: str = "plain") -> str:
    """The table of results that README shows, made of the record.

    Args:
        record: of `studies.quality`.
        set_name: "plain" or "openmoji".
    """
    trainings = {name: sets[set_name] for name, sets in record["measured"]["methods"].items()}
    head = ["method"]
    for name in trainings:
        head += [f"{name}: F1-IoU", "Obj-IoU", "AP"]
    rows = []
    for row, label in README_ROWS.items():
        cells = [label]
        for own in trainings.values():
            cells.append(cell(interval(own, row, "f1_iou")))
            cells += [
                f"{interval(own, row, metric).mean:.3f}"
                for metric in ("obj_iou", "average_precision")
            ]
        rows.append(cells)
    return grid(head, rows)
