"""The command line on a tiny model saved to disk; `main` runs in this process."""

import base64
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from captum_mllm import MLLMAttributionResult
from captum_mllm.adapters import registered_classes
from captum_mllm.cli.arguments import printable
from captum_mllm.cli.explain import DEMO_SCENE, demo_scene
from captum_mllm.cli.main import main
from captum_mllm.methods import METHODS, explain
from captum_mllm.model import loading
from captum_mllm.model.loading import prepare_inputs
from captum_mllm.pictures import open_picture
from captum_mllm.validation import ArgumentError
from tests.adapters.test_families import as_full_processor
from tests.disks import full_disk
from tests.oracle.families import NAMES, PLACEHOLDER, above, family

MADE_BY = {  # method: name and number of scales in its result
    "lens": ("JointNormalization(LogitLens)", 1),
    "tam": ("TokenActivationMap(LogitLens)", 1),
    "msea": ("JointNormalization(MSEA(LogitLens))", 2),
    "arc": ("ARC(LogitLens)", 1),
    "msea+arc": ("ARC(MSEA(LogitLens))", 2),
    "direct": ("JointNormalization(MSEA(DirectLogitAttribution))", 2),
    "direct_lens": ("JointNormalization(DirectLens)", 2),
    "randomised_model": ("randomised_model(JointNormalization(LogitLens))", 1),
}
EXPLAINED = [name for name in METHODS if name != "mask"]  # which needs annotated pictures
FEW = {"integrated_gradients": ("--option", "steps=2")}


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
    return main(["explain", *(part for pair in arguments.items() for part in pair), *flags])


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


def pictures_of(page):
    """The pictures inside a page."""
    found = re.findall(r'id="picture-\d+" href="data:image/jpeg;base64,([^"]*)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.mark.parametrize("method", EXPLAINED)
def test_every_method_writes_page_and_table(method, base, tmp_path, capsys):
    arguments = {**base, "--method": method, "--target": "a dog on the left"}
    assert run(arguments, "--save-result", *FEW.get(method, ())) == 0
    result = MLLMAttributionResult.load(tmp_path / "out" / "result.safetensors")
    assert (result.method, len(result.scales)) == MADE_BY.get(method, (method, 1))
    assert result.units == "[0, 1]"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "table.txt", "words.json", "result.safetensors"}
    data = json.loads((tmp_path / "out" / "words.json").read_text())
    assert list(data["methods"]) == list(dict.fromkeys([method, "lens", "random"]))
    assert data["facts"]["settings"].startswith(f"method={method}")
    assert hashlib.sha256(Path(arguments["--image"]).read_bytes()).hexdigest() in str(data["facts"])
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
    assert data["answer"] == "".join(result.output_tokens).strip()
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
    inputs, assumed = prepare_inputs(processor, [picture], "what is here ?")
    assert "no chat template" in assumed
    ids = inputs["input_ids"][0].tolist()
    placeholders = [n for n, i in enumerate(ids) if i == processor.image_token_id]
    assert len(placeholders) == 16
    assert placeholders[-1] < ids.index(processor.tokenizer.convert_tokens_to_ids("what"))


@pytest.mark.parametrize("start", ["", "<s>"])
def test_chat_template_is_used_with_one_start_token(start, picture):
    from studies.training.tokenizer import build_processor

    processor = build_processor(16, 8)  # its tokenizer puts <s> before every text
    processor.chat_template = start + processor.chat_template
    inputs, assumed = prepare_inputs(processor, [picture], "what is this?")
    assert "chat template" in assumed
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert "assistant" in processor.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("--image", "missing.png", "no file 'missing.png'"),
        ("--image", __file__, "not a picture"),
        ("--max-new-tokens", "x", "whole number"),
        ("--alpha-max", "-1", "above 0"),
        ("--method", "grad", "must be one of lens, tam, .*mask, got 'grad'"),
        ("--model", "./missing", "no such folder"),
        ("--out", __file__, "is a file"),
        ("--out", f"{__file__}/below", "is a file"),
        ("--scales", "1,x", "positive numbers"),
        ("--scales", "-1", "positive numbers"),
        ("--scales", "0.01", "smaller than one"),
        ("--scales", "1,1", "distinct"),
        ("--layer", "7", "must be an int in"),
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
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")  # there are no weights at all
    line = failing(capsys, {**base, "--model": str(tmp_path / "llama")})
    assert "argument --model" in line
    assert "takes no images" in line
    assert all(f"{name}ForConditionalGeneration" in line for name in NAMES)


