"""Damaged COCO files."""

import json
import shutil
from functools import cache, partial
from math import isfinite
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as tools

from captum_mllm.data import CocoDataset
from tests.fuzz.damage import damaged_bytes, damaged_data
from tests.fuzz.harness import Case

HEIGHT, WIDTH = 24, 32


@cache
def drawn() -> list[np.ndarray]:
    """The pixels of the two pictures, and of the black one that may stand in their place."""
    rng = np.random.default_rng(0)
    shape = (HEIGHT, WIDTH, 3)
    return [rng.integers(0, 255, shape, dtype=np.uint8) for _ in range(2)] + [np.zeros(shape)]


@cache
def undamaged() -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder with two pictures; the instances and captions files as data."""
    folder = Path(mkdtemp())
    (folder / "images").mkdir()
    for name, pixels in zip(("a.png", "b.png"), drawn(), strict=False):
        Image.fromarray(pixels).save(folder / "images" / name)
    box = np.zeros((HEIGHT, WIDTH), np.uint8)
    box[3:9, 5:20] = 1
    packed = tools.encode(np.asfortranarray(box))["counts"].decode()
    masks: list[Any] = [
        [[2, 3, 20, 4, 18.5, 20, 3, 15], [22.5, 2, 30, 3, 25, 9]],
        {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]},
        {"size": [HEIGHT, WIDTH], "counts": packed},
    ]
    annotations = [
        {
            "id": n + 5, "image_id": 1 + (n > 1), "category_id": 7 + n % 2, "segmentation": mask,
            "area": 90.5, "bbox": [1, 2, 10.5, 9], "iscrowd": int(n == 1), "score": 0.5,
        }
        for n, mask in enumerate(masks)
    ]  # fmt: skip
    images = [
        {"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT, "license": 3}
        for n, name in ((2, "b.png"), (1, "a.png"))
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}]
    instances = {"images": images, "categories": categories, "annotations": annotations}
    captions = [{"id": n, "image_id": n, "caption": f"a dog {n}"} for n in (1, 2)]
    return folder, instances, {"annotations": captions}


def number(draw: Any) -> float:
    kinds = (
        st.floats(-5, 40), st.floats(allow_nan=True, allow_infinity=True),
        st.sampled_from((1e5, -1e5, 99_999, 1e6, 2**31, 1e300, 0, 31.999999, -0.5)),
    )  # fmt: skip
    return draw(st.one_of(*kinds))


def other_mask(draw: Any, instances: dict[str, Any]) -> str:
    """A segmentation made up: near or far, degenerate, long, or run lengths that don't fit."""
    record = draw(st.sampled_from(instances["annotations"]))
    kind = draw(st.sampled_from(("near", "any", "long", "thin", "runs", "packed")))
    if kind == "near":
        corners = st.lists(st.floats(-3, 35).map(lambda x: round(x, 2)), min_size=6, max_size=12)
        polygons: Any = [draw(corners.map(lambda xs: xs[: len(xs) // 2 * 2]))]
    elif kind == "any":
        polygons = [[number(draw) for _ in range(draw(st.integers(0, 9)))]]
    elif kind == "long":
        reach, count = draw(st.sampled_from((30, 3_000, 99_999))), draw(st.sampled_from((50, 2000)))
        polygons = [[reach if n % 4 < 2 else -reach for n in range(2 * count)]]
    elif kind == "thin":
        polygons = [[5, 5, 5, 5, 5, 5]] * draw(st.integers(1, 300))
    elif kind == "runs":
        ends = draw(st.lists(st.integers(-5, 900), max_size=6))
        size = draw(st.sampled_from(([HEIGHT, WIDTH], [WIDTH, HEIGHT], [1, 1], [2**20, 2**20])))
        polygons = {"size": size, "counts": [*ends, HEIGHT * WIDTH - sum(ends)]}
    else:
        packed = draw(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
        polygons = {"size": [HEIGHT, WIDTH], "counts": packed}
    record["segmentation"] = polygons
    return f"mask: {kind}"


def other_file(draw: Any, folder: Path, instances: dict[str, Any]) -> str:
    """A picture cut off or of another size; names that lead elsewhere."""
    path = folder / "images/a.png"
    kind = draw(st.sampled_from(("bytes", "size", "name", "gone")))
    if kind == "bytes":
        what, data = damaged_bytes(draw, path.read_bytes())
        path.write_bytes(data)
        return f"picture {what}"
    if kind == "size":
        Image.new("RGB", draw(st.sampled_from(((24, 32), (1, 1), (320, 240))))).save(path)
    elif kind == "gone":
        path.unlink()
    else:
        names = ("../images/a.png", str(path), "a.png/", "./a.png", "b.png", "..", "a.png\x00")
        instances["images"][1]["file_name"] = draw(st.sampled_from(names))
    return f"file: {kind}"


def inside(points: Any) -> tuple[np.ndarray, np.ndarray]:
    """By even-odd crossings: where pixel centres are inside, and where an edge is near."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    odd, near = np.zeros((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
    corners = np.asarray(points, float).reshape(-1, 2)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(all="ignore"):
            odd ^= crosses & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-12)
        t = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length, 0, 1)
        near |= np.hypot(x - x0 - t * (x1 - x0), y - y0 - t * (y1 - y0)) < 1.5
    return odd, near


def mask_fits(segmentation: Any, mask: np.ndarray) -> bool:
    """Compare a mask with its segmentation, drawn or counted anew."""
    if mask.shape != (HEIGHT, WIDTH) or mask.dtype != bool:
        return False
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, str):
            counts = decompressed(counts)
        values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return bool((mask == values.reshape(WIDTH, HEIGHT).T).all())
    odd, near = zip(*map(inside, segmentation), strict=True)
    sure = ~np.any(near, 0)
    return bool((np.any(odd, 0) == mask)[sure].all())


def decompressed(text: str) -> list[int]:
    """COCO's packed run lengths, digit by digit."""
    runs: list[int] = []
    value = place = 0
    for letter in text:
        digit = ord(letter) - 48
        value |= (digit & 31) << (5 * place)
        place += 1
        if not digit & 32:
            value -= (1 << (5 * place)) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = place = 0
    return runs


def is_right(instances: Any, captions: Any, samples: list[Any]) -> bool:
    """Compare what was read with the files' data, looked up anew."""
    images = sorted(instances["images"], key=lambda image: image["id"])
    names = {record["id"]: record["name"] for record in instances["categories"]}
    if [image["id"] for image in images] != [sample[0] for sample in samples]:
        return False
    for (number, size, pixels, texts, objects), image in zip(samples, images, strict=True):
        own = [r for r in instances["annotations"] if r["image_id"] == number]
        said = [r["caption"] for r in captions["annotations"] if r["image_id"] == number]
        if size != (image["height"], image["width"]) or texts != said:
            return False
        if not any(np.array_equal(pixels, own) for own in drawn()):
            return False
        if [thing.id for thing in objects] != [record["id"] for record in own]:
            return False
        for thing, record in zip(objects, own, strict=True):
            area = record.get("area", thing.mask.sum())
            values = (thing.category, thing.area, thing.is_crowd)
            if values != (names[record["category_id"]], area, bool(record.get("iscrowd", 0))):
                return False
            if not isfinite(area) or not mask_fits(record["segmentation"], thing.mask):
                return False
    return True


def draw_case(data: st.DataObject) -> Case:
    source, instances, captions = undamaged()
    folder = source.with_name(f"{source.name}-damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    instances, captions = json.loads(json.dumps(instances)), json.loads(json.dumps(captions))
    kind = data.draw(st.sampled_from(("bytes", "data", "data", "data", "mask", "mask", "file")))
    if kind == "data":
        what, both = damaged_data(data.draw, [instances, captions])
        instances, captions = (*both, None, None)[:2]
    elif kind == "mask":
        what = other_mask(data.draw, instances)
    elif kind == "file":
        what = other_file(data.draw, folder, instances)
    texts = [json.dumps(instances), json.dumps(captions)]
    if kind == "bytes":
        n = data.draw(st.integers(0, 1))
        what, damaged = damaged_bytes(data.draw, texts[n].encode())
        try:  # some damage is other valid JSON
            changed = json.loads(damaged)
            instances, captions = (changed, captions) if n == 0 else (instances, changed)
        except (ValueError, RecursionError):
            pass
        (folder / "instances.json").write_bytes(damaged if n == 0 else texts[0].encode())
        (folder / "captions.json").write_bytes(damaged if n else texts[1].encode())
    else:
        (folder / "instances.json").write_text(texts[0])
        (folder / "captions.json").write_text(texts[1])

    def run() -> list[Any]:
        read = CocoDataset(folder / "images", folder / "instances.json", folder / "captions.json")
        return [(s.image_id, s.size, s.image, s.captions, s.objects) for s in read]

    names = ["instances.json", "captions.json", "a.png", "b.png"]
    return Case(what, run, partial(is_right, instances, captions), names)
