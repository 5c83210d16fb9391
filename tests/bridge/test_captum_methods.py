"""captum's methods over TokenLogProb, in every family: the same methods over forwards by hand.

docs/captum.md has the table; what it says is held to these tests.
"""

import random
import warnings

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerGradCam,
    LayerIntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
    ShapleyValueSampling,
)
from torch.testing import assert_close

from captum_mllm import TokenLogProb
from captum_mllm.functional import grid_mask
from tests.oracle.families import above
from tests.oracle.frames import by_hand, cells_by_hand, embedded_by_hand
from tests.oracle.layouts import QWEN, kin_of

T = 2  # the explained token


def occlusion(f, x, _mask):
    window = (x.shape[1], 8, 8) if x.ndim == 4 else (3, x.shape[2])
    return Occlusion(f).attribute(x, window, window, target=T, perturbations_per_eval=3)


METHODS = {  # of a function, its input and a mask of features
    "IntegratedGradients": lambda f, x, _: IntegratedGradients(f).attribute(
        x, target=T, n_steps=3, internal_batch_size=2
    ),
    "Saliency": lambda f, x, _: Saliency(f).attribute(x.requires_grad_(), target=T),
    "InputXGradient": lambda f, x, _: InputXGradient(f).attribute(x.requires_grad_(), target=T),
    "NoiseTunnel": lambda f, x, _: NoiseTunnel(Saliency(f)).attribute(
        x, nt_samples=3, stdevs=0.1, target=T
    ),
    "Occlusion": occlusion,
    "FeatureAblation": lambda f, x, mask: FeatureAblation(f).attribute(
        x, target=T, feature_mask=mask, perturbations_per_eval=3
    ),
    "ShapleyValueSampling": lambda f, x, mask: ShapleyValueSampling(f).attribute(
        x, target=T, feature_mask=mask, n_samples=2, perturbations_per_eval=2
    ),
    "KernelShap": lambda f, x, mask: KernelShap(f).attribute(
        x, target=T, feature_mask=mask, n_samples=9, perturbations_per_eval=4
    ),
}


@pytest.fixture(params=above())
def kin(request):
    return kin_of(request.param)


def seeded(run, *args):
    """Captum draws from three generators."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    return run(*args).detach()


def close(got, expected):
    assert got.shape == expected.shape
    assert float(expected.abs().max()) > 0
    assert_close(got, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_image(kin, method):
    pictures = [kin.wide_picture]
    inputs = kin.encode(*pictures)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    x = f.pixels
    mask = grid_mask(x.shape[-2:], 2, 2)[None, None]
    hand = by_hand(kin, inputs, pictures, kin.answer)
    got = seeded(METHODS[method], f, x.clone(), mask)
    close(got, seeded(METHODS[method], hand, x.clone(), mask))
    shown = TokenLogProb(kin.model, inputs, kin.answer, kin.processor).to_image(got, pictures[0])
    assert shown.shape == (1, pictures[0].height, pictures[0].width)
    assert float(shown.abs().max()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_text(kin, method):
    inputs = kin.encode(kin.wide_picture)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    x = f.embeddings
    # One feature for the image's tokens, which have no say, and six for the words.
    words = torch.arange(x.shape[1]).flip(0).clamp(max=6)[None, :, None]
    hand = embedded_by_hand(kin, inputs, kin.answer)
    got = seeded(METHODS[method], f, x.clone(), words)
    close(got, seeded(METHODS[method], hand, x.clone(), words))


def grad_cam(scores, cells):
    """Activations weighted by their mean gradient, summed over channels."""
    cells = cells.clone().requires_grad_()
    gradient = torch.autograd.grad(scores(cells)[0, T], cells)[0]
    axes = tuple(range(2, cells.ndim))
    return (cells * gradient.mean(axes, keepdim=True)).sum(1, keepdim=True).detach()


def test_image_LayerGradCam(kin):  # noqa: N802
    inputs = kin.encode(kin.wide_picture)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    cells, scores = cells_by_hand(kin, inputs, kin.wide_picture, kin.answer)
    got = LayerGradCam(f, f.layer()).attribute(f.pixels, target=T).detach()
    close(got, grad_cam(scores, cells))


def test_text_LayerGradCam(kin):  # noqa: N802
    inputs = kin.encode(kin.wide_picture)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    hand = embedded_by_hand(kin, inputs, kin.answer)
    got = LayerGradCam(f, f.text_layer()).attribute(f.embeddings, target=T).detach()
    lines = f.embeddings.transpose(1, 2)
    close(got, grad_cam(lambda line: hand(line.transpose(1, 2)), lines))


def test_image_LayerIntegratedGradients(kin):  # noqa: N802
    inputs = kin.encode(kin.wide_picture)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    cells, scores = cells_by_hand(kin, inputs, kin.wide_picture, kin.answer)
    seen = []
    handle = f.layer().register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    f(f.pixels * 0)
    handle.remove()
    got = LayerIntegratedGradients(f, f.layer()).attribute(f.pixels, target=T, n_steps=4)
    close(got, IntegratedGradients(scores).attribute(cells, seen[0], target=T, n_steps=4))


def test_text_LayerIntegratedGradients(kin):  # noqa: N802
    inputs = kin.encode(kin.wide_picture)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    hand = embedded_by_hand(kin, inputs, kin.answer)
    layered = LayerIntegratedGradients(f, f.text_layer())
    got = layered.attribute(f.embeddings, target=T, n_steps=4).transpose(1, 2)
    close(got, IntegratedGradients(hand).attribute(f.embeddings, target=T, n_steps=4))


@pytest.mark.parametrize("name", ["Llava", "InternVL", "PaliGemma", *QWEN])
def test_a_layer_of_the_users_model(name):
    """The projector's output, whose first axis is images, tiles or tokens."""
    kin = kin_of(name)
    f = TokenLogProb(kin.model, kin.encode(), kin.answer)
    inner = kin.model.model
    layer = inner.visual.merger if name in QWEN else inner.multi_modal_projector
    # transformers 5.5's Qwen2.5-VL takes no more copies at once than the prompt has tokens.
    steps = 24 if name == "Qwen2_5_VL" else 64
    got = LayerIntegratedGradients(f, layer).attribute(f.pixels, target=T, n_steps=steps)
    with torch.no_grad():
        change = (f(f.pixels) - f(f.pixels * 0))[0, T]
    if name != "Qwen3VL":  # whose tower hands over more than the merger's output
        assert_close(got.sum(), change, rtol=2e-2, atol=2e-2)
    assert float(got.abs().max()) > 0


