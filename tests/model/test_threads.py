"""Two threads that explain with one model: the second waits, and both get right values."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captum.attr import Saliency

from captum_mllm import ARC, MSEA, DirectLogitAttribution, TokenLogProb
from tests.oracle.families import family


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


METHODS = {
    "arc-msea": lambda m, p, i, a: ARC(MSEA(m, p)).attribute(i, a).grid_attr[0],
    "direct": lambda m, p, i, a: DirectLogitAttribution(m, p).attribute(i, a).grid_attr[0],
    "saliency": saliency,
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
