"""Inputs that contradict each other end in an error that names the argument, not in a traceback."""

import warnings

import pytest
import torch
from PIL import Image

from captum_mllm import LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.validation import ArgumentError
from tests.oracle.families import NAMES, family


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


@pytest.mark.parametrize("name", ["Llava", "Gemma3"])
def test_a_head_in_another_dtype(name):
    kin = family(name)
    find_adapter(kin.model).head.to(torch.bfloat16)
    message = refused(kin, kin.encode(), "model")
    assert "LM head in torch.bfloat16 and its language model in torch.float32" in message


def swapped(inputs, one, other):
    """Every token-wise input with two tokens exchanged."""
    order = torch.arange(inputs["input_ids"].shape[1])
    order[one], order[other] = other, one
    shape = inputs["input_ids"].shape
    return {k: v[:, order] if v.shape == shape else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_image_tokens_that_text_breaks(name):
    kin = family(name)
    inputs, adapter = kin.encode(), find_adapter(kin.model)
    where = (inputs["input_ids"][0] == adapter.visual_ids[0]).nonzero()[:, 0].tolist()
    end = next(n for n in where if n + 1 not in where)
    with pytest.raises(ValueError, match="input_ids"):
        LogitLens(kin.model).attribute(swapped(inputs, end - 1, end + 1), kin.answer)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", [1, 3])
def test_an_attention_mask_that_hides_text(name, hidden):
    kin = family(name)
    inputs = kin.encode()
    inputs["attention_mask"][0, :hidden] = 0
    assert f"first {hidden} tokens" in refused(kin, inputs, "attention_mask")


@pytest.mark.parametrize("name", ["Llava", "PaliGemma"])
@pytest.mark.parametrize("size", [(8, 32), (32, 8)], ids=str)
def test_pixels_of_another_size_than_the_processors(name, size):
    """They make as many image tokens, so the model itself takes them."""
    kin = family(name)
    inputs = kin.encode()
    inputs["pixel_values"] = torch.nn.functional.interpolate(inputs["pixel_values"], size)
    with pytest.warns(UserWarning, match=f"pixel_values are {size[0]} x {size[1]} pixels, but"):
        LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)


def test_tiles_of_another_picture_than_image_sizes_tell():
    kin = family("LlavaNext")
    usual, wide = kin.encode(), kin.encode(kin.wide_picture)
    assert usual["pixel_values"].shape == wide["pixel_values"].shape
    with pytest.warns(UserWarning, match="image_sizes those of another picture"):
        LogitLens(kin.model).attribute({**usual, "pixel_values": wide["pixel_values"]}, kin.answer)
    for picture in (kin.picture, kin.wide_picture, kin.tall_picture):
        inputs = kin.encode(picture)
        noisy = inputs["pixel_values"] + 0.3 * torch.randn(inputs["pixel_values"].shape)
        LogitLens(kin.model).attribute({**inputs, "pixel_values": noisy}, kin.answer)
    with pytest.raises(ValueError, match="images= holds a picture of 24 x 36 pixels"):
        LogitLens(kin.model, kin.processor).attribute(usual, kin.answer, images=kin.wide_picture)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen3VL"])
@pytest.mark.parametrize("grid", [(4, 16), (16, 4)], ids=str)
def test_a_grid_of_as_many_patches_is_told_by_the_picture(name, grid):
    kin = family(name)
    inputs = {**kin.encode(), "image_grid_thw": torch.tensor([[1, *grid]])}
    with pytest.raises(ValueError, match="images= through the processor's settings are not"):
        LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer, images=kin.picture)


@pytest.mark.parametrize("grid", [[[1.0, 8.0, 8.0]], [[1, -8, -8]], [[0, 8, 8]]], ids=str)
def test_grids_that_are_no_whole_numbers(grid):
    kin = family("Qwen2VL")
    inputs = {**kin.encode(), "image_grid_thw": torch.tensor(grid)}
    refused(kin, inputs, "image_grid_thw")


@pytest.mark.parametrize("kind", ["flat", "noise"])
def test_odd_pictures_of_llava_next_are_not_suspected(kind):
    """A flat picture has no deviation; the base image loses the noise of single pixels."""
    kin = family("LlavaNext")
    values = torch.full((96, 160, 3), 128.0)
    if kind == "noise":
        values = torch.linspace(0, 255, 160)[None, :, None] + 20 * torch.randn(96, 160, 3)
    picture = Image.fromarray(values.expand(96, 160, 3).clamp(0, 255).byte().numpy(), "RGB")
    inputs = kin.encode(picture)
    adapter = find_adapter(kin.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.check_inputs({**inputs, "pixel_values": inputs["pixel_values"].requires_grad_()})
