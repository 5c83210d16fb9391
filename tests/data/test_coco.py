"""The reader of COCO files, against masks drawn by hand and by pycocotools itself."""

import contextlib
import copy
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as tools

from captum_mllm.data import CocoDataset
from captum_mllm.data.coco_masks import _compressed_total, draw_mask

HEIGHT, WIDTH = SIZE = [6, 8]
SQUARE = np.zeros((HEIGHT, WIDTH), bool)
SQUARE[1:4, 2:6] = True
L_SHAPE = np.zeros((HEIGHT, WIDTH), bool)
L_SHAPE[0:6, 0:2] = L_SHAPE[4:6, 0:7] = True


def polygon(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def runs_of(mask):
    """Run lengths down the columns, the first of them empty pixels: written out, no library."""
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def compressed(mask):
    return tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def annotation(id, image, category, mask, **more):
    return {"id": id, "image_id": image, "category_id": category, "segmentation": mask, **more}


def instances():
    """As val2017's: images out of order, one of them bare, polygons, a crowd as run lengths."""
    two_parts = [polygon(2, 1, 6, 4), polygon(6, 4, 8, 6)]
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"id": 4, "name": "Attribution License", "url": "http://example.org"}],
        "images": [
            {
                "id": id, "file_name": f"{id:012d}.png", "width": WIDTH, "height": HEIGHT,
                "license": 4, "flickr_url": "http://example.org", "date_captured": "2013-11-14",
                "coco_url": "http://example.org",
            }
            for id in (785, 139, 632)
        ],
        "annotations": [
            annotation(9, 785, 18, two_parts, area=15.5, iscrowd=0, bbox=[2, 1, 6, 5.0]),
            annotation(7, 785, 1, {"size": SIZE, "counts": runs_of(L_SHAPE)}, iscrowd=1, area=22),
            annotation(8, 139, 18, {"size": SIZE, "counts": compressed(SQUARE)}, style="noto"),
        ],
        "categories": [
            {"supercategory": "animal", "id": 18, "name": "dog"},
            {"supercategory": "person", "id": 1, "name": "person"},
        ],
    }  # fmt: skip


def captions():
    texts = [(31, 785, "A dog."), (30, 785, "Some people and a dog."), (7, 139, "Ein Hündchen.")]
    return {"annotations": [{"id": i, "image_id": n, "caption": t} for i, n, t in texts]}


@pytest.fixture
def write(tmp_path):
    folder = tmp_path / "val2017"
    folder.mkdir()
    for number, id in enumerate((139, 632, 785)):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 255)).save(folder / f"{id:012d}.png")

    def write(instances, captions=None):
        paths = [folder, tmp_path / "instances.json"]
        paths[1].write_text(json.dumps(instances))
        if captions is not None:
            paths.append(tmp_path / "captions.json")
            paths[2].write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
        return paths

    return write


def test_samples(write):
    data = CocoDataset(*write(instances(), captions()))
    assert (len(data), data.categories) == (3, ("person", "dog"))
    assert [sample.image_id for sample in data] == [139, 632, 785]
    assert [sample.image_id for sample in (*data[1:], data[-1])] == [632, 785, 785]
    first, bare, last = data
    assert first.captions + last.captions == ["Ein Hündchen.", "A dog.", "Some people and a dog."]
    assert (bare.captions, bare.objects) == ([], ())
    assert (first.file_name, first.size) == ("000000000139.png", (HEIGHT, WIDTH))
    assert [sample.image.getpixel((0, 0)) for sample in data] == [(n, 0, 255) for n in range(3)]
    with pytest.raises(IndexError):
        data[3]
    dog, crowd = last.objects
    assert (dog.category, dog.area, dog.is_crowd, dog.id) == ("dog", 15.5, False, 9)
    assert (dog.bbox, crowd.bbox) == ((2, 1, 6, 5), None)
    assert (crowd.category, crowd.area, crowd.is_crowd, crowd.id) == ("person", 22, True, 7)
    assert first.objects[0].area == SQUARE.sum()  # not annotated: the mask's
    assert CocoDataset(*write(instances()))[2].captions == []


