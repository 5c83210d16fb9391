"""The command line on a tiny model saved to disk; `main` runs in this process."""

import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from captum_mllm import MLLMAttributionResult, cli
from captum_mllm.visualization.pictures import open_picture

MADE_BY = {  # method: name and number of scales in its result
    "lens": ("LogitLens", 1),
    "tam": ("TokenActivationMap(LogitLens)", 1),
    "msea": ("MSEA(LogitLens)", 3),
    "arc": ("ARC(LogitLens)", 1),
    "msea+arc": ("ARC(MSEA(LogitLens))", 3),
}


@pytest.fixture(scope="session")
def saved(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def image(picture, tmp_path):
    path = tmp_path / "cat.png"
    picture.save(path)
    return path


@pytest.fixture
def base(saved, image, tmp_path):
    """Arguments that work; `out` must not exist yet."""
    return {
        "--model": str(saved),
        "--image": str(image),
        "--prompt": "what is here ?",
        "--out": str(tmp_path / "out"),
        "--max-new-tokens": "4",
        "--device": "cpu",
    }


def run(arguments, *flags):
    return cli.main(["explain", *(part for pair in arguments.items() for part in pair), *flags])


def failing(capsys, arguments, *flags):
    """The one line of a failure."""
    try:
        code = run(arguments, *flags)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert err.endswith(errors[0] + "\n")
    assert "Traceback" not in err
    return errors[0]


@pytest.mark.parametrize("method", cli.METHODS)
def test_every_method_writes_page_overlays_and_table(method, base, tmp_path, capsys):
    arguments = {**base, "--method": method, "--target": "a dog on the left"}
    assert run(arguments, "--save-result") == 0
    result = MLLMAttributionResult.load(tmp_path / "out" / "result.safetensors")
    assert (result.method, len(result.scales)) == MADE_BY[method]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"index.html", "picture.png", "text-heatmap.png", "words.json"} <= names
    assert {"word-02-dog.png", "word-05-left.png"} <= names
    assert "word-01-a.png" not in names
    out, err = capsys.readouterr()
    assert "answer: a dog on the left" in out
    assert [line.split()[0] for line in out.splitlines()[3:7]] == ["word", "----", "dog", "left"]
    assert "Assumed" in err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_generated_answer_is_explained_and_saved(base, tmp_path, capsys):
    assert run(base, "--save-result") == 0
    result = MLLMAttributionResult.load(tmp_path / "out" / "result.safetensors")
    assert 1 <= len(result.output_tokens) <= 4
    data = json.loads((tmp_path / "out" / "words.json").read_text())
    assert data["answer"] == " ".join(result.output_tokens)  # this tokenizer marks no spaces
    assert "wrote" in capsys.readouterr().err


def test_scales_and_layer_reach_the_method(base, tmp_path):
    target = {"--target": "a dog"}
    assert run({**base, **target, "--scales": "1,2", "--method": "msea"}, "--save-result") == 0
    result = MLLMAttributionResult.load(tmp_path / "out" / "result.safetensors")
    assert result.scales == (1.0, 2.0)
    assert run({**base, **target, "--layer": "0", "--method": "msea"}, "--save-result") == 0
    other = MLLMAttributionResult.load(tmp_path / "out" / "result.safetensors")
    assert not other.token_attr.equal(result.token_attr) or other.scales != result.scales


def test_prompt_with_image_token_is_used_as_it_is(base, capsys):
    assert run({**base, "--prompt": "USER: <image> what ASSISTANT:"}) == 0
    assert "used as it is" in capsys.readouterr().err


def test_image_token_is_put_before_a_prompt_without_template(processor, picture):
    assert processor.chat_template is None
    inputs, assumed = cli.prepare_inputs(processor, picture, "what is here ?")
    assert "no chat template" in assumed
    ids = inputs["input_ids"][0].tolist()
    placeholders = [n for n, i in enumerate(ids) if i == processor.image_token_id]
    assert len(placeholders) == 16
    assert placeholders[-1] < ids.index(processor.tokenizer.convert_tokens_to_ids("what"))


