"""Inputs that contradict each other end in an error that names the argument, not in a traceback."""

import pytest
import torch

from captum_mllm import LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.validation import ArgumentError
from tests.oracle.families import family


def refused(kin, inputs, argument, target=None):
    with pytest.raises(ArgumentError) as caught:
        LogitLens(kin.model).attribute(inputs, kin.answer if target is None else target)
    assert caught.value.argument == argument
    return str(caught.value)


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
@pytest.mark.parametrize("key", ["pixel_values", "pixel_attention_mask"])
def test_pixels_or_their_mask_of_another_picture(name, key):
    kin = family(name)
    usual, wide = kin.encode(), kin.encode(kin.wide_picture)
    assert usual[key].shape != wide[key].shape
    refused(kin, {**usual, key: wide[key]}, "pixel_attention_mask")
    refused(kin, {**wide, key: usual[key]}, "pixel_attention_mask")


@pytest.mark.parametrize("shape", [(1,), (1, 3), (1, 1, 5, 5)], ids=str)
def test_a_pixel_mask_of_another_shape(shape):
    kin = family("Idefics3")
    inputs = {**kin.encode(), "pixel_attention_mask": torch.ones(shape, dtype=torch.int64)}
    assert f"got {shape}" in refused(kin, inputs, "pixel_attention_mask")


@pytest.mark.parametrize("size", [[0, 0], [0, 32], [32, 0], [-3, 4], [float("nan"), 3.0]], ids=str)
def test_sizes_of_pictures_that_are_none(size):
    kin = family("LlavaNext")
    refused(kin, {**kin.encode(), "image_sizes": torch.tensor([size])}, "image_sizes")


@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "Qwen2VL", "Idefics3"])
def test_inputs_on_the_meta_device(name):
    kin = family(name)
    inputs = kin.encode()
    for key, value in inputs.items():
        message = refused(kin, {**inputs, key: value.to("meta")}, key)
        assert "meta device, where tensors have no values" in message
    refused(kin, inputs, "target", kin.answer.to("meta"))


@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "Idefics3", "Qwen2VL"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_vision_encoder_in_another_dtype(name, dtype):
    kin = family(name)
    inputs = kin.encode()
    find_adapter(kin.model).tower.to(dtype)
    if name == "Qwen2VL":  # its model brings the features to the embeddings' dtype
        maps = LogitLens(kin.model).attribute(inputs, kin.answer).grid_attr[0]
        assert torch.isfinite(maps).all()
        return
    message = refused(kin, inputs, "model")
    assert f"vision encoder in {dtype} and its language model in torch.float32" in message
