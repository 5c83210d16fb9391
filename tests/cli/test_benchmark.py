"""``captum-mllm benchmark``: the command, interrupted and resumed, and its users' mistakes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captum_mllm.cli.arguments import option
from captum_mllm.cli.main import main
from captum_mllm.data import CocoDataset, write_label_maps
from captum_mllm.reference.export import export
from tests.benchmark.test_run import NAMES, lines
from tests.disks import full_disk

PICTURES = 3


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    return export("plain", tmp_path_factory.mktemp("data"), count=PICTURES, size=64)


@pytest.fixture
def base(exported, tmp_path):
    """Arguments that work."""
    return {
        "--data": str(exported),
        "--methods": "lens,random",
        "--metrics": "obj_iou,func_iou,f1_iou",
        "--out": str(tmp_path / "out"),
        "--device": "cpu",
    }


def command(arguments, *flags):
    return ["benchmark", *(part for pair in arguments.items() for part in pair), *flags]


def run(arguments, *flags):
    return main(command(arguments, *flags))


def without_time(folder):
    found = json.loads((folder / "benchmark.json").read_text())
    for own in found["figures"].values():
        del own["seconds"]
    return {name: value for name, value in found.items() if name != "settings"}


def test_table_on_stdout_the_rest_on_stderr(base, tmp_path, capfd):
    assert run({**base, "--limit": "2", "--against": "random"}, "--parity") == 0
    out, err = capfd.readouterr()
    assert (tmp_path / "out/benchmark.md").read_text() == out
    rows = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")]
    assert rows == ["| method", "| ---", "| lens", "| random", "| method", "| ---", "| lens"]
    assert "Minus random, where both have a value:" in out
    assert "(parity)" in out
    assert "wrote benchmark.json, benchmark.md and samples.jsonl" in err
    assert "100%" in err
    found = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert found["settings"]["against"] == "random"
    assert found["fixed"]["parity"] is True
    assert (found["model"], found["pictures"]) == ("shipped", 2)
    assert found["paths"] == {"data": base["--data"]}


def test_every_way_to_name_the_data(base, exported, tmp_path):
    data = CocoDataset(*(exported / name for name in NAMES))
    labels = write_label_maps(data, tmp_path / "labels")
    del base["--data"]
    paths = dict(zip(("--images", "--instances", "--captions"), NAMES, strict=True))
    ways = [
        {"--data": str(exported)},
        {flag: str(exported / name) for flag, name in paths.items()},
        {"--data": str(labels)},
    ]
    found = []
    for number, way in enumerate(ways):
        out = tmp_path / f"out{number}"
        assert run({**base, **way, "--out": str(out), "--answers": "captions"}) == 0
        found.append(without_time(out)["figures"])
    assert found[0] == found[1] == found[2]


# The command, but that the model's first call after the second line never ends.
STALLED = """
import runpy, sys, time, torch
from pathlib import Path

path = Path(sys.argv.pop(1))

def wait(*_):
    if path.exists() and path.read_bytes().count(b"\\n") == 2:
        time.sleep(600)

