"""Inputs that are easy to get wrong, on the families that they concern."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import NoiseTunnel
from PIL import Image
from transformers import image_transforms

from captum_mllm import LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.functional import WHOLE
from tests.oracle.families import NAMES, family, video
from tests.oracle.published import ARC, MSEA
from tests.oracle.tiny import random_picture


def test_inputs_that_are_no_tensors_are_not_left_out():
    kin = family("Qwen2_5_VL")
    inputs = video(kin) | {"second_per_grid_ts": [4.0]}
    with pytest.raises(ValueError, match=r"tensor 'second_per_grid_ts', got list.*return_tensors"):
        LogitLens(kin.model).attribute(inputs, kin.answer)
    numbers = inputs | {"second_per_grid_ts": torch.tensor([4.0])}
    slow = LogitLens(kin.model).attribute(numbers, kin.answer)
    usual = LogitLens(kin.model).attribute(video(kin), kin.answer)
    assert not torch.allclose(slow.grid_attr[0], usual.grid_attr[0], atol=1e-3)


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_the_prompt_tells_how_tiles_lie(name):
    """Also of blank pictures, whose pixels don't."""
    kin = family(name)
    sizes = [(64, 32), (32, 64), (64, 64)]  # width, height
    blank = [Image.new("RGB", size, "navy") for size in sizes]
    result = LogitLens(kin.model, kin.processor).attribute(kin.encode(*blank), kin.answer)
    assert [grid.tiles for grid in result.grids] == [(1, 2), (2, 1), (2, 2)]


def test_a_pixel_tensor_holds_one_image():
    kin = family("Idefics3")
    inputs = kin.encode(kin.picture, kin.wide_picture)
    pixels = inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="pixel tensor, but input_ids hold 2 images"):
        LogitLens(kin.model).attribute(pixels, kin.answer, inputs)


