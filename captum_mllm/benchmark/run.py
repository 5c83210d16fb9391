"""Run a benchmark: every method on every picture, each result on the disk before the next."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from captum_mllm.benchmark.figures import failures, figures, markdown
from captum_mllm.benchmark.log import SampleLog
from captum_mllm.benchmark.samples import Request, ask, explained, scores
from captum_mllm.benchmark.settings import Settings, differences, fixed_part, table_of
from captum_mllm.data.coco import CocoDataset
from captum_mllm.data.label_maps import LabelMapDataset
from captum_mllm.files import nan_to_none, write_atomic
from captum_mllm.methods import METHODS

SAMPLES, FIGURES, TABLE = "samples.jsonl", "benchmark.json", "benchmark.md"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What a run has found.

    Args:
        figures: see :func:`captum_mllm.benchmark.figures.figures`.
        failures: how often a sample failed for which reason.
        table: the figures as Markdown.
        folder: where they are.
    """

    figures: Mapping[str, Any]
    failures: Mapping[str, int]
    table: str
    folder: Path


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
    """Score methods on annotated pictures; go on where an earlier run into the folder ended.

    Writes three files: ``samples.jsonl``, a line per picture and method, on the disk before the
    next one begins; ``benchmark.json``, the settings and all figures; ``benchmark.md``, the table.
    Whatever ends the process, no line is lost and none is made twice; one torn by the end is made
    anew. What fails on a picture is recorded with its reason, counted, and the run goes on.

    An earlier run must have had the same settings, data, weights and versions. Only the methods,
    the number of pictures, the method of reference and what costs time alone may differ: lines
    that are there are used, others are added.

    Args:
        model: a transformers model of a registered family.
        processor: its processor.
        data: the annotated pictures.
        out: folder to write; made if missing.
        settings: what is measured, and how.
        about: further plain data for ``benchmark.json``, e.g. paths. Default: none.
        retry_failed: whether samples that failed in an earlier run are done again. Default: no.
        show_progress: progress bar over pictures and methods, on stderr. Default: no.

    Returns:
        :class:`Benchmark`.

    Raises:
        ValueError: the folder holds a run with other settings, or none of ours, or one that is
            going on; settings that don't go with the data. The message says what and how to mend
            it.
        ImportError: a package that a metric needs is not installed.
        OSError: the folder can't be written.

    Example:
        >>> import tempfile
        >>> from captum_mllm.benchmark import Settings, run_benchmark
        >>> from captum_mllm.reference import load
        >>> from captum_mllm.reference.export import export
        >>> folder = export("plain", tempfile.mkdtemp(), count=2, size=112)
        >>> files = (folder / name for name in ("images", "instances.json", "captions.json"))
        >>> settings = Settings(methods=("lens", "random"), metrics=("pointing_game",))
        >>> done = run_benchmark(*load(), CocoDataset(*files), tempfile.mkdtemp(), settings)
        >>> sorted(path.name for path in done.folder.iterdir())
        ['benchmark.json', 'benchmark.md', 'samples.jsonl']
        >>> done.figures["random"]["pictures"], done.failures
        (2, {})
    """
    pictures = min(len(data), settings.limit or len(data))
    if not pictures:
        raise ValueError("data holds no picture.")
    if not data.categories:
        raise ValueError("data names no category, so there is nothing to find.")
    fixed = fixed_part(settings, model, data)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "fixed": fixed, "settings": settings.to_dict(), **dict(about or {})}
    _check_folder(folder, fixed)
    with _alone(folder):
        log = SampleLog(folder / SAMPLES)
        _write_json(folder / FIGURES, {**head, "finished": False})
        run = _Run(model, processor, data, settings, fixed["categories"], log)
        run.fill(pictures, retry_failed, show_progress)
    found = figures(log.records, pictures, settings)
    why = failures(log.records, pictures, settings)
    table = markdown(found, settings, _sentences(fixed, pictures, settings))
    body = {"finished": True, "pictures": pictures, "figures": found, "failures": why}
    write_atomic(folder / TABLE, (table + _failure_lines(why)).encode())
    _write_json(folder / FIGURES, {**head, **body})
    return Benchmark(found, why, table + _failure_lines(why), folder)


