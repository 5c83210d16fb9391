"""What MSEA+ARC costs on models of 7 and 8 billion parameters, beside a plain forward.

Usage: ``make study NAME=large ARGS="[--families llava qwen2vl internvl] [--repeats 5]
[--out DIR] [--tiny]"``; writes ``large.json`` (values) and ``large.md`` (tables), anew after
each case, so that a stopped run keeps its cases. Needs a GPU and no download: real architectures,
random weights. ``--tiny`` runs the same code on the CPU with few and narrow layers, in seconds.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from captum_mllm import ARC, MSEA, LogitLens
from studies.large_models import (
    AFTER,
    ANSWER,
    ATTENTION,
    BEFORE,
    DTYPE,
    FAMILIES,
    SEED,
    Case,
    Family,
    build,
    make_inputs,
    tiny,
)
from studies.large_table import GENERATE, LEAN, NOTE, PLAIN, as_text

TINY_ANSWER = 6


@contextmanager
def watched(model: nn.Module, image: int) -> Iterator[list[int]]:
    """Yields a list that grows by the number of image tokens of each of the model's forwards."""
    seen: list[int] = []

    def note(_model: nn.Module, _args: Any, given: Mapping[str, Tensor]) -> None:
        seen.append(int((given["input_ids"] == image).sum()))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def measured(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Seconds of a call until its result is there, and torch's peak allocation (None on a CPU)."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    kept = call()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    del kept
    return seconds, torch.cuda.max_memory_allocated(device) if on_gpu else None


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def measure_case(
    model: Any, family: Family, case: Case, repeats: int, answer: int = ANSWER
) -> dict[str, Any]:
    """All methods on one case: first a round that warms up and checks, then the measured ones.

    Args:
        model: from :func:`build`.
        family: its architecture.
        case: the picture and its scales.
        repeats: measured rounds; generation takes part in the first.
        answer: tokens of the answer.

    Raises:
        ValueError: forwards with other image tokens than the case says; maps that are not finite
            or on another grid.
    """
    device = model.device
    prompt, forced, ids = make_inputs(family, case, device, answer)
    lens, msea = LogitLens(model), MSEA.paper(model, scales=case.scales)
    arc = ARC.paper(msea)

    def generate(tokens: int = answer) -> Tensor:
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        return model.generate(**prompt, **length, do_sample=False, suppress_tokens=[family.image])

    calls: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: model(**forced),
        LEAN: lambda: model(**forced, use_cache=False, logits_to_keep=answer + 1),
        "LogitLens": lambda: lens.attribute(prompt, ids),
        "MSEA": lambda: msea.attribute(prompt, ids),
        "MSEA+ARC": lambda: arc.attribute(prompt, ids),
    }
    with torch.no_grad():
        for name in (PLAIN, LEAN, "LogitLens", "MSEA"):
            calls[name]()
        generate(2)
        with watched(model, family.image) as seen:
            found = arc.attribute(prompt, ids)
        maps = found.grid_attr[0]
        if sorted(seen) != sorted(case.tokens):
            raise ValueError(f"forwards had {seen} image tokens, not {case.tokens}.")
        if tuple(maps.shape) != (answer, *case.map_shape) or not bool(torch.isfinite(maps).all()):
            raise ValueError(f"maps {tuple(maps.shape)}: not finite, or not {case.map_shape}.")
        seconds: dict[str, list[float]] = {name: [] for name in (*calls, GENERATE)}
        peaks: dict[str, int | None] = {}
        for turn in range(repeats):
            for name, call in (calls if turn else calls | {GENERATE: generate}).items():
                if not turn:
                    gc.collect()  # nothing of the last method counts as this one's memory
                taken, peak = measured(call, device)
                seconds[name].append(taken)
                peaks.setdefault(name, peak)
    return {
        "cells": case.cells,
        "tiles": case.tiles,
        "scales": case.scales,
        "achieved": found.scales,
        "image_tokens": seen,
        "largest_image_tokens": max(seen),
        "sum_image_tokens": sum(seen),
        "prefix_forwards": len(seen) - 1,
        "sequence": forced["input_ids"].shape[1],
        "map_shape": tuple(maps.shape[1:]),
        "positive_cells": round(float((maps > 0).float().mean()), 4),
        "methods": _figures(seconds, peaks, _bytes(model)),
    }