def test_masks_are_those_drawn_by_hand(write):
    first, _, last = CocoDataset(*write(instances()))
    two_parts = SQUARE.copy()
    two_parts[4:6, 6:8] = True
    drawn = {9: two_parts, 7: L_SHAPE, 8: SQUARE}
    found = {thing.id: thing.mask for sample in (first, last) for thing in sample.objects}
    assert found.keys() == drawn.keys()
    for id, mask in found.items():
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, drawn[id])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_are_pycocotools_own(write):
    """What `pycocotools.coco.COCO.annToMask` draws from the same file, over odd polygons too."""
    from pycocotools.coco import COCO

    rng = np.random.default_rng(0)
    data = instances()
    for n in range(40):
        polygons = [
            rng.uniform(-2, 10, 2 * rng.integers(3, 7)).round(2).tolist()
            for _ in range(rng.integers(1, 4))
        ]
        mask = {"size": SIZE, "counts": compressed(rng.random((HEIGHT, WIDTH)) < 0.4)}
        data["annotations"].append(
            annotation(100 + n, (139, 632)[n % 2], 1, polygons if n % 3 else mask, iscrowd=0)
        )
    data["annotations"].append(annotation(99, 139, 1, [polygon(-1e5, 0, 1e5, 1e5)]))  # far out
    paths = write(data)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(paths[1]))
    count = 0
    for sample in CocoDataset(*paths):
        for thing in sample.objects:
            expected = theirs.annToMask(theirs.anns[thing.id]).astype(bool)
            np.testing.assert_array_equal(thing.mask, expected)
            count += 1
    assert count == 44


def test_own_fields(write):
    data, said = instances(), captions()
    data["images"][1]["split"] = "test"
    data["annotations"][2]["width"] = 3  # an image's field of COCO, but no object's
    said["annotations"][2]["question"] = "what is it?"
    sample = CocoDataset(*write(data, said))[0]
    assert sample.extra == {"split": "test"}
    assert sample.caption_extra == ({"question": "what is it?"},)
    assert sample.objects[0].extra == {"style": "noto", "width": 3}


def test_a_sub_folder_and_ids_shared_by_two_files(write):
    data = instances()
    for image in data["images"]:
        image["file_name"] = f"val2017/{image['file_name']}"
    folder, *rest = write(data, captions())  # 7 is an object's id and a caption's
    assert CocoDataset(folder.parent, *rest)[0].image.size == (WIDTH, HEIGHT)


def test_pixels_are_as_stored(write):
    """No EXIF orientation; grey, transparent and palette images become RGB."""
    folder, path = write(instances())
    (exif := Image.Exif())[0x0112] = 6  # "turn by 90 degrees"
    grey = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH))
    grey.save(folder / "000000000139.png", exif=exif)
    image = CocoDataset(folder, path)[0].image
    assert (image.size, image.mode) == ((WIDTH, HEIGHT), "RGB")
    np.testing.assert_array_equal(np.asarray(image)[..., 1], np.asarray(grey))


def test_pictures_of_another_size_or_none(write):
    folder, path = write(instances())
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "000000000139.png")
    (folder / "000000000632.png").write_bytes(b"no picture")
    data = CocoDataset(folder, path)
    with pytest.raises(ValueError, match=r"000000000139.png is 6 x 8 px.* as 8 x 6; use.*EXIF"):
        _ = data[0].image
    with pytest.raises(ValueError, match=r"000000000632.png cannot be read as a picture"):
        _ = data[1].image


def test_missing_files(write, tmp_path):
    folder, path, said = write(instances(), captions())
    with pytest.raises(FileNotFoundError, match=r"images='nowhere' is not a folder"):
        CocoDataset("nowhere", path)
    with pytest.raises(FileNotFoundError, match=r"instances='none.json' is not a file"):
        CocoDataset(folder, "none.json")
    with pytest.raises(FileNotFoundError, match=r"captions='none.json' is not a file"):
        CocoDataset(folder, path, "none.json")
    for id in (139, 785):
        (folder / f"{id:012d}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 3 images .*139.png, 0+785.png. Give"):
        CocoDataset(folder, path, said)


