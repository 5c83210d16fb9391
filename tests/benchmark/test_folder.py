"""The folder of a run: damaged lines, other pictures, full disks, kills at any moment."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from captum_mllm.benchmark import Settings, run_benchmark
from captum_mllm.benchmark.log import SampleLog, line_problem
from captum_mllm.reference.export import export
from captum_mllm.validation import ArgumentError
from tests.benchmark.test_run import lines, read
from tests.disks import full_disk

FAST = Settings(methods=("lens", "random"), metrics=("obj_iou", "f1_iou"), max_new_tokens=8)
SAMPLES, ASIDE = "samples.jsonl", "samples.set-aside.jsonl"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export("plain", tmp_path_factory.mktemp("data"), count=2, size=56)


@pytest.fixture(scope="module")
def finished(shipped, exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_benchmark(*shipped, read(exported), folder, FAST)
    return folder


@pytest.fixture
def own(finished, tmp_path):
    """A copy of a finished run that a test may damage."""
    return shutil.copytree(finished, tmp_path / "out")


def without_seconds(table):
    """A table without its last column, the only one that differs from run to run."""
    return re.sub(r"\| [0-9.]+ \|$", "|", table, flags=re.MULTILINE)


def go_on(shipped, exported, folder, count):
    """Resume a damaged run, which must say how many lines it sets aside."""
    lines = "1 line does" if count == 1 else f"{count} lines do"
    with pytest.warns(UserWarning, match=f"^{lines} not fit this run"):
        return run_benchmark(*shipped, read(exported), folder, FAST)


# ---- damaged lines ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a log of three lines."""
    path = tmp_path_factory.mktemp("log") / SAMPLES
    log = SampleLog(path)
    for n in range(3):
        log.append({"sample": n, "method": "lens", "text": 'é "}\n', "values": [0.5, None, n]})
    return path.read_bytes(), log.records


def opened(data, folder):
    """A log with these bytes; nothing is lost, and what is left is whole."""
    path = folder / SAMPLES
    (folder / ASIDE).unlink(missing_ok=True)
    path.write_bytes(data)
    log = SampleLog(path)
    aside = (folder / ASIDE).read_bytes() if (folder / ASIDE).exists() else b""
    was = data.split(b"\n")
    assert sorted((path.read_bytes() + aside).split(b"\n")) in (sorted([*was, b""]), sorted(was))
    assert sum(log.set_aside.values()) == aside.count(b"\n")
    again = SampleLog(path)
    assert (again.records, again.set_aside) == (log.records, {})
    return log


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_a_log_is_found(small, tmp_path, step):
    data, records = small
    for place in range(0, len(data), step):
        flipped = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        log = opened(flipped, tmp_path)
        assert log.set_aside, place
        assert log.records.items() <= records.items(), place
        assert len(log.records) >= len(records) - 2  # of two, where the end of a line is gone


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_cut_of_a_log_is_found(small, tmp_path, step):
    data, records = small
    for length in range(0, len(data), step):
        log = opened(data[:length], tmp_path)
        whole = data[:length].count(b"\n")
        assert list(log.records.values()) == list(records.values())[:whole]
        assert bool(log.set_aside) == (not data[:length].endswith(b"\n") and length > 0)


def test_line_ends_of_windows_are_no_damage(small, tmp_path):
    data, records = small
    (tmp_path / SAMPLES).write_bytes(data.replace(b"\n", b"\r\n"))
    log = SampleLog(tmp_path / SAMPLES)
    assert log.records == records
    assert not log.set_aside


def test_lines_that_repeat(tmp_path):
    log = SampleLog(tmp_path / SAMPLES)
    for value in (1, 2):
        log.append({"sample": 0, "method": "lens", "value": value})
    again = SampleLog(tmp_path / SAMPLES)
    assert again.records[0, "lens"]["value"] == 1
    assert again.set_aside == {"repeated": 1}
    again.append({"sample": 1, "method": "lens", "error": {}})
    again.append({"sample": 1, "method": "lens", "value": 3})
    last = SampleLog(tmp_path / SAMPLES)
    assert last.records[1, "lens"]["value"] == 3  # what failed was done again
    assert last.set_aside == {}


HASHES = {"picture": "a", "annotation": "b"}
GOOD = {"sha256": HASHES, "seconds": 0.5, "values": {"auc": [0.5, None]}, "answer_ids": [3]}
PROBLEMS = [
    ({"sha256": None}, "without the hashes of its picture and annotation"),
    ({"sha256": {"picture": "a"}}, "without the hashes of its picture and annotation"),
    ({"seconds": -0.1}, "without a time"),
    ({"seconds": float("inf")}, "without a time"),
    ({"seconds": "1"}, "without a time"),
    ({"seconds": True}, "without a time"),
    ({"values": None}, "without the values of a metric"),
    ({"values": {"other": []}}, "without the values of a metric"),
    ({"values": {"auc": 0.5}}, "with a value that is no number"),
    ({"values": {"auc": ["0.5"]}}, "with a value that is no number"),
    ({"values": {"auc": [float("nan")]}}, "with a value that is no number"),
    ({"answer_ids": []}, "without an answer"),
    ({"answer_ids": [1.5]}, "without an answer"),
    ({"error": {"type": "ValueError", "text": "x"}}, "without values or an error"),
]


