"""How good the maps are on test scenes: every method, controls, ranges of scales, faithfulness.

Usage: ``make study NAME=quality ARGS="[--trainings NAME ...] [--workers N] [--device cuda]
[--chosen FILE] [--out DIR]"``; writes ``quality.json`` (every scene's values) and ``quality.md``.
The settings are those that ``studies.choose`` chose on validation scenes (its record). Run it from
a checkout, which holds the further training (``docs/studies/weights``), the third style at hand
(``captum_mllm.reference.openmoji``). Needs the extra ``metrics``.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from captum_mllm.files import nan_to_none, write_atomic
from captum_mllm.methods import explain
from captum_mllm.metrics import insertion_deletion
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import Example
from studies.choose import DEFAULTS, weights_of
from studies.evidence import SIDE, Evidence, Setting, Values, examples, gather, lens_of, score
from studies.prompts import answer_ids, conversation_inputs
from studies.quality_bounds import mask_scores
from studies.quality_rows import methods, ranges, sensitivity
from studies.quality_table import tables
from studies.quality_time import RUNS, seconds

RECORDS = Path(__file__).parent / "records"
FAMILIES = ("llava", "qwen2vl", "internvl")
ONE_SIZE = "llava-one-size"
COMPARED = ("plain", "openmoji")
METRICS = ("obj_iou", "average_precision", "oracle_iou")
BASELINES = ("attention", "gradcam", "integrated_gradients", "ablation")
CONTROLS = ("mask", "random", "centre", "randomised_model")
REPLACED = ("blur",)
STEPS, PER_EVAL, CHUNK = 16, 32, 2
IG_STEPS = 8
PARTS = ("methods", "ranges", "sensitivity", "faithfulness", "bounds", "time")
COUNTED = {  # part -> what says how many scenes it takes
    "methods": "scenes",
    "ranges": "ranges",
    "sensitivity": "ranges",
    "faithfulness": "judged",
}
Rows = dict[str, Values]


@dataclass(frozen=True)
class Job:
    """Some examples of one set for one training, and what is measured on them.

    Args:
        part: "methods", "ranges", "sensitivity" or "faithfulness".
        training: of `TRAININGS`.
        set_name: of the test sets.
        numbers: of the examples.
        device: where the model runs.
        rows: name and setting of each row.
    """

    part: str
    training: str
    set_name: str
    numbers: tuple[int, ...]
    device: str
    rows: tuple[tuple[str, Setting], ...]


# ---- one process's part ------------------------------------------------------------------------


def measure(job: Job) -> list[Rows]:
    """Values of each example.

    Args:
        job: what is measured.
    """
    torch.set_num_threads(1)
    lens, processor = lens_of(job.training, job.device)
    model = lens.runner.adapter.model
    found = []
    for example in examples(job.set_name, "test", job.numbers):
        evidence = gather(
            model,
            processor,
            example,
            scales_of(job.rows),
            consistency=False,
            shifts=any(setting.shifted for _, setting in job.rows),
        )
        if job.part == "faithfulness":
            found.append(faithfulness(model, processor, example, evidence, job))
            continue
        rows: Rows = {}
        for name, setting in job.rows:
            maps = setting.read(setting.trace(evidence), lens).grid_attr[0]
            rows[name] = score(maps, evidence, METRICS if job.part == "methods" else METRICS[:2])
        found.append(rows)
    return found


def scales_of(rows: Sequence[tuple[str, Setting]]) -> tuple[float, ...]:
    """All scales that some rows read, 1 first."""
    scales = {scale for _, setting in rows for scale in setting.scales} - {1.0}
    return (1.0, *sorted(scales))


def faithfulness(
    model: Any, processor: Any, example: Example, evidence: Evidence, job: Job
) -> Rows:
    """Localisation of baselines and controls, and insertion and deletion of all rows.

    Args:
        model: the model.
        processor: its processor.
        example: the example.
        evidence: of it.
        job: its rows are the methods whose faithfulness is measured.

    Returns:
        Per row the metrics of `score` and, of each baseline image, insertion, deletion and their
        difference of each noun that names a visible object, by the token that
        begins it; "sensitive": 1 where black costs it more than 0.2 of its probability.
    """
    lens, _ = lens_of(job.training, job.device)
    picture, masks = render_pil(example.scene, SIDE)
    inputs = conversation_inputs(processor, picture, example.talk).to(model.device)
    answer = answer_ids(processor, example.talk).to(model.device)
    named = {tokens: obj for obj, tokens in evidence.nouns if obj >= 0 and masks[obj].any()}
    shown = {t: masks[obj] for tokens, obj in named.items() for t in tokens}
    maps = {
        name: setting.read(setting.trace(evidence), lens).grid_attr[0] for name, setting in job.rows
    }
    for name in (*BASELINES, *CONTROLS):
        result = explain(
            name,
            model,
            processor,
            inputs,
            answer,
            masks=shown,
            seed=example.number,
            steps=IG_STEPS,
        )
        maps[name] = result.grid_attr[0]
    first = [tokens[0] for tokens in named]
    rows: Rows = {}
    for name, own in maps.items():
        rows[name] = score(own, evidence, METRICS)
        for replaced in REPLACED if first else ():
            curves = insertion_deletion(
                model,
                inputs,
                answer,
                own[first],
                processor=processor,
                tokens=first,
                baseline=replaced,
                steps=STEPS,
                perturbations_per_eval=PER_EVAL,
            )
            rows[name] |= {
                f"insertion, {replaced}": curves.insertion_auc.tolist(),
                f"deletion, {replaced}": curves.deletion_auc.tolist(),
                f"difference, {replaced}": curves.difference.tolist(),
                "sensitive": curves.sensitive.double().tolist(),
            }
    return rows


# ---- all of them -------------------------------------------------------------------------------


def jobs(chosen: dict[str, Setting], args: argparse.Namespace) -> list[Job]:
    """All parts, the longest first."""
    compared = methods(chosen)
    judged = {
        name: compared[name]
        for name in (
            "LogitLens, published",
            "TAM, published",
            "MSEA+ARC, published",
            "TAM, chosen",
            "MSEA, chosen",
            "MSEA+ARC, chosen",
            "chosen, single scale blurred by 0.75 cells",
        )
    }
    plan: list[tuple[str, Sequence[str], Sequence[str], int, dict[str, Setting]]] = [
        ("methods", FAMILIES, COMPARED, args.scenes, compared),
        ("ranges", (*FAMILIES, ONE_SIZE), ("plain",), args.ranges, ranges(chosen)),
        ("sensitivity", FAMILIES, ("plain",), args.ranges, sensitivity(chosen)),
        ("faithfulness", FAMILIES, ("plain",), args.judged, judged),
    ]
    found = []
    for part, trainings, sets, count, rows in plan:
        for name in trainings:
            if part not in args.parts or name not in args.trainings:
                continue
            for set_name in sets:
                for first in range(0, count, CHUNK):
                    numbers = tuple(range(first, min(first + CHUNK, count)))
                    job = Job(part, name, set_name, numbers, args.device, tuple(rows.items()))
                    found.append(job)
    return found


def chosen_settings(path: Path) -> dict[str, Setting]:
    """The settings that `studies.choose` recorded; of MSEA+ARC the defaults that came of it."""
    record = json.loads(path.read_text())
    found = {
        method["name"]: Setting(**method["chosen"] | {"scales": tuple(method["chosen"]["scales"])})
        for method in record["methods"]
    }
    return found | {"MSEA+ARC": Setting("arc", **DEFAULTS)}


def measured_once(job: Job, folder: Path) -> list[Rows]:
    """What an earlier run left in the folder, or :func:`measure`'s values, which are left there.

    Args:
        job: what is measured.
        folder: of the parts that are done.
    """
    name = f"{job.part}.{job.training}.{job.set_name}.{job.numbers[0]}-{job.numbers[-1]}.json"
    key = (job.rows, STEPS, IG_STEPS, weights_of(job.training))
    settings = hashlib.sha256(repr(key).encode()).hexdigest()
    path = folder / f"{settings[:12]}.{name}"
    if not path.exists():
        write_atomic(path, json.dumps(nan_to_none(measure(job))).encode())
    return json.loads(path.read_text())


def put_together(measured: dict[str, Any], done: Mapping[Job, list[Rows]]) -> None:
    """Put the values of jobs into a record, in place of what it held of their sets.

    Args:
        measured: part -> training -> set -> row -> metric -> scene -> values.
        done: jobs in their order, and what each measured.
    """
    for job, found in done.items():
        sets = measured.setdefault(job.part, {}).setdefault(job.training, {})
        if job.numbers[0] == 0:
            sets[job.set_name] = {}
        own = sets[job.set_name]
        for rows in found:
            for name, values in rows.items():
                for metric, each in values.items():
                    kept = own.setdefault(name, {}).setdefault(metric, [])
                    kept.append([None if v is None else round(v, 3) for v in each])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Quality of all methods on test scenes.")
    parser.add_argument("--trainings", nargs="+", default=[*FAMILIES, ONE_SIZE])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--scenes", type=int, default=60, help="of the test split, per set")
    parser.add_argument("--ranges", type=int, default=20, help="scenes for ranges and sensitivity")
    parser.add_argument("--judged", type=int, default=8, help="scenes for faithfulness")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each setting, for its time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the models run")
    parser.add_argument("--chosen", type=Path, default=RECORDS / "choose.json")
    parser.add_argument("--progress", type=Path, help="folder; what it holds is not run again")
    parser.add_argument("--out", type=Path, default=RECORDS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    args = _parser().parse_args(arguments)
    folder = args.progress or Path(tempfile.mkdtemp())
    for made in (args.out, folder):
        made.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    chosen = chosen_settings(args.chosen)
    planned = jobs(chosen, args)
    path = args.out / "quality.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:  # what is not run again keeps its own
        if part in COUNTED:
            record[COUNTED[part]] = getattr(args, COUNTED[part])
    weights = record.get("weights", {}) | {name: weights_of(name) for name in args.trainings}
    record |= {"steps": STEPS, "weights": weights}
    done: dict[Job, list[Rows]] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(measured_once, job, folder): job for job in planned}
        for future in tqdm(as_completed(running), total=len(running), mininterval=10):
            done[running[future]] = future.result()
    put_together(record.setdefault("measured", {}), {job: done[job] for job in planned})
    if "bounds" in args.parts:
        record["bounds"] = {name: mask_scores(name, args.scenes) for name in COMPARED}
    if "time" in args.parts:
        rows = sensitivity(chosen)
        record["seconds"] = record.get("seconds", {}) | {
            name: seconds(name, rows, args.runs, args.device)
            for name in FAMILIES
            if name in args.trainings
        }
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    text = tables(record)
    (args.out / "quality.md").write_text(text)
    print(f"{text}\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