torch.nn.modules.module.register_module_forward_pre_hook(wait)
runpy.run_module("captum_mllm", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_resumed(number, base, tmp_path, capfd):
    """Nothing is lost or computed twice, and the figures are those of a run in one go."""
    path = tmp_path / "out/samples.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, str(path), *command(base)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 2):
            time.sleep(0.01)
        process.send_signal(number)
        stderr = process.communicate()[1]
    finally:
        process.kill()
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 2 <= whole.count(b"\n") < 2 * PICTURES
    assert json.loads((tmp_path / "out/benchmark.json").read_text())["finished"] is False
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted, but all finished results are in " in stderr
        assert "re-run the same command to resume" in stderr
        assert "Traceback" not in stderr
    else:
        assert process.returncode == -signal.SIGKILL
    assert run(base) == 0  # a line that was being written is set aside, which is said
    assert path.read_bytes().startswith(whole)
    assert run({**base, "--out": str(tmp_path / "in one go")}) == 0
    assert lines(tmp_path / "out") == lines(tmp_path / "in one go")
    assert without_time(tmp_path / "out") == without_time(tmp_path / "in one go")
    capfd.readouterr()


def test_a_broken_picture_is_counted(base, exported, tmp_path, capfd):
    data = CocoDataset(*(exported / name for name in NAMES))
    labels = write_label_maps(data, tmp_path / "labels")
    (labels / "image/000000000001.png").write_bytes(b"no picture")
    assert run({**base, "--data": str(labels)}) == 0
    out = capfd.readouterr().out
    assert "Failed, and left out of the means (of alike reasons the first):" in out
    assert "- 2 x ValueError: " in out


MISTAKES = [  # changes (None: without it) -> what the line says
    ({"--methods": "lens,tan"}, "argument --methods: must be among lens, tam, "),
    ({"--methods": "lens,"}, "argument --methods: must be names with commas between"),
    ({"--metrics": "iou"}, "argument --metrics: must be among obj_iou, "),
    ({"--against": "tam"}, "argument --against: must be one of lens, random, got 'tam'"),
    ({"--option": "scales=1"}, "argument --option: must be METHOD.NAME=VALUE, got 'scales=1'"),
    (
        {"--option": "tam.layer=1"},
        "argument --option: must be for one of lens, random, got some for 'tam'",
    ),
    (
        {"--option": "lens.x=1"},
        "argument --option: must be those of their method: method 'lens'",
    ),
    ({"--data": None}, "arguments --data or, for COCO, --images and --instances: give one"),
    ({"--images": "x"}, "arguments --data or, for COCO, --images and --instances: give one"),
    ({"--data": None, "--images": "x"}, "arguments --data or, for COCO, --images and --instances"),
    ({"--data": "nowhere"}, "argument --data: 'nowhere' holds neither instances.json nor anno"),
    (
        {"--data": None, "--images": "x", "--instances": "y"},
        "argument --images, --instances or --captions: images='x' is not a folder",
    ),
    ({"--limit": "0"}, "argument --limit: must be a whole number of at least 1, got '0'"),
    ({"--steps": "few"}, "argument --steps: must be a whole number of at least 1, got 'few'"),
    ({"--prompt": " "}, "argument --prompt: is empty"),
    ({"--baseline": "white"}, "argument --baseline: invalid choice: 'white'"),
    ({"--categories": "coco"}, "argument --categories: is 'coco', but the data has"),
    ({"--model": "./nowhere"}, "argument --model: './nowhere' can't be loaded"),
    ({"--device": "abacus"}, "argument --device: 'abacus' can't be used"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_line(change, message, base, capfd):
    arguments = {name: v for name, v in {**base, **change}.items() if v is not None}
    try:
        code = run(arguments)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert message in line
    assert err.endswith(line + "\n")
    assert "Traceback" not in err


def test_other_settings_and_a_file_in_the_way(base, tmp_path, capfd):
    assert run(base) == 0
    assert run({**base, "--prompt": "what is here ?"}) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert "argument --out: '" in err
    assert "prompt was 'describe the picture.', is 'what is here ?'. Name another folder" in err
    (tmp_path / "file").write_text("")
    assert run({**base, "--out": str(tmp_path / "file")}) == 2
    assert "argument --out: " in capfd.readouterr().err


def test_nothing_was_measured(base, exported, tmp_path, capfd):
    """Exit code 1, for a script, and the reason for a person."""
    other = shutil.copytree(exported, tmp_path / "other")
    content = json.loads((other / "instances.json").read_text())
    for n, category in enumerate(content["categories"]):
        category["name"] = f"unicorn {'abcdefghij'[n % 10]}{n}"
    (other / "instances.json").write_text(json.dumps(content))
    arguments = {**base, "--data": str(other), "--metrics": "obj_iou", "--limit": "1"}
    assert run(arguments) == 1
    err = capfd.readouterr().err
    assert "nothing was measured: no word of an answer names a category of the data" in err
    (other / "images/000000.png").write_bytes(b"no picture")
    assert run({**arguments, "--out": str(tmp_path / "failed")}) == 1
    out, err = capfd.readouterr()
    assert "nothing was measured: see the failures below the table" in err
    assert "- 2 x ValueError: " in out


@pytest.mark.filterwarnings("always")
def test_lines_that_are_set_aside_are_said(base, tmp_path, capfd):
    assert run(base) == 0
    path = tmp_path / "out/samples.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"seconds": ', b'"seconds": -', 1))
    capfd.readouterr()
    assert run(base) == 0
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if "set-aside" in line]
    assert line.startswith("captum-mllm: warning: 1 line does not fit this run (1 cut off or")


def test_a_full_disk(base, tmp_path, capsys):
    size = 1000
    with full_disk(size):
        assert run(base) == 1
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith(f"captum-mllm benchmark: error: {base['--out']} can't be written (")
    assert line.endswith("make room and re-run the same command to resume")
    assert run(base) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_standard_output_that_is_full(base, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(base) == 1
    assert "captum-mllm benchmark: error: [Errno 28] No space left" in capsys.readouterr().err


def test_options():
    assert option("msea+arc.scales=1,1.5") == ("msea+arc", "scales", (1, 1.5))
    assert option("tam.parity=True") == ("tam", "parity", True)
    assert option("msea.aggregation=mean") == ("msea", "aggregation", "mean")
    assert option("alpha_max=0.5") == ("", "alpha_max", 0.5)


def test_limits_and_names_that_lead_away_are_flags(exported, base, tmp_path, capsys):
    """Refused before the model is loaded, with the flag that allows them."""
    (tmp_path / "data").mkdir()
    instances = json.loads((exported / "instances.json").read_text())
    for image in instances["images"]:
        image["file_name"] = str(exported / "images" / image["file_name"])
    instances["annotations"][0]["segmentation"] = [[2, 2, 9, 2, 9, 9, 2, 9]]
    (tmp_path / "data/images").mkdir()
    (tmp_path / "data/instances.json").write_text(json.dumps(instances))
    away = {**base, "--data": str(tmp_path / "data"), "--model": "./missing"}
    cases = [
        (away, (), "argument --data: ", "are outside", "or pass --allow-outside if you trust"),
        ({**away, "--data": str(exported)}, ("--max-pixels", "4095"), "4095", "--max-pixels"),
        (away, ("--allow-outside", "--max-outline", "27"), "28 pixels", "raise --max-outline"),
        ({**away, "--data": str(exported)}, ("--max-mask-pixels", "9"), "raise --max-mask-pixels"),
        (away, ("--allow-outside",), "argument --model: './missing' can't be loaded"),
    ]
    for arguments, flags, *messages in cases:
        assert run(arguments, *flags) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert all(message in last for message in messages), last


def test_truncated_label_images_are_failed_samples(exported, base, tmp_path, capsys):
    files = (exported / name for name in ("images", "instances.json", "captions.json"))
    folder = write_label_maps(CocoDataset(*files), tmp_path / "labels")
    broken = sorted((folder / "seg_label").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:60])
    run({**base, "--data": str(folder), "--methods": "lens"})
    reasons = [line["error"]["text"] for line in lines(tmp_path / "out") if "error" in line]
    assert len(reasons) == 1
    assert "anno.json: record 1: entry 2 (label image)" in reasons[0]
    assert str(broken) in reasons[0]