def _figures(
    seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, int | None], weights: int
) -> dict[str, dict[str, Any]]:
    """Per method: seconds, peak memory, and both as multiples of the plain forward's."""
    plain_peak, plain_time = peaks[PLAIN], median(seconds[PLAIN])
    found = {}
    for name, taken in seconds.items():
        row: dict[str, Any] = {"seconds": taken, "median_seconds": median(taken)}
        row |= {"time_ratio": median(taken) / plain_time}
        row |= dict.fromkeys(("peak_bytes", "above_weights_bytes", "peak_ratio", "above_ratio"))
        peak = peaks[name]
        if peak is not None and plain_peak is not None:
            row |= {"peak_bytes": peak, "above_weights_bytes": peak - weights}
            row["peak_ratio"] = peak / plain_peak
            row["above_ratio"] = (peak - weights) / (plain_peak - weights)
        found[name] = row
    return found


def _freed(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_family(
    family: Family, device: torch.device, repeats: int, answer: int, save: Callable[[dict], None]
) -> None:
    """Build a model and measure its cases; a case that fails leaves its reason and no more.

    Args:
        family: the architecture.
        device: where to measure.
        repeats: measured rounds.
        answer: tokens of the answer.
        save: called with the family's record after each case.
    """
    record: dict[str, Any] = {"title": family.title, "cases": []}
    start = time.perf_counter()
    try:
        model = build(family, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        save(record | {"error": _reason(error)})
        print(f"{family.title}: {_reason(error)}", flush=True)
        return
    record["build_seconds"] = time.perf_counter() - start
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["weight_bytes"] = _bytes(model)
    for case in family.cases:
        try:
            row = measure_case(model, family, case, repeats, answer)
        except Exception as error:  # out of memory, above all: the run goes on
            row = {"image_tokens": case.tokens, "scales": case.scales, "error": _reason(error)}
        record["cases"].append(row)
        save(record)
        _freed(device)
        print(f"{family.title}: {row.get('error') or _line(row)}", flush=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0].replace("|", "/")


def _line(row: Mapping[str, Any]) -> str:
    times = (f"{name} {m['median_seconds'] * 1e3:.0f} ms" for name, m in row["methods"].items())
    return f"{row['largest_image_tokens']} image tokens: {', '.join(times)}"


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(f"{path.suffix}.part")
    unfinished.write_text(text)
    unfinished.replace(path)  # at once: never half a file


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of MSEA+ARC on large models.")
    names = list(FAMILIES)
    parser.add_argument("--families", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, default 5")
    parser.add_argument("--out", type=Path, help="folder; default records/, a new one if --tiny")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    args = parser.parse_args(given)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1.")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("needs a GPU; --tiny shows on the CPU that the command works.")
    if args.out is None:
        args.out = Path(tempfile.mkdtemp() if args.tiny else Path(__file__).parent / "records")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; ``arguments`` are the process's by default. Returns 1 if a case failed."""
    args = _arguments(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.tiny else "cuda:0")
    answer = TINY_ANSWER if args.tiny else ANSWER
    words = sys.argv[1:] if arguments is None else arguments
    record: dict[str, Any] = {
        "command": "make study NAME=large" + (f' ARGS="{" ".join(words)}"' if words else ""),
        "gpu": not args.tiny,
        "device": "CPU" if args.tiny else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
        "attention": ATTENTION,
        "seed": SEED,
        "repeats": args.repeats,
        "answer_tokens": answer,
        "text_tokens": BEFORE + AFTER,
        "note": NOTE,
        "families": {},
    }

    def save(name: str, family: dict[str, Any]) -> None:
        record["families"][name] = family
        _write(args.out / "large.json", f"{json.dumps(record)}\n")
        _write(args.out / "large.md", as_text(record))

    gc.freeze()  # what was imported is not garbage: to look it through takes long
    try:
        for name in args.families:
            family = tiny(name) if args.tiny else FAMILIES[name]
            measure_family(family, device, args.repeats, answer, partial(save, name))
            _freed(device)
    finally:
        gc.unfreeze()
    print(f"{as_text(record)}\nwritten to {args.out}")
    families = record["families"].values()
    return int(any("error" in row for family in families for row in (family, *family["cases"])))


if __name__ == "__main__":
    sys.exit(main())