def _check_folder(folder: Path, fixed: Mapping[str, Any]) -> None:
    """Raise unless the folder holds no run, or one that may go on."""
    path = folder / FIGURES
    if not path.exists():
        if (folder / SAMPLES).exists() and (folder / SAMPLES).stat().st_size:
            raise ValueError(
                f"out={str(folder)!r} holds {SAMPLES} but no {FIGURES} that says how it was made; "
                "name another folder."
            )
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["fixed"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"out={str(folder)!r} holds a {FIGURES} that no benchmark wrote; name another folder."
        ) from error
    changed = differences(before, json.loads(json.dumps(fixed)))
    if changed:
        raise ValueError(
            f"out={str(folder)!r} holds a run with other settings: {'; '.join(changed)}. Name "
            "another folder, or give the same settings to go on there."
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows: two runs there are the user's own care
        yield
        return
    with (folder / SAMPLES).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"out={str(folder)!r} is being written by another run; wait for it, or name "
                "another folder."
            ) from error
        yield


@dataclass(frozen=True, eq=False)
class _Run:
    """A run's unchanging parts, and how it makes its lines."""

    model: Any
    processor: Any
    data: CocoDataset | LabelMapDataset
    settings: Settings
    table_kind: str
    log: SampleLog

    def fill(self, pictures: int, retry_failed: bool, show_progress: bool) -> None:
        """Do every picture and method that the log lacks."""

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
        """One picture's lines, each as soon as it is made; what goes wrong becomes a line."""
        known = [self.log.records.get((n, name), {}).get("answer_ids") for name in METHODS]
        answer = next((ids for ids in known if ids), None)  # one for all methods, later ones too
        about: dict[str, Any] = {"sample": n}
        try:
            sample = self.data[n]
            about |= {"image_id": sample.image_id, "file_name": sample.file_name}
            table = table_of(self.table_kind, self.data, sample)
            request = ask(self.model, self.processor, sample, n, self.settings, table, answer)
        except ImportError:  # of no picture in particular
            raise
        except Exception as error:
            for method in methods:
                yield {**about, "method": method, "error": _error(error)}
            return
        about |= {"answer": request.text, "answer_ids": request.answer.tolist()}
        for method in methods:
            try:
                yield {**about, "method": method, **self._measured(request, method, sample.size)}
            except ImportError:
                raise
            except Exception as error:
                yield {**about, "method": method, "error": _error(error)}

    def _measured(self, request: Request, method: str, size: tuple[int, int]) -> dict[str, Any]:
        start = time.perf_counter()
        result = explained(self.model, self.processor, request, method, self.settings)
        seconds = time.perf_counter() - start
        values = scores(self.model, self.processor, request, result, size, self.settings)
        return {"seconds": seconds, "values": values}


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
    told = [
        f"{fixed['model']} ({fixed['weights'][:19]}, {fixed['dtype']}), {pictures} {singular}, "
        f"explained: {of} to {settings.prompt!r}. Means over all words (insertion and its like: "
        f"tokens) of all pictures, with 95 % intervals from resampled pictures.{parity}"
    ]
    if settings.options:
        own = "; ".join(
            f"{name}: {', '.join(f'{key}={value!r}' for key, value in chosen.items())}"
            for name, chosen in settings.options.items()
        )
        told.append(f"Options: {own}.")
    if {"arc", "msea+arc"} & set(settings.methods) and {"lens", "tam", "msea"} & set(
        settings.methods
    ):
        told.append(
            "arc and msea+arc calibrate their maps on a finer grid by default; lens, tam and msea "
            "do not: thresholds (Obj-IoU and its like) see that. The options calibration=1.5 and "
            "upsampling=2 do the same for these; calibration=None leaves it out of those."
        )
    return told


def _failure_lines(why: Mapping[str, int]) -> str:
    if not why:
        return ""
    lines = [f"- {count} x {reason}" for reason, count in why.items()]
    return "\n" + "\n".join(["Failed, and left out of the means:", "", *lines]) + "\n"
