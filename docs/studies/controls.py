"""The order of the controls that are made from a mask, by how far the near misses miss.

Usage: ``make study NAME=controls ARGS="[--trainings NAME ...] [--scenes N] [--workers N]
[--out DIR]"``; writes ``controls.json.xz`` and ``controls.md``: on plain test scenes the linear
datamodeling score and keep and remove of every control, with near misses by one cell of the model's
grid and by half a cell, and of DirectLens in both calibrations for comparison.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captum_mllm.methods import control_maps
from captum_mllm.metrics import keep_and_remove, linear_datamodeling_score, paired_bootstrap
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import Example
from studies.choose import weights_of
from studies.direct import rows_of, traces_of, words_of
from studies.direct_faithful import MEASURES, PER_EVAL, SUBSETS
from studies.evidence import SIDE, examples, lens_of
from studies.prompts import answer_ids, conversation_inputs
from studies.records import write_record

RECORDS = Path(__file__).parent / "records"
CELLS = (1.0, 0.5)
OURS = ("direct lens", "direct lens, adaptive")
NEAR = ("eroded", "dilated", "shifted", "blurred")
CHUNK = 2


@dataclass(frozen=True)
class Job:
    """Some plain test scenes for one training.

    Args:
        training: of ``studies.evidence.TRAININGS``.
        numbers: of the scenes.
    """

    training: str
    numbers: tuple[int, ...]


def measure(job: Job) -> list[dict[str, Any]]:
    """Values of every map on each scene: measure -> map -> one value per noun.

    Args:
        job: what is measured.
    """
    torch.set_num_threads(1)
    return [_scene(job.training, one) for one in examples("plain", "test", job.numbers)]


def controls_of(mask: torch.Tensor, grid: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Every control, the near misses once per entry of `CELLS`.

    Args:
        mask: bool (height, width).
        grid: rows and columns of the model's cells.
        seed: of the random map.
    """
    found: dict[str, torch.Tensor] = {}
    for cells in CELLS:
        for name, each in control_maps(mask, grid, cells=cells, seed=seed).items():
            found[f"{name}, {cells:g} cell" if name in NEAR else name] = each
    return found


def _scene(training: str, example: Example) -> dict[str, Any]:
    lens, processor = lens_of(training)
    model = lens.runner.adapter.model
    picture, masks = render_pil(example.scene, SIDE)
    inputs = conversation_inputs(processor, picture, example.talk)
    answer = answer_ids(processor, example.talk)
    trace = lens.trace(inputs, answer)
    nouns = [(o, t) for o, t in words_of(trace, example, masks).nouns if o >= 0 and masks[o].any()]
    if not nouns:
        return {}
    grid = (trace.grids[0].rows, trace.grids[0].cols)
    per = [controls_of(masks[o], grid, o) for o, _ in nouns]
    shown = {name: torch.stack([each[name] for each in per]) for name in per[0]}
    truth = torch.stack([masks[o].float() for o, _ in nouns])
    area = {n: (m.flatten(1).sum(1) / truth.flatten(1).sum(1)).tolist() for n, m in shown.items()}
    traces = traces_of(lens, inputs, answer, choosing=False, mirrored=False)
    ours = rows_of(traces, lens, choosing=False)
    shown |= {name: ours[name][[tokens[0] for _, tokens in nouns]] for name in OURS}
    settings: dict[str, Any] = {
        "processor": processor,
        "tokens": [tokens[0] for _, tokens in nouns],
        "perturbations_per_eval": PER_EVAL,
        "seed": example.number,
    }
    lds = linear_datamodeling_score(model, inputs, answer, shown, subsets=SUBSETS, **settings)
    kept = keep_and_remove(model, inputs, answer, shown, truth, **settings)
    return {
        "LDS": {name: v.tolist() for name, v in lds.scores.items()},
        "keep and remove": {name: v.tolist() for name, v in kept.scores.items()},
        "area": {name: area[name] for name in area if name.startswith(("eroded", "dilated"))},
    }


# ---- tables ------------------------------------------------------------------------------------


def values_of(rows: Sequence[Mapping[str, Any]], measure_name: str, control: str) -> np.ndarray:
    """Values of a control, (scenes, nouns), padded with NaN."""
    each = [row[measure_name][control] for row in rows if row]
    width = max(len(values) for values in each)
    return np.array([[*v, *[np.nan] * (width - len(v))] for v in each], dtype=float)


def tables(record: Mapping[str, Any]) -> str:
    """One table per training and measure, the best control first.

    Args:
        record: of this study.
    """
    out = [
        "# The order of the controls",
        "",
        "`make study NAME=controls`: plain test scenes, mean baseline. "
        "In brackets the mask minus the map, with a 95 % "
        "interval from paired resamples of scenes. Area: of the mask's; empty: nouns of whose mask "
        "nothing is left.",
    ]
    for training, rows in record["measured"].items():
        for name in MEASURES[:2]:
            controls = list(next(row for row in rows if row)[name])
            mean = {one: float(np.nanmean(values_of(rows, name, one))) for one in controls}
            count = int(np.isfinite(values_of(rows, name, "mask")).sum())
            out += [
                "",
                f"## {training}: {name} ({count} nouns)",
                "",
                "| map | mean | mask minus it | area | empty |",
                "| --- | --- | --- | --- | --- |",
            ]
            out += [_line(rows, name, one) for one in sorted(controls, key=lambda c: -mean[c])]
    return "\n".join(out) + "\n"


def _line(rows: Sequence[Mapping[str, Any]], name: str, control: str) -> str:
    own = values_of(rows, name, control)
    cells = [control, f"{np.nanmean(own):.3f}", "", "", ""]
    if control != "mask":
        gap = paired_bootstrap(values_of(rows, name, "mask"), own, n_resamples=1000, seed=0)
        cells[2] = f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    if control in next(row for row in rows if row)["area"]:
        area = values_of(rows, "area", control)
        area = area[np.isfinite(area)]
        cells[3:] = [f"{100 * area.mean():.0f} %", f"{100 * (area == 0).mean():.0f} %"]
    return "| " + " | ".join(cells) + " |"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [round(each, 4) for each in value]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="The order of the controls.")
    parser.add_argument("--trainings", nargs="+", default=["llava", "qwen2vl", "internvl"])
    parser.add_argument("--scenes", type=int, default=28)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RECORDS)
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    jobs = [
        Job(name, tuple(range(at, min(at + CHUNK, args.scenes))))
        for name in args.trainings
        for at in range(0, args.scenes, CHUNK)
    ]
    measured: dict[str, Any] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        results = tqdm(pool.map(measure, jobs), total=len(jobs), mininterval=20)
        for job, found in zip(jobs, results, strict=True):
            measured.setdefault(job.training, []).extend(_rounded(row) for row in found)
    weights = {name: weights_of(name) for name in measured}
    record = {"subsets": SUBSETS, "weights": weights, "measured": measured}
    write_record(args.out / "controls.json.xz", record)
    text = tables(record)
    (args.out / "controls.md").write_text(text)
    print(f"{text}\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