def test_image_and_text_at_once(kin):
    """Completeness over both; from a baseline nearby, as norms make zero embeddings singular."""
    f = TokenLogProb(kin.model, kin.encode(kin.wide_picture), kin.answer)
    inputs = f.pixels, f.embeddings
    baselines = tuple(x + 0.1 * torch.randn_like(x) for x in inputs)
    both = IntegratedGradients(f).attribute(inputs, baselines, target=T, n_steps=24)
    with torch.no_grad():
        change = (f(*inputs) - f(*baselines))[0, T]
    assert_close(sum(part.sum() for part in both), change, rtol=2e-2, atol=1e-2)
    assert all(float(part.abs().max()) > 0 for part in both)


def test_several_images_are_a_tuple(kin):
    pictures = [kin.wide_picture, kin.tall_picture]
    inputs = kin.encode(*pictures)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    hand = by_hand(kin, inputs, pictures, kin.answer)
    got = IntegratedGradients(f).attribute(f.pixels, target=T, n_steps=3)
    expected = IntegratedGradients(hand).attribute(f.pixels, target=T, n_steps=3)
    for own, other in zip(got, expected, strict=True):
        close(own, other)


def test_ablation_without_a_target_explains_all_tokens_at_once(kin):
    f = TokenLogProb(kin.model, kin.encode(kin.wide_picture), kin.answer)
    mask = grid_mask(f.pixels.shape[-2:], 2, 2)[None, None]
    got = FeatureAblation(f).attribute(f.pixels, feature_mask=mask)
    assert got.shape == (len(kin.answer), *f.pixels.shape[1:])
    for t in range(len(kin.answer)):
        alone = FeatureAblation(f).attribute(f.pixels, target=t, feature_mask=mask)
        assert_close(got[t : t + 1], alone, rtol=1e-3, atol=1e-4)


def test_a_black_picture_is_no_padding():
    """Idefics3 and SmolVLM drop tiles of nothing but zeros; a baseline of zeros is a picture."""
    for name in ("Idefics3", "SmolVLM"):
        kin = kin_of(name)
        f = TokenLogProb(kin.model, kin.encode(), kin.answer)
        with torch.no_grad():
            nearly = f(f.pixels * 0 + 1e-6)
            assert_close(f(f.pixels * 0), nearly, rtol=1e-3, atol=1e-3)


def test_warnings_and_model_after_captum(kin):
    """No method warns but of the gradient that it turns on, and none leaves a trace."""
    f = TokenLogProb(kin.model, kin.encode(), kin.answer)
    before = {k: v.clone() for k, v in kin.model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in f.modules()]
    mask = grid_mask(f.pixels.shape[-2:], 2, 2)[None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in METHODS.values():
            seeded(run, f, f.pixels, mask)
    LayerGradCam(f, f.layer()).attribute(f.pixels, target=T)
    assert all(torch.equal(v, before[k]) for k, v in kin.model.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in f.modules()] == hooks
    assert all(p.grad is None for p in kin.model.parameters())
