"""Each line can fail: models, adapters and maps that break the one thing that it measures."""

import copy
from dataclasses import replace

import torch

from captum_mllm import check
from captum_mllm.adapters import QwenVLAdapter
from captum_mllm.checking import controls, costs
from captum_mllm.cli.explain import demo_scene
from tests.oracle.layouts import kin_of

MEASURED = ("teacher forcing", "lens", "prefix", "another picture", "scales and views")


def failed(model, processor, picture, only=MEASURED):
    report = check(model, processor, picture, max_new_tokens=4, only=only)
    return {line.name: line.found for line in report.failed}


def hooked(model, module, hook):
    """A copy of a model of a user who set a hook."""
    own = copy.deepcopy(model)
    module(own).register_forward_hook(hook)
    return own


def test_the_sound_model_passes(model, processor, picture):
    assert failed(model, processor, picture) == {}


def test_steps_of_generate_that_are_not_those_of_one_forward(model, processor, picture):
    def louder(_module, _args, logits):
        return 1.5 * logits if logits.shape[1] == 1 else logits

    other = hooked(model, lambda m: m.lm_head, louder)
    found = failed(other, processor, picture, ("teacher forcing", "prefix"))
    assert list(found) == ["teacher forcing"]
    assert "(allowed 0.001)" in found["teacher forcing"]


def test_image_tokens_that_hear_the_text_after_them(model, processor, picture):
    def mixed(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + hidden[:, -1:]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    other = hooked(model, lambda m: m.get_decoder().layers[0], mixed)
    assert "prefix" in failed(other, processor, picture)


def test_a_head_that_caps_its_logits(model, processor, picture):
    other = hooked(model, lambda m: m.lm_head, lambda _m, _a, logits: 2 * torch.tanh(logits / 2))
    found = failed(other, processor, picture, ("lens",))
    assert "differs from the model's logits by" in found["lens"]


def test_a_model_that_does_not_look(model, processor, picture):
    def blind(_module, _args, features):
        return torch.ones_like(features)

    other = hooked(model, lambda m: m.model.multi_modal_projector, blind)
    found = failed(other, processor, picture, ("another picture", "layout"))
    assert set(found) == {"another picture", "layout"}
    line = check(other, processor, picture, "what is here ?", only=("faithfulness",))
    assert line["faithfulness"].verdict == "not tried"
    assert "does not depend on what the picture shows" in line["faithfulness"].found


def test_a_flip_that_scrambles_the_patches(monkeypatch):
    """As the default would do to rows of patches: the numbers of a row in reverse."""

    def scrambled(_self, inputs, _grids, _axes):
        return {"pixel_values": inputs["pixel_values"].flip(-1)}

    kin = kin_of("Qwen2VL")
    assert failed(kin.model, kin.processor, kin.wide_picture, ("scales and views",)) == {}
    monkeypatch.setattr(QwenVLAdapter, "flipped", scrambled)
    found = failed(kin.model, kin.processor, kin.wide_picture, ("scales and views",))
    assert "mirrored is not the picture flipped" in found["scales and views"]


def test_scales_that_are_refused(monkeypatch, model, processor, picture):
    def refused(*_args, **_kwargs):
        raise ValueError("no such size")

    monkeypatch.setattr(costs, "maps_at", refused)
    report = check(model, processor, picture, max_new_tokens=4, only=("scales and views",))
    line = report["scales and views"]
    assert line.verdict == "passed"
    assert "scale 2 is refused: no such size; mirrored is refused" in line.found
    assert "scales=(1.0,)" in line.advice


def test_maps_that_do_not_depend_on_the_weights(monkeypatch, model, processor, picture):
    monkeypatch.setattr(
        controls, "cascading_copies", lambda model, _seed: [("everything", copy.deepcopy(model))]
    )
    found = failed(model, processor, picture, ("randomised layers",))
    assert "everything 1.00" in found["randomised layers"]


def test_a_model_too_large_to_be_copied(monkeypatch, model, processor, picture):
    monkeypatch.setattr(controls, "_free_memory", lambda: 1000)
    report = check(model, processor, picture, only=("randomised layers",))
    line = report["randomised layers"]
    assert line.verdict == "not tried"
    assert "twice the model's memory" in line.advice


def test_maps_that_are_worse_than_random(monkeypatch, shipped):
    def opposite(*args, **kwargs):
        result = explain(*args, **kwargs)
        return replace(result, grid_attr=tuple(1 - maps for maps in result.grid_attr))

    explain = controls.explain
    monkeypatch.setattr(controls, "explain", opposite)
    monkeypatch.setattr(controls, "STEPS", 4)
    monkeypatch.setattr(controls, "DRAWS", 1)
    line = check(*shipped, *demo_scene(), only=("faithfulness",))["faithfulness"]
    assert line.verdict == "failed", line.found
    assert "Random maps are better" in line.advice


def test_too_slow_for_insertion_and_deletion(monkeypatch, shipped_subject):
    asked = shipped_subject
    monkeypatch.setattr(controls, "PATIENCE", 0.0)
    line = check(asked.model, asked.processor, asked.picture, asked.prompt, only=("faithfulness",))[
        "faithfulness"
    ]
    assert line.verdict == "not tried"
    assert "forwards would take" in line.found
