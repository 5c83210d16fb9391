"""Maps that read the context: direct logit attribution and its product with the lens, by scenes.

Usage: ``make study NAME=direct ARGS="[--split validation] [--trainings NAME ...] [--sets NAME ...]
[--examples N] [--workers N] [--device cuda] [--record FILE] [--add]"``; writes every example's
values to ``records/direct.<split>.json.xz`` and the tables to ``records/direct.<split>.md``.
Options are chosen on the validation split; the test split reports the rows that were chosen.
``--add`` measures the rows of adaptive calibration alone, and adds them to the examples of the
record.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_mllm import ARC, JointNormalization, LogitLens, TokenActivationMap
from captum_mllm.attr.direct_lens import product_trace
from captum_mllm.functional import upsample
from captum_mllm.metrics import is_function_word
from captum_mllm.model.scales import GatheredViews, ViewPlan, gather_views
from captum_mllm.model.trace import TokenTrace
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import Example
from studies.choose import weights_of
from studies.direct_table import adaptive_table, tables
from studies.evidence import SIDE, Evidence, Values, examples, lens_of, score
from studies.prompts import answer_ids, conversation_inputs, script_columns, whole_nouns
from studies.records import read_record, write_record

RECORDS = Path(__file__).parent / "records"
SCALES = (1.0, 2.0)
DEPTH = 50
CHUNK = 5
TAUS = (1.5, 2.0)
ADDED = (
    "TAM, adaptive",
    "TAM over turned views, adaptive",
    "MSEA+ARC, turned views, adaptive",
    "direct, adaptive",
    "direct lens, adaptive",
    "direct lens, beta 2, adaptive",
)
CHECKED, NEAR = "lens", 0.02
Traces = dict[str, TokenTrace]


@dataclass(frozen=True)
class Job:
    """Some examples of one set for one training.

    Args:
        training: of ``studies.evidence.TRAININGS``.
        set_name: of the test sets.
        split: "validation" or "test".
        numbers: of the examples.
        device: where the model runs.
        adding: whether the rows of `ADDED` alone are measured, and "lens" to check the record by.
    """

    training: str
    set_name: str
    split: str
    numbers: tuple[int, ...]
    device: str
    adding: bool = False


def traces_of(
    lens: LogitLens, inputs: Any, answer: Tensor, *, choosing: bool, mirrored: bool = True
) -> Traces:
    """Every trace that a row reads, from the views of both flips.

    Args:
        lens: of the model.
        inputs: the prompt.
        answer: ids of the reference answer.
        choosing: whether all candidates are wanted, or what was chosen alone.
        mirrored: whether mirrored views are wanted too, default True.

    Returns:
        Name -> trace.
    """
    turned = ViewPlan(lens=SCALES, flip="half_turn", direct=SCALES)
    half = gather_views(lens.runner, inputs, answer, turned, top_k=DEPTH)
    assert half.direct is not None
    traces = {
        "lens": half.lens.base,
        "turned": half.lens.merged("mean", "adaptive"),
        "direct": half.direct.merged("mean", "equal"),
        "product, turned, 1": product_trace(half, "adaptive", 1.0),
        "product, turned, 2": product_trace(half, "adaptive", 2.0),
    }
    if not mirrored:
        return traces
    flipped = ViewPlan(lens=SCALES, flip="horizontal")
    side = gather_views(lens.runner, inputs, answer, flipped, top_k=DEPTH)
    traces["mirrored"] = side.lens.merged("mean", "adaptive")
    if choosing:
        plain = half.lens.select([0, 2])
        traces["direct, scale 1"] = half.direct.select([0]).merged("mean", "equal")
        traces["product, plain, 1"] = product_trace(
            GatheredViews(plain, half.direct), "adaptive", 1.0
        )
        traces["product, mirrored, 1"] = product_trace(
            GatheredViews(side.lens, half.direct), "adaptive", 1.0
        )
        traces["product, turned, 0.5"] = product_trace(half, "adaptive", 0.5)
    return traces


def rows_of(traces: Traces, lens: LogitLens, *, choosing: bool) -> dict[str, Tensor]:
    """Maps in [0, 1] of every row whose trace is there, (tokens, rows, cols).

    Args:
        traces: of :func:`traces_of`.
        lens: any attributor of the model; it is not run.
        choosing: whether all candidates are wanted.
    """
    finish: dict[str, Any] = {"upsampling": 2, "calibration": 1.5}
    fitted: dict[str, Any] = {"upsampling": 2, "calibration": "adaptive"}
    bounded: dict[str, Any] = {"rank_filter": False, "alpha_max": 0.25}
    readers = {
        "lens": ("lens", JointNormalization(lens, upsampling=2, calibration=1.0)),
        "TAM": (
            "lens",
            TokenActivationMap(lens, rank_filter=False, alpha_max=0.25, **finish),
        ),
        "TAM over mirrored views": (
            "mirrored",
            TokenActivationMap(lens, rank_filter=False, alpha_max=0.25, **finish),
        ),
        "TAM over turned views": (
            "turned",
            TokenActivationMap(lens, rank_filter=False, alpha_max=0.25, **finish),
        ),
        "MSEA": ("mirrored", JointNormalization(lens, **finish)),
        "MSEA+ARC": ("mirrored", ARC(lens)),
        "MSEA+ARC, turned views": ("turned", ARC(lens)),
        "direct": ("direct", JointNormalization(lens, **finish)),
        "direct lens": ("product, turned, 1", JointNormalization(lens, **finish)),
        "direct lens, beta 2": ("product, turned, 2", JointNormalization(lens, **finish)),
        "direct lens + ARC": ("product, turned, 1", ARC(lens)),
        "TAM, adaptive": ("lens", TokenActivationMap(lens, **bounded, **fitted)),
        "TAM over turned views, adaptive": (
            "turned",
            TokenActivationMap(lens, **bounded, **fitted),
        ),
        "MSEA+ARC, turned views, adaptive": ("turned", ARC(lens, **fitted)),
        "direct, adaptive": ("direct", JointNormalization(lens, **fitted)),
        "direct lens, adaptive": ("product, turned, 1", JointNormalization(lens, **fitted)),
        "direct lens, beta 2, adaptive": (
            "product, turned, 2",
            JointNormalization(lens, **fitted),
        ),
    }
    if choosing:
        for name in traces:
            if name.startswith(("product", "direct")):
                for tau in TAUS:
                    reader = JointNormalization(lens, upsampling=2, calibration=tau)
                    readers[f"{name}, tau {tau:g}"] = (name, reader)
        readers["product, turned, 1, ECI"] = (
            "product, turned, 1",
            TokenActivationMap(lens, rank_filter=False, alpha_max=0.25, **finish),
        )
    return {
        row: reader.attribute_trace(traces[name]).grid_attr[0]
        for row, (name, reader) in readers.items()
        if name in traces
    }


def measure(job: Job) -> list[dict[str, Values]]:
    """Values of every row on each example.

    Args:
        job: what is measured.
    """
    torch.set_num_threads(1)
    lens, processor = lens_of(job.training, job.device)
    choosing = job.split == "validation"
    found = []
    for example in examples(job.set_name, job.split, job.numbers):
        picture, masks = render_pil(example.scene, SIDE)
        inputs = conversation_inputs(processor, picture, example.talk).to(job.device)
        answer = answer_ids(processor, example.talk).to(job.device)
        traces = traces_of(lens, inputs, answer, choosing=choosing, mirrored=not job.adding)
        evidence = words_of(traces["lens"], example, masks)
        maps = rows_of(traces, lens, choosing=choosing)
        if job.adding:
            maps = {name: each for name, each in maps.items() if name in (CHECKED, *ADDED)}
        rows = {}
        for name, each in maps.items():
            rows[name] = score(each, evidence) | {"right": twins(each, evidence, example)}
        found.append(rows)
    return found


def words_of(trace: TokenTrace, example: Example, masks: Tensor) -> Evidence:
    """Nouns and function words of the reference answer, without views.

    Args:
        trace: of the answer.
        example: the example.
        masks: bool (objects, side, side).
    """
    start = trace.n_prompt
    words = [
        (word, [column - start for column in columns])
        for word, columns in script_columns(trace, example.talk)
        if columns[0] >= start
    ]
    return Evidence(
        views=None,  # type: ignore[arg-type]
        asked=(),
        nouns=tuple((word.obj, tuple(tokens)) for word, tokens in whole_nouns(words)),
        functions=tuple(tuple(tokens) for word, tokens in words if is_function_word(word.text)),
        masks=masks,
    )


def twins(maps: Tensor, evidence: Evidence, example: Example) -> list[float]:
    """Of each noun that two objects share: 1 where the one that is meant is brighter.

    Args:
        maps: (tokens, rows, cols).
        evidence: knows the nouns and masks.
        example: the example.

    Returns:
        One value per noun: 1, 0, or .5 where both are equally bright.
    """
    kinds = example.scene.categories
    pixels = upsample(maps, (evidence.masks.shape[-2], evidence.masks.shape[-1]))
    found = []
    for obj, tokens in evidence.nouns:
        others = [o for o, kind in enumerate(kinds) if o != obj and obj >= 0 and kind == kinds[obj]]
        if not others or not all(bool(evidence.masks[o].any()) for o in (obj, *others)):
            continue
        shown = pixels[list(tokens)].mean(0)
        meant, other = (float(shown[evidence.masks[o]].mean()) for o in (obj, others[0]))
        found.append(0.5 if meant == other else float(meant > other))
    return found


def _rounded(rows: Mapping[str, Values]) -> dict[str, Values]:
    return {
        name: {metric: [round(v, 4) for v in each] for metric, each in values.items()}
        for name, values in rows.items()
    }


def joined_rows(
    old: Sequence[Mapping[str, Values]], new: Sequence[Mapping[str, Values]], first: int = 0
) -> list[dict[str, Values]]:
    """Rows added to those of the same examples.

    Args:
        old: rows of each example of the record.
        new: rows of `ADDED`, and "lens" again, of all or some of these examples.
        first: number of the first of these.

    Returns:
        Both, the old values of "lens".

    Raises:
        ValueError: more examples, or "lens" is not what the record has.
    """
    if len(old) < first + len(new):
        raise ValueError(f"the record has {len(old)} examples, got {first + len(new)}.")
    for number, again in enumerate(new, first):
        known = old[number]
        for metric, values in again[CHECKED].items():
            pairs = zip(known[CHECKED][metric], values, strict=True)
            if any(abs(a - b) > NEAR for a, b in pairs):
                raise ValueError(f"example {number}: {metric} of the lens is not the record's.")
    rows = [dict(known) for known in old]
    for known, again in zip(rows[first:], new, strict=False):
        known |= {name: again[name] for name in ADDED}
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="Maps that read the context.")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--trainings", nargs="+", default=["llava", "qwen2vl", "internvl"])
    parser.add_argument("--sets", nargs="+", default=["plain", "twins", "openmoji"])
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first example")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--add", action="store_true", help="only the rows of adaptive calibration")
    parser.add_argument("--record", type=Path, help="default: direct.<split>.json.xz of records")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    path = args.record or RECORDS / f"direct.{args.split}.json.xz"
    record: dict[str, Any] = read_record(path) if path.exists() else {}
    record |= {"split": args.split}
    jobs = [
        Job(
            training,
            one,
            args.split,
            tuple(range(at, min(at + CHUNK, end))),
            args.device,
            args.add,
        )
        for training, one in product(args.trainings, args.sets)
        for end in (args.first + args.examples,)
        for at in range(args.first, end, CHUNK)
    ]
    done: dict[Job, list[dict[str, Values]]] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(measure, job): job for job in jobs}
        for future in tqdm(as_completed(running), total=len(running), mininterval=20):
            done[running[future]] = [_rounded(rows) for rows in future.result()]
    measured = record.setdefault("measured", {})
    for training, one in product(args.trainings, args.sets):
        mine = [job for job in jobs if (job.training, job.set_name) == (training, one)]
        found = [rows for job in mine for rows in done[job]]
        if args.add:
            found = joined_rows(measured[training][one], found, args.first)
        measured.setdefault(training, {})[one] = found
    weights = {name: weights_of(name) for name in args.trainings}
    record["weights"] = record.get("weights", {}) | weights
    write_record(path, record)
    text = tables(record) + adaptive_table(record)
    path.with_name(path.name.removesuffix(".json.xz") + ".md").write_text(text)
    print(f"{text}\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
