"""Pictures of the user: damaged files, depths, frames, limits and names."""

import contextlib
import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captum_mllm.adapters.pixels import as_rgb
from captum_mllm.pictures import header_size, open_picture, read_picture, shown_name, to_eight_bits

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def noise():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_cut_of_a_picture_is_an_error_or_leaves_it_whole(kind, noise, tmp_path):
    data = encoded(noise, kind)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(data)
    whole = np.asarray(open_picture(path))
    refused = 0
    ends = range(0, len(data), 1 + len(data) // 300)
    for end in ends:
        path.write_bytes(data[:end])
        picture, message = whole, ""
        try:
            picture = open_picture(path)
        except ValueError as error:
            message = str(error)
        # Where there is no error, only the end of the file, after all pixels, is missing.
        np.testing.assert_array_equal(np.asarray(picture), whole)
        if message:
            assert repr(str(path)) in message
            refused += 1
    assert refused >= 0.7 * len(ends)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_pictures_raise_value_errors_alone(kind, noise, tmp_path):
    data, draw = encoded(noise, kind), random.Random(1)
    path = tmp_path / "a"
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        path.write_bytes(broken)
        with contextlib.suppress(ValueError):  # and nothing else
            assert open_picture(path, 10_000).mode == "RGB"


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((RAMP * 65535).round().astype(np.uint16), (0, 255)),
        ((RAMP * 4095).round().astype(np.uint16), (0, 16)),  # 12 bits in 16: dark, as stored
        ((RAMP * 255).round().astype(np.int32), (0, 255)),
        ((RAMP * 65535).round().astype(np.int32), (0, 255)),
        ((RAMP * 1e9 - 5e8).round().astype(np.int32), (0, 255)),
        (RAMP.astype(np.float32), (0, 255)),
        ((RAMP * 255).astype(np.float32), (0, 255)),
        ((RAMP * 7e4 - 3).astype(np.float32), (0, 255)),
        ((RAMP * 0 + 1e6).astype(np.float32), (0, 0)),  # one value: no range
    ],
)
def test_deep_pictures_keep_their_order(values, expected, tmp_path):
    """Nothing turns white: a ramp stays a ramp, in files and in pictures given as such."""
    deep = Image.fromarray(values)
    deep.save(tmp_path / "a.tiff")
    grey = np.asarray(to_eight_bits(deep)).astype(int)
    assert (grey.min(), grey.max()) == expected
    assert (np.diff(grey.ravel()) >= 0).all()
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "a.tiff"))[..., 0], grey)
    np.testing.assert_array_equal(np.asarray(as_rgb(deep))[..., 2], grey)
    if expected == (0, 255):
        np.testing.assert_allclose(grey, (RAMP * 255).round(), atol=1)


def test_sixteen_bits_are_scaled_by_their_whole_range(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    picture, notes = read_picture(tmp_path / "a.png")
    assert np.asarray(picture)[0, :, 1].tolist() == [0, 0, 1, 1, 128, 255]
    assert len(notes) == 1
    assert "more than 8 bits" in notes[0]
    assert "from 0 (black) to 65535 (white)" in notes[0]
    big_endian = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert np.asarray(to_eight_bits(big_endian)).tolist() == [[0, 0, 1, 1, 128, 255]]


def test_eight_bits_stay_as_they_are():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"):
        picture = Image.new(mode, (2, 2))
        assert to_eight_bits(picture) is picture


def test_values_that_are_no_numbers_are_refused(tmp_path):
    values = np.ones((2, 2), np.float32)
    for value in (np.nan, np.inf):
        values[0, 0] = value
        Image.fromarray(values).save(tmp_path / "a.tiff")
        with pytest.raises(ValueError, match=r"a.tiff' is a broken picture .*not finite"):
            open_picture(tmp_path / "a.tiff")


def test_the_first_of_several_frames_is_taken_and_said(tmp_path):
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("red", "lime", "blue")]
    for kind in ("gif", "png", "webp", "tiff"):
        path = tmp_path / f"a.{kind}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        picture, notes = read_picture(path)
        assert picture.getpixel((0, 0))[0] > 250, kind
        assert notes == [f"{path} holds several frames; the first one is taken."]
    frames[0].save(tmp_path / "one.gif")
    assert read_picture(tmp_path / "one.gif")[1] == []


def test_a_bomb_is_refused_by_its_header_and_the_limit_can_be_raised(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("1", (100, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # five times: Pillow alone raises, too
    with pytest.raises(ValueError, match=r"a.png' is too large: .*5000 pixels.*raise max_pixels"):
        open_picture(path)
    assert open_picture(path, 5000).size == (100, 50)
    with pytest.raises(ValueError, match=r"too large: 100 x 50 pixels are more than 4999"):
        open_picture(path, 4999)
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert header_size(path) == (50, 100)  # which decodes nothing


def test_damage_that_would_be_other_pixels_is_found(tmp_path):
    """Pillow compares no checksum of a PNG's pixels; here one byte of them is another."""
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path, compress_level=0)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.png' is a broken picture"):
        open_picture(path)
    assert header_size(path) == (8, 8)


def test_names_that_no_file_has_and_names_that_are_not_utf8(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file 'aaaa.*\.\.\.aaa"):
        open_picture(Path("a" * 5000))
    name = os.fsdecode(b"caf\xe9.png")
    path = tmp_path / name
    Image.new("RGB", (2, 2)).save(path)
    assert open_picture(path).size == (2, 2)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"caf\\\\udce9.png' is not a picture") as raised:
        open_picture(path)
    str(raised.value).encode("utf-8")
    assert shown_name("\ud800") == r"\ud800"
