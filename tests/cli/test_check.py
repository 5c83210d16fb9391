"""``captum-mllm check``: exit codes, files, one line for a mistake."""

import json

import pytest
import torch

from captum_mllm.checking import controls
from captum_mllm.cli.main import main
from tests.oracle.tiny import tiny_llava, tiny_processor

QUICK = ("--only", "class,layout,lens", "--max-new-tokens", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def test_a_sound_model_passes(saved, tmp_path, capsys, picture):
    image = tmp_path / "cat.png"
    picture.save(image)
    files = tmp_path / "report.json", tmp_path / "page.html"
    arguments = ["--image", str(image), "--prompt", "what is here ?"]
    arguments += ["--json", str(files[0]), "--out", str(files[1])]
    assert main(["check", "--model", saved, *QUICK, *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == saved
    assert out.splitlines()[-1] == "4 passed, 0 failed, 0 not tried."
    assert "captum-mllm: layout: passed" in err
    data = json.loads(files[0].read_text())
    assert data["about"]["prompt"] == "what is here ?"
    assert data["about"]["model"] == saved
    assert "Layout" in files[1].read_text()


def test_a_fault_gives_exit_code_1(saved, capsys, monkeypatch):
    from captum_mllm.adapters import LlavaAdapter, View

    monkeypatch.setattr(
        LlavaAdapter,
        "views",
        lambda _self, grid: (View(torch.arange(grid.cells).reshape(grid.shape).flip(1)),),
    )
    assert main(["check", "--model", saved, *QUICK]) == 1
    out, _ = capsys.readouterr()
    assert "mirrored left to right" in " ".join(out.split())
    assert out.splitlines()[-1] == "3 passed, 1 failed, 0 not tried: layout failed."


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model", "./nowhere"), "argument --model"),
        (("--image", "nothing.png"), "argument --image"),
        (("--json", "nowhere/report.json"), "argument --json: nowhere/report.json must be a file"),
        (("--out", "."), "argument --out"),
        (("--only", "colour"), "argument --only: must hold names of class"),
        (("--max-new-tokens", "0"), "argument --max-new-tokens"),
        (("--prompt", " "), "argument --prompt"),
    ],
)
def test_what_can_not_start_gives_exit_code_2(saved, capsys, flags, says):
    try:
        code = main(["check", "--model", saved, *QUICK, *flags])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    (error,) = [line for line in err.splitlines() if "error:" in line]
    assert says in error


def test_the_shipped_model_needs_no_arguments(capsys, monkeypatch):
    monkeypatch.setattr(controls, "STEPS", 4)
    assert main(["check", "--only", "lens,faithfulness", "--device", "cpu"]) == 0
    out, _ = capsys.readouterr()
    assert "Insertion minus deletion over" in " ".join(out.split())
