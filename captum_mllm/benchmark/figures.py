"""From the lines of a run to its figures: means over all values, with paired intervals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captum_mllm.benchmark.log import Key
from captum_mllm.benchmark.settings import LOWER_IS_BETTER, Settings
from captum_mllm.metrics import Interval, paired_bootstrap, paired_bootstrap_f1

Records = Mapping[Key, Mapping[str, Any]]


def figures(records: Records, pictures: int, settings: Settings) -> dict[str, Any]:
    """Means with 95 % intervals, and differences to the method of reference.

    A mean is over all values of all pictures (words, or tokens), as TAM's are: a picture with more
    words weighs more. Intervals come from resampled pictures, for which the means are computed
    again. A method's mean is over the pictures that it finished; a difference is over the values
    that both methods have.

    Args:
        records: the lines of the run, by picture and method.
        pictures: how many pictures count, from the first.
        settings: the run's.

    Returns:
        Per method: "pictures" finished, "failed", mean "seconds" per picture, "metrics" (per metric
        "mean", "low", "high", "values": how many) and, unless it is the reference, "difference"
        (the same, minus the reference).

    Reference:
        TAM's global means; the intervals: :func:`captum_mllm.metrics.paired_bootstrap`.
    """
    lines = {
        method: [records.get((n, method), {}) for n in range(pictures)]
        for method in settings.methods
    }
    values: dict[str, Any] = {}
    for method, of_method in lines.items():
        done = [line for line in of_method if "values" in line]
        values[method] = {
            "pictures": len(done),
            "failed": sum("error" in line for line in of_method),
            "seconds": float(np.mean([line["seconds"] for line in done])) if done else None,
            "metrics": {name: _entry(of_method, None, name, settings) for name in settings.metrics},
        }
        if method != settings.reference:
            against = lines[settings.reference]
            values[method]["difference"] = {
                name: _entry(of_method, against, name, settings) for name in settings.metrics
            }
    return values


def _entry(
    lines: Sequence[Mapping[str, Any]],
    against: Sequence[Mapping[str, Any]] | None,
    metric: str,
    settings: Settings,
) -> dict[str, Any]:
    seed = settings.bootstrap_seed
    names = ("obj_iou", "func_iou") if metric == "f1_iou" else (metric,)
    tables = [table_of_values(lines, against, name) for name in names]
    count = sum(int((~np.isnan(first + second)).sum()) for first, second in tables)
    if metric == "f1_iou":
        (obj, other_obj), (func, other_func) = tables
        b = None if against is None else (other_obj, other_func)
        interval: Interval = paired_bootstrap_f1((obj, func), b, seed=seed)
    else:
        a, b = tables[0]
        interval = paired_bootstrap(a, None if against is None else b, seed=seed)
    return {**interval._asdict(), "values": count}


def table_of_values(
    lines: Sequence[Mapping[str, Any]],
    against: Sequence[Mapping[str, Any]] | None,
    metric: str,
) -> tuple[np.ndarray, np.ndarray]:
    """One metric's values of two methods, (pictures, values) each, padded with NaN.

    Args:
        lines: a method's lines, one per picture; a picture without values has none.
        against: another method's, or None for the same lines.
        metric: its name.

    Example:
        >>> lines = [{"values": {"auc": [0.5, None]}}, {}]
        >>> table_of_values(lines, None, "auc")[0].tolist()
        [[0.5, nan], [nan, nan]]
    """
    rows = [
        [line.get("values", {}).get(metric, []) for line in of] for of in (lines, against or lines)
    ]
    width = max((len(row) for method in rows for row in method), default=0)
    full = np.full((2, len(lines), width), np.nan)
    for which, method in enumerate(rows):
        for n, row in enumerate(method):
            full[which, n, : len(row)] = [np.nan if value is None else value for value in row]
    return full[0], full[1]


def failures(records: Records, pictures: int, settings: Settings) -> dict[str, int]:
    """How many samples failed for each reason, the most common first.

    Reasons that differ in nothing but the picture's name and in numbers are alike: they are
    counted together, and the first of them stands for all.

    Args:
        records: the lines of the run, by picture and method.
        pictures: how many pictures count.
        settings: the run's.

    Example:
        >>> def failed(name):
        ...     text = f"{name} cannot be read"
        ...     return {"file_name": name, "error": {"type": "ValueError", "text": text}}
        >>> lines = {(n, "lens"): failed(name) for n, name in enumerate(("a.png", "b.png"))}
        >>> failures(lines, 2, Settings(methods=("lens",)))
        {'ValueError: a.png cannot be read': 2}
    """
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for line in (records.get((n, m), {}) for n in range(pictures) for m in settings.methods):
        if "error" in line:
            text = f"{line['error']['type']}: {line['error']['text']}"
            name = line.get("file_name")
            kind = re.sub(r"\d+", "0", text.replace(name, "") if name else text)
            counts[first.setdefault(kind, text)] += 1
    return dict(counts.most_common())


def markdown(values: Mapping[str, Any], settings: Settings, about: Sequence[str]) -> str:
    """The figures as Markdown: a table of means and, for several methods, one of differences.

    Args:
        values: returned by :func:`figures`.
        settings: the run's.
        about: sentences above the tables.
    """
    arrows = {name: "lower" if name in LOWER_IS_BETTER else "higher" for name in settings.metrics}
    heads = [f"{name} ({arrows[name]} is better)" for name in settings.metrics]
    lines = [*about, "", *_head(["method", *heads, "pictures", "failed", "s per picture"])]
    for method, entry in values.items():
        cells = [_cell(entry["metrics"][name], "") for name in settings.metrics]
        seconds = "-" if entry["seconds"] is None else f"{entry['seconds']:.2f}"
        row = [method, *cells, str(entry["pictures"]), str(entry["failed"]), seconds]
        lines.append(f"| {' | '.join(row)} |")
    others = {method: entry for method, entry in values.items() if "difference" in entry}
    if others:
        lines += ["", f"Minus {settings.reference}, where both have a value:", ""]
        lines += _head(["method", *settings.metrics])
        for method, entry in others.items():
            cells = [_cell(entry["difference"][name], "+") for name in settings.metrics]
            lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join(lines) + "\n"


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"| {' | '.join(['---'] * len(names))} |"]


def _cell(entry: Mapping[str, Any], sign: str) -> str:
    if np.isnan(entry["mean"]):
        return "-"
    mean, low, high = (f"{entry[name]:{sign}.3f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
