"""NoiseTunnel around token attributions: pixel tensors, repeated targets, batches of copies."""

import pytest
import torch
from captum.attr import NoiseTunnel

from captum_mllm import LogitLens, TokenActivationMap
from captum_mllm.functional import upsample
from tests.oracle.comparing import close
from tests.oracle.published import ARC, MSEA

METHODS = {
    "lens": LogitLens,
    "msea": MSEA,
    "arc-msea": lambda model: ARC(MSEA(model)),
    "tam": TokenActivationMap,
}


def rest_of(inputs):
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


def loop(method, inputs, answer, pixels):
    """The mapping attributed once per version of the pixels, in pixels of the frame."""
    size = tuple(pixels.shape[-2:])
    maps = [
        method.attribute({**inputs, "pixel_values": row[None]}, answer).grid_attr[0]
        for row in pixels
    ]
    return torch.stack([upsample(m, size) for m in maps])


def noisy_copies(pixels, n, stdev):
    """The copies that NoiseTunnel draws."""
    shape = (n, *pixels.shape[1:])
    return pixels.repeat_interleave(n, 0) + torch.normal(0, torch.full(shape, stdev))


@pytest.mark.parametrize("name", METHODS)
def test_a_pixel_tensor_with_the_rest_of_the_mapping(subject, name):
    method, inputs = METHODS[name](subject.model), subject.inputs
    got = method.attribute(inputs["pixel_values"], subject.answer, rest_of(inputs))
    assert got.shape[:2] == (1, len(subject.answer))
    assert torch.equal(got, loop(method, inputs, subject.answer, inputs["pixel_values"]))
    as_tuple = method.attribute(inputs["pixel_values"], subject.answer, (rest_of(inputs),))
    assert torch.equal(got, as_tuple)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("as_type", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_smoothgrad_equals_a_loop(tiny_subject, name, as_type):
    s, inputs = tiny_subject, tiny_subject.inputs
    method, answer = METHODS[name](s.model), s.answer.tolist()
    torch.manual_seed(7)
    got = NoiseTunnel(method).attribute(
        inputs["pixel_values"], nt_samples=3, stdevs=0.3, target=as_type(answer),
        additional_forward_args=rest_of(inputs),
    )  # fmt: skip
    torch.manual_seed(7)
    noisy = noisy_copies(inputs["pixel_values"], 3, 0.3)
    expected = loop(method, inputs, answer, noisy)
    assert not torch.allclose(expected[0], expected[1])
    close(got, expected.mean(0, keepdim=True))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("target", [[20, 31, 7], [7, 7, 7, 7], [9], [9, 9]], ids=str)
def test_batches_of_copies(tiny_subject, batch, target):
    """captum repeats a 1-D target per copy, but not one of length 1; ours sees through both."""
    s, inputs = tiny_subject, tiny_subject.inputs
    method = LogitLens(s.model)
    torch.manual_seed(7)
    got = NoiseTunnel(method).attribute(
        inputs["pixel_values"], nt_samples=5, nt_samples_batch_size=batch, stdevs=0.3,
        target=torch.tensor(target), additional_forward_args=rest_of(inputs),
    )  # fmt: skip
    torch.manual_seed(7)
    sizes = [batch] * (5 // batch) + ([5 % batch] if 5 % batch else [])
    noisy = torch.cat([noisy_copies(inputs["pixel_values"], n, 0.3) for n in sizes])
    close(got, loop(method, inputs, target, noisy).mean(0, keepdim=True))


@pytest.mark.parametrize("nt_type", ["smoothgrad_sq", "vargrad"])
def test_other_kinds(tiny_subject, nt_type):
    s, inputs = tiny_subject, tiny_subject.inputs
    method = MSEA(s.model)
    torch.manual_seed(7)
    got = NoiseTunnel(method).attribute(
        inputs["pixel_values"], nt_type, nt_samples=4, stdevs=0.3, target=s.answer,
        additional_forward_args=rest_of(inputs),
    )  # fmt: skip
    torch.manual_seed(7)
    maps = loop(method, inputs, s.answer, noisy_copies(inputs["pixel_values"], 4, 0.3))
    square = maps.square().mean(0)
    expected = square if nt_type == "smoothgrad_sq" else square - maps.mean(0).square()
    close(got[0], expected, 1e-4)


def test_explain_goes_through(tiny_subject):
    s, inputs = tiny_subject, tiny_subject.inputs
    got = NoiseTunnel(LogitLens(s.model)).attribute(
        inputs["pixel_values"], nt_samples=2, stdevs=0.0, target=s.answer, explain="all",
        additional_forward_args=rest_of(inputs),
    )  # fmt: skip
    expected = LogitLens(s.model).attribute(inputs, s.answer, explain="all")
    close(got[0], expected.image_attr[0])


def test_copies_without_a_target_are_refused(tiny_subject):
    s, inputs = tiny_subject, tiny_subject.inputs
    with pytest.raises(ValueError, match=r"target is None, but inputs hold 2 versions"):
        LogitLens(s.model).attribute(
            inputs["pixel_values"].repeat(2, 1, 1, 1), None, rest_of(inputs)
        )


def test_original_pictures_would_replace_the_pixels(tiny_subject):
    s, inputs = tiny_subject, tiny_subject.inputs
    with pytest.raises(ValueError, match=r"images= would replace the pixels"):
        MSEA(s.model, s.processor).attribute(
            inputs["pixel_values"], s.answer, rest_of(inputs), images=s.picture
        )
