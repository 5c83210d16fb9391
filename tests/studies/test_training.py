import json
from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_mllm.reference import load, make_scene, model_path, named_objects
from captum_mllm.reference.captions import DEFAULT_QUESTION
from captum_mllm.reference.models import MODELS
from captum_mllm.reference.planted import draw_broken
from captum_mllm.reference.scenes import SceneBatch, seeds_of
from studies.training.data import make_batch
from studies.training.evaluate_model import (
    answers,
    auc,
    evaluate,
    lens,
    lens_aucs,
    macro_mean,
    partner_named,
    prompt_inputs,
    share,
)
from studies.training.families import Way, square
from studies.training.layouts import Layout, draw_layout, layout_coverage, normalize
from studies.training.models import build_model, family_of, sha256
from studies.training.train import answer_loss, main

LLAVA = family_of("llava")
SCENES = [make_scene(i) for i in range(5000, 5020)]


@pytest.fixture(scope="module")
def shipped():
    path = model_path("llava")
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(path)


@pytest.mark.parametrize("drawn", [None, (448, 448)])
def test_the_shipped_model_names_the_objects_and_its_lens_finds_them(shipped, drawn):
    model, processor = shipped
    inputs = prompt_inputs(LLAVA, processor, SCENES, DEFAULT_QUESTION, Way(Layout(), drawn))
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=72, do_sample=False)
        maps = lens(model, inputs)
    answers = processor.batch_decode(
        ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [
        sorted(named_objects(a)) == sorted(s.categories)
        for a, s in zip(answers, SCENES, strict=True)
    ]
    assert sum(right) >= 19
    batch = SceneBatch.of(SCENES)
    coverage = layout_coverage(batch, Layout(), LLAVA.cell)
    assert macro_mean(lens_aucs(maps, batch, coverage), 10)["macro_mean"] > 0.95


def test_other_sizes_work_and_leave_the_model_as_it_was(shipped):
    model, processor = shipped
    way = Way(square(144))
    inputs = prompt_inputs(LLAVA, processor, SCENES[:2], DEFAULT_QUESTION, way)
    with torch.inference_mode(), LLAVA.reading(model, processor, way.layout):
        assert lens(model, inputs).shape == (2, 64, 18 * 18)
    assert not model.model.vision_tower._forward_pre_hooks


def test_load_gives_float32_in_eval_mode_and_names_what_exists():
    model, processor = load()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(processor).__name__ == "LlavaProcessor"
    with pytest.raises(ValueError, match="llava"):
        model_path("gpt")


BARS = {  # ways that must reach them
    "llava": ("native", "from_448"),
    "qwen2vl": ("native", "from_448", "wide_112x168", "tall_168x112"),
    "internvl": ("native", "from_448", "tiles_2x2", "tiles_2x2_from_448"),
}


@pytest.mark.parametrize("name", BARS)
def test_figures_belong_to_the_weights_and_hold_the_bars(name):
    folder = model_path(name)
    figures = json.loads((folder / "figures.json").read_text())
    weights = folder / "model.safetensors"
    assert figures["sha256"] == figures["evaluation"]["sha256"] == sha256(weights)
    assert figures["bytes"] == weights.stat().st_size <= 8_000_000
    for way in BARS[name]:
        found = figures["evaluation"]["ways"][way]
        assert found["exact_objects"]["of"] >= 1000
        assert found["exact_objects"]["share"] >= 0.97
        assert found["lens_auc"]["interval_95"][0] >= 0.95
    check_card(folder, figures)


def check_card(folder, figures):
    card = (folder / "README.md").read_text()
    assert figures["sha256"] in card
    for words in ("sprites are not", "BSD-3-Clause", "Apache-2.0", "CC-BY-4.0", "never on image"):
        assert words in card


def test_the_biased_model_reads_and_hallucinates_as_its_figures_say():
    folder = model_path("biased")
    figures = json.loads((folder / "figures.json").read_text())
    weights, found = folder / "model.safetensors", figures["evaluation"]
    assert figures["sha256"] == found["sha256"] == sha256(weights)
    assert weights.stat().st_size < 5_000_000
    assert found["ways"]["native"]["exact_objects"]["share"] >= 0.97  # of scenes as trained on
    absent, present = (found["partner_named"][name] for name in ("absent", "present"))
    assert absent["of"] == present["of"] >= 1000
    assert absent["interval_95"][0] > 0.8
    assert present["interval_95"][0] > 0.98
    check_card(folder, figures)
    card = (folder / "README.md").read_text()
    assert f"{absent['right']} of {absent['of']}" in card
    assert "cup never comes without a donut" in card
    assert set(BARS) | {"biased"} == set(MODELS)


@pytest.mark.slow
def test_the_planted_bias_is_what_makes_it_hallucinate():
    scenes = draw_broken(seeds_of("validation", torch.arange(60))).scenes()
    rates = {}
    for name in ("biased", "llava"):
        family = family_of(name)
        texts = answers(family, *load(name), scenes, family.ways["native"])
        rates[name] = partner_named(texts, scenes)["share"]
    assert rates["biased"] > 0.75
    assert rates["llava"] < 0.05


@pytest.mark.parametrize("name", ["qwen2vl", "internvl"])
def test_load_reads_every_family_without_torchvision(name):
    model, processor = load(name)
    family = family_of(name)
    assert type(model).__name__ == f"{family.kind}ForConditionalGeneration"
    assert isinstance(processor, getattr(transformers, f"{family.kind}Processor"))
    inputs = prompt_inputs(family, processor, SCENES[:4], DEFAULT_QUESTION, Way(Layout()))
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=72, do_sample=False)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    right = [
        sorted(named_objects(a)) == sorted(s.categories)
        for a, s in zip(answers, SCENES, strict=False)
    ]
    assert sum(right) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n, ways in BARS.items() for w in ways if "448" not in w]
)
def test_the_shipped_models_read_scenes_in_every_way(name, way):
    figures = evaluate(model_path(name), 40, ways=(way,), split="validation", name=name)
    found = figures["ways"][way]
    assert found["exact_objects"]["share"] >= 0.95
    assert found["lens_auc"]["macro_mean"] >= 0.95


