"""Pixels and processors that can't be the model's are told; those of the ten families are not."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from captum_mllm import LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.processors import pixel_statistics
from captum_mllm.model.processor_checks import check_pixels, check_processor
from captum_mllm.validation import ArgumentError
from tests.oracle.families import NAMES, family

KINDS = ("usual", "wide", "tall", "grey", "white", "dark", "smooth")


@pytest.fixture(scope="module", params=NAMES)
def kin(request):
    return family(request.param)


def drawn(kin, kind):
    """Pictures whose normalised values could be mistaken: flat, light, or without noise."""
    usual = {"usual": kin.picture, "wide": kin.wide_picture, "tall": kin.tall_picture}
    if kind in usual:
        return usual[kind]
    height, width = kin.picture.height, kin.picture.width
    if kind == "smooth":
        ramp = np.linspace(128, 190, width)[None].repeat(height, 0)
        return Image.fromarray(np.stack([ramp, ramp * 0.95, ramp * 0.9], -1).astype(np.uint8))
    level = {"grey": 128, "white": 255, "dark": 3}[kind]
    return Image.new("RGB", (width, height), (level,) * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_own_processors_raise_no_alarm(kin, kind):
    inputs, adapter = kin.encode(drawn(kin, kind)), find_adapter(kin.model)
    noise = 0.3 * torch.randn(inputs["pixel_values"].shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_processor(kin.processor, adapter)
        for pixels in (inputs["pixel_values"], inputs["pixel_values"] + noise, 0 * noise):
            for processor in (kin.processor, None):
                check_pixels({**inputs, "pixel_values": pixels}, processor, adapter)


def channelwise(pixels, change):
    """Pixels changed by a function of values whose channels are the first axis."""
    if pixels.ndim == 2:
        by_channel = pixels.unflatten(1, (3, -1)).movedim(1, 0)
        return change(by_channel).movedim(0, 1).flatten(1)
    return change(pixels.movedim(-3, 0)).movedim(0, -3)


def wrong(kin, pixels, how):
    mean, std = (torch.tensor(v) for v in pixel_statistics(kin.processor))
    raw = channelwise(
        pixels,
        lambda x: (x.flatten(1) * std[:, None] + mean[:, None]).reshape(x.shape).clamp(0, 1),
    )
    if how == "twice":
        return channelwise(
            pixels, lambda x: ((x.flatten(1) - mean[:, None]) / std[:, None]).reshape(x.shape)
        )
    return {"0 .. 255": raw * 255, "0 .. 1": (raw * 255).round() / 255}[how]


@pytest.mark.parametrize("how", ["0 .. 255", "0 .. 1", "twice"])
def test_pixels_of_another_range_are_told(kin, how):
    inputs = kin.encode()
    inputs["pixel_values"] = wrong(kin, inputs["pixel_values"], how)
    with pytest.warns(UserWarning, match=r"pixel_values (range|are 0 \.\. 1).*own processor"):
        LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)
    if how == "0 .. 255":
        with pytest.warns(UserWarning, match="pixel_values range"):
            LogitLens(kin.model).attribute(inputs, kin.answer)


def test_bytes_are_refused(kin):
    inputs = kin.encode()
    inputs["pixel_values"] = wrong(kin, inputs["pixel_values"], "0 .. 255").round().byte()
    with pytest.raises(ArgumentError, match=r"pixel_values must be normalised floats, got .*uint8"):
        LogitLens(kin.model).attribute(inputs, kin.answer)


def test_channels_in_reverse_order_are_told_where_their_means_differ(kin):
    inputs = kin.encode()
    inputs["pixel_values"] = channelwise(inputs["pixel_values"], lambda x: x.flip(0))
    mean, std = pixel_statistics(kin.processor)
    if len(set(mean)) == len(set(std)) == 1:
        check_pixels(inputs, kin.processor, find_adapter(kin.model))  # can't be told
        return
    with pytest.warns(UserWarning, match="BGR instead of RGB"):
        LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)


def test_processors_of_other_families_are_told_wherever_labels_would_differ():
    kins = [family(name) for name in NAMES]
    refused = warned = 0
    for kin in kins:
        adapter, ids = find_adapter(kin.model), kin.encode()["input_ids"][0].tolist()
        own = kin.processor.tokenizer.convert_ids_to_tokens(ids)
        for other in kins:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    check_processor(other.processor, adapter)
                except ArgumentError:
                    refused += 1
                    assert kin is not other
                    continue
            told = any("processor is a" in str(warning.message) for warning in caught)
            warned += told
            assert not told or kin is not other
            assert told or other.processor.tokenizer.convert_ids_to_tokens(ids) == own, (
                kin.name, other.name,
            )  # fmt: skip
    assert (refused, warned) == (66, 16)


def test_a_wrong_processor_is_told_where_it_is_used():
    kin, other, alike = family("Llava"), family("PaliGemma"), family("InternVL")
    with pytest.raises(ArgumentError, match="processor PaliGemmaProcessor stands for an image by"):
        LogitLens(kin.model, other.processor).attribute(kin.encode(), kin.answer)
    qwen = family("Qwen2VL")
    with pytest.warns(UserWarning, match=r"InternVLProcessor, but .* has a Qwen2VLProcessor"):
        LogitLens(qwen.model, alike.processor).attribute(qwen.encode(), qwen.answer)