def test_no_json(write):
    folder, path = write(instances())
    for text, error in (("{", "' is not a JSON file"), ("[]", r": must hold an object, got \[\]")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"instances.json{error}"):
            CocoDataset(folder, path)


GOOD = compressed(SQUARE)
MASKS = [  # segmentation -> what the error says
    ([], "is missing or empty"),
    ("text", "is 'text'; give polygons"),
    ([1, 2, 3, 4, 5, 6], "holds a polygon that is 1; give polygons"),
    ([[1, 2, 3, 4, 5, "6"]], "holds a polygon that is"),
    ([[1, 2, 3, 4, 5, float("nan")]], "holds a polygon that is"),
    ([[1, 2, 3, 4]], "holds a polygon of 4 numbers; it takes 3 points"),
    ([[1, 2, 3, 4, 5, 6, 7]], "holds a polygon of 7 numbers"),
    ([polygon(0, 0, 3e8, 9)], "holds a polygon with the coordinate 300000000.0; give pixels"),
    ([polygon(0, -100_001, 3, 3)], "holds a polygon with the coordinate -100001; give pixels"),
    ([polygon(0, 0, 10**400, 3)], "holds a polygon that is"),
    ({}, "has size None"),
    ({"size": SIZE[::-1], "counts": GOOD}, r"has size \[8, 6\]; the image's \[height, width\] is"),
    ({"size": SIZE}, "has counts None"),
    ({"size": SIZE, "counts": ""}, "has counts ''"),
    ({"size": SIZE, "counts": [1, -1, 48]}, "has counts that are not run lengths"),
    ({"size": SIZE, "counts": [1, 1.0, 46]}, "has counts that are not run lengths"),
    ({"size": SIZE, "counts": [1, 2, 3]}, "has counts for 6 pixels of 48"),
    ({"size": SIZE, "counts": [40, 9]}, "has counts for 49 pixels of 48"),
    ({"size": SIZE, "counts": GOOD[:-1]}, "has counts for"),
    ({"size": SIZE, "counts": GOOD + "2"}, "has counts for"),
    ({"size": SIZE, "counts": "no run"}, "has counts that are not run lengths"),
    ({"size": SIZE, "counts": "PPPPPPP"}, "has counts that are not run lengths"),
    ({"size": SIZE, "counts": "ooooooooooooooo0"}, "has counts that are not run lengths"),
    ({"size": SIZE, "counts": "\ud800"}, r"has counts that are not run lengths: '\\ud800'"),
]


@pytest.mark.parametrize(("mask", "message"), MASKS, ids=[str(m)[:40] for m, _ in MASKS])
def test_masks_that_are_none(write, mask, message):
    data = instances()
    data["annotations"][1]["segmentation"] = mask
    message = rf"instances.json: annotation 7: field 'segmentation' {message}"
    with pytest.raises(ValueError, match=message):
        CocoDataset(*write(data))


DROP = object()
WRONG = [  # table, field, value -> what the error says
    ("images", "id", DROP, r"images\[1\]: field 'id' is missing; it must be a whole number"),
    ("images", "id", "139", r"images\[1\]: field 'id' is '139'; it must be a whole number"),
    ("images", "id", True, r"images\[1\]: field 'id' is True"),
    ("images", "id", 785, r"images\[1\]: field 'id' is 785, as another's in images; give"),
    ("images", "file_name", " ", r"images\[1\]: field 'file_name' is ' '; it must be a text"),
    ("images", "width", 0, r"images\[1\]: field 'width' is 0; it must be a whole number above 0"),
    ("images", "height", 6.0, r"images\[1\]: field 'height' is 6.0"),
    ("categories", "name", None, r"categories\[1\]: field 'name' is None"),
    ("categories", "id", 18, r"categories\[1\]: field 'id' is 18, as another's in categories"),
    ("annotations", "id", 9, r"annotations\[1\]: field 'id' is 9, as another's in annotations"),
    ("annotations", "image_id", 1, r"annotation 7: field 'image_id' is 1, which images does not"),
    ("annotations", "category_id", 2, r"annotation 7: field 'category_id' is 2, which categories"),
    ("annotations", "category_id", DROP, r"annotations\[1\]: field 'category_id' is missing"),
    ("annotations", "segmentation", DROP, r"annotation 7: field 'segmentation' is missing"),
    ("annotations", "iscrowd", 2, r"annotation 7: field 'iscrowd' is 2; it must be 0 or 1"),
    ("annotations", "area", -1, r"annotation 7: field 'area' is -1; it must be a number of at"),
    ("annotations", "bbox", [1, 2, 3], r"annotation 7: field 'bbox' is \[1, 2, 3\]; it must be"),
]


