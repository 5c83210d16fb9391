"""Run a benchmark: every method on every picture, each result on disk before the next."""

from __future__ import annotations

import contextlib
import errno
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from captum_mllm.benchmark.figures import failures, figures, markdown
from captum_mllm.benchmark.log import SampleLog, line_problem
from captum_mllm.benchmark.samples import (
    BenchmarkSample,
    explain_sample,
    fingerprint,
    prepare_sample,
    score_sample,
)
from captum_mllm.benchmark.settings import Settings, differences, fixed_part, table_of
from captum_mllm.data import CocoDataset, LabelMapDataset
from captum_mllm.files import nan_to_none, write_atomic
from captum_mllm.methods import METHODS
from captum_mllm.validation import ArgumentError

SAMPLES, FIGURES, TABLE = "samples.jsonl", "benchmark.json", "benchmark.md"
LOCK = ".lock"
FORMAT = 2
"""Of the folder; 2 came with the checksums and hashes of samples.jsonl."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # no picture is to blame
_CALIBRATED = {"arc", "msea+arc", "direct", "direct_lens"}


@dataclass(frozen=True, eq=False)
class Benchmark:
    """The results of a run.

    Args:
        figures: see :func:`captum_mllm.benchmark.figures.figures`.
        failures: reason -> how many samples failed for it.
        table: the figures as Markdown.
        folder: the folder that holds them.
        set_aside: reason -> how many lines of an earlier run were set aside for it.
    """

    figures: Mapping[str, Any]
    failures: Mapping[str, int]
    table: str
    folder: Path
    set_aside: Mapping[str, int] = field(default_factory=dict)

    @property
    def values(self) -> int:
        """How many values were measured, over all methods and metrics."""
        entries = (own["metrics"].values() for own in self.figures.values())
        return sum(entry["values"] for of_method in entries for entry in of_method)


def run_benchmark(
    model: Any,
    processor: Any,
    data: CocoDataset | LabelMapDataset,
    out: str | Path,
    settings: Settings,
    *,
    about: Mapping[str, Any] | None = None,
    retry_failed: bool = False,
    show_progress: bool = False,
) -> Benchmark:
    """Score methods on annotated pictures, or resume an earlier run into the same folder.

    Writes three files: ``samples.jsonl``, a line per picture and method, each written to disk
    before the next is computed; ``benchmark.json``, the settings and all figures;
    ``benchmark.md``, the table (and ``.lock``, empty, which keeps a second run out). However the
    process ends, no line is lost and none is computed twice. A failure on a picture is recorded
    with its reason, counted, and the run continues.

    Each line of ``samples.jsonl`` holds a checksum, and the sha256 of the picture's file and of its
    annotation. A line of an earlier run that does not fit (cut off, changed, repeated, without a
    value, or of another picture or annotation than now bears that number) moves to
    ``samples.set-aside.jsonl``, a warning says how many did and why, and its sample is computed
    again.

    Methods that need the same forwards ("lens", "tam", "arc"; "msea", "msea+arc") share
    them; the seconds of a method include those of its shared forwards.

    An earlier run must have had the same settings, data, weights and versions. Only the methods,
    the number of pictures, the method of reference and settings that affect nothing but speed may
    differ: existing lines are used, missing ones are added.

    Args:
        model: a transformers model of a registered family.
        processor: its processor.
        data: the annotated pictures.
        out: folder to write; created if it is missing.
        settings: what is measured, and how.
        about: further plain data for ``benchmark.json``, e.g. paths. Default: none.
        retry_failed: whether samples that failed in an earlier run are computed again. Default: no.
        show_progress: progress bar over pictures and methods, on stderr. Default: no.

    Returns:
        :class:`Benchmark`.

    Raises:
        ArgumentError: the folder holds a run with other settings, files of something else, or a
            run in progress; settings that don't fit the data. The message says what is wrong and
            how to fix it.
        ImportError: a package that a metric needs is not installed.
        OSError: the folder can't be written, e.g. the disk is full; all finished lines stay.

    Warns:
        UserWarning: lines of an earlier run were set aside.

    Example:
        >>> import tempfile
        >>> from captum_mllm.benchmark import Settings, run_benchmark
        >>> from captum_mllm.reference import load
        >>> from captum_mllm.reference.export import export
        >>> folder = export("plain", tempfile.mkdtemp(), count=2, size=112)
        >>> files = (folder / name for name in ("images", "instances.json", "captions.json"))
        >>> settings = Settings(methods=("lens", "random"), metrics=("pointing_game",))
        >>> benchmark = run_benchmark(*load(), CocoDataset(*files), tempfile.mkdtemp(), settings)
        >>> sorted(path.name for path in benchmark.folder.glob("[!.]*"))
        ['benchmark.json', 'benchmark.md', 'samples.jsonl']
        >>> benchmark.figures["random"]["pictures"], benchmark.failures
        (2, {})
    """
    pictures = min(len(data), settings.limit or len(data))
    if not pictures:
        raise ArgumentError("data", "holds no picture.")
    if not data.categories:
        raise ArgumentError("data", "has no categories, so there is nothing to score.")
    fixed = fixed_part(settings, model, data)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "fixed": fixed, "settings": settings.to_dict(), **dict(about or {})}
    _check_folder(folder, fixed)
    with _locked(folder):
        log = SampleLog(folder / SAMPLES, _Fitting(data, settings))
        if log.set_aside:
            warnings.warn(_set_aside(log), stacklevel=2)
        _write_json(folder / FIGURES, {**head, "finished": False})
        run = _Run(model, processor, data, settings, fixed["categories"], log)
        run.fill(pictures, retry_failed, show_progress)
    values = figures(log.records, pictures, settings)
    reasons = failures(log.records, pictures, settings)
    table = markdown(values, settings, _sentences(fixed, pictures, settings))
    table += _failure_lines(reasons)
    body = {"finished": True, "pictures": pictures, "figures": values, "failures": reasons}
    write_atomic(folder / TABLE, table.encode())
    _write_json(folder / FIGURES, {**head, **body})
    return Benchmark(values, reasons, table, folder, dict(log.set_aside))


def _check_folder(folder: Path, fixed: Mapping[str, Any]) -> None:
    """Raise unless the folder holds no run, or one that can be resumed."""
    path = folder / FIGURES
    if not path.exists():
        if (folder / SAMPLES).exists() and (folder / SAMPLES).stat().st_size:
            raise ArgumentError(
                "out",
                f"{str(folder)!r} holds {SAMPLES} but no {FIGURES} with its settings; "
                "name another folder.",
            )
        return
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        version, before = head["format"], dict(head["fixed"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ArgumentError(
            "out",
            f"{str(folder)!r} holds a {FIGURES} that no benchmark wrote; name another folder.",
        ) from error
    if version != FORMAT:
        raise ArgumentError(
            "out",
            f"{str(folder)!r} holds a run of format {version!r}, and this version reads and writes "
            f"{FORMAT}: name another folder, or resume it with the captum_mllm version that "
            "began it.",
        )
    changed = differences(before, json.loads(json.dumps(fixed)))
    if changed:
        raise ArgumentError(
            "out",
            f"{str(folder)!r} holds a run with other settings: {'; '.join(changed)}. Name "
            "another folder, or give the same settings to resume that run.",
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # on Windows nothing keeps a second run out
        yield
        return
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArgumentError(
                "out",
                f"{str(folder)!r} is being written by another run; wait for it, or name "
                "another folder.",
            ) from error
        yield


class _Fitting:
    """What is wrong with a line of an earlier run, given the data and settings of this one."""

    def __init__(self, data: CocoDataset | LabelMapDataset, settings: Settings) -> None:
        self._data = data
        self._metrics = set(settings.metrics) - {"f1_iou"}
        self._found: dict[int, Mapping[str, str | None]] = {}

    def __call__(self, line: Mapping[str, Any]) -> str | None:
        n = line["sample"]
        if not 0 <= n < len(self._data) or line["method"] not in METHODS:
            return "of a picture or method that there is not"
        if n not in self._found:
            self._found[n] = fingerprint(self._data, n)
        problem = line_problem(line, self._metrics)
        if problem is None and line["sha256"] != self._found[n]:
            return "of another picture or annotation"
        return problem


def _set_aside(log: SampleLog) -> str:
    count = sum(log.set_aside.values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in log.set_aside.items())
    lines = "1 line does" if count == 1 else f"{count} lines do"
    return (
        f"{lines} not fit this run ({reasons}): moved from {log.path.name} to {log.others.name} in "
        f"{str(log.path.parent)!r}, and computed again where this run needs them."
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """The constant parts of a run, and how its lines are computed."""

    model: Any
    processor: Any
    data: CocoDataset | LabelMapDataset
    settings: Settings
    table_kind: str
    log: SampleLog

    def fill(self, pictures: int, retry_failed: bool, show_progress: bool) -> None:
        """Compute every picture and method that the log lacks."""

        def is_done(n: int, method: str) -> bool:
            line = self.log.records.get((n, method))
            return line is not None and not (retry_failed and "error" in line)

        methods = self.settings.methods
        todo = [[name for name in methods if not is_done(n, name)] for n in range(pictures)]
        total = pictures * len(methods)
        done = total - sum(map(len, todo))
        with tqdm(total=total, initial=done, desc="samples", disable=not show_progress) as bar:
            for n, names in enumerate(todo):
                for line in self.lines(n, names) if names else ():
                    self.log.append(nan_to_none(line))
                    bar.update()

    def lines(self, n: int, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
        """One picture's lines, each as soon as it is computed; an error becomes a line, too."""
        known = [self.log.records.get((n, name), {}).get("answer_ids") for name in METHODS]
        answer = next((ids for ids in known if ids), None)  # one for all methods, later ones too
        about: dict[str, Any] = {"sample": n, "sha256": fingerprint(self.data, n)}
        try:
            sample = self.data[n]
            about |= {"image_id": sample.image_id, "file_name": sample.file_name}
            table = table_of(self.table_kind, self.data, sample)
            prepared = prepare_sample(
                self.model, self.processor, sample, n, self.settings, table, answer
            )
        except Exception as error:
            _check_blame(error)
            for method in methods:
                yield {**about, "method": method, "error": _error(error)}
            return
        about |= {"answer": prepared.text, "answer_ids": prepared.answer.tolist()}
        for method in methods:
            try:
                yield {**about, "method": method, **self._scores(prepared, method, sample.size)}
            except Exception as error:
                _check_blame(error)
                yield {**about, "method": method, "error": _error(error)}

    def _scores(
        self, sample: BenchmarkSample, method: str, size: tuple[int, int]
    ) -> dict[str, Any]:
        start, saved = time.perf_counter(), sample.shared.saved
        result = explain_sample(self.model, self.processor, sample, method, self.settings)
        seconds = time.perf_counter() - start + sample.shared.saved - saved  # as if run alone
        values = score_sample(self.model, self.processor, sample, result, size, self.settings)
        return {"seconds": seconds, "values": values}


