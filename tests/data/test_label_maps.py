"""The reader of label images, against labels written by hand, and the writer of that layout."""

import json

import numpy as np
import pytest
from PIL import Image

from captum_mllm.data import CocoDataset, LabelMapDataset, write_label_maps
from captum_mllm.reference.export import export

HEIGHT, WIDTH = 4, 6
LABELS = np.zeros((HEIGHT, WIDTH), np.uint8)
LABELS[1:3, 1:4], LABELS[3, 5], LABELS[0, 0] = 7, 200, 9  # 9 is nobody's


def records():
    names = {"dog": 7, "wine glass": 200, "cat": 3}
    return [
        ["image/b.png", "A dog.", "seg/b.png", names],
        ["image/a.png", "Ein Hündchen.", "seg/a.png", {"cat": 7}],
    ]


@pytest.fixture
def write(tmp_path):
    for part in ("image", "seg"):
        (tmp_path / part).mkdir()
    for number, name in enumerate("ba"):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 255)).save(tmp_path / f"image/{name}.png")
        Image.fromarray(LABELS).save(tmp_path / f"seg/{name}.png")

    def write(data):
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        (tmp_path / "anno.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_samples(write):
    data = LabelMapDataset(write(records()))
    assert (len(data), data.categories) == (2, ("dog", "wine glass", "cat"))
    first, second = data
    assert (first.captions, second.captions) == (["A dog."], ["Ein Hündchen."])
    assert (first.image_id, first.file_name, first.size) == (0, "image/b.png", (HEIGHT, WIDTH))
    assert [sample.image.getpixel((0, 0)) for sample in data[:]] == [(0, 0, 255), (1, 0, 255)]
    found = {thing.category: thing for thing in first.objects}
    assert found.keys() == {"dog", "wine glass"}  # no pixel shows the cat
    np.testing.assert_array_equal(found["dog"].mask, LABELS == 7)
    assert found["dog"].mask.dtype == bool
    assert (found["wine glass"].area, found["wine glass"].is_crowd) == (1.0, False)
    assert first.extra == {"names": ["dog", "wine glass", "cat"]}
    assert [thing.category for thing in data[-1].objects] == ["cat"]
    with pytest.raises(IndexError):
        data[2]


def test_kinds_of_label_images(write):
    """A palette's indices count, not its colours; three equal channels are one."""
    folder = write(records())
    palette = Image.fromarray(LABELS).convert("P")
    palette.putdata(LABELS.ravel().tolist())
    palette.putpalette([n % 251 for n in range(768)])
    palette.save(folder / "seg/b.png")
    Image.fromarray(np.stack([LABELS] * 3, -1)).save(folder / "seg/a.png")
    for sample in LabelMapDataset(folder):
        np.testing.assert_array_equal(sample.objects[0].mask, LABELS == 7)
    Image.fromarray(np.stack([LABELS, LABELS, 0 * LABELS], -1)).save(folder / "seg/a.png")
    data = LabelMapDataset(folder)
    with pytest.raises(
        ValueError, match=r"record 1: entry 2 \(label image\) .* has colours: write"
    ):
        _ = data[1]


WRONG = [  # record, entry, value -> what the error says
    (1, 0, " ", r"record 1: entry 0 \(picture\) is ' '; it must be a text that is not empty"),
    (0, 1, None, r"record 0: entry 1 \(caption\) is None"),
    (0, 2, 5, r"record 0: entry 2 \(label image\) is 5"),
    (0, 3, ["dog"], r"record 0: entry 3 \(categories\) is \['dog'\]; it must be an object"),
    (0, 3, {" ": 1}, r"entry 3 \(categories\) is {' ': 1}; it must be an object"),
    (0, 3, {"dog": 0}, r"the label of 'dog' must be a whole number in 1\.\.255"),
    (0, 3, {"dog": 256}, r"the label of 'dog' must be"),
    (0, 3, {"dog": True}, r"the label of 'dog' must be"),
    (1, 3, {"dog": 1, "cat": 1}, r"record 1: .*give every name a unique label"),
]


@pytest.mark.parametrize(("record", "entry", "value", "message"), WRONG)
def test_entries_that_are_wrong(write, record, entry, value, message):
    data = records()
    data[record][entry] = value
    with pytest.raises(ValueError, match=rf"anno.json: .*{message}"):
        LabelMapDataset(write(data))


def test_files_that_are_wrong(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder='nowhere' holds no anno.json"):
        LabelMapDataset("nowhere")
    for text, message in (
        ("[", "is not a JSON file"),
        ("{}", r"must hold a list of records, got {}"),
        ('[["a", "b"]]', r"record 0 is \['a', 'b'\]; it must be a list of picture, caption, label"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelMapDataset(write(text))
    folder = write(records())
    (folder / "seg/a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"record 1: entry 2 .*cannot be read as a picture"):
        LabelMapDataset(folder)
    Image.fromarray(LABELS.astype(np.uint16)).save(folder / "seg/a.png")
    with pytest.raises(ValueError, match=r"record 1: entry 2 .*pixels of kind 'I;16'"):
        LabelMapDataset(folder)
    Image.fromarray(LABELS.T).save(folder / "seg/a.png")
    with pytest.raises(ValueError, match=r"a.png is 6 x 4 px.* annotated as 4 x 6"):
        _ = LabelMapDataset(folder)[1].image
    (folder / "seg/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 files .* are not in .*: seg/a.png"):
        LabelMapDataset(folder)


def test_what_is_written_is_read_back(tmp_path):
    made = export("crowded", tmp_path, count=4, size=64)
    coco = CocoDataset(*(made / n for n in ("images", "instances.json", "captions.json")))
    data = LabelMapDataset(write_label_maps(coco, tmp_path / "labels"))
    assert data.categories == coco.categories
    for one, other in zip(coco, data, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.captions[:1] == other.captions
        expected = {}
        for thing in one.objects:  # these masks don't overlap
            expected[thing.category] = expected.get(thing.category, False) | thing.mask
        found = {thing.category: thing.mask for thing in other.objects}
        assert found.keys() == expected.keys()
        for name, mask in found.items():
            np.testing.assert_array_equal(mask, expected[name])
    with pytest.raises(FileExistsError, match=r"is not an empty folder; name another"):
        write_label_maps(coco, tmp_path / "labels")
    bare = CocoDataset(made / "images", made / "instances.json")
    with pytest.raises(ValueError, match=r"data: image 0 has no caption"):
        write_label_maps(bare, tmp_path / "others")


def test_the_later_of_two_overlapping_masks_stands(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def box(id, category, left, right):
        corners = [left, 0, right, 0, right, 4, left, 4]
        return {"id": id, "image_id": 0, "category_id": category, "segmentation": [corners]}

    data = {
        "images": [{"id": 0, "file_name": "a.png", "width": 4, "height": 4}],
        "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [box(1, 5, 0, 3), box(2, 2, 2, 4)],
    }
    said = {"annotations": [{"id": 0, "image_id": 0, "caption": "a dog"}]}
    for name, content in (("instances", data), ("captions", said)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    coco = CocoDataset(tmp_path, tmp_path / "instances.json", tmp_path / "captions.json")
    (sample,) = LabelMapDataset(write_label_maps(coco, tmp_path / "out"))
    areas = {thing.category: thing.area for thing in sample.objects}
    assert areas == {"dog": 8.0, "cat": 8.0}
