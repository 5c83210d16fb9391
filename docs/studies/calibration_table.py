"""The tables of ``studies.calibration``, from its record."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SEED, RESAMPLES = 0, 1000
BASE = "direct lens, beta 1, floor 0.01"
FIXED = "tau 1.5"
COLUMNS = ("llava", "qwen2vl", "internvl")
Gains = dict[str, tuple[float, float, float]]


def family(training: str) -> str:
    """The family of a training: the first part of its name."""
    return training.split("-")[0]


class Scenes:
    """F1-IoU of every row and of resampled scenes, the same ones for all rows and trainings.

    Args:
        record: of ``studies.calibration``.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.measured = record["measured"]
        draw = np.random.default_rng(SEED)
        self.draws = {}
        for sets in self.measured.values():
            for name, rows in sets.items():
                if name not in self.draws:
                    drawn = draw.integers(len(rows), size=(RESAMPLES, len(rows)))
                    self.draws[name] = np.vstack([np.arange(len(rows)), drawn])
        self.known: dict[tuple[str, str, str], np.ndarray] = {}

    def rows(self) -> list[str]:
        """Names of all rows."""
        return list(next(iter(next(iter(self.measured.values())).values()))[0])

    def mean(self, training: str, set_name: str, row: str, metric: str) -> np.ndarray:
        """Mean over all words of the scenes: of all of them first, then of each resample.

        Args:
            training: of the record.
            set_name: of the record.
            row: "map; rule".
            metric: of the row.
        """
        each = [scene[row].get(metric, []) for scene in self.measured[training][set_name]]
        kept = [np.asarray([v for v in values if v == v]) for values in each]
        total, count = (np.array([f(v) for v in kept]) for f in (np.sum, len))
        drawn = self.draws[set_name]
        with np.errstate(invalid="ignore"):
            return total[drawn].sum(1) / count[drawn].sum(1)

    def f1(self, training: str, set_name: str, row: str) -> np.ndarray:
        """F1-IoU, as :meth:`mean`."""
        key = (training, set_name, row)
        if key not in self.known:
            obj, func = (self.mean(*key, metric) for metric in ("obj_iou", "func_iou"))
            self.known[key] = 2 * obj * func / (obj + func)
        return self.known[key]

    def gains(self, row: str, base: str) -> Gains:
        """Gain of F1-IoU over another row in %, with 95 % intervals.

        Args:
            row: "map; rule".
            base: likewise.

        Returns:
            "all": the mean over families and sets, a family's trainings averaged; then per family
            and set.
        """
        cells: dict[tuple[str, str], list[np.ndarray]] = {}
        for training, sets in self.measured.items():
            for name in sets:
                own, other = self.f1(training, name, row), self.f1(training, name, base)
                cells.setdefault((family(training), name), []).append(100 * (own / other - 1))
        per = {f"{one}, {name}": np.mean(v, axis=0) for (one, name), v in cells.items()}
        per = {"all": np.mean(list(per.values()), axis=0), **per}
        return {n: (v[0], *np.quantile(v[1:], (0.025, 0.975))) for n, v in per.items()}

    def each(self, row: str, metric: str, set_name: str) -> list[float]:
        """Mean of a metric per family of `COLUMNS`, its trainings averaged."""
        found: dict[str, list[float]] = {}
        for training, sets in self.measured.items():
            if set_name in sets:
                value = self.mean(training, set_name, row, metric)[0]
                found.setdefault(family(training), []).append(float(value))
        return [float(np.mean(found[one])) for one in COLUMNS if one in found]


def _gain(value: tuple[float, float, float]) -> str:
    return f"{value[0]:+.1f} % [{value[1]:+.1f}, {value[2]:+.1f}]"


def _table(title: str, scenes: Scenes, rows: Sequence[str], base: str) -> list[str]:
    """Gains of some rows over one of them."""
    first = scenes.gains(base, base)
    lines = ["", f"## {title}", "", f"| row | {' | '.join(first)} |"]
    lines.append("| --- " * (1 + len(first)) + "|")
    for row in rows:
        cells = ["" if row == base else _gain(v) for v in scenes.gains(row, base).values()]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def _product(scenes: Scenes, rows: Sequence[str]) -> list[str]:
    """AP and right twins of the product's settings."""
    lines = [
        "",
        "## Weight and floor of the product: AP and right twins",
        "",
        "| row | AP, plain | AP, twins | right twin, tau 1.5 | right twin, mean 0.4 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = row.partition(";")[0]
        columns = [
            (f"{name}; {FIXED}", "average_precision", "plain"),
            (f"{name}; {FIXED}", "average_precision", "twins"),
            (f"{name}; {FIXED}", "right", "twins"),
            (f"{name}; mean 0.4", "right", "twins"),
        ]
        cells = [" ".join(f"{v:.3f}" for v in scenes.each(*one)) for one in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def tables(record: Mapping[str, Any]) -> str:
    """Rules of calibration, settings of the product, and the rules for other methods.

    Args:
        record: of ``studies.calibration``.

    Returns:
        Markdown.
    """
    scenes = Scenes(record)
    rows = scenes.rows()
    of_base = [row for row in rows if row.startswith(f"{BASE}; ")]
    out = [
        "# Calibration, and the weights of the product",
        "",
        "`make study NAME=calibration`: validation scenes, reference answers teacher-forced. "
        "Gain of F1-IoU over the first-named "
        f"row in %, with 95 % intervals from {RESAMPLES} paired resamples of scenes; "
        f"the mean over the trainings of each family ({', '.join(record['weights'])}), and over "
        "families and sets (all). A rule says how far below its peak a map falls to 1/e: tau, in "
        "its standard deviations; mean, third quartile, own threshold: a share of the peak's "
        "height above the map's mean, third quartile or Otsu threshold; mass: as far as gives "
        "every map the same mean, as a share of its peak.",
        *_table("Rules of calibration", scenes, of_base, f"{BASE}; {FIXED}"),
    ]
    for rule in (FIXED, "mean 0.4"):
        some = [row for row in rows if row.startswith("direct lens") and row.endswith(f"; {rule}")]
        out += _table(f"Weight and floor of the product, {rule}", scenes, some, f"{BASE}; {rule}")
    some = [row for row in rows if row.startswith("direct lens") and row.endswith(f"; {FIXED}")]
    out += _product(scenes, some)
    others = [row for row in rows if not row.startswith("direct lens")]
    for name in dict.fromkeys(row.partition(";")[0] for row in others):
        some = [row for row in others if row.startswith(f"{name}; ")]
        out += _table(f"Rules of calibration: {name}", scenes, some, f"{name}; {FIXED}")
    return "\n".join(out) + "\n"