def _check_blame(error: Exception) -> None:
    """Raise what is no error of this picture: a missing package, a full disk."""
    if isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno in _FULL):
        raise error


def _error(error: Exception) -> dict[str, str]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what an "out of memory" left behind
    return {"type": type(error).__name__, "text": " ".join(str(error).split())}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_atomic(
        path, json.dumps(nan_to_none(dict(data)), indent=1, allow_nan=False).encode() + b"\n"
    )


def _sentences(fixed: Mapping[str, Any], pictures: int, settings: Settings) -> list[str]:
    of = "the model's own greedy answer" if settings.answers == "own" else "the first caption"
    parity = (
        " Known defects of TAM's evaluation are reproduced (parity)." if settings.parity else ""
    )
    singular = "picture" if pictures == 1 else "pictures"
    sentences = [
        f"{fixed['model']} ({fixed['weights'][:19]}, {fixed['dtype']}), {pictures} {singular}, "
        f"explained: {of} to {settings.prompt!r}. Means over all words (insertion, deletion and "
        f"the like: tokens) of all pictures, with 95 % intervals from resampled pictures.{parity}"
    ]
    if settings.options:
        options = "; ".join(
            f"{name}: {', '.join(f'{key}={value!r}' for key, value in chosen.items())}"
            for name, chosen in settings.options.items()
        )
        sentences.append(f"Options: {options}.")
    chosen = set(settings.methods)
    if _CALIBRATED & chosen and {"lens", "tam", "msea"} & chosen:
        sentences.append(
            "arc, msea+arc, direct and direct_lens calibrate their maps on a finer grid by "
            "default; lens, tam and msea do not, which matters for thresholded metrics such as "
            "Obj-IoU. The options upsampling=2 and calibration=1.5 (as arc has it; 'adaptive', as "
            "direct has it) do the same for lens, tam and msea; calibration=None switches it off "
            "for the others."
        )
    return sentences


_FAILED = "Failed, and left out of the means (of alike reasons the first):"


def _failure_lines(reasons: Mapping[str, int]) -> str:
    if not reasons:
        return ""
    lines = [f"- {count} x {reason}" for reason, count in reasons.items()]
    return "\n" + "\n".join([_FAILED, "", *lines]) + "\n"
