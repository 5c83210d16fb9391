"""Loading folders that are damaged or hostile: one line that names the folder, file and cause."""

import json
import random
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from captum_mllm.cli.main import main
from captum_mllm.model.loading import load_model, prepare_inputs
from captum_mllm.validation import ArgumentError

TEMPLATE = "{{ messages[0]['content'][1]['text'] }}"


@pytest.fixture(scope="session")
def whole(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refusal(folder, argument="name"):
    """The one line of the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parts that read the damaged file
        with pytest.raises(ArgumentError) as raised:
            load_model(str(folder), device="cpu")
    message = str(raised.value)
    assert raised.value.argument == argument
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_every_cut_of_the_weights_names_the_file(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    draw = random.Random(0)
    for end in (0, 7, 8, 100, len(content) - 1, *draw.sample(range(len(content)), 2)):
        path.write_bytes(content[:end])
        assert "model.safetensors is damaged" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_json_names_the_file(name, folder):
    content = (folder / name).read_bytes()
    for damaged in (b"", b"hello", b"[" * 100_000, b"[]", b"null", b"\xff", content[:-9]):
        (folder / name).write_bytes(damaged)
        assert f"{name} is damaged" in refusal(folder), damaged[:9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_token_index": "x"}, "config.json: "),
        ({"text_config": []}, "config.json: "),
        ({"model_type": []}, "config.json: "),
        ({"model_type": "unheard of"}, "config.json: "),
        ({"projector_hidden_act": "x"}, "config.json: KeyError: 'x'"),
        ({"dtype": "x"}, ""),
    ],
)
def test_settings_that_are_wrong_name_the_file(change, message, folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **change}))
    assert message in refusal(folder)


def test_missing_files(folder):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).rename(folder / "kept")
        assert name.split(".")[0] in refusal(folder).removeprefix(str(folder))
        (folder / "kept").rename(folder / name)


def test_weights_that_the_checkpoint_lacks_are_said(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    note = load_model(str(folder), device="cpu")[2]
    assert "1 of the model's weights are not in the checkpoint and are random" in note
    assert "q_proj" in note


def test_a_whole_folder_needs_no_words(folder):
    assert load_model(str(folder), device="cpu")[2] == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in", "has a chat template that fails: TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "has a chat template that fails: ZeroDivisionError"),
        ("{{ raise_exception('no pictures') }}", "has a chat template that fails: TemplateErr"),
        (TEMPLATE, "has a chat template that gives 0 image tokens ('<image>') for 1 picture(s)"),
    ],
)
def test_broken_chat_templates(template, message, folder):
    (folder / "chat_template.jinja").write_text(template)
    _, processor, _ = load_model(str(folder), device="cpu")
    with pytest.raises(ArgumentError) as raised:
        prepare_inputs(processor, [Image.new("RGB", (40, 30))], "what ?")
    assert str(raised.value).startswith(f"processor {message}")


def test_prompts_that_are_no_unicode(processor):
    with pytest.raises(ArgumentError, match=r"prompt is not valid Unicode: '\\udcff \?'"):
        prepare_inputs(processor, [Image.new("RGB", (40, 30))], "\udcff ?")


def test_pictures_of_sixteen_bits_reach_the_processor_scaled(processor):
    deep = Image.new("I;16", (40, 30), 32896)
    grey = Image.new("RGB", (40, 30), (128, 128, 128))
    found, expected = (prepare_inputs(processor, [one], "what ?")[0] for one in (deep, grey))
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


# ---- code of a checkpoint -----------------------------------------------------------------------

CODE = """
from pathlib import Path
Path(__file__).with_name("{marker}").touch()
Path("{folder}", "{marker}").touch()
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers import PreTrainedTokenizerFast
class Own(LlavaConfig):
    model_type = "own_llava"
class OwnModel(LlavaForConditionalGeneration):
    config_class = Own
class OwnProcessor(LlavaProcessor):
    pass
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def hostile(folder):
    """A folder whose settings name Python code that leaves a file where it runs."""
    (folder / "own.py").write_text(CODE.format(folder=folder, marker="it-ran"))
    maps = {
        "config.json": {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.OwnModel"},
        "processor_config.json": {"AutoProcessor": "own.OwnProcessor"},
        "tokenizer_config.json": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    }
    for name, auto_map in maps.items():
        settings = json.loads((folder / name).read_text())
        settings |= {"auto_map": auto_map}
        if name == "config.json":
            settings["model_type"] = "own_llava"
        (folder / name).write_text(json.dumps(settings))
    return folder


def test_code_of_a_folder_is_not_run(hostile, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    message = refusal(hostile)
    assert "Python code of its own" in message
    assert "only with trust_remote_code=True" in message
    assert not (hostile / "it-ran").exists()


@pytest.mark.slow
def test_nothing_is_asked_on_standard_input(hostile, tmp_path):
    """In a process of its own, with a y waiting there."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(picture)
    command = ["explain", "--model", hostile, "--image", picture, "--prompt", "what ?"]
    done = subprocess.run(
        [sys.executable, "-m", "captum_mllm", *command, "--out", tmp_path / "out"],
        input="y\n" * 20,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "error: argument --model" in last
    assert "only with --trust-remote-code: read the code first" in last
    assert "Traceback" not in done.stderr
    assert not (hostile / "it-ran").exists()
    assert "[y/N]" not in done.stdout + done.stderr


def test_code_is_not_run_for_classes_that_transformers_has(hostile, monkeypatch):
    settings = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps({**settings, "model_type": "llava"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    load_model(str(hostile), device="cpu")
    assert not (hostile / "it-ran").exists()


def test_trusted_code_is_run_and_announced(hostile, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", None)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    command = ["explain", "--model", str(hostile), "--image", str(tmp_path / "a.png")]
    command += ["--prompt", "what ?", "--out", str(tmp_path / "out"), "--trust-remote-code"]
    main([*command, "--method", "lens", "--target", "a dog"])
    err = capsys.readouterr().err
    assert (hostile / "it-ran").exists()
    assert "WARNING: --trust-remote-code: Python files of" in err.splitlines()[0]


class Turns:
    """A processor of Gemma 3's kin: it knows both tokens, and its template writes one of them."""

    def __init__(self, real, written):
        self.real, self.written = real, written
        self.tokenizer, self.chat_template = real.tokenizer, "there is one"
        self.boi_token, self.image_token = "<begin>", "<image>"

    def apply_chat_template(self, turns, **_options):
        return f"USER: {self.written}\n{turns[0]['content'][-1]['text']} ASSISTANT:"

    def __call__(self, images, text, **options):
        return self.real(images=images, text=text.replace("<begin>", "<image>"), **options)


@pytest.mark.parametrize("token", ["<begin>", "<image>"])
def test_either_image_token_of_a_template_counts(token, processor, picture):
    turns = Turns(processor, token)
    inputs, assumed = prepare_inputs(turns, [picture], "what is here ?")
    assert "pixel_values" in inputs
    assert "chat template" in assumed
    prompt = f"USER: {token}\nwhat is here ? ASSISTANT:"
    _, assumed = prepare_inputs(turns, [picture], prompt)
    assert "used as it is" in assumed
    with pytest.raises(ArgumentError, match="holds 2 image tokens"):
        prepare_inputs(turns, [picture], f"{token}{token} what ?")
    with pytest.raises(ArgumentError, match="gives 0 image tokens"):
        prepare_inputs(Turns(processor, ""), [picture], "what is here ?")


def test_harmless_files_are_not_blamed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ArgumentError) as caught:
        load_model(str(tmp_path))
    assert "modules.json" not in str(caught.value)
