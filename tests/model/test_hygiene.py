"""The user's model afterwards, after success and after every kind of failure: bit-identical."""

import copy

import pytest
import torch

from captum_mllm import LogitLens, TokenActivationMap
from tests.oracle import forwards as forwards
from tests.oracle import tiny
from tests.oracle.model_state import check_same, state, worn
from tests.oracle.published import ARC, MSEA

METHODS = {
    "lens": LogitLens,
    "lens-layer": lambda m: LogitLens(m, layer=0),
    "msea": lambda m: MSEA(m, consistency=True),
    "arc-msea": lambda m: ARC(MSEA(m)),
    "tam-parity": lambda m: TokenActivationMap(m, parity=True),
}


@pytest.fixture
def worn_model(subject):
    """A fresh copy: nothing ran on it yet."""
    model = type(subject.model)(copy.deepcopy(subject.model.config))
    model.load_state_dict(subject.model.state_dict())
    model.generation_config = copy.deepcopy(subject.model.generation_config)
    return worn(model)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grad", [True, False])
def test_after_success(subject, worn_model, name, grad):
    with torch.set_grad_enabled(grad):
        before = state(worn_model)
        METHODS[name](worn_model).attribute(subject.inputs, subject.answer)
        check_same(before, worn_model)


def test_after_use_the_model_runs_as_ever(subject, worn_model):
    """Also where transformers keeps hooks of its own in a model that has run."""
    full = forwards.with_answer(subject.inputs, subject.answer)
    expected = subject.model(**full, output_hidden_states=True)
    for used_before in (False, True):
        before = state(worn_model)
        MSEA(worn_model).attribute(subject.inputs, subject.answer)
        check_same(before, worn_model)
        got = worn_model(**full, output_hidden_states=True)
        assert torch.equal(got.logits, expected.logits), used_before
        assert len(got.hidden_states) == len(expected.hidden_states)


def test_after_generating(inputs):
    model = worn(tiny.tiny_llava(seed=1))
    before = state(model)
    result = LogitLens(model).attribute(inputs, gen_args={"max_new_tokens": 4})
    check_same(before, model)
    # Training mode is off while we run (dropout would show).
    eval_mode = LogitLens(tiny.tiny_llava(seed=1)).attribute(inputs, result.output_ids)
    assert torch.equal(result.grid_attr[0], eval_mode.grid_attr[0])


def test_results_do_not_depend_on_the_models_mode(subject, worn_model):
    attr = MSEA(subject.model).attribute(subject.inputs, subject.answer)
    same = MSEA(worn_model).attribute(subject.inputs, subject.answer)
    assert torch.equal(attr.grid_attr[0], same.grid_attr[0])
    assert not attr.grid_attr[0].requires_grad


def test_dropout_is_off_while_we_run(inputs, answer):
    model = tiny.tiny_llava()
    model.model.language_model.layers[1].register_module("noise", torch.nn.Dropout(0.5))
    layer = model.model.language_model.layers[1]
    layer.register_forward_hook(lambda m, _a, out: m.noise(out))
    model.train()
    lens = LogitLens(model)
    one, two = (lens.attribute(inputs, answer).grid_attr[0] for _ in range(2))
    assert torch.equal(one, two)
    assert layer.noise.training


class Stop(BaseException):
    """Raised inside the model; no Exception, like KeyboardInterrupt."""


def raise_in(module, error, at_call=1):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == at_call:
            raise error

    return module.register_forward_hook(hook)


PLACES = {
    "tower": lambda m: m.model.vision_tower,
    "tower-inside": lambda m: m.model.vision_tower.embeddings if hasattr(
        m.model.vision_tower, "embeddings") else next(m.model.vision_tower.children()),
    "layer": lambda m: m.get_decoder().layers[1],
    "norm": lambda m: m.get_decoder().norm,
    "head": lambda m: m.lm_head,
    "model": lambda m: m,
}  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError("inside"), KeyboardInterrupt(), Stop()], ids=repr)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("at_call", [1, 2])
def test_after_an_error_inside_the_model(inputs, answer, place, error, at_call):
    model = worn(tiny.tiny_llava())
    method = MSEA(model, consistency=True)
    handle = raise_in(PLACES[place](model), error, at_call)
    before = state(model)
    with pytest.raises(type(error)):
        method.attribute(inputs, answer)
    check_same(before, model)
    handle.remove()
    method.attribute(inputs, answer)


def test_after_an_error_while_generating(inputs):
    model = worn(tiny.tiny_llava(seed=1))
    handle = raise_in(model.get_decoder().norm, KeyboardInterrupt(), at_call=3)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        LogitLens(model).attribute(inputs)
    check_same(before, model)
    handle.remove()


@pytest.mark.parametrize(
    "bad",
    [
        {"target": []}, {"target": [tiny.IMAGE_TOKEN]}, {"target": {"a": 1}}, {"target": [5000]},
        {"target": [20], "explain": "everything"}, {"target": [20], "explain": [0]},
        {"gen_args": {"num_return_sequences": 2}}, {"gen_args": {"typo": 2}},
        {"target": "a string"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["lens", "arc-msea"])
def test_after_bad_arguments(inputs, name, bad):
    model = worn(tiny.tiny_llava(seed=1))
    method = METHODS[name](model)
    before = state(model)
    with pytest.raises((ValueError, TypeError)):
        method.attribute(inputs, **bad)
    check_same(before, model)


def test_after_states_that_are_not_finite(inputs, answer):
    model = worn(tiny.tiny_llava())
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.down_proj.weight[0] = float("inf")
    before = state(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        MSEA(model).attribute(inputs, answer)
    check_same(before, model)


def test_inference_mode(inputs, answer):
    model = tiny.tiny_llava()
    expected = ARC(model).attribute(inputs, answer)
    with torch.inference_mode():
        got = ARC(model).attribute(inputs, answer)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(expected.grid_attr[0], got.grid_attr[0])


def test_the_inputs_are_left_alone(subject):
    inputs = subject.inputs
    copies = {name: value.clone() for name, value in inputs.items()}
    answer = subject.answer.clone()
    ARC(MSEA(subject.model, consistency=True)).attribute(inputs, answer)
    assert inputs.keys() == copies.keys()
    assert all(torch.equal(inputs[name], copies[name]) for name in copies)
    assert torch.equal(answer, subject.answer)
