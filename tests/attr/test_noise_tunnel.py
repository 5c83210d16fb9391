"""NoiseTunnel around token attributions: pixel tensors, repeated targets, batches of copies."""

import pytest
import torch
from captum.attr import NoiseTunnel

from captum_mllm import LogitLens, TokenActivationMap
from captum_mllm.functional import upsample
from captum_mllm.validation import ArgumentError
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
@pytest.mark.parametrize("as_type", [tuple, lambda ids: torch.tensor([ids])], ids=["ids", "2-D"])
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
@pytest.mark.parametrize("as_type", [tuple, lambda ids: torch.tensor([ids])], ids=["ids", "2-D"])
def test_batches_of_copies(tiny_subject, batch, target, as_type):
    """A tuple is never repeated by captum, of a 2-D tensor whole rows are."""
    s, inputs = tiny_subject, tiny_subject.inputs
    method = LogitLens(s.model)
    torch.manual_seed(7)
    got = NoiseTunnel(method).attribute(
        inputs["pixel_values"], nt_samples=5, nt_samples_batch_size=batch, stdevs=0.3,
        target=as_type(target), additional_forward_args=rest_of(inputs),
    )  # fmt: skip
    torch.manual_seed(7)
    sizes = [batch] * (5 // batch) + ([5 % batch] if 5 % batch else [])
    noisy = torch.cat([noisy_copies(inputs["pixel_values"], n, 0.3) for n in sizes])
    close(got, loop(method, inputs, target, noisy).mean(0, keepdim=True))


@pytest.mark.parametrize("versions", [1, 2])
@pytest.mark.parametrize("target", [[20, 31, 7, 7], [7, 7]], ids=str)
def test_noise_on_a_batch_of_versions(tiny_subject, versions, target):
    s, inputs = tiny_subject, tiny_subject.inputs
    method, pixels = LogitLens(s.model), inputs["pixel_values"].repeat(versions, 1, 1, 1)
    options = {"nt_samples": 3, "stdevs": 0.3, "additional_forward_args": rest_of(inputs)}
    for given in (tuple(target), torch.tensor([target]), torch.tensor([target] * versions)):
        torch.manual_seed(7)
        got = NoiseTunnel(method).attribute(pixels, target=given, **options)
        torch.manual_seed(7)
        expected = loop(method, inputs, target, noisy_copies_of_each(pixels, 3, 0.3))
        close(got, expected.unflatten(0, (versions, 3)).mean(1))


def noisy_copies_of_each(pixels, n, stdev):
    copies = pixels.repeat_interleave(n, 0)
    return copies + torch.normal(0, torch.full(copies.shape, stdev))


@pytest.mark.parametrize("as_type", [list, torch.tensor], ids=["list", "tensor"])
@pytest.mark.parametrize(
    ("versions", "target"),
    [(2, [7, 7]), (2, [20, 20, 7, 7]), (6, [20] * 3 + [7] * 3), (6, [9] * 2), (4, [9] * 4)],
)
def test_repeated_ids_on_several_versions_are_refused(tiny_subject, versions, target, as_type):
    """They may be the answer, or one that captum repeated for each copy: [dog, dog] or [dog]."""
    s, inputs = tiny_subject, tiny_subject.inputs
    pixels, method = inputs["pixel_values"].repeat(versions, 1, 1, 1), LogitLens(s.model)
    with pytest.raises(ArgumentError, match=r"target .* tuple") as caught:
        method.attribute(pixels, as_type(target), rest_of(inputs))
    assert caught.value.argument == "target"
    got = method.attribute(pixels, tuple(target), rest_of(inputs))
    close(got, loop(method, inputs, target, pixels))


@pytest.mark.parametrize(
    ("versions", "target"), [(2, [20, 31]), (2, [9]), (3, [7, 7]), (4, [7] * 3)]
)
def test_ids_that_captum_cannot_have_repeated_are_the_answer(tiny_subject, versions, target):
    s, inputs = tiny_subject, tiny_subject.inputs
    pixels, method = inputs["pixel_values"].repeat(versions, 1, 1, 1), LogitLens(s.model)
    for given in (target, torch.tensor(target)):
        got = method.attribute(pixels, given, rest_of(inputs))
        close(got, loop(method, inputs, target, pixels))


def test_captums_repeated_list_is_refused_and_not_read_as_a_longer_answer(tiny_subject):
    s, inputs = tiny_subject, tiny_subject.inputs
    for versions in (1, 2):
        with pytest.raises(ArgumentError, match=r"target .* tuple"):
            NoiseTunnel(LogitLens(s.model)).attribute(
                inputs["pixel_values"].repeat(versions, 1, 1, 1), nt_samples=3, stdevs=0.1,
                target=[20, 31], additional_forward_args=rest_of(inputs),
            )  # fmt: skip


@pytest.mark.parametrize("versions", [1, 2])
def test_a_target_per_version_is_refused(tiny_subject, versions):
    s, inputs = tiny_subject, tiny_subject.inputs
    pixels = inputs["pixel_values"].repeat(versions, 1, 1, 1)
    with pytest.raises(ArgumentError, match=r"target .* rows that differ"):
        LogitLens(s.model).attribute(pixels, torch.tensor([[20, 31], [20, 7]]), rest_of(inputs))


@pytest.mark.parametrize("nt_type", ["smoothgrad_sq", "vargrad"])
def test_other_kinds(tiny_subject, nt_type):
    s, inputs = tiny_subject, tiny_subject.inputs
    method = MSEA(s.model)
    torch.manual_seed(7)
    got = NoiseTunnel(method).attribute(
        inputs["pixel_values"], nt_type, nt_samples=4, stdevs=0.3, target=tuple(s.answer.tolist()),
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
        inputs["pixel_values"], nt_samples=2, stdevs=0.0, target=tuple(s.answer.tolist()),
        explain="all", additional_forward_args=rest_of(inputs),
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
