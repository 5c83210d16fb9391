"""Damaged label images and their list, as GranDf and OpenPSG are laid out."""

import json
import shutil
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from captum_mllm.data import LabelMapDataset
from tests.fuzz.damage import damaged_bytes, damaged_data
from tests.fuzz.harness import Case

SIZE = (20, 28)


@cache
def undamaged() -> tuple[Path, list[Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A folder with two pictures; its list, the labels of each label image, the pictures."""
    folder = Path(mkdtemp())
    rng = np.random.default_rng(1)
    labels, pictures = {}, {}
    for part in ("image", "seg"):
        (folder / part).mkdir()
    for name in ("a", "b"):
        pictures[name] = rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pictures[name]).save(folder / f"image/{name}.png")
        labels[name] = np.kron(rng.integers(0, 6, (5, 7)), np.ones((4, 4))).astype(np.uint8)
        Image.fromarray(labels[name]).save(folder / f"seg/{name}.png")
    names = {"dog": 1, "cat": 2, "sky": 4, "sea": 200}
    records = [[f"image/{n}.png", f"a dog {n}", f"seg/{n}.png", names] for n in ("a", "b")]
    return folder, records, labels, pictures


def other_labels(draw: Any, path: Path, labels: np.ndarray) -> tuple[str, np.ndarray | None]:
    """A label image of another kind, and the labels that it holds; None where it holds none."""
    kinds = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "colours", "size", "gif")
    kind = draw(st.sampled_from(kinds))
    image = Image.fromarray(labels)
    held: np.ndarray | None = labels
    if kind == "P":
        image = Image.fromarray(labels, "L").copy()
        image.putpalette([draw(st.integers(0, 255)) for _ in range(12)] + [0] * 756)
    elif kind == "colours":
        grey = np.stack([labels] * 3, -1)
        grey[draw(st.integers(0, 19)), draw(st.integers(0, 27)), draw(st.integers(0, 2))] ^= 1
        image, held = Image.fromarray(grey), None
    elif kind == "size":
        size = draw(st.sampled_from(((20, 28), (1, 1), (56, 40), (28, 19))))
        image, held = image.resize(size, Image.Resampling.NEAREST), None
    elif kind == "1":
        image, held = Image.fromarray(labels > 0), (labels > 0).astype(np.uint8)
    elif kind in ("I", "F"):
        image, held = image.convert(kind), None
    elif kind == "I;16":
        image, held = Image.fromarray(labels.astype(np.uint16) + 256), None
    elif kind not in ("L", "gif"):
        image = image.convert(kind)
        held = labels if kind == "RGB" else None
    formats = {"CMYK": "TIFF", "I": "TIFF", "F": "TIFF", "gif": "GIF"}  # whatever the name says
    image.save(path, format=formats.get(kind, "PNG"))
    return f"labels: {kind}", held


def shown(name: str) -> np.ndarray | None:
    """The pixels of a picture; a label image can be one, too."""
    part, stem = Path(name).parent.name, Path(name).stem
    labels, pictures = undamaged()[2:]
    grey = labels.get(stem)
    return pictures.get(stem) if part == "image" or grey is None else np.stack([grey] * 3, -1)


def is_right(records: Any, labels: dict[str, np.ndarray], samples: list[Any]) -> bool:
    """Compare with the list and with the labels as they were written."""
    for (caption, size, names, objects, image), record in zip(samples, records, strict=True):
        if not np.array_equal(image, shown(record[0])):
            return False
        held = labels.get(Path(record[2]).stem, np.zeros(0))
        seen = {name: held == label for name, label in record[3].items() if (held == label).any()}
        if caption != [record[1]] or size != held.shape or names != list(record[3]):
            return False
        if [thing.category for thing in objects] != list(seen):
            return False
        if not all((thing.mask == seen[thing.category]).all() for thing in objects):
            return False
    return True


def never(_: Any) -> bool:
    return False


def draw_case(data: st.DataObject) -> Case:
    source, records, labels, _ = undamaged()
    folder = source.with_name(f"{source.name}-damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    records, labels = json.loads(json.dumps(records)), dict(labels)
    kind = data.draw(st.sampled_from(("list", "list", "text", "image", "image", "labels")))
    held: np.ndarray | None = labels["a"]
    text = json.dumps(records).encode()
    if kind == "list":
        what, records = damaged_data(data.draw, records)
        text = json.dumps(records).encode()
    elif kind == "text":
        what, text = damaged_bytes(data.draw, text)
        with suppress(ValueError, RecursionError):  # some damage is another valid list
            records = json.loads(text)
    elif kind == "image":
        path = folder / data.draw(st.sampled_from(("seg/a.png", "image/a.png")))
        what, damaged = damaged_bytes(data.draw, path.read_bytes())
        path.write_bytes(damaged)
        what = f"{path.parent.name} {what}"
    else:
        what, held = other_labels(data.draw, folder / "seg/a.png", labels["a"])
        labels["a"] = labels["a"] if held is None else held
    (folder / "anno.json").write_bytes(text)

    def run() -> list[Any]:
        read = LabelMapDataset(folder)
        return [(s.captions, s.size, s.extra["names"], s.objects, s.image) for s in read]

    right = never if held is None else partial(is_right, records, labels)
    return Case(what, run, right, ["anno.json", "a.png", "b.png"])