@pytest.mark.parametrize(("change", "problem"), PROBLEMS)
def test_lines_that_lack_something(change, problem):
    assert line_problem(GOOD, {"auc"}) is None
    assert line_problem({**GOOD, **change}, {"auc"}) == problem


def test_failed_lines():
    line = {"sha256": HASHES, "error": {"type": "ValueError", "text": "x"}}
    assert line_problem(line, {"auc"}) is None
    for error in (None, {}, {"type": "ValueError"}, {"type": 1, "text": "x"}):
        assert line_problem({**line, "error": error}, {"auc"}) == "without values or an error"


def test_damaged_lines_are_done_again(shipped, exported, finished, own):
    """Another value with all else right, a time below 0, a line twice, one of no picture."""
    first, second, *rest = (own / SAMPLES).read_bytes().splitlines(keepends=True)
    digit = re.search(rb'"obj_iou": \[0\.(\d)', first).start(1)
    changed = first[:digit] + bytes([first[digit] ^ 1]) + first[digit + 1 :]
    late = re.sub(rb'"seconds": ', b'"seconds": -', second)
    (own / SAMPLES).write_bytes(b"".join([changed, late, *rest, rest[-1]]))
    log = SampleLog(own / SAMPLES)  # sets these aside; then one with a right checksum
    log.append({**log.records[1, "lens"], "sample": 9})
    assert log.set_aside == {"cut off or changed": 2, "repeated": 1}
    found = go_on(shipped, exported, own, 1)
    assert found.set_aside == {"of a picture or method that there is not": 1}
    assert (own / ASIDE).read_bytes().startswith(changed + late + rest[-1])
    assert without_seconds(found.table) == without_seconds((finished / "benchmark.md").read_text())
    assert sorted(lines(own), key=str) == sorted(lines(finished), key=str)


def damaged(data, draw):
    """Some bytes flipped, cut away, repeated, or replaced."""
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice((1, 1, 1, 3, 30, 300)))
    part = bytes(byte ^ 1 << draw.randrange(8) for byte in data[start:end])
    other = draw.choice((part, b"", data[start:end] * 2, b"\n", b"0", b"-1", b"null", b"[" * 9999))
    return data[:start] + other + (b"" if draw.random() < 0.1 else data[end:])


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.* not fit this run")
def test_any_damage_to_a_folder(shipped, exported, finished, tmp_path, count):
    """Each ends in the table of the undamaged run, or in an error that names the folder."""
    expected = without_seconds((finished / "benchmark.md").read_text())
    draw, outcomes = random.Random(count), []
    for n in range(count):
        own = shutil.copytree(finished, tmp_path / str(n))
        path = own / draw.choice((SAMPLES, SAMPLES, "benchmark.json", "benchmark.md"))
        path.write_bytes(damaged(path.read_bytes(), draw))
        try:
            found = run_benchmark(*shipped, read(exported), own, FAST)
        except ArgumentError as error:
            outcomes.append(str(own) in str(error))
            assert path.name == "benchmark.json"
        else:
            outcomes.append(without_seconds(found.table) == expected)
            assert lines(own) == lines(finished) or found.set_aside
    assert all(outcomes)


# ---- other pictures -----------------------------------------------------------------------------


def test_other_pictures_under_the_same_names(shipped, exported, own, tmp_path):
    """No line of the old picture stays beside one of the new."""
    data = shutil.copytree(exported, tmp_path / "data")
    path = data / "images/000001.png"
    with Image.open(path) as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_180)
    turned.save(path)
    before = lines(own)
    found = go_on(shipped, data, own, 2)
    assert found.set_aside == {"of another picture or annotation": 2}
    assert (own / ASIDE).read_bytes().count(b"\n") == 2
    whole = run_benchmark(*shipped, read(data), tmp_path / "whole", FAST)
    assert without_seconds(found.table) == without_seconds(whole.table)
    after = lines(own)
    assert after == lines(tmp_path / "whole")
    assert after[:2] == before[:2]
    assert all(a["sha256"]["picture"] != b["sha256"]["picture"] for a, b in
               zip(after[2:], before[2:], strict=True))  # fmt: skip
    annotations = {line["sha256"]["annotation"] for line in after}
    assert annotations == {line["sha256"]["annotation"] for line in before}
    assert len(annotations) == 2