@pytest.mark.parametrize("method", ["lens", "msea+arc", "gradcam"])
def test_a_class_without_adapter_is_probed(method, base, tmp_path, capsys, monkeypatch):
    from captum_mllm.adapters import registry

    flags = ("--method", method, "--target", "a cat", "--save-result")
    assert run({**base, "--out": str(tmp_path / "by_hand")}, *flags) == 0
    assert "probed" not in capsys.readouterr().err
    monkeypatch.setattr(registry, "_REGISTRY", {})
    assert run(base, *flags) == 0
    assert "probed LlavaForConditionalGeneration: 4 x 4 tokens" in capsys.readouterr().err
    probed, by_hand = (
        MLLMAttributionResult.load(tmp_path / folder / "result.safetensors")
        for folder in ("out", "by_hand")
    )
    assert probed.grid_attr[0].shape == by_hand.grid_attr[0].shape
    assert probed.output_tokens == by_hand.output_tokens


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


@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_a_full_disk_leaves_nothing(size, base, tmp_path, capsys):
    """Not even a part of a report; a limit between the sizes of its files meets each of them."""
    with full_disk(size):
        assert run({**base, "--method": "lens", "--target": "a dog"}, "--save-result") == 1
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith(f"captum-mllm explain: error: {base['--out']} can't be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


def test_ascii_terminal_gets_escapes():
    class Stream:
        encoding = "ascii"

    assert printable("café 狗", Stream()) == r"caf\xe9 \u72d7"


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

    picture, prompt = demo_scene()
    assert len(make_scene(DEMO_SCENE, "test").objects) == 3
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
    ("flag", "value", "method"),
    [("--scales", "1,2", "arc"), ("--alpha-max", "1", "msea"), ("--layer", "1", "gradcam")],
)
def test_flags_that_a_method_does_not_take_are_refused(flag, value, method, base, capsys):
    """With its options, before the model is loaded."""
    line = failing(capsys, {**base, "--model": "./missing", "--method": method, flag: value})
    name = flag.strip("-").replace("-", "_")
    assert f"argument {flag}: method '{method}' does not take the option(s) {name}; it tak" in line
    assert all(option in line for option in METHODS[method].options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("top_k",), "argument --option: must be METHOD.NAME=VALUE, got 'top_k'"),
        ((".top_k=1",), "argument --option: must be METHOD.NAME=VALUE, got '.top_k=1'"),
        (("tam.parity=True",), "argument --option: tam.parity is not an option of --method msea+a"),
        (("grid=1",), "argument --option: method 'msea+arc' does not take the option(s) grid; it"),
        (("top_k=2", "msea+arc.top_k=3"), "argument --option: top_k is given twice"),
        (("rbo_p=2",), "argument --option: rbo_p must lie strictly between"),
        (("scales=2",), "argument --option, --model or --prompt: scales must be a sequence"),
    ],
)
def test_wrong_options_are_one_line(options, message, base, capsys):
    flags = [part for one in options for part in ("--option", one)]
    assert message in failing(capsys, base, *flags)


def test_masks_are_for_benchmarks(base, capsys):
    line = failing(capsys, {**base, "--method": "mask"})
    assert "argument --method: mask needs masks" in line
    assert "captum-mllm benchmark" in line


def test_explain_gives_the_maps_of_the_library(base, tmp_path):
    """Short forms and options reach the method; what is left out has the library's default."""
    text = "a dog on the left"
    flags = {**base, "--target": text, "--scales": "1,1.5", "--alpha-max": "0.5"}
    options = ("--option", "top_k=7", "--option", "msea+arc.flip=none")
    assert run(flags, "--save-result", *options) == 0
    result = MLLMAttributionResult.load(tmp_path / "out" / "result.safetensors")
    model, processor, _ = loading.load_model(base["--model"], "auto", "cpu")
    picture = open_picture(Path(base["--image"]))
    inputs, _ = loading.prepare_inputs(processor, [picture], base["--prompt"])
    expected = explain(
        "msea+arc", model, processor, inputs, text,
        scales=(1.0, 1.5), alpha_max=0.5, top_k=7, flip="none",
    )  # fmt: skip
    assert result.scales == expected.scales
    assert torch.equal(result.grid_attr[0], expected.grid_attr[0])
    assert torch.equal(result.token_attr, expected.token_attr)