@pytest.mark.parametrize(("table", "name", "value", "message"), WRONG)
def test_fields_that_are_wrong(write, table, name, value, message):
    data = copy.deepcopy(instances())
    data[table][1].pop(name, None)
    if value is not DROP:
        data[table][1][name] = value
    with pytest.raises(ValueError, match=rf"instances.json: {message}"):
        CocoDataset(*write(data))


def test_tables_that_are_wrong(write):
    for name in ("images", "annotations", "categories"):
        data = instances()
        del data[name]
        with pytest.raises(ValueError, match=rf"top level: field '{name}' is missing; a COCO file"):
            CocoDataset(*write(data))
        with pytest.raises(ValueError, match=rf"field '{name}' is {{}}; a COCO file"):
            CocoDataset(*write({**data, name: {}}))
        with pytest.raises(ValueError, match=rf"{name}\[0\] must be an object, got 5"):
            CocoDataset(*write({**data, name: [5]}))


def test_annotations_that_are_refused_are_named_together(write):
    data, square = instances(), [polygon(2, 1, 6, 4)]
    wrong = [(square, None), ([], 4), ([[0, 0, 4, 4]], 4), (None, 4)]
    for id, (mask, area) in enumerate([*wrong, (square, 4), *wrong], 43):
        data["annotations"].append(annotation(id, 139, 1, mask, area=area))
    message = r"annotation 43: field 'area' is None.* refused: 8 of 12 \(ids 43, 44, 45, \.\.\.\)"
    with pytest.raises(ValueError, match=message):
        CocoDataset(*write(data))


def test_captions_of_other_images_are_left_out(write):
    said = captions()
    said["annotations"][1]["image_id"] = 1
    found = [sample.captions for sample in CocoDataset(*write(instances(), said))]
    assert found == [["Ein Hündchen."], [], ["A dog."]]
    for caption in said["annotations"]:
        caption["image_id"] = 1
    with pytest.raises(ValueError, match=r"captions.json: none of its 3 captions is of an image"):
        CocoDataset(*write(instances(), said))
    assert CocoDataset(*write(instances(), {"annotations": []}))[0].captions == []


def test_captions_that_are_wrong(write):
    for field, value in (("caption", ["a dog"]), ("id", 31)):
        said = captions()
        said["annotations"][1][field] = value
        with pytest.raises(ValueError, match=rf"captions.json: .*\[1\]: field '{field}' is"):
            CocoDataset(*write(instances(), said))
    with pytest.raises(ValueError, match=r"captions.json: .*field 'caption' is missing"):
        CocoDataset(*write(instances(), instances()))  # the files in the wrong order


def test_totals_of_compressed_runs_are_pycocotools():
    rng = np.random.default_rng(1)
    for n in range(300):
        height, width = rng.integers(1, 200, 2)
        mask = rng.random((height, width)) < rng.random()
        if n % 2:  # few long runs
            mask = np.repeat(np.repeat(mask, 20, 0), 20, 1)
        assert _compressed_total(compressed(mask)) == mask.size
        runs = {"size": list(mask.shape), "counts": compressed(mask)}
        np.testing.assert_array_equal(draw_mask(tools, runs, *mask.shape), mask)


def test_without_pycocotools(write, monkeypatch):
    paths = write(instances())
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(ImportError, match=r'pip install "captum-mllm\[metrics\]"'):
        CocoDataset(*paths)
