"""How many samples pass the gates that are set before any map is made.

Usage: ``make study NAME=gates ARGS="[--trainings NAME ...] [--sets NAME ...] [--examples N]
[--workers N] [--out DIR]"``; writes ``gates.json.xz`` (every example's gates) and ``gates.md`` (the
tables). Each set has N examples of the validation and N of the test split. The answer is the
reference answer; the tokens are the first of each of its nouns, or of the set "questions" the first
of the answer.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from captum_mllm.metrics import SampleGates, gates_table, sample_gates
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import Example
from studies.choose import weights_of
from studies.direct import words_of
from studies.evidence import SIDE, examples, lens_of
from studies.prompts import answer_ids, conversation_inputs
from studies.records import write_record

RECORDS = Path(__file__).parent / "records"
SPLITS = ("validation", "test")
QUESTIONS = ("llava-questions", "questions")
BASELINE, LEAST = "mean", 0.5
CHUNK = 5


@dataclass(frozen=True)
class Job:
    """Some examples, and the training that is asked about them.

    Args:
        training: of ``studies.evidence.TRAININGS``, or "llava-questions".
        set_name: of the test sets.
        split: "validation" or "test".
        numbers: of the examples.
    """

    training: str
    set_name: str
    split: str
    numbers: tuple[int, ...]


def measure(job: Job) -> list[dict[str, Any]]:
    """The gates of each example, and the probability of each of its tokens.

    Args:
        job: what is measured.
    """
    torch.set_num_threads(1)
    return [_checked(job, one) for one in examples(job.set_name, job.split, job.numbers)]


def _checked(job: Job, example: Example) -> dict[str, Any]:
    lens, processor = lens_of(job.training)
    picture, masks = render_pil(example.scene, SIDE)
    inputs = conversation_inputs(processor, picture, example.talk)
    answer = answer_ids(processor, example.talk)
    trace = lens.trace(inputs, answer)
    tokens = [0]
    if job.set_name != "questions":
        nouns = words_of(trace, example, masks).nouns
        tokens = [place[0] for obj, place in nouns if obj >= 0 and bool(masks[obj].any())]
    found = sample_gates(
        lens.runner.adapter.model,
        inputs,
        answer,
        processor=processor,
        tokens=tokens,
        baseline=BASELINE,
    )
    return asdict(found) | {"probs": trace.probs[tokens].tolist()}


# ---- tables ------------------------------------------------------------------------------------


def gates_of(row: Mapping[str, Any]) -> SampleGates:
    """The gates that a row of the record holds."""
    known: dict[str, Any] = {one.name: row[one.name] for one in fields(SampleGates)}
    known |= {name: tuple(v) for name, v in known.items() if isinstance(v, (list, tuple))}
    return SampleGates(**known)


def _share(flags: Sequence[bool]) -> str:
    return f"{100 * sum(flags) / len(flags):.0f} %" if flags else ""


def summary(measured: Mapping[str, Any]) -> list[str]:
    """One line per training and set: both splits together.

    Args:
        measured: of the record: training -> set -> split -> rows.
    """
    lines = [
        "| model, set | samples | greedy | blank differs | all gates | nouns | log p drops "
        "| p >= .5 | everything |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for training, sets in measured.items():
        for name, splits in sets.items():
            rows = [row for split in splits.values() for row in split]
            gates = [gates_of(row) for row in rows]
            drops = [drop for one in gates for drop in one.drops]
            sure = [p >= LEAST for row in rows for p in row["probs"]]
            kept = [one.sample for one in gates for _ in one.drops]
            cells = [
                f"{training}, {name}",
                f"{len(rows)}",
                _share([one.greedy for one in gates]),
                _share([one.blank_differs for one in gates]),
                _share([one.sample for one in gates]),
                f"{len(drops)}",
                _share(drops),
                _share(sure),
                _share([all(each) for each in zip(kept, drops, sure, strict=True)]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def tables(record: Mapping[str, Any]) -> str:
    """All samples in one table, then every gate of each training and set.

    Args:
        record: of this study.
    """
    out = [
        "# Gates of samples",
        "",
        "`make study NAME=gates`, with the reference answers. "
        "greedy: they are the model's own; blank differs: a blank image gives "
        "another answer; all gates: also stable, and ids that survive re-encoding. Of the nouns of "
        "visible objects (their first token; of questions the answer's first): log p drops "
        f"without the image ({record['baseline']} baseline); p >= .5 with it; everything: both, in "
        "a sample that passes all gates.",
        "",
        *summary(record["measured"]),
    ]
    for training, sets in record["measured"].items():
        for name, splits in sets.items():
            for split, rows in splits.items():
                out += ["", f"## {training}, {name}, {split}", "", gates_table(map(gates_of, rows))]
    return "\n".join(out) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="How many samples pass the gates.")
    parser.add_argument("--trainings", nargs="*", default=["llava", "qwen2vl", "internvl"])
    parser.add_argument("--sets", nargs="+", default=["plain", "twins", "crowded", "small"])
    parser.add_argument("--examples", type=int, default=30, help="per split")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RECORDS)
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    wanted = [*product(args.trainings, args.sets), QUESTIONS]
    jobs = [
        Job(training, one, split, tuple(range(at, min(at + CHUNK, args.examples))))
        for (training, one), split in product(wanted, SPLITS)
        for at in range(0, args.examples, CHUNK)
    ]
    measured: dict[str, Any] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        results = tqdm(pool.map(measure, jobs), total=len(jobs), mininterval=20)
        for job, found in zip(jobs, results, strict=True):
            splits = measured.setdefault(job.training, {}).setdefault(job.set_name, {})
            probs = [[round(p, 4) for p in row["probs"]] for row in found]
            rows = [row | {"probs": p} for row, p in zip(found, probs, strict=True)]
            splits.setdefault(job.split, []).extend(rows)
    weights = {name: weights_of(name) for name in measured}
    record = {"baseline": BASELINE, "weights": weights, "measured": measured}
    write_record(args.out / "gates.json.xz", record)
    text = tables(record)
    (args.out / "gates.md").write_text(text)
    print(f"{text}\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
