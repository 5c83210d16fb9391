"""Choose the defaults of MSEA and ARC, and as well as them those of TAM, on validation scenes.

Usage: ``make study NAME=choose ARGS="[--trainings NAME ...] [--examples 40] [--workers N]
[--device cuda] [--out DIR]"``; writes ``choose.json`` and ``choose.md``. Run it from a checkout,
which holds the further trainings (``docs/studies/weights``). Needs the extra ``metrics``.

One option after another is chosen, the others held; what came first is chosen once more at the
end. What counts is the mean of F1-IoU over trainings and sets. Among options within a tie of the
best F1-IoU those within a tie of the best average precision stay, and of these the first listed
wins, which is the plainest or the cheapest. The tie is TIE; where options differ in what they cost
the model (scales, mirrored views) it is WORTH. Weights of scales are there so that the range does
not matter: they are judged by the mean over all RANGES. Nothing here sees a test scene.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captum_mllm import LogitLens
from captum_mllm.metrics import f1_iou
from captum_mllm.reference.models import model_path
from studies.choose_table import METRICS, heading, table
from studies.evidence import (
    TRAININGS,
    Evidence,
    Setting,
    examples,
    gather,
    lens_of,
    read_saved,
    score,
    training_path,
)
from studies.training.models import sha256

SETS = ("plain", "twins", "interference")
SCALES = (1.0, 0.5, 0.75, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)  # scale 1 first
TIE, WORTH = 0.002, 0.01
CHUNK = 10
CALIBRATIONS = (
    *({"upsampling": n, "calibration": t} for n, t in product((1, 2), (None, 0.7, 1.0, 1.5, 2.0))),
)
FILTER = ({"rank_filter": False}, {"rank_filter": True})
BOUNDS = ({"alpha_max": None}, {"alpha_max": 1.0}, {"alpha_max": 0.5}, {"alpha_max": 0.25})
RANGES = (  # the cheapest first: image tokens per forward at scale 1, summed
    {"scales": (0.5, 0.75, 1.0)},
    {"scales": (0.75, 1.0, 1.25)},
    {"scales": (1.0, 1.5)},
    {"scales": (1.0, 1.25, 1.5)},
    {"scales": (1.0, 2.0)},
    {"scales": (1.0, 1.5, 2.0)},
    {"scales": (1.0, 1.75, 2.5)},
    {"scales": (1.0, 1.25, 1.5, 1.75, 2.0)},
    {"scales": (1.0, 1.5, 2.0, 2.5)},
    {"scales": (1.0, 2.0, 3.0)},
)
VIEWS = ({"mirrored": False}, {"mirrored": True})
AGGREGATIONS = (
    {"aggregation": "mean"},
    {"aggregation": "geometric_mean"},
    {"aggregation": "median"},
)
NORMS = ({"scale_norm": "none"}, {"scale_norm": "max"}, {"scale_norm": "std"})
WEIGHTS = (
    {"scale_weights": "equal"},
    {"scale_weights": "adaptive"},
    {"scale_weights": "adaptive, consistency"},
)
Options = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Round:
    """One option's turn.

    Args:
        title: as shown.
        options: what is tried, the plainest or cheapest first.
        tie: difference in F1-IoU and average precision that does not count.
        over: each option is judged by its mean over these; default itself alone.
    """

    title: str
    options: Options
    tie: float = TIE
    over: Options = ({},)


@dataclass(frozen=True)
class Chosen:
    """A method, what it starts from, and the order in which its options are chosen.

    Args:
        name: as shown.
        start: the published method.
        rounds: one after another.
    """

    name: str
    start: Setting
    rounds: tuple[Round, ...]


DEFAULTS: dict[str, Any] = {  # of MSEA and ARC: what came of the choice
    "scales": (1.0, 2.0),
    "aggregation": "mean",
    "scale_norm": "none",
    "scale_weights": "adaptive",
    "mirrored": True,
    "top_k": 50,
    "rbo_p": 0.9,
    "strength": 1.0,
    "alpha_max": 0.25,
    "rank_filter": False,
    "upsampling": 2,
    "calibration": 1.5,
}
LAST = (Round("calibration", CALIBRATIONS), Round("filter", FILTER))
BOUND = (Round("bound of alpha", BOUNDS),)
MULTI = (
    Round("mirrored views", VIEWS, WORTH),
    Round("scale weights", WEIGHTS, TIE, RANGES),
    Round("scales", RANGES, WORTH),
    Round("aggregation", AGGREGATIONS),
    Round("level of scales", NORMS),
)
METHODS = (
    Chosen("LogitLens", Setting("lens"), LAST),
    Chosen("TAM", Setting("tam", rank_filter=True), (*LAST, *BOUND, *LAST, *BOUND)),
    Chosen(
        "MSEA+ARC",
        Setting("arc", scales=(1.0, 1.25, 1.5)),
        (*LAST, *BOUND, *MULTI, *LAST, *BOUND),
    ),
)


# ---- one process's part ------------------------------------------------------------------------


def gather_part(job: tuple[str, str, tuple[int, ...], str, str]) -> Path:
    """Run a training over some examples; the evidence goes to a file.

    Args:
        job: training, set, numbers of the examples, folder, device.
    """
    name, set_name, numbers, folder, device = job
    torch.set_num_threads(1)
    lens, processor = lens_of(name, device)
    model = lens.runner.adapter.model
    found = [
        gather(model, processor, example, SCALES)
        for example in examples(set_name, "validation", numbers)
    ]
    path = Path(folder) / f"{name}.{set_name}.{numbers[0]}.pt"
    torch.save(found, path)
    return path


def score_part(job: tuple[Path, tuple[Setting, ...]]) -> list[dict[str, list[list[float]]]]:
    """Settings on the examples of one file.

    Args:
        job: the file, the settings.

    Returns:
        Per setting and metric the values of each example.
    """
    path, settings = job
    torch.set_num_threads(1)
    cache = path.with_suffix(".scores")
    known = json.loads(cache.read_text()) if cache.exists() else {}
    keys = {json.dumps(asdict(setting), sort_keys=True): setting for setting in settings}
    new = {key: setting for key, setting in keys.items() if key not in known}
    if new:
        lens, _ = lens_of(path.name.split(".")[0])
        known |= {key: _score(setting, _read(path), lens) for key, setting in new.items()}
        cache.write_text(json.dumps(known))
    return [known[json.dumps(asdict(setting), sort_keys=True)] for setting in settings]


def _score(
    setting: Setting, evidence: Sequence[Evidence], lens: LogitLens
) -> dict[str, list[list[float]]]:
    values: dict[str, list[list[float]]] = {}
    for one in evidence:
        maps = setting.read(setting.trace(one), lens).grid_attr[0]
        for metric, own in score(maps, one).items():
            values.setdefault(metric, []).append(own)
    return values


@cache
def _read(path: Path) -> list[Evidence]:
    return read_saved(path)


# ---- all of them -------------------------------------------------------------------------------


@dataclass
class Bench:
    """Scores settings over all evidence, each once.

    Args:
        pool: processes.
        paths: files of evidence.
        known: what was scored: setting -> training -> set -> metric -> mean.
    """

    pool: ProcessPoolExecutor
    paths: Sequence[Path]
    known: dict[Setting, dict[str, dict[str, dict[str, float]]]]

    def score(self, settings: Sequence[Setting]) -> None:
        """Score what is new."""
        new = tuple(dict.fromkeys(s for s in settings if s not in self.known))
        if not new:
            return
        parts = list(self.pool.map(score_part, [(path, new) for path in self.paths]))
        for i, setting in enumerate(new):
            pooled: dict[str, dict[str, dict[str, list[float]]]] = {}
            for path, part in zip(self.paths, parts, strict=True):
                name, set_name = path.name.split(".")[:2]
                own = pooled.setdefault(name, {}).setdefault(set_name, {})
                for metric, values in part[i].items():
                    own.setdefault(metric, []).extend(v for each in values for v in each)
            self.known[setting] = {
                name: {one: summary(values) for one, values in sets.items()}
                for name, sets in pooled.items()
            }

    def means(self, settings: Sequence[Setting]) -> dict[str, float]:
        """Mean of every metric over settings, trainings and sets."""
        sets = [own for s in settings for each in self.known[s].values() for own in each.values()]
        return {name: float(np.mean([own[name] for own in sets])) for name in METRICS}


def summary(values: dict[str, list[float]]) -> dict[str, float]:
    """Means over words, and their F1-IoU."""
    means = {metric: float(np.nanmean(own)) for metric, own in values.items()}
    return means | {"f1_iou": f1_iou(means["obj_iou"], means["func_iou"])}


def choose(bench: Bench, method: Chosen) -> dict[str, Any]:
    """One option after another.

    Args:
        bench: scores settings.
        method: what is chosen for.

    Returns:
        ``{"name", "start", "chosen", "rounds": [{"option", "tried": [{"options", means...}],
        "taken"}]}``.
    """
    setting, rounds = method.start, []
    bench.score([setting])
    for one in method.rounds:
        tried = [
            (option, [replace(setting, **option, **other) for other in one.over])
            for option in one.options
            if _fits(replace(setting, **option))
        ]
        bench.score([candidate for _, candidates in tried for candidate in candidates])
        rows = [{"options": option, **bench.means(candidates)} for option, candidates in tried]
        taken = best_of(rows, one.tie)
        setting = replace(setting, **taken["options"])
        rounds.append({"option": one.title, "tried": rows, "taken": taken["options"]})
        print(method.name, one.title, taken, flush=True)
    return {"name": method.name, "start": method.start, "chosen": setting, "rounds": rounds}


def best_of(rows: Sequence[dict[str, Any]], tie: float) -> dict[str, Any]:
    """The first of those near the best F1-IoU that are near these's best average precision.

    Args:
        rows: with "f1_iou" and "average_precision", the plainest first.
        tie: how near.
    """
    for metric in ("f1_iou", "average_precision"):
        best = max(row[metric] for row in rows)
        rows = [row for row in rows if row[metric] >= best - tie]
    return rows[0]


def _fits(setting: Setting) -> bool:
    """Whether a setting's options go together."""
    return not (setting.aggregation == "median" and setting.scale_weights != "equal")