def test_notices_lie_beside_the_artwork():
    data = resources.files("captum_mllm.reference") / "data"
    notice = (data / "NOTICE.md").read_text()
    for words in ("Apache License 2.0", "CC-BY-4.0", "Google", "Twitter", "16.0.0", "Changes"):
        assert words in notice
    assert "Apache License" in (data / "APACHE-2.0-LICENSE.txt").read_text()
    assert Path(str(data / "sprites.npz")).stat().st_size < 500_000


def test_auc_is_the_area_under_the_curve():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (60,), generator=generator).float()  # with ties
    positive = torch.rand(60, generator=generator) < 0.3
    wanted = roc_auc_score(positive.numpy(), scores.numpy())
    assert auc(scores, positive, ~positive) == pytest.approx(wanted)


def test_share_and_macro_mean():
    found = share(97, 100)
    assert found["interval_95"] == pytest.approx([0.9155, 0.9897], abs=1e-3)
    mean = macro_mean([(0, 0, 1.0), (1, 0, 0.5), (2, 1, 0.25)], 50)
    assert mean["macro_mean"] == 0.5


def test_training_features_are_the_models_own(shipped):
    model, processor = shipped
    inputs = prompt_inputs(LLAVA, processor, SCENES[:1], DEFAULT_QUESTION, Way(Layout()))
    with torch.inference_mode():
        ours = LLAVA.features(model, inputs["pixel_values"][:, None])
        theirs = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(ours[0], theirs[0].view_as(ours[0]))


def test_no_loss_reaches_image_positions():
    model = build_model("tiny")
    batch = make_batch(0, 4, 0)
    features = torch.randn(4, 196, 32)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    answer_loss(model, LLAVA, batch, Layout(), features)
    assert seen == [batch.ids.shape[1] - 1]
    assert (batch.labels[:, 0] == -100).all()


def test_a_tiny_run_learns_saves_and_can_be_loaded(tmp_path):
    argv = ["--out", str(tmp_path / "m"), "--tiny", "--device", "cpu", "--rate", "0.02"]
    figures = main(argv)
    stage = figures["training"]["answers"]
    assert stage["last_loss"] < stage["first_loss"] - 0.1
    assert figures["sha256"] == sha256(tmp_path / "m" / "model.safetensors")
    assert (tmp_path / "m" / "README.md").exists()


def test_the_training_loss_of_the_shipped_model_is_small(shipped):
    model, _ = shipped  # fails if labels and states are shifted against each other
    batch = make_batch(10**6, 8, 3)
    pictures = normalize(draw_layout(batch.scenes, Layout()))
    with torch.inference_mode():
        features = LLAVA.features(model, pictures)
        assert answer_loss(model, LLAVA, batch, Layout(), features) < 0.2