def test_alpha_max_reaches_the_method(base, tmp_path):
    maps = []
    for more in ({}, {"--alpha-max": "0.01"}):
        out = str(tmp_path / str(len(maps)))
        arguments = {**base, "--target": "a dog on the left", "--method": "arc", "--out": out}
        assert run({**arguments, **more}, "--save-result") == 0
        maps.append(MLLMAttributionResult.load(f"{out}/result.safetensors").grid_attr[0])
    assert not torch.equal(*maps)


# ---- every family -------------------------------------------------------------------------------

VIDEO_PART = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "InternVL", "SmolVLM")
WITHOUT_VIDEO = "loaded without its video part because torchvision is not installed"
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{{ PICTURE if c['type'] == 'image' else c['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WITH_BREAK = ("Llava", "LlavaNext", "InternVL", "Idefics3", "SmolVLM", "Gemma3")
as_processors_do = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
kin_of = functools.cache(family)


@functools.cache
def template(name):
    """A chat template of that family, in which each picture has its placeholder."""
    return TEMPLATE.replace("PICTURE", repr(PLACEHOLDER.get(name, "<image>")))


@pytest.fixture(params=above())
def kin(request):
    return kin_of(request.param)


@pytest.fixture
def kin_saved(kin, tmp_path):
    """A folder that model and processor were saved to, as where torchvision is installed."""
    folder = tmp_path / "model"
    kin.model.save_pretrained(folder)
    (as_full_processor if kin.name in VIDEO_PART else as_saved)(folder, kin.processor)
    return folder


def as_saved(folder, processor):
    processor.save_pretrained(folder)


@as_processors_do
def test_every_family_is_explained_from_its_folder(kin, kin_saved, base, tmp_path, capsys):
    pictures = {"one": kin.wide_picture, "other": kin.picture}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    images = [str(tmp_path / f"{name}.png") for name in pictures]
    arguments = {**base, "--model": str(kin_saved), "--method": "lens", "--target": "dog left"}
    arguments["--image"] = images[0]
    assert run(arguments, "--save-result") == 0
    alone = MLLMAttributionResult.load(tmp_path / "out" / "result.safetensors")
    assert len(alone.grids) == 1
    page = (tmp_path / "out" / "index.html").read_text()
    err = capsys.readouterr().err
    assert (WITHOUT_VIDEO in err) == (WITHOUT_VIDEO in page) == (kin.name in VIDEO_PART)

    assert run(arguments, "--image", images[1], "--save-result") == 0
    both = MLLMAttributionResult.load(tmp_path / "out" / "result.safetensors")
    assert both.grids[0] == alone.grids[0]
    assert len(both.grids) == 2
    out, err = capsys.readouterr()
    assert "assumed: the model saw the whole picture" not in err  # where the pictures lie is known
    assert out.count("answer: dog left") == 1
    assert out.index("one.png\nword") < out.index("other.png\nword")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"index.html", "table.txt", "words.json", "result.safetensors"}
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    for picture, shown in zip(pictures.values(), pictures_of(page), strict=True):
        assert shown.size == picture.size
    assert "one.png" in page
    assert "other.png" in page


@as_processors_do
@pytest.mark.parametrize("count", [1, 2])
def test_each_picture_has_its_placeholder(kin, count):
    pictures = [kin.picture, kin.wide_picture][:count]
    inputs, assumed = prepare_inputs(kin.processor, pictures, "what is here ?")
    assert "no chat template" in assumed
    tokenizer, ids = kin.processor.tokenizer, inputs["input_ids"]
    assert "USER:" not in tokenizer.decode(ids[0])
    expected = kin.encode(*pictures)["input_ids"]
    visual = torch.tensor(kin.model.config.image_token_id)
    assert (ids == visual).sum() == (expected == visual).sum()
    if kin.name.startswith("Qwen"):
        start, end = (tokenizer.convert_tokens_to_ids(f"<|vision_{n}|>") for n in ("start", "end"))
        assert (ids == start).sum() == (ids == end).sum() == count
    before = PLACEHOLDER.get(kin.name, "<image>") + ("\n" if kin.name in WITH_BREAK else "")
    assert assumed == f"Assumed: {before * count!r} before the prompt (no chat template)."
    question = ids[0].tolist().index(tokenizer.convert_tokens_to_ids("what"))
    assert question > (ids[0] == visual).nonzero().max()
    if kin.name == "PaliGemma" and count == 1:  # as its processor does, where a prompt has none
        bare = kin.processor(images=pictures, text="what is here ?", return_tensors="pt")
        assert ids.tolist() == bare["input_ids"].tolist()


@as_processors_do
def test_chat_template_of_every_family(kin, monkeypatch):
    monkeypatch.setattr(kin.processor, "chat_template", template(kin.name))
    inputs, assumed = prepare_inputs(kin.processor, [kin.picture] * 2, "what is here ?")
    assert "chat template" in assumed
    expected = kin.encode(
        kin.picture,
        kin.picture,
        prompt=f"USER: {kin.placeholder} {kin.placeholder} what is here ? ASSISTANT:",
    )
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()


@as_processors_do
def test_prompt_with_another_number_of_placeholders_is_refused(kin):
    with pytest.raises(ArgumentError, match=r"prompt holds 1 image tokens .* 2 picture"):
        prepare_inputs(kin.processor, [kin.picture] * 2, f"{kin.placeholder} what ?")
    inputs, assumed = prepare_inputs(kin.processor, [kin.picture], kin.prompt)
    assert inputs["input_ids"].tolist() == kin.inputs["input_ids"].tolist()
    assert "used as it is" in assumed


def test_every_family_is_known_without_its_weights(kin, tmp_path):
    kin.model.config.architectures = None
    kin.model.config.save_pretrained(tmp_path)  # there are no weights
    loading._check_class(str(tmp_path))
    assert type(kin.model).__name__ in registered_classes()


def test_hub_ids_are_read_without_a_video_part_too(monkeypatch, tmp_path):
    import huggingface_hub

    kin_of("Qwen3VL").processor.save_pretrained(tmp_path)
    asked = {}

    def snapshot(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    processor = loading._without_torchvision("someone/model", AttributeError())
    assert type(processor) is type(kin_of("Qwen3VL").processor)
    assert not any(pattern.endswith("safetensors") for pattern in asked["someone/model"])


def test_package_that_a_processor_needs_is_named(monkeypatch, tmp_path):
    from captum_mllm.adapters import image_only

    def fail(path):
        raise ImportError("Package `num2words` is required")

    monkeypatch.setattr(image_only, "load_image_only", fail)
    with pytest.raises(ImportError, match="num2words"):
        loading._without_torchvision(str(tmp_path), AttributeError("no video_processor"))


def test_a_comparison_that_fails_does_not_lose_the_result(base, tmp_path, capsys, monkeypatch):
    def run_out(_request):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(METHODS, "tam", replace(METHODS["tam"], run=run_out))
    assert run({**base, "--compare": "tam,random", "--target": "a dog"}) == 0
    assert "tam is left out of the comparison: out of memory" in capsys.readouterr().err
    methods = json.loads((tmp_path / "out" / "words.json").read_text())["methods"]
    assert list(methods) == ["msea+arc", "random"]


def test_answers_of_function_words_have_a_table_too(base, capsys):
    assert run({**base, "--compare": "none", "--target": "a"}) == 0
    assert capsys.readouterr().out.split("\n---")[1].splitlines()[1].startswith("a  ")


def test_foreign_files_are_kept(base, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", None)  # noticed before the work
        line = failing(capsys, base)
    assert "holds index.html, which no report of captum_mllm wrote" in line
    assert "--force" in line
    assert (out / "index.html").read_text() == "mine"
    assert run({**base, "--target": "a dog"}, "--force") == 0
    assert run({**base, "--target": "a dog"}) == 0
    assert "mine" not in (out / "index.html").read_text("utf-8")[:100]


def test_methods_to_compare_are_checked_first(base, tmp_path, capsys):
    line = failing(capsys, {**base, "--compare": "lens,nonsense"})
    assert "argument --compare: method must be one of lens" in line
    assert "needs masks" in failing(capsys, {**base, "--compare": "mask"})
    assert run({**base, "--compare": "none", "--target": "a dog"}) == 0
    assert list(json.loads((tmp_path / "out" / "words.json").read_text())["methods"]) == [
        "msea+arc"
    ]


# ---- names, sizes and kinds of pictures ----------------------------------------------------------


def test_names_that_are_not_utf8_or_very_long_are_written_as_text(base, tmp_path, capsys):
    names = [os.fsdecode(b"caf\xe9.png"), "b" * 250 + ".png"]
    for name in names:
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    first, second = (str(tmp_path / name) for name in names)
    out = tmp_path / os.fsdecode(b"r\xe9sum\xe9" + b"o" * 240)
    assert run({**base, "--image": first, "--out": str(out)}, "--image", second) == 0
    page = (out / "index.html").read_text("utf-8")
    assert r"caf\udce9.png" in page
    assert "bbb...bbb" in page
    assert r"caf\udce9.png" in capsys.readouterr().out


def test_tokens_and_prompts_that_utf8_cannot_hold_are_written_as_escapes(subject, tmp_path):
    from captum_mllm import LogitLens
    from captum_mllm.visualization import write_report

    inputs = subject.processor(images=subject.picture, text=subject.prompt, return_tensors="pt")
    result = LogitLens(subject.model, subject.processor).attribute(inputs, subject.answer)
    write_report(tmp_path, result, [subject.picture], prompt="\ud800", notes=["\udce9"])
    assert r"\ud800" in (tmp_path / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--prompt": os.fsdecode(b"\xff ?")}, "argument --prompt: is not UTF-8 text: '\\\\udcff"),
        ({"--target": os.fsdecode(b"\xff")}, "argument --target: is not UTF-8 text"),
        ({"--scales": "1,1e9"}, "argument --scales: must be at most 16, got '1,1e9'"),
        ({"--scales": "1,16.5"}, "argument --scales: must be at most 16"),
        ({"--image": "a" * 5000}, "argument --image: there is no file 'aaa"),
        ({"--image": os.fsdecode(b"\xff.png")}, "argument --image: there is no file '\\\\udcff.p"),
        ({"--out": "a" * 300}, "argument --out: "),
        ({"--model": "a" * 5000}, "argument --model: "),
        ({"--model": os.fsdecode(b"\xff")}, "argument --model: "),
    ],
)
def test_names_and_texts_that_cannot_be_are_one_line(flags, message, base, capsys):
    assert message in failing(capsys, {**base, **flags})


def test_scales_of_an_option_are_bounded_too(base, capsys):
    line = failing(capsys, base, "--option", "scales=(1, 1e9)")
    assert "argument --scales: must be at most 16, got 1e+09" in line


def test_a_bomb_names_file_and_flag(base, image, capsys):
    Image.new("1", (20_000, 20_000)).save(image)
    line = failing(capsys, base)
    assert "argument --image: " in line
    assert "cat.png' is too large" in line
    assert "raise --max-pixels" in line
    Image.new("RGB", (40, 30)).save(image)
    assert "40 x 30 pixels are more than 1199" in failing(capsys, {**base, "--max-pixels": "1199"})
    assert run({**base, "--max-pixels": "1200"}) == 0


def test_what_was_done_to_a_picture_is_said(base, tmp_path, image, capsys):
    Image.new("I;16", (40, 30), 30_000).save(image)
    moving = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    assert run(base, "--image", str(moving)) == 0
    err = capsys.readouterr().err
    page = (tmp_path / "out/index.html").read_text("utf-8")
    for text in ("cat.png has more than 8 bits per pixel", "moving.gif holds several frames; the"):
        assert text in err
        assert text in page
    grey, moving = pictures_of(page)
    assert grey.getpixel((0, 0)) == pytest.approx((117, 117, 117), abs=2)
    assert moving.getpixel((0, 0))[0] > 250


def test_a_folder_with_a_hostile_words_json_is_no_earlier_report(base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/words.json").write_text("[" * 100_000)
    (tmp_path / "out/table.txt").write_text("mine")
    assert "holds table.txt, words.json, which no report" in failing(capsys, base)
    assert (tmp_path / "out/table.txt").read_text() == "mine"
    assert run({**base, "--target": "a dog", "--method": "lens"}, "--force") == 0