# ---- command ---------------------------------------------------------------------------------


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Choose defaults on validation scenes.")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--examples", type=int, default=40, help="per training and set")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the models run")
    parser.add_argument("--evidence", type=Path, help="folder; what it holds is not run again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records")
    args = parser.parse_args()
    start = time.perf_counter()
    folder = args.evidence or Path(tempfile.mkdtemp())
    for path in (folder, args.out):
        path.mkdir(parents=True, exist_ok=True)
    jobs = [
        (
            name,
            one,
            tuple(range(first, min(first + CHUNK, args.examples))),
            str(folder),
            args.device,
        )
        for name, one in product(args.trainings, args.sets)
        for first in range(0, args.examples, CHUNK)
    ]
    paths = [folder / f"{name}.{one}.{some[0]}.pt" for name, one, some, *_ in jobs]
    new = [job for job, path in zip(jobs, paths, strict=True) if not path.exists()]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(gather_part, new))
        print(f"evidence after {time.perf_counter() - start:.0f} s", flush=True)
        bench = Bench(pool, paths, {})
        found = [choose(bench, method) for method in METHODS]
    for method in found:
        for label in ("start", "chosen"):
            setting = method[label]
            method |= {label: asdict(setting), f"{label}_means": bench.means([setting])}
            method[f"{label}_per_training"] = bench.known[setting]
    record = {
        "split": "validation",
        "examples": args.examples,
        "sets": args.sets,
        "weights": {name: weights_of(name) for name in args.trainings},
        "tie": TIE,
        "worth": WORTH,
        "methods": found,
    }
    text = f"{heading(record)}\n\n{table(record)}\n"
    (args.out / "choose.json").write_text(json.dumps(record) + "\n")
    (args.out / "choose.md").write_text(text)
    print(f"{text}\n{time.perf_counter() - start:.0f} s")


def weights_of(name: str) -> str:
    """Hash of a training's weights."""
    return sha256((training_path(name) or model_path(name)) / "model.safetensors")


if __name__ == "__main__":
    main()
