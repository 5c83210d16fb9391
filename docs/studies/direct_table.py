"""The tables of ``studies.direct``, from its record."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captum_mllm.metrics import paired_bootstrap, paired_bootstrap_f1

SEED, RESAMPLES = 0, 1000
AGAINST, STRONGER = "TAM", "TAM over turned views"
ADAPTIVE = ", adaptive"
Rows = Sequence[Mapping[str, Mapping[str, Sequence[float]]]]


def padded(rows: Rows, name: str, metric: str) -> np.ndarray:
    """Values of one row and metric, (examples, values), padded with NaN."""
    each = [example[name].get(metric, []) for example in rows]
    width = max(1, *(len(values) for values in each))
    return np.array([[*values, *[np.nan] * (width - len(values))] for values in each])


def _line(every: Rows, name: str) -> str:
    rows = [row for row in every if name in row]
    peers = [one + ADAPTIVE * name.endswith(ADAPTIVE) for one in (AGAINST, STRONGER)]
    values = {n: tuple(padded(rows, n, m) for m in ("obj_iou", "func_iou")) for n in {name, *peers}}
    obj, func = values[name]
    f1 = {
        n: paired_bootstrap_f1((values[n][0], values[n][1]), n_resamples=2, seed=SEED).mean
        for n in (name, *peers)
    }
    precision = padded(rows, name, "average_precision")
    label = name if len(rows) == len(every) else f"{name} ({len(rows)} scenes)"
    cells = [label, f"{np.nanmean(obj):.3f}", f"{np.nanmean(func):.3f}", f"{f1[name]:.3f}"]
    draws: dict[str, Any] = {"n_resamples": RESAMPLES, "seed": SEED}
    for other in peers:
        if name == other:
            cells.append("")
            continue
        base = (values[other][0], values[other][1])
        gain = [100 * v / f1[other] for v in paired_bootstrap_f1((obj, func), base, **draws)]
        cells.append(f"{gain[0]:+.1f} % [{gain[1]:+.1f}, {gain[2]:+.1f}]")
    cells.append(f"{np.nanmean(precision):.3f}")
    if name == peers[0]:
        cells.append("")
    else:
        more = paired_bootstrap(precision, padded(rows, peers[0], "average_precision"), **draws)
        cells.append(f"{more.mean:+.3f} [{more.low:+.3f}, {more.high:+.3f}]")
    right = padded(rows, name, "right")
    cells.append("" if np.isnan(right).all() else f"{np.nanmean(right):.3f}")
    return "| " + " | ".join(cells) + " |"


def tables(record: Mapping[str, Any]) -> str:
    """One table per training and set.

    Args:
        record: of ``studies.direct``.

    Returns:
        Markdown.
    """
    out = [
        "# Maps that read the context",
        "",
        f"Scenes of the {record['split']} split, reference answers teacher-forced; F1-IoU and "
        "average precision (AP) with what each gains over the equally tuned TAM, and over that "
        "TAM on the same views of several scales (turned views); 95 % intervals "
        f"from {RESAMPLES} paired resamples of scenes; rows whose calibration is adaptive, over a "
        "TAM of the same calibration; right: share of nouns that two objects "
        "share whose map is brighter on the object that is meant.",
    ]
    for training, sets in record["measured"].items():
        for name, rows in sets.items():
            out += [
                "",
                f"## {training}, {name} ({len(rows)} scenes)",
                "",
                "| method | Obj-IoU | Func-IoU | F1-IoU | over TAM | over TAM, turned views | AP "
                "| over TAM | right |",
                "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
                *(_line(rows, row) for row in rows[0]),
            ]
    return "\n".join(out) + "\n"


def adaptive_table(record: Mapping[str, Any]) -> str:
    """What adaptive calibration gains over 1.5, per training and set that has its rows.

    Args:
        record: of ``studies.direct``.

    Returns:
        Markdown; empty where no example has such a row.
    """
    lines: list[str] = []
    for training, sets in record["measured"].items():
        for set_name, every in sets.items():
            fitted = [name for name in every[0] if name.endswith(ADAPTIVE)]
            rows = [row for row in every if all(name in row for name in fitted)]
            if not fitted:
                continue
            if not lines:
                plain = [name.removesuffix(ADAPTIVE) for name in fitted]
                lines += ["", "## Adaptive calibration: gain of F1-IoU over 1.5", ""]
                lines += [
                    f"| model, set | {' | '.join(plain)} |",
                    "| --- " * (1 + len(plain)) + "|",
                ]
            cells = [_over_fixed(rows, name) for name in fitted]
            lines.append(f"| {training}, {set_name} ({len(rows)}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if lines else ""


def _over_fixed(rows: Rows, name: str) -> str:
    own, fixed = (
        tuple(padded(rows, one, metric) for metric in ("obj_iou", "func_iou"))
        for one in (name, name.removesuffix(ADAPTIVE))
    )
    draws: dict[str, Any] = {"n_resamples": RESAMPLES, "seed": SEED}
    base = paired_bootstrap_f1((fixed[0], fixed[1]), n_resamples=2, seed=SEED).mean
    gain = paired_bootstrap_f1((own[0], own[1]), (fixed[0], fixed[1]), **draws)
    mean, low, high = (100 * value / base for value in gain)
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"
