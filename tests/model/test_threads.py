"""Two threads that explain with one model: the second waits, and both get right values."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captum.attr import Saliency

from captum_mllm import ARC, MSEA, DirectLogitAttribution, LogitLens, TokenLogProb
from captum_mllm.adapters.hooks import Snapshot, one_thread, unchanged
from captum_mllm.methods import explain
from captum_mllm.methods.controls import shuffled_copy
from tests.oracle.families import family
from tests.oracle.tiny import tiny_llava


@pytest.fixture
def model():
    """One that no other test has run: transformers leaves hooks of its own in a model."""
    return tiny_llava()


@pytest.fixture
def eager_switching():
    """Threads take turns after a few steps, not after 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def saliency(model, processor, inputs, answer):
    f = TokenLogProb(model, inputs, answer, processor)
    pixels = f.pixels[0] if isinstance(f.pixels, tuple) else f.pixels
    return Saliency(f).attribute(pixels.requires_grad_(), target=1)


def generated(model, processor, inputs, _answer):
    return (
        LogitLens(model, processor).attribute(inputs, gen_args={"max_new_tokens": 2}).grid_attr[0]
    )


def attention(model, processor, inputs, answer):
    return explain("attention", model, processor, inputs, answer).grid_attr[0]


METHODS = {
    "arc-msea": lambda m, p, i, a: ARC(MSEA(m, p)).attribute(i, a).grid_attr[0],
    "direct": lambda m, p, i, a: DirectLogitAttribution(m, p).attribute(i, a).grid_attr[0],
    "saliency": saliency,
    "generated": generated,
    "attention": attention,
}


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("name", ["Llava", "Qwen2VL"])
def test_threads_on_one_model_get_the_values_of_one_after_the_other(name):
    kin = family(name)
    kin.model.train()
    pictures = (kin.picture, kin.wide_picture)
    tasks = [(run, kin.encode(picture)) for picture in pictures for run in METHODS.values()]

    def explained(task):
        run, inputs = task
        return run(kin.model, kin.processor, inputs, kin.answer)

    expected = [explained(task) for task in tasks]
    wanted = {name: parameter.requires_grad for name, parameter in kin.model.named_parameters()}
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(explained, tasks * 2))
    for one, other in zip(expected * 2, found, strict=True):
        assert torch.equal(one, other)
    assert all(module.training for module in kin.model.modules())
    assert wanted == {n: parameter.requires_grad for n, parameter in kin.model.named_parameters()}


def run_once(model):
    with one_thread(model):
        pass


def waits_for(model, held):
    """Whether another thread waits for one model while this one holds another."""
    with ThreadPoolExecutor(1) as pool:
        with one_thread(held):
            other = pool.submit(run_once, model)
            try:
                other.result(0.2)
            except TimeoutError:
                return True
        return False


def test_copies_have_locks_of_their_own(model):
    assert waits_for(model, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not waits_for(other, model)
    assert waits_for(type(model)(model.config), model), "the attention setting sits in the config"


def test_a_copy_made_meanwhile_has_no_hooks(model, inputs, answer):
    expected = LogitLens(model).attribute(inputs, answer)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(LogitLens(model).attribute, inputs, answer) for _ in range(8)]
        copies = [pool.submit(shuffled_copy, model, 0) for _ in range(8)]
        for run in runs:
            assert torch.equal(run.result().grid_attr[0], expected.grid_attr[0])
        parts = [module for made in copies for module in made.result().modules()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def test_modules_are_looked_through_once_per_call(model, inputs, answer, monkeypatch):
    looks = []
    monkeypatch.setattr(Snapshot, "__init__", counted(Snapshot.__init__, looks))
    MSEA(model).attribute(inputs, answer)
    assert len(looks) == 1
    with unchanged(model):
        MSEA(model).attribute(inputs, answer)
    assert len(looks) == 2


def counted(function, calls):
    def call(*args):
        calls.append(1)
        return function(*args)

    return call
