"""Whether the model used what a map marks, and whether it marks the evidence of an answer.

Usage: ``make study NAME=direct_faithful ARGS="[--trainings NAME ...] [--scenes N] [--questions N]
[--workers N] [--out DIR]"``; writes ``direct_faithful.json.xz`` and ``direct_faithful.md``: on
test scenes the linear datamodeling score, keep and remove, and the rank correlation with feature
ablation over cells, of all methods and controls; on the test set "questions" the share of a map's
energy in the evidence that the question's program gives.
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
from torch import Tensor
from tqdm import tqdm

from captum_mllm.functional import WHOLE, rank_correlation, resample_cells, upsample
from captum_mllm.methods import control_maps, explain
from captum_mllm.metrics import (
    energy_in_mask,
    keep_and_remove,
    linear_datamodeling_score,
    paired_bootstrap,
)
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import Example
from studies.choose import weights_of
from studies.direct import rows_of, traces_of, words_of
from studies.evidence import SIDE, examples, lens_of
from studies.prompts import answer_ids, conversation_inputs
from studies.records import write_record

RECORDS = Path(__file__).parent / "records"
OURS = ("lens", "TAM", "TAM over turned views", "MSEA", "MSEA+ARC", "direct", "direct lens")
BASELINES = ("attention", "gradcam", "integrated_gradients")
BEST = "direct lens"
SUBSETS, PER_EVAL, IG_STEPS = 48, 32, 8
CHUNK = 2
MEASURES = ("LDS", "keep and remove", "feature ablation")


@dataclass(frozen=True)
class Job:
    """Some examples, and the training that is asked about them.

    Args:
        training: of ``studies.evidence.TRAININGS``, or "llava-questions".
        set_name: "plain" or "questions".
        numbers: of the examples of the test split.
    """

    training: str
    set_name: str
    numbers: tuple[int, ...]


def measure(job: Job) -> list[dict[str, Any]]:
    """Values of every method on each example: measure -> method -> one value per word.

    Args:
        job: what is measured.
    """
    torch.set_num_threads(1)
    part = _evidence if job.set_name == "questions" else _faithfulness
    return [part(job, example) for example in examples(job.set_name, "test", job.numbers)]


def _maps(job: Job, example: Example, picture: Any) -> tuple[Any, Tensor, dict[str, Tensor], Any]:
    """Inputs, answer, the maps of our rows and of the baselines, and the plain trace."""
    lens, processor = lens_of(job.training)
    model = lens.runner.adapter.model
    inputs, answer = (
        conversation_inputs(processor, picture, example.talk),
        answer_ids(processor, example.talk),
    )
    traces = traces_of(lens, inputs, answer, choosing=False)
    maps = {
        name: row for name, row in rows_of(traces, lens, choosing=False).items() if name in OURS
    }
    for name in BASELINES:
        result = explain(name, model, processor, inputs, answer, steps=IG_STEPS)
        maps[name] = result.grid_attr[0]
    return inputs, answer, maps, traces["lens"]


def _faithfulness(job: Job, example: Example) -> dict[str, Any]:
    lens, processor = lens_of(job.training)
    model = lens.runner.adapter.model
    picture, masks = render_pil(example.scene, SIDE)
    inputs, answer, maps, trace = _maps(job, example, picture)
    nouns = [(o, t) for o, t in words_of(trace, example, masks).nouns if o >= 0 and masks[o].any()]
    grid = trace.grids[0]
    tokens = [noun[0] for _, noun in nouns]
    shown = {name: each[tokens] for name, each in maps.items()}
    controls = [control_maps(masks[o], (grid.rows, grid.cols), seed=o) for o, _ in nouns]
    for name in controls[0] if controls else ():
        shown[name] = torch.stack([each[name] for each in controls])
    if not tokens:
        return {}
    settings: dict[str, Any] = {
        "processor": processor,
        "tokens": tokens,
        "perturbations_per_eval": PER_EVAL,
        "seed": example.number,
    }
    lds = linear_datamodeling_score(model, inputs, answer, shown, subsets=SUBSETS, **settings)
    truth = torch.stack([masks[o].float() for o, _ in nouns])
    kept = keep_and_remove(model, inputs, answer, shown, truth, **settings)
    ablated = explain("ablation", model, processor, inputs, answer).grid_attr[0][tokens]
    size = (int(ablated.shape[-2]), int(ablated.shape[-1]))
    near = {name: resample_cells(each, WHOLE, size) for name, each in shown.items()}
    agreed = {n: rank_correlation(m.flatten(1), ablated.flatten(1)) for n, m in near.items()}
    return {
        "LDS": {name: v.tolist() for name, v in lds.scores.items()},
        "keep and remove": {name: v.tolist() for name, v in kept.scores.items()},
        "feature ablation": {name: v.tolist() for name, v in agreed.items()},
    }


def _evidence(job: Job, example: Example) -> dict[str, Any]:
    """Share of each map's energy in the evidence for the answer's first word."""
    picture, masks = render_pil(example.scene, SIDE)
    _, _, maps, trace = _maps(job, example, picture)
    grid = trace.grids[0]
    known = control_maps(masks[0], (grid.rows, grid.cols), seed=example.number)
    shown = {name: each[:1] for name, each in maps.items()}
    shown |= {name: known[name][None] for name in ("centre", "random")}
    found: dict[str, Any] = {}
    for kind, objects in (example.evidence or {}).items():
        if not objects:
            continue
        truth = masks[list(objects)].any(0)
        found[kind] = {
            name: np.atleast_1d(energy_in_mask(upsample(each, (SIDE, SIDE)), truth[None])).tolist()
            for name, each in shown.items()
        }
    kinds = found.setdefault("union", {})
    if kinds and example.question is not None:
        found[f"union, {example.question.kind}"] = kinds
    return found


# ---- tables ------------------------------------------------------------------------------------


def tables(record: Mapping[str, Any]) -> str:
    """One table per training and set; differences are the best row minus the other.

    Args:
        record: of this study.
    """
    out = [
        "# Faithfulness, and the evidence of answers that name no object",
        "",
        f'Test scenes, mean baseline. In brackets "{BEST}" minus the row, with a 95 % interval '
        "from paired resamples of scenes.",
    ]
    for training, sets in record["measured"].items():
        for set_name, rows in sets.items():
            measures = list(dict.fromkeys(m for row in rows for m in row if row[m]))
            measures = [m for m in measures if m in MEASURES] or sorted(measures)
            for measure_name in measures:
                out += _table(training, set_name, measure_name, rows)
    return "\n".join(out) + "\n"


def _table(training: str, set_name: str, name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    having = [row[name] for row in rows if row.get(name)]
    methods = list(having[0])

    def values(method: str) -> np.ndarray:
        width = max(len(row[method]) for row in having)
        nan = float("nan")
        return np.array([[*row[method], *[nan] * (width - len(row[method]))] for row in having])

    best = values(BEST)
    count = int(np.isfinite(best.astype(float)).sum())
    title = f"## {training}, {set_name}: {name} ({len(having)} scenes, {count} words)"
    lines = ["", title, "", "| method | mean | difference |", "| --- | --- | --- |"]
    for method in methods:
        own = values(method).astype(float)
        cell = ""
        if method != BEST:
            gap = paired_bootstrap(best.astype(float), own, n_resamples=1000, seed=0)
            cell = f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        lines.append(f"| {method} | {np.nanmean(own):.3f} | {cell} |")
    return lines


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="Faithfulness of maps that read the context.")
    parser.add_argument("--trainings", nargs="*", default=["llava", "qwen2vl", "internvl"])
    parser.add_argument("--scenes", type=int, default=26, help="of the plain test set")
    parser.add_argument("--questions", type=int, default=200, help="of the test set questions")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RECORDS)
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    wanted = [(name, "plain", args.scenes) for name in args.trainings]
    wanted += [("llava-questions", "questions", args.questions)] if args.questions else []
    jobs = [
        Job(name, one, tuple(range(at, min(at + CHUNK, count))))
        for name, one, count in wanted
        for at in range(0, count, CHUNK)
    ]
    measured: dict[str, Any] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        results = tqdm(pool.map(measure, jobs), total=len(jobs), mininterval=20)
        for job, found in zip(jobs, results, strict=True):
            rows = measured.setdefault(job.training, {}).setdefault(job.set_name, [])
            rows += [_rounded(row) for row in found]
    weights = {name: weights_of(name) for name in measured}
    record = {"subsets": SUBSETS, "weights": weights, "measured": measured}
    write_record(args.out / "direct_faithful.json.xz", record)
    text = tables(record)
    (args.out / "direct_faithful.md").write_text(text)
    print(f"{text}\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
