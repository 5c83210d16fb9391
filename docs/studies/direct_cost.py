"""What direct logit attribution costs on models of 7 and 8 billion parameters.

Usage: ``make study NAME=direct_cost ARGS="[--families llava qwen2vl internvl] [--repeats 9]
[--out DIR] [--tiny] [--count]"``; writes ``direct_cost.json`` and ``direct_cost.md``. Needs a GPU
and no download: real architectures, random weights. ``--tiny`` runs the same code on the CPU.
``--count`` needs no GPU: it counts kernels, waits and bytes of the recording, and adds them to the
record, whose figures of a GPU stay; ``--count before`` puts them into the first column, for a
checkout of an earlier state in front of this one in ``PYTHONPATH``.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from captum_mllm import DirectLens, DirectLogitAttribution, LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.model.direct import recorded_contributions
from captum_mllm.model.forward import captured_forward, evaluating
from captum_mllm.model.inputs import append_answer, read_sample
from captum_mllm.model.write_paths import write_paths
from studies import direct_counts
from studies.large import measured
from studies.large_models import (
    ANSWER,
    ATTENTION,
    DTYPE,
    FAMILIES,
    Case,
    Family,
    build,
    make_inputs,
    tiny,
)

BARE, WITH = "teacher-forced forward", "with direct logit attribution"
NOTE = (
    "Medians of interleaved runs; the second row is the same forward with the contributions to "
    "every text token recorded. Ratios are to the first row. The last rows are whole calls of "
    "`attribute`, checks and restoration of the model included."
)

BEFORE = (
    "The figures of a GPU were taken before the recording was made cheaper (what the last tables "
    'call "before"), not since; `make study NAME=direct_cost` on a GPU takes them again.'
)


def measure_case(
    model: Any, family: Family, case: Case, repeats: int, answer: int
) -> dict[str, Any]:
    """Seconds and peak memory of the forward alone, with contributions, and of whole calls.

    Args:
        model: from :func:`studies.large_models.build`.
        family: its architecture.
        case: the picture; its scales beyond the first are not used.
        repeats: measured rounds.
        answer: tokens of the answer.
    """
    device = model.device
    prompt, _, ids = make_inputs(family, case, device, answer)
    adapter = find_adapter(model)
    sample = read_sample(prompt, adapter)
    full = append_answer(sample, ids.to(device), adapter)
    end = full["input_ids"].shape[1]
    rows = torch.arange(end - answer - 1, end - 1, device=device)
    targets = full["input_ids"][0][rows + 1]
    whole: dict[str, Any] = {
        "LogitLens": LogitLens(model),
        "DirectLogitAttribution": DirectLogitAttribution(model),
    }
    if not adapter.fixed_size and case.tiles == (1, 1):
        whole["DirectLens, scales 1 and 1.5"] = DirectLens(model, scales=(1.0, 1.5))

    def bare() -> Any:
        return captured_forward(adapter, full, sample.grids, rows=rows)

    with evaluating(adapter):
        paths = write_paths(adapter)

        def recorded() -> Any:
            with recorded_contributions(adapter, paths, rows, targets) as found:
                bare()
            return found[0]

        for warm_up in (bare, recorded, recorded):
            warm_up()
        parts: dict[str, Callable[[], Any]] = {BARE: bare, WITH: recorded}
        seconds, peaks = _rounds(parts, repeats, device)
    calls = {name: lambda a=a: a.attribute(prompt, ids) for name, a in whole.items()}
    for call in calls.values():
        call()
    more, above = _rounds(calls, repeats, device)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    taken = {name: median(values) for name, values in (seconds | more).items()}
    return {
        "image_tokens": case.tokens[0],
        "seconds": seconds | more,
        "median_seconds": taken,
        "ratio": {name: value / taken[BARE] for name, value in taken.items()},
        "above_weights_bytes": {
            name: None if peak is None else peak - weights for name, peak in (peaks | above).items()
        },
    }


def _rounds(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Seconds of every round and the peak of the first, the calls interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, int | None] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            if name not in peaks:
                gc.collect()
            taken, peak = measured(call, device)
            seconds[name].append(taken)
            peaks.setdefault(name, peak)
    return seconds, peaks


def as_text(record: Mapping[str, Any]) -> str:
    """The tables of a record, as Markdown.

    Args:
        record: of this study.
    """
    out = ["# Cost of direct logit attribution", ""]
    if record["state"] == "before":
        out += [BEFORE, ""]
    out += [
        f"{record['device']}, torch {record['torch']}, transformers {record['transformers']}, "
        f"{record['dtype']}, {record['attention']}, {record['answer_tokens']} answer tokens, "
        f"{record['repeats']} rounds. {NOTE}",
    ]
    for family in record["families"].values():
        for case in family["cases"]:
            out += [
                "",
                f"## {family['title']}, {case['image_tokens']} image tokens",
                "",
                "| | ms | ratio | MiB above the weights |",
                "| --- | --- | --- | --- |",
            ]
            for name, value in case["median_seconds"].items():
                peak = case["above_weights_bytes"][name]
                shown = "" if peak is None else f"{peak / 2**20:.0f}"
                out.append(f"| {name} | {value * 1e3:.1f} | {case['ratio'][name]:.2f} | {shown} |")
    if record.get("counts"):
        out += direct_counts.as_text(record["counts"])
    return "\n".join(out) + "\n"


def add_counts(out: Path, families: Sequence[str], state: str, wide: bool) -> str:
    """Count, and put the counts into the record in a folder; returns its text.

    Args:
        out: folder of the record.
        families: keys in ``FAMILIES``.
        state: column of the table, "before" or "now".
        wide: also bytes, of models of full width.
    """
    record = json.loads((out / "direct_cost.json").read_text())
    counts = record.setdefault("counts", {})
    for name in families:
        row = counts.setdefault(state, {}).setdefault(name, {})
        row |= direct_counts.count(name, wide=wide)
    record["counts"] = {key: counts[key] for key in ("before", "now") if key in counts}
    _write(out, record)
    return as_text(record)


def _write(out: Path, record: Mapping[str, Any]) -> None:
    (out / "direct_cost.json").write_text(json.dumps(record) + "\n")
    (out / "direct_cost.md").write_text(as_text(record))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="Cost of direct logit attribution.")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--count", nargs="?", const="now", choices=["before", "now"])
    args = parser.parse_args(arguments)
    records = Path(__file__).parent / "records"
    if args.count:
        print(add_counts(args.out or records, args.families, args.count, not args.tiny))
        return
    on_gpu = not args.tiny
    if on_gpu and not torch.cuda.is_available():
        parser.error("needs a GPU; --tiny shows on the CPU that the command works.")
    out = args.out or (Path(tempfile.mkdtemp()) if args.tiny else records)
    device = torch.device("cuda:0" if on_gpu else "cpu")
    answer = ANSWER if on_gpu else 6
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
        "attention": ATTENTION,
        "repeats": args.repeats,
        "answer_tokens": answer,
        "state": "now",
        "families": {},
    }
    if (out / "direct_cost.json").exists():
        record["counts"] = json.loads((out / "direct_cost.json").read_text()).get("counts")
    for name in args.families:
        family = FAMILIES[name] if on_gpu else tiny(name)
        model = build(family, device)
        cases = [measure_case(model, family, c, args.repeats, answer) for c in family.cases]
        record["families"][name] = {"title": family.title, "cases": cases}
        _write(out, record)
        del model
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    print(as_text(record))


if __name__ == "__main__":
    main()