def test_other_annotations(shipped, exported, own, tmp_path):
    """The annotations' files are part of the settings; the hash of each sample's tells which."""
    from captum_mllm.benchmark.samples import fingerprint

    data = shutil.copytree(exported, tmp_path / "data")
    content = json.loads((data / "captions.json").read_text())
    for caption in content["annotations"]:
        if caption["image_id"] == 1:
            caption["caption"] += " !"
    (data / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"other settings: data.sha256 was '"):
        run_benchmark(*shipped, read(data), own, FAST)
    old, new = ([fingerprint(read(of), n) for n in range(2)] for of in (exported, data))
    assert old[0] == new[0]
    assert old[1]["picture"] == new[1]["picture"]
    assert old[1]["annotation"] != new[1]["annotation"]


# ---- a full disk --------------------------------------------------------------------------------


def test_a_full_disk_leaves_whole_lines(tmp_path):
    log = SampleLog(tmp_path / SAMPLES)
    log.append({"sample": 0, "method": "lens"})
    before = log.path.read_bytes()
    for room in (0, 1, 20):
        with full_disk(len(before) + room), pytest.raises(OSError, match=r"space|large"):
            log.append({"sample": 1, "method": "lens"})
        assert log.path.read_bytes() == before
    assert list(log.records) == [(0, "lens")]


@pytest.mark.parametrize("moment", ["settings", "line", "figures"])
def test_a_full_disk_ends_the_run(shipped, exported, finished, tmp_path, moment):
    """What is done stays, and the run can be resumed."""
    figures, samples = finished / "benchmark.json", (finished / SAMPLES).read_bytes()
    size = {"settings": 100, "line": len(samples) - 5, "figures": figures.stat().st_size - 1}
    out = tmp_path / "out"
    if moment == "figures":  # all lines are there
        shutil.copytree(finished, out)
    with full_disk(size[moment]), pytest.raises(OSError, match=r"space|large"):
        run_benchmark(*shipped, read(exported), out, FAST)
    done = {"settings": 0, "line": 3, "figures": 4}[moment]
    assert (out / SAMPLES).exists() == (done > 0)
    assert not done or lines(out) == lines(finished)[:done]
    found = run_benchmark(*shipped, read(exported), out, FAST)
    assert found.set_aside == {}
    assert lines(out) == lines(finished)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in finished.iterdir()}


def test_a_full_disk_is_no_failure_of_a_picture(shipped, exported, tmp_path):
    """Where a forward needs a file of its own."""

    def spill(*_):
        (tmp_path / "spilt").write_bytes(bytes(10_000))

    handle = shipped[0].register_forward_pre_hook(spill)
    try:
        with full_disk(5000), pytest.raises(OSError, match="large"):
            run_benchmark(*shipped, read(exported), tmp_path / "out", FAST)
    finally:
        handle.remove()
    assert not (tmp_path / "out" / SAMPLES).exists()


# ---- kills --------------------------------------------------------------------------------------

# Forks a run of the folder, kills it after the given time, and does so until one lives to its end.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
import captum_mllm.methods.ours
from captum_mllm.benchmark import run_benchmark
from captum_mllm.reference import load
from tests.benchmark.test_folder import FAST, read

model, processor = load()
data, out = read(Path(sys.argv[1])), Path(sys.argv[2])
kills, deadline, draw = int(sys.argv[3]), time.monotonic() + float(sys.argv[4]), random.Random(0)

def fork(folder):
    child = os.fork()
    if child:
        return child
    try:
        import warnings
        warnings.simplefilter("ignore")
        run_benchmark(model, processor, data, folder, FAST)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)

run_benchmark(model, processor, data, out / "whole", FAST)  # in one go; imports what is lazy
start = time.monotonic()
assert os.waitpid(fork(out / "timed"), 0)[1] == 0
longest, done, folder = time.monotonic() - start, 0, 0
while done < kills and time.monotonic() < deadline:
    child = fork(out / str(folder))
    time.sleep(draw.random() * longest)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    done += status == signal.SIGKILL
    folder += status == 0  # it came to its end before: the next begins anew
assert os.waitpid(fork(out / str(folder)), 0)[1] == 0
print(done, "kills", folder + 1, "runs")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_killed_at_50_random_moments(exported, tmp_path):
    """The table, the figures and the lines are those of a run in one go, but for the seconds."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(exported), str(tmp_path), "50", "600"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    done, runs = map(int, re.findall(r"\d+", ended.stdout))
    assert done == 50
    whole = tmp_path / "whole"
    for n in range(runs):
        folder = tmp_path / str(n)
        table, expected = ((one / "benchmark.md").read_text() for one in (folder, whole))
        assert without_seconds(table) == without_seconds(expected)
        assert without_seconds(table) != table
        assert lines(folder) == lines(whole)
        assert timeless(folder) == timeless(whole)


def timeless(folder):
    found = json.loads((folder / "benchmark.json").read_text())
    for of_method in found["figures"].values():
        del of_method["seconds"]
    return found
