"""Annotation files that are hostile or damaged: refused before they take time or memory."""

import json
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as tools

from captum_mllm.data import CocoDataset, LabelMapDataset
from captum_mllm.data.coco_masks import draw_mask
from captum_mllm.validation import ArgumentError

SIDE = 16
SQUARE = [[2, 2, 9, 2, 9, 9, 2, 9]]


def zigzag(count, reach):
    return [[reach if n % 4 < 2 else -reach for n in range(2 * count)]]


@pytest.fixture
def coco(tmp_path):
    """Writes a set of one picture and one annotation; opens it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images/a.png")

    def make(mask=SQUARE, name="a.png", width=SIDE, height=SIDE, count=1, **options):
        data = {
            "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
            "categories": [{"id": 1, "name": "dog"}],
            "annotations": [
                {"id": n, "image_id": 1, "category_id": 1, "segmentation": mask}
                for n in range(count)
            ],
        }
        (tmp_path / "a.json").write_text(json.dumps(data))
        return CocoDataset(tmp_path / "images", tmp_path / "a.json", **options)

    return make


@pytest.fixture
def labels(tmp_path):
    for part in ("image", "seg"):
        (tmp_path / part).mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "image/a.png")
    pixels = np.random.default_rng(0).integers(0, 4, (SIDE, SIDE), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "seg/a.png")

    def make(picture="image/a.png", mask="seg/a.png", **options):
        record = [picture, "a dog", mask, {"dog": 1, "cat": 2}]
        (tmp_path / "anno.json").write_text(json.dumps([record]))
        return LabelMapDataset(tmp_path, **options)

    return make


# ---- COCO: outlines, sizes, counts --------------------------------------------------------------


@pytest.mark.parametrize("count", [300, 600, 1000])
def test_far_points_are_refused_before_anything_is_drawn(count, coco):
    tracemalloc.start()
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"annotation 0: field 'segmentation' has an outline of"):
        coco(zigzag(count, 99_999))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert time.monotonic() - begun < 1


def test_the_limit_of_outlines_is_their_length_and_can_be_raised(coco):
    outline = 2 * 7 + 2 * 7  # of the square
    assert coco(SQUARE, max_outline=outline)[0].objects[0].mask.sum() == 49
    with pytest.raises(ValueError, match=r"has an outline of 28 pixels; it may be 27 at most"):
        coco(SQUARE, max_outline=outline - 1)
    with pytest.raises(ValueError, match=r"has an outline of 56 pixels"):  # parts add up
        coco(SQUARE * 2, max_outline=55)
    coco(zigzag(5, 90_000))  # 720,000
    assert coco(zigzag(7, 90_000), max_outline=2_000_000)[0].objects[0].mask.shape == (SIDE, SIDE)


def test_declared_sizes_are_bounded_and_compared_with_the_header(coco, monkeypatch):
    with pytest.raises(ValueError, match=r"image 1: field 'width' and height are 20000 x 20000"):
        coco(width=20_000, height=20_000)
    monkeypatch.setattr("captum_mllm.data.coco.draw_mask", None)  # nothing is drawn
    data = coco(width=9_000, height=9_000)
    with pytest.raises(ValueError, match=r"a.png is 16 x 16 px, but image 1 is annotated as 9000"):
        _ = data[0]
    with pytest.raises(ValueError, match=r"a.png is 16 x 16 px"):
        _ = coco(width=20_000, height=20_000, max_pixels=400_000_000)[0]


def test_a_picture_larger_than_annotated_is_not_decoded(coco, tmp_path, monkeypatch):
    sample = coco()[0]
    Image.new("1", (15_000, 15_000)).save(tmp_path / "images/a.png")  # more than Pillow takes
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ValueError, match=r"a.png is 15000 x 15000 px, but image 1"):
        _ = sample.image


def test_pixels_of_all_masks_of_a_picture_are_bounded(coco):
    pixels = 3 * SIDE * SIDE
    assert len(coco(count=3, max_mask_pixels=pixels)[0].objects) == 3
    with pytest.raises(ValueError, match=r"image 1: its 3 masks of 16 x 16 pixels .*max_mask_pix"):
        coco(count=3, max_mask_pixels=pixels - 1)


def test_limits_are_whole_numbers(coco, labels):
    for name in ("max_pixels", "max_outline", "max_mask_pixels"):
        for value in (0, -1, 1.5, "9", True):
            with pytest.raises(ArgumentError, match=rf"{name} must be a whole number above 0"):
                coco(**{name: value})
    with pytest.raises(ArgumentError, match=r"max_pixels must be at most 2147483647"):
        labels(max_pixels=2**31)


def test_run_lengths_that_are_bombs(coco):
    size = [SIDE, SIDE]
    huge = "oooooo1" * 3  # digits of runs of billions of pixels
    for counts in ([10**12], [2**32 + 256], [10**400], [0, 256] * 50_000, huge):
        with pytest.raises(ValueError, match=r"annotation 0: field 'segmentation' has counts"):
            coco({"size": size, "counts": counts})
    many = [0, 0] * 50_000 + [256]  # zeros only cost their own text
    assert not coco({"size": size, "counts": many})[0].objects[0].mask.any()


def test_masks_are_bool_arrays_of_their_own():
    mask = draw_mask(tools, SQUARE, 12, 16)
    assert (mask.dtype, mask.shape, mask.flags.c_contiguous) == (bool, (12, 16), True)
    mask[0, 0] = True
    assert mask.sum() == 50


# ---- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, "[" * 50_000 + "]" * 50_000])
def test_deeply_nested_json_is_an_error_of_its_file(deep, coco, labels, tmp_path):
    data = coco()
    (tmp_path / "b.json").write_text(deep)
    with pytest.raises(ValueError, match=r"captions='.*b.json' is not a JSON file"):
        CocoDataset(tmp_path / "images", data.files[0], tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"instances='.*b.json' is not a JSON file"):
        CocoDataset(tmp_path / "images", tmp_path / "b.json")
    (tmp_path / "anno.json").write_text(deep)
    with pytest.raises(ValueError, match=r"anno.json is not a JSON file"):
        LabelMapDataset(tmp_path)


def test_bytes_that_are_not_utf8(tmp_path, coco):
    coco()
    (tmp_path / "a.json").write_bytes(b'{"images": "\xff"}')
    with pytest.raises(ValueError, match=r"a.json' is not a JSON file: 'utf-8' codec"):
        CocoDataset(tmp_path / "images", tmp_path / "a.json")


# ---- names of files -----------------------------------------------------------------------------


def test_names_that_lead_out_of_the_folder_are_refused_unless_allowed(coco, labels, tmp_path):
    folder = tmp_path / "secret"
    folder.mkdir()
    Image.new("RGB", (SIDE, SIDE), "red").save(folder / "b.png")
    (tmp_path / "images/link.png").symlink_to(folder / "b.png")
    (tmp_path / "images/folder").symlink_to(folder)
    for name in (str(folder / "b.png"), "../secret/b.png", "link.png", "folder/b.png"):
        with pytest.raises(ValueError, match=r"a.json: 1 of the 1 images .*outside.*allow_outside"):
            coco(name=name)
        assert coco(name=name, allow_outside=True)[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert coco(name="../images/a.png")[0].size == (SIDE, SIDE)  # and back in
    for name in ("../secret/b.png", str(folder / "b.png")):
        (tmp_path / "set").mkdir(exist_ok=True)
        record = [name, "a dog", name, {"dog": 1}]
        (tmp_path / "set/anno.json").write_text(json.dumps([record]))
        with pytest.raises(ValueError, match=r"anno.json: 2 of the 2 files .*outside"):
            LabelMapDataset(tmp_path / "set")
    record[2] = str(tmp_path / "seg/a.png")
    (tmp_path / "set/anno.json").write_text(json.dumps([record]))
    assert LabelMapDataset(tmp_path / "set", allow_outside=True)[0].file_name == name


def test_a_link_to_the_whole_folder_is_no_way_out(coco, tmp_path):
    """The user names the folder, wherever it leads."""
    data = coco()
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    assert CocoDataset(tmp_path / "linked", data.files[0])[0].image.size == (SIDE, SIDE)


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000 + "a.png", "a\0.png"])
def test_names_that_no_file_can_have(name, coco, labels):
    with pytest.raises(FileNotFoundError, match=r"1 of the 1 images .* are not in") as raised:
        coco(name=name)
    assert len(str(raised.value)) < 600
    for record in ({"picture": name}, {"mask": name}):
        with pytest.raises(FileNotFoundError, match=r"1 of the 2 files .* are not in"):
            labels(**record)


def test_names_that_are_not_unicode(coco, labels):
    with pytest.raises(ValueError, match=r"field 'file_name' is '\\ud800.png'; it must be a text"):
        coco(name="\ud800.png")
    with pytest.raises(
        ValueError, match=r"entry 2 \(label image\) is '\\ud800'; it must be a text"
    ):
        labels(mask="\ud800")


# ---- label images -------------------------------------------------------------------------------


def test_every_cut_of_a_label_image_is_an_error_or_leaves_it_whole(labels, tmp_path):
    data = labels()
    whole = [thing.mask for thing in data[0].objects]
    path = tmp_path / "seg/a.png"
    content = path.read_bytes()
    refused = 0
    for end in range(len(content)):
        path.write_bytes(content[:end])
        for read in (lambda: data[0], lambda: LabelMapDataset(tmp_path)[0]):
            found, message = whole, ""
            try:
                found = [thing.mask for thing in read().objects]
            except ValueError as error:
                message = str(error)
            np.testing.assert_array_equal(found, whole)
            if message:
                assert "anno.json: record 0: entry 2 (label image)" in message
                assert "seg/a.png" in message
                refused += 1
    assert refused > len(content)


def test_label_images_that_are_bombs(labels, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match=r"entry 2 \(label image\) .*seg/a.png' is too large"):
        labels()
    with pytest.raises(ValueError, match=r"its 2 masks of 16 x 16 pixels are more than 511"):
        labels(max_pixels=256, max_mask_pixels=511)
    assert len(labels(max_pixels=256, max_mask_pixels=512)[0].objects) == 2


def test_a_picture_of_another_size_than_its_label_image(labels, tmp_path):
    Image.new("RGB", (SIDE, 5)).save(tmp_path / "image/a.png")
    with pytest.raises(ValueError, match=r"image/a.png is 16 x 5 px, but record 0 of .* 16 x 16"):
        _ = labels()[0]
