"""Damaged folders of benchmarks, gone on with."""

import hashlib
import json
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hypothesis import strategies as st

from captum_mllm.benchmark import Benchmark, Settings, run_benchmark
from captum_mllm.data import CocoDataset
from captum_mllm.reference import load
from captum_mllm.reference.export import export
from tests.fuzz.damage import damaged_bytes, damaged_data
from tests.fuzz.harness import Case

SETTINGS = Settings(methods=("lens", "random"), metrics=("obj_iou", "f1_iou"), max_new_tokens=6)
FILES = ("samples.jsonl", "benchmark.json", "benchmark.md")


@cache
def undamaged() -> tuple[Any, CocoDataset, Path, str, dict[str, Any]]:
    """Model and processor, data, the folder of a finished run, its table and its figures."""
    model = load()
    source = export("plain", Path(mkdtemp()), count=2, size=56)
    data = CocoDataset(*(source / n for n in ("images", "instances.json", "captions.json")))
    folder = Path(mkdtemp())
    done = run_benchmark(*model, data, folder, SETTINGS)
    return model, data, folder, without_seconds(done.table), numbers(done)


def without_seconds(table: str) -> str:
    return re.sub(r"\| [0-9.]+ \|$", "|", table, flags=re.MULTILINE)


def numbers(done: Benchmark) -> dict[str, Any]:
    """All figures but seconds, and the failures."""
    figures = json.loads(json.dumps(done.figures))
    for own in figures.values():
        del own["seconds"]
    return {"figures": figures, "failures": dict(done.failures)}


def sealed(record: Any) -> bytes:
    """A line whose checksum is right, whatever it holds."""
    text = json.dumps(record).encode()
    digest = hashlib.sha256(text).hexdigest()[:16]
    return text[:-1] + f', "checksum": "{digest}"}}'.encode() if text.endswith(b"}") else text


def damaged_lines(draw: Any, text: bytes) -> tuple[str, bytes]:
    """Lines removed, repeated, exchanged, or sealed again with a field that can't be."""
    lines = text.splitlines()
    n = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(("remove", "repeat", "order", "field", "field", "empty", "crlf")))
    if kind == "remove":
        del lines[n]
    elif kind == "repeat":
        lines.insert(draw(st.integers(0, len(lines))), lines[n])
    elif kind == "order":
        lines = draw(st.permutations(lines))
    elif kind == "empty":
        lines.insert(n, draw(st.sampled_from((b"", b" ", b"{}", b"null", b"[]", b"\xff"))))
    elif kind == "crlf":
        return "lines: crlf", b"\r\n".join(lines)
    else:
        record = json.loads(lines[n])
        record.pop("checksum", None)
        # Values and texts that could be a run's own can't be told from them by anything.
        key = draw(
            st.sampled_from(("sample", "method", "seconds", "sha256", "answer_ids", "values"))
        )
        bad = (None, "x", -1, [], {}, True, float("nan"), 10**9, [["a"]], {"obj_iou": "x"})
        change = draw(st.sampled_from((*bad, "removed")))
        if change == "removed":
            del record[key]
        else:
            record[key] = change
        if key == "seconds" and change == 10**9:
            record[key] = -1.0  # a long time is a time
        lines[n] = sealed(record)
        return f"field: {key} {change}", b"\n".join(lines) + b"\n"
    return f"lines: {kind} {n}", b"\n".join(lines) + b"\n"


def draw_case(data: st.DataObject) -> Case:
    model, read, source, table, figures = undamaged()
    folder = source.with_name(f"{source.name}-damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    kind = data.draw(st.sampled_from(("bytes", "bytes", "lines", "lines", "lines", "json", "gone")))
    name = data.draw(st.sampled_from(FILES[:2] if kind in ("bytes", "gone") else FILES[:1]))
    path = folder / name
    if kind == "bytes":
        what, damaged = damaged_bytes(data.draw, path.read_bytes())
        path.write_bytes(damaged)
        what = f"{name}: {what}"
    elif kind == "lines":
        what, damaged = damaged_lines(data.draw, path.read_bytes())
        path.write_bytes(damaged)
    elif kind == "json":
        what, head = damaged_data(data.draw, json.loads((folder / FILES[1]).read_text()))
        (folder / FILES[1]).write_text(json.dumps(head))
    else:
        path.unlink()
        what = f"gone: {name}"

    def run() -> Benchmark:
        return run_benchmark(*model, read, folder, SETTINGS)

    def is_right(done: Benchmark) -> bool:
        on_disk = json.loads((folder / FILES[1]).read_text())
        same = without_seconds(done.table) == table and numbers(done) == figures
        before = json.loads((source / FILES[1]).read_text())
        return same and (on_disk["finished"], on_disk["format"]) == (True, before["format"])

    return Case(what, run, is_right, ["out "])
