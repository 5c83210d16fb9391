"""Flipped pixel inputs: what the processor makes of the flipped picture, on every family."""

import pytest
import torch
from PIL import Image, ImageOps

from captum_mllm.adapters import find_adapter
from captum_mllm.model.inputs import read_sample
from tests.oracle.families import NAMES, family, video

MIRRORED, TURNED = (-1,), (-2, -1)
PICTURE = {
    MIRRORED: ImageOps.mirror,
    TURNED: lambda picture: picture.transpose(Image.Transpose.ROTATE_180),
}


def flipped(subject, inputs, axes):
    adapter = find_adapter(subject.model)
    sample = read_sample(inputs, adapter)
    return adapter.flipped(sample.kwargs, sample.grids, axes)


@pytest.mark.parametrize("axes", PICTURE)
@pytest.mark.parametrize("name", NAMES)
def test_flipped_twice_is_as_before(name, axes):
    subject = family(name)
    for pictures in ((subject.wide_picture,), (subject.wide_picture, subject.tall_picture)):
        inputs = subject.encode(*pictures)
        once = flipped(subject, inputs, axes)
        twice = flipped(subject, inputs | once, axes)
        assert not torch.allclose(once["pixel_values"], inputs["pixel_values"])
        for key, pixels in once.items():
            assert pixels.shape == inputs[key].shape
            torch.testing.assert_close(twice[key], inputs[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", PICTURE)
@pytest.mark.parametrize("name", NAMES)
def test_flipped_pixels_are_those_of_the_flipped_picture(name, axes):
    """The processor sees the flipped picture: no code is shared. Other views are no such thing."""
    subject = family(name)
    for picture in (subject.picture, subject.wide_picture, subject.tall_picture):
        expected = subject.encode(PICTURE[axes](picture))
        got = flipped(subject, subject.encode(picture), axes)
        for key, pixels in got.items():
            torch.testing.assert_close(pixels, expected[key], rtol=1e-3, atol=0.02)


@pytest.mark.parametrize(("case", "down", "across"), [("wide", 1, 2), ("tall", 3, 1)])
def test_tiles_change_places(case, down, across):
    """By hand: tile by tile, and the thumbnail after them."""
    subject = family("InternVL")
    inputs = subject.encode({"wide": subject.wide_picture, "tall": subject.tall_picture}[case])
    tiles = inputs["pixel_values"]
    assert len(tiles) == down * across + 1
    thumbnail = tiles[-1:]
    grid = tiles[:-1].unflatten(0, (down, across))
    for axes in PICTURE:
        moved = grid.flip(1) if axes == MIRRORED else grid.flip(0, 1)
        expected = torch.cat([moved.flatten(0, 1).flip(axes), thumbnail.flip(axes)])
        assert torch.equal(flipped(subject, inputs, axes)["pixel_values"], expected)


def test_every_frame_of_a_video():
    subject = family("Qwen2_5_VL")
    inputs = video(subject)
    once = flipped(subject, inputs, TURNED)
    (key,) = once
    assert not torch.allclose(once[key], inputs[key])
    torch.testing.assert_close(flipped(subject, inputs | once, TURNED)[key], inputs[key])
