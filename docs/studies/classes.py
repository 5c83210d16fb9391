"""Which classes of transformers work, and which are refused and why: all, on tiny random models.

Usage: ``make study NAME=classes ARGS="[--kinds llava qwen3_5 ...] [--seconds 300] [--workers 1]
[--out DIR]"``; writes ``classes.json`` and, from it, ``classes.md``. Each class of transformers'
image-text-to-text mapping is built small (:mod:`studies.zoo`), gets three pictures (60 x 60,
90 x 50 and 50 x 90 pixels), and the checks of :mod:`studies.classes_checks` run on each. A class
has a process of its own and a time limit: one that hangs or crashes costs its own row. With
torchvision and timm (``make .torchvision/ready``, then ``PYTHONPATH=.torchvision``) about twenty
more classes can be built. With ``--kinds``, other rows of the record stay.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from studies.classes_checks import CHECKS, PICTURES, Case, random_picture
from studies.classes_table import as_text, outcome
from studies.zoo import KINDS, Unavailable, subject

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("torch", "transformers", "torchvision", "timm", "captum")
LONGEST = 400  # characters of a reason


def measured(kind: str) -> dict[str, Any]:
    """Everything that is tried on one class.

    Args:
        kind: transformers' model type.

    Returns:
        ``class``, ``parameters`` and, per picture and check, figures or an ``error``; or the
        reason why it is ``unavailable``.
    """
    named = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    try:
        one = subject(kind)
    except Unavailable as error:
        return {"class": named, "unavailable": _reason(error)}
    record: dict[str, Any] = {"class": named, "pictures": {}}
    record["parameters"] = sum(p.numel() for p in one.model.parameters())
    record["processor"] = type(one.processor.image_processor).__name__
    for shape, size in PICTURES.items():
        case = Case(one, random_picture(size))
        record["pictures"][shape] = {name: _tried(check, case) for name, check in CHECKS.items()}
    return record


def _tried(check: Any, case: Case) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = dict(check(case))
        told = {str(w.message).split("\n")[0] for w in said if "captum_mllm" in str(w.filename)}
        if told:
            found["warnings"] = sorted(told)
    except Exception as error:  # the reason is the record
        found = {"error": _reason(error)}
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:LONGEST]
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"


# ---- processes ----------------------------------------------------------------------------------


def _child(kind: str, answer: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    answer.send(measured(kind))


def in_own_process(kind: str, seconds: float) -> dict[str, Any]:
    """:func:`measured` in a process of its own.

    Args:
        kind: transformers' model type.
        seconds: time limit; past it the process is ended.

    Returns:
        Its record; with only a ``failed`` where it hung or died.
    """
    ours, theirs = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_child, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(seconds) else {"failed": f"not done in {seconds:g} s."}
    except EOFError:
        process.join()
        found = {"failed": f"its process died with exit code {process.exitcode}."}
    if process.is_alive():
        process.join(1)
        process.kill()
    process.join()
    return found


def _all_measured(
    kinds: Sequence[str], seconds: float, workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(
            kinds, pool.map(lambda kind: in_own_process(kind, seconds), kinds), strict=True
        )


# ---- record -------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def _write(out: Path, record: Mapping[str, Any]) -> None:
    for name, text in {
        "classes.json": json.dumps(record, indent=1),
        "classes.md": as_text(record),
    }.items():
        unfinished = out / f"{name}.part"
        unfinished.write_text(f"{text.rstrip()}\n")
        unfinished.replace(out / name)  # at once: never half a file


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What works on which class of models.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", default=KINDS)
    parser.add_argument("--seconds", type=float, default=300, help="limit of a class, default 300")
    parser.add_argument("--workers", type=int, default=1, help="classes at a time, default 1")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder, default records/")
    return parser.parse_args(given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; ``arguments`` are the process's by default. Returns 0."""
    args = _arguments(arguments)
    transformers.logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "classes.json"
    old = json.loads(path.read_text())["kinds"] if path.exists() else {}
    kinds = {kind: old[kind] for kind in KINDS if kind in old and kind not in args.kinds}
    record = {"versions": _versions(), "pictures": PICTURES, "kinds": kinds}
    for kind, found in _all_measured(args.kinds, args.seconds, args.workers):
        kinds[kind] = found
        record["kinds"] = {name: kinds[name] for name in KINDS if name in kinds}
        _write(args.out, record)
        print(f"{kind}: {' '.join(outcome(found))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