@pytest.mark.parametrize("start", ["", "<s>"])
def test_chat_template_is_used_with_one_start_token(start, picture):
    from captum_mllm.reference.tokenizer import build_processor

    processor = build_processor(16, 8)  # its tokenizer puts <s> before every text
    processor.chat_template = start + processor.chat_template
    inputs, assumed = cli.prepare_inputs(processor, picture, "what is this?")
    assert "chat template" in assumed
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert "assistant" in processor.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("--image", "missing.png", "no file 'missing.png'"),
        ("--image", __file__, "no picture"),
        ("--max-new-tokens", "x", "whole number"),
        ("--alpha-max", "-1", "above 0"),
        ("--method", "grad", "'lens', 'tam', 'msea', 'arc', 'msea\\+arc'"),
        ("--model", "./missing", "no such folder"),
        ("--out", __file__, "is a file"),
        ("--out", f"{__file__}/below", "is a file"),
        ("--scales", "1,x", "positive numbers"),
        ("--scales", "-1", "positive numbers"),
        ("--scales", "0.01", "smaller than one"),
        ("--scales", "1,1", "distinct"),
        ("--layer", "7", "layer must be"),
        ("--device", "toaster", "toaster"),
        ("--dtype", "int8", "'float32'"),
        ("--max-new-tokens", "0", "at least 1"),
        ("--target", " ", "empty"),
        ("--prompt", "", "empty"),
        ("--prompt", "<image> <image>", "<image>|image tokens"),
    ],
)
def test_mistakes_end_with_one_line_that_names_the_argument(
    argument, value, words, base, tmp_path, capsys
):
    line = failing(capsys, {**base, argument: value})
    assert f"argument {argument}" in line
    assert re.search(words, line)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]  # nothing half-written


def test_image_and_prompt_are_needed_and_demo_goes_alone(base, tmp_path, capsys):
    without = {k: v for k, v in base.items() if k != "--image"}
    assert "--image" in failing(capsys, without)
    assert "--demo" in failing(capsys, base, "--demo")


def test_broken_picture(base, image, capsys):
    image.write_bytes(image.read_bytes()[:900])
    assert "broken picture" in failing(capsys, base)


def test_model_without_pictures_is_refused_before_its_weights_are_read(base, tmp_path, capsys):
    from transformers import LlamaConfig, LlavaNextConfig

    for config, words in ((LlamaConfig(), "reads no pictures"), (LlavaNextConfig(), "no adapter")):
        folder = tmp_path / type(config).__name__
        config.save_pretrained(folder)  # there are no weights at all
        line = failing(capsys, {**base, "--model": str(folder)})
        assert "argument --model" in line
        assert words in line


def test_missing_torchvision_is_named(base, capsys, monkeypatch):
    from transformers import AutoProcessor
    from transformers.utils import import_utils

    def fail(*_, **__):
        raise AttributeError("VIDEO_PROCESSOR_MAPPING has no attribute '_extra_content'")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    monkeypatch.setattr(import_utils, "is_torchvision_available", lambda: False)
    line = failing(capsys, base)
    assert "pip install torchvision" in line
    assert "argument --model" in line


def test_failure_while_drawing_leaves_nothing(base, tmp_path, capsys, monkeypatch):
    from captum_mllm.visualization import report

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report, "_matrix", fail)
    assert "disk full" in failing(capsys, base)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


def test_ascii_terminal_gets_escapes():
    class Stream:
        encoding = "ascii"

    assert cli._printable("café 狗", Stream()) == r"caf\xe9 \u72d7"


def test_pictures_are_opened_as_they_are_seen(tmp_path):
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (2, 4)
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_picture_too_large_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large"):
        open_picture(tmp_path / "large.png")


def test_demo_scene_is_held_out_and_has_three_objects():
    from captum_mllm.reference import make_scene

    picture, prompt = cli._demo_scene()
    assert len(make_scene(cli.DEMO_SCENE, "test").objects) == 3
    assert picture.size == (336, 336)
    assert prompt


def test_help_needs_no_model():
    done = subprocess.run(
        [sys.executable, "-m", "captum_mllm", "explain", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "msea+arc" in done.stdout


@pytest.mark.parametrize(
    ("flag", "value", "method"), [("--scales", "1,2", "arc"), ("--alpha-max", "1", "msea")]
)
def test_flags_that_a_method_ignores_are_refused(flag, value, method, base, capsys):
    assert run({**base, "--method": method, flag: value}) == 2
    assert f"argument {flag}: only" in capsys.readouterr().err


def test_alpha_max_reaches_the_method(base, tmp_path):
    maps = []
    for more in ({}, {"--alpha-max": "0.01"}):
        out = str(tmp_path / str(len(maps)))
        arguments = {**base, "--target": "a dog on the left", "--method": "arc", "--out": out}
        assert run({**arguments, **more}, "--save-result") == 0
        maps.append(MLLMAttributionResult.load(f"{out}/result.safetensors").grid_attr[0])
    assert not torch.equal(*maps)