@pytest.mark.parametrize("name", ["InternVL", "Idefics3", "LlavaNext"])
def test_noise_tunnel_over_tiles(name):
    kin = family(name)
    inputs = kin.encode(kin.wide_picture)
    plain = LogitLens(kin.model).attribute(inputs, kin.answer)
    pixels = inputs.pop("pixel_values")
    whole = pixels if pixels.ndim == 5 else pixels[None]  # one sample of all tiles
    maps = NoiseTunnel(LogitLens(kin.model)).attribute(
        whole, nt_samples=2, stdevs=1e-6, target=kin.answer[None], additional_forward_args=inputs
    )
    assert maps.shape[:2] == (1, len(kin.answer))
    torch.testing.assert_close(maps[0], plain.image_attr[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("context", ["after_image", "all"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "Gemma3"])
def test_an_images_own_markers_are_no_context_with_or_without_processor(name, context):
    kin = family(name)
    inputs = kin.encode(kin.wide_picture)
    with_it, without = (
        LogitLens(kin.model, processor, context=context).attribute(inputs, kin.answer)
        for processor in (kin.processor, None)
    )
    words = [label.strip() for label in with_it.input_tokens]
    assert not [word for word in words if "row_" in word or "fake" in word or "img" in word]
    if context == "after_image" or name in ("InternVL", "Idefics3", "SmolVLM", "PaliGemma"):
        assert with_it.token_attr.shape == without.token_attr.shape


def test_times_of_a_video_are_no_context():
    kin = family("Qwen3VL")
    result = LogitLens(kin.model, kin.processor, context="all").attribute(video(kin), kin.answer)
    assert not [label for label in result.input_tokens if "seconds" in label or "<" in label]


@pytest.mark.parametrize("size", [(64, 29), (29, 64), (36, 24), (12, 36), (32, 32)])
def test_a_window_over_the_whole_picture_is_the_picture(size):
    """Padding keeps its value, also where it is one pixel at one side only."""
    kin = family("LlavaNext")
    inputs = kin.encode(random_picture(3, size))
    adapter = find_adapter(kin.model)
    grids = adapter.grids(inputs)
    made = adapter.window_pixels(inputs, grids, [WHOLE])["pixel_values"]
    torch.testing.assert_close(made[0, 1:], inputs["pixel_values"][0, 1:])


@pytest.mark.parametrize("size", [(400, 4), (4, 400)])
def test_a_picture_too_thin_for_tiles_is_refused(size):
    kin = family("LlavaNext")
    with pytest.raises(ValueError, match=r"image_sizes: a picture of .* keeps no row"):
        LogitLens(kin.model).attribute(kin.encode(random_picture(3, size)), kin.answer)


@pytest.mark.parametrize("name", ["Qwen2VL", "InternVL", "Idefics3", "PaliGemma"])
def test_original_pictures_with_transparent_parts(name, monkeypatch):
    def deprecated(message, *_, **__):
        raise AssertionError(message)

    quiet = SimpleNamespace(warning_once=deprecated)
    monkeypatch.setattr(image_transforms, "logger", quiet, raising=False)  # 5.5 has none
    kin = family(name)
    pixels = np.asarray(kin.picture.convert("RGBA")).copy()
    pixels[..., 3] = np.linspace(0, 255, pixels.shape[1]).astype(np.uint8)
    picture = Image.fromarray(pixels)
    result = MSEA(kin.model, kin.processor).attribute(
        kin.encode(picture), kin.answer, images=picture
    )
    assert len(result.scales) == 3


@pytest.mark.parametrize("given", ["picture.png", np.zeros((4, 4, 3))], ids=["path", "array"])
def test_original_pictures_of_another_kind(given):
    kin = family("Qwen2VL")
    with pytest.raises(TypeError, match="images= takes PIL pictures, not"):
        MSEA(kin.model, kin.processor).attribute(kin.inputs, kin.answer, images=given)


def test_scales_that_a_model_of_one_size_cannot_take_are_named():
    kin = family("Gemma3")
    with pytest.warns(UserWarning, match=r"scales \[0\.5\] are dropped"):
        result = MSEA(kin.model, scales=(0.5,)).attribute(kin.inputs, kin.answer)
    assert result.scales == (1.0,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MSEA(kin.model, scales=(1.0, 1.5)).attribute(kin.inputs, kin.answer)


def test_pictures_of_a_video_whose_last_frame_was_repeated():
    kin = family("Qwen2VL")
    result = ARC(kin.model).attribute(video(kin, frames=4), kin.answer)
    frames = [random_picture(n, (32, 24)) for n in range(4)]
    for count in (3, 4):
        result.plot_image_heatmap(target_token_pos=0, picture=frames[:count])
    with pytest.raises(ValueError, match="picture must be 4 pictures"):
        result.plot_image_heatmap(target_token_pos=0, picture=frames[:2])


def test_an_attention_mask_of_zeros_and_a_mask_as_positions():
    kin = family("Qwen2VL")
    empty = kin.inputs | {"attention_mask": torch.zeros_like(kin.inputs["input_ids"])}
    with pytest.raises(ValueError, match="attention_mask is 0 everywhere"):
        LogitLens(kin.model).attribute(empty, kin.answer)
    mask = torch.tensor([True, False])
    with pytest.raises(ValueError, match="explain must hold at least one position"):
        LogitLens(kin.model).attribute(kin.inputs, kin.answer, explain=mask)


def test_original_pictures_where_an_optional_input_was_left_out():
    kin = family("Idefics3")
    inputs = kin.encode(kin.wide_picture)
    whole = MSEA(kin.model, kin.processor).attribute(inputs, kin.answer, images=kin.wide_picture)
    del inputs["pixel_attention_mask"]
    less = MSEA(kin.model, kin.processor).attribute(inputs, kin.answer, images=kin.wide_picture)
    torch.testing.assert_close(less.grid_attr, whole.grid_attr)
