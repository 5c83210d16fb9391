"""Read pictures with masks and captions in COCO format: a folder of images and two JSON files.

What COCO itself publishes (`val2017/`, `instances_val2017.json`, `captions_val2017.json`), what
other tools write in its format, and what `captum_mllm.reference.export` writes. Masks may be
polygons or run lengths, compressed or not; pycocotools draws them, so they equal COCO's to the
pixel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from captum_mllm.data.annotations import (
    MAX_MASK_PIXELS,
    check_files,
    first_few,
    is_text,
    mask_memory_problem,
    read_json,
)
from captum_mllm.data.coco_masks import (
    MAX_OUTLINE,
    check_limit,
    draw_mask,
    is_number,
    mask_problem,
    mask_tools,
    pixel_limit,
    shown,
)
from captum_mllm.pictures import decoding, header_size, to_eight_bits

_INT, _TEXT = "a whole number", "a text of valid Unicode, not empty"


_SIDE, _FLAG = "a whole number above 0", "0 or 1"


_AREA, _BOX = "a number of at least 0", "four numbers: left, top, width, height"


_RULES: dict[str, Callable[[Any], bool]] = {
    _INT: lambda v: type(v) is int,
    _TEXT: is_text,
    _SIDE: lambda v: type(v) is int and v > 0,
    _FLAG: lambda v: v in (0, 1),
    _AREA: lambda v: is_number(v) and v >= 0,
    _BOX: lambda v: isinstance(v, list) and len(v) == 4 and all(map(is_number, v)),
}


_IMAGE = {"id": _INT, "file_name": _TEXT, "width": _SIDE, "height": _SIDE}


_CATEGORY = {"id": _INT, "name": _TEXT}


_OBJECT = {"id": _INT, "image_id": _INT, "category_id": _INT}


_MAYBE = {"iscrowd": _FLAG, "area": _AREA, "bbox": _BOX}  # fields that may be left out


_CAPTION = {"id": _INT, "image_id": _INT, "caption": _TEXT}


_LINKS = ("license", "flickr_url", "coco_url", "date_captured")  # COCO's further fields of images


@dataclass(frozen=True, eq=False)
class CocoObject:
    """One annotated object of a picture.

    Args:
        category: Name of the category.
        mask: bool (height, width), where the object is, at the picture's own size. All False if
            a polygon is too thin to contain the centre of a pixel.
        area: In pixels, as annotated; the mask's sum if it is not annotated.
        is_crowd: Whether the mask covers a group of objects that were not separated.
        id: Of the annotation.
        bbox: (left, top, width, height) in pixels as annotated, or None. Default: None.
        extra: The annotation's fields that are not COCO's. Default: none.
    """

    category: str
    mask: np.ndarray
    area: float
    is_crowd: bool
    id: int
    bbox: tuple[float, float, float, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CocoSample:
    """One picture with its annotations.

    Args:
        image_id: Id of the image.
        file_name: As in the instances file.
        path: Of the image file.
        size: (height, width) in pixels.
        captions: The picture's captions, in the captions file's order.
        objects: The annotated objects, in the instances file's order; may be empty.
        extra: The image's fields that are not COCO's.
        caption_extra: Likewise of each caption, aligned with `captions`.
    """

    image_id: int
    file_name: str
    path: Path
    size: tuple[int, int]
    captions: list[str]
    objects: tuple[CocoObject, ...]
    extra: dict[str, Any]
    caption_extra: tuple[dict[str, Any], ...]

    @property
    def image(self) -> Image.Image:
        """The picture (RGB), read from its file on each access.

        The pixels are as stored: an EXIF orientation is not applied, as COCO's masks and sizes are
        of the stored pixels. More than 8 bits become 8 by the rule of
        :func:`~captum_mllm.pictures.to_eight_bits`; of several frames the first is taken.

        Raises:
            ValueError: The file cannot be read as a picture, or its size is not the annotated one.
        """
        check_header(self.path, self.size, f"image {self.image_id}")
        try:
            with decoding(self.path, self.size[0] * self.size[1]) as opened:
                return to_eight_bits(opened).convert("RGB")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be read as a picture: {error}.") from error


def check_header(path: Path, size: tuple[int, int], whose: str) -> None:
    """Compare a picture's header with the annotated size, before anything is decoded or drawn.

    Args:
        path: Of the picture.
        size: (height, width) as annotated, in pixels.
        whose: What is annotated so, for the error.

    Raises:
        ValueError: The header cannot be read, or says another size.
    """
    try:
        height, width = header_size(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    if (height, width) != size:
        raise ValueError(
            f"{path} is {width} x {height} px, but {whose} is annotated as {size[1]} x {size[0]}; "
            "use the pictures that were annotated: not resized, and not rotated by their EXIF "
            "orientation."
        )


class CocoDataset(Sequence[CocoSample]):
    """Pictures, masks and captions, ordered by image id.

    Everything except the pictures themselves is checked when the set is opened. Images without
    annotations or captions are kept; captions of images that the instances file lacks are ignored,
    so a part of a set can be read with the whole set's captions. Masks are drawn when a sample is
    accessed, after its picture's header was found to be of the annotated size.

    The limits keep a damaged or hostile file from taking all time or memory; files of which you
    know the origin may need higher ones.

    Every annotation needs a mask, and its `area`, if present, must be a number; other files are
    refused. The second example removes annotations without a mask from a file; an `area` of null
    can be removed from its annotation, and the mask's is used instead.

    Args:
        images: Folder that holds the image files.
        instances: JSON file with `images`, `annotations` (masks) and `categories`.
        captions: JSON file whose `annotations` are captions of the same images, or of more.
            Default: none, and samples have no captions.
        max_pixels: The most pixels (height times width) of a picture. Default: Pillow's limit,
            `PIL.Image.MAX_IMAGE_PIXELS` (89,478,485); at most 2^31 - 1.
        max_outline: The most pixels of one annotation's outline: over its polygons, the sum of the
            longer side (width or height) of each edge. Drawing takes about 40 bytes for each.
            Default: 1,000,000.
        max_mask_pixels: The most pixels of all masks of one picture together, which take a byte
            each. Default: 2,000,000,000.
        allow_outside: Whether image files may lie outside the folder: absolute names, names that
            climb out by `..`, links that lead out. Default: False.

    Raises:
        FileNotFoundError: A JSON file, the folder, or an image file is missing.
        ValueError: Something in a JSON file is not in COCO's format, beyond a limit, or names a
            file outside the folder; the message says where, what it is and how to fix it. On
            access, a picture that is not of its annotated size.
        ImportError: pycocotools is missing.

    Example:
        >>> import tempfile
        >>> from captum_mllm.reference.export import export
        >>> folder = export("plain", tempfile.mkdtemp(), count=2, size=64)
        >>> data = CocoDataset(folder / "images", folder / "instances.json")
        >>> len(data), data[1].file_name, data[1].image.size
        (2, '000001.png', (64, 64))
        >>> data[1].objects[0].mask.shape
        (64, 64)

        >>> import json
        >>> from captum_mllm.data.coco_masks import mask_problem
        >>> file = json.loads((folder / "instances.json").read_text())
        >>> file["annotations"][0]["segmentation"] = []  # only a box, say
        >>> size = {image["id"]: (image["height"], image["width"]) for image in file["images"]}
        >>> def has_mask(a):
        ...     return mask_problem(a.get("segmentation"), *size[a["image_id"]]) is None
        >>> file["annotations"] = list(filter(has_mask, file["annotations"]))
        >>> _ = (folder / "with_masks.json").write_text(json.dumps(file))
        >>> len(CocoDataset(folder / "images", folder / "with_masks.json"))
        2
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        instances: str | os.PathLike[str],
        captions: str | os.PathLike[str] | None = None,
        *,
        max_pixels: int | None = None,
        max_outline: int = MAX_OUTLINE,
        max_mask_pixels: int = MAX_MASK_PIXELS,
        allow_outside: bool = False,
    ) -> None:
        self._max_pixels = pixel_limit(max_pixels)
        self._max_outline = check_limit("max_outline", max_outline)
        self._max_mask_pixels = check_limit("max_mask_pixels", max_mask_pixels)
        self._tools = mask_tools("CocoDataset")
        self._folder = Path(images)
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"images={str(images)!r} is not a folder; give the folder that holds the images."
            )
        file = _File("instances", instances)
        self._images = dict(sorted(file.table("images", _IMAGE).items()))
        self._check_sizes(file)
        self._categories = file.table("categories", _CATEGORY)
        self._objects: dict[int, list[dict]] = {id: [] for id in self._images}
        self._add_objects(file)
        self._captions: dict[int, list[dict]] = {id: [] for id in self._images}
        if captions is not None:
            self._add_captions(_File("captions", captions), file)
        names = [image["file_name"] for image in self._images.values()]
        check_files(file.path, self._folder, names, "images", allow_outside)
        self._ids = list(self._images)
        self.files = (file.path,) if captions is None else (file.path, Path(captions))

    def _check_sizes(self, file: _File) -> None:
        for id, image in self._images.items():
            if image["width"] * image["height"] > self._max_pixels:
                problem = f"and height are {image['width']} x {image['height']} pixels"
                fix = f"they may be {self._max_pixels} pixels at most: correct them, make the "
                fix += "picture smaller, or raise max_pixels"
                raise file.wrong(f"image {id}", "width", problem, fix)

    def _add_objects(self, file: _File) -> None:
        records = file.table("annotations", _OBJECT)
        refused: list[int] = []
        first = ""
        for id, record in records.items():
            try:
                self._check_object(file, record)
            except ValueError as error:
                first = first or str(error)
                refused.append(id)
            else:
                self._objects[record["image_id"]].append(record)
        if refused:
            raise ValueError(
                f"{first} Annotations refused: {len(refused)} of {len(records)} (ids "
                f"{first_few(refused)}); CocoDataset's docstring shows how to drop those without a "
                "mask."
            )
        for id, image in self._images.items():
            problem = mask_memory_problem(
                len(self._objects[id]), image["height"], image["width"], self._max_mask_pixels
            )
            if problem:
                raise ValueError(f"{file.path}: image {id}: its {problem}.")

    def _check_object(self, file: _File, record: dict) -> None:
        where = f"annotation {record['id']}"
        image = _known(file, record, "image_id", self._images, "images")
        _known(file, record, "category_id", self._categories, "categories")
        file.check_fields(where, {k: record[k] for k in _MAYBE if k in record}, _MAYBE)
        problem = mask_problem(
            record.get("segmentation"), image["height"], image["width"], self._max_outline
        )
        if problem:
            raise file.wrong(where, "segmentation", *problem)

    def _add_captions(self, file: _File, instances: _File) -> None:
        records = file.table("annotations", _CAPTION).values()
        for record in records:
            if record["image_id"] in self._captions:
                self._captions[record["image_id"]].append(record)
        if records and self._images and not any(self._captions.values()):
            raise ValueError(
                f"{file.path}: none of its {len(records)} captions is of an image that "
                f"{instances.path} holds; give the captions of the same images, or none."
            )

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories' names, ordered by their ids."""
        return tuple(self._categories[id]["name"] for id in sorted(self._categories))

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> CocoSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[CocoSample]: ...
    def __getitem__(self, index: int | slice) -> CocoSample | list[CocoSample]:
        if isinstance(index, slice):
            return [self._sample(id) for id in self._ids[index]]
        return self._sample(self._ids[index])

    def _sample(self, id: int) -> CocoSample:
        image, captions = self._images[id], self._captions[id]
        size = (image["height"], image["width"])
        if self._objects[id]:  # masks are not drawn for a picture that they don't fit
            check_header(self._folder / image["file_name"], size, f"image {id}")
        return CocoSample(
            image_id=id,
            file_name=image["file_name"],
            path=self._folder / image["file_name"],
            size=size,
            captions=[record["caption"] for record in captions],
            objects=tuple(self._object(record, image) for record in self._objects[id]),
            extra=_extra(image, *_IMAGE, *_LINKS),
            caption_extra=tuple(_extra(record, *_CAPTION) for record in captions),
        )

    def _object(self, record: dict, image: dict) -> CocoObject:
        mask = draw_mask(self._tools, record["segmentation"], image["height"], image["width"])
        box = record.get("bbox")
        return CocoObject(
            category=self._categories[record["category_id"]]["name"],
            mask=mask,
            area=float(record.get("area", mask.sum())),
            is_crowd=bool(record.get("iscrowd", 0)),
            id=record["id"],
            bbox=None if box is None else (box[0], box[1], box[2], box[3]),
            extra=_extra(record, *_OBJECT, *_MAYBE, "segmentation"),
        )


class _File:
    """A JSON file whose errors say where in it they are."""

    def __init__(self, argument: str, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{argument}={str(path)!r} is not a file.")
        self.data = read_json(self.path, f"{argument}={str(path)!r}")
        if not isinstance(self.data, dict):
            raise ValueError(f"{self.path}: must hold an object, got {shown(self.data)}.")

    def wrong(self, where: str, name: str, problem: str, fix: str) -> ValueError:
        return ValueError(f"{self.path}: {where}: field {name!r} {problem}; {fix}.")

    def table(self, name: str, rules: dict[str, str]) -> dict[int, dict]:
        """The records of a list by their ids, in the file's order."""
        records = self.data.get(name)
        if not isinstance(records, list):
            problem = "is missing" if name not in self.data else f"is {shown(records)}"
            fix = f"a COCO file of this kind has a list of objects with {', '.join(rules)}"
            raise self.wrong("top level", name, problem, fix)
        out: dict[int, dict] = {}
        for i, record in enumerate(records):
            where = f"{name}[{i}]"
            if not isinstance(record, dict):
                raise ValueError(f"{self.path}: {where} must be an object, got {shown(record)}.")
            self.check_fields(where, record, rules)
            if record["id"] in out:
                problem = f"is {record['id']}, as another's in {name}"
                raise self.wrong(where, "id", problem, "give each a unique id")
            out[record["id"]] = record
        return out

    def check_fields(self, where: str, record: dict, rules: dict[str, str]) -> None:
        for name, rule in rules.items():
            if name not in record:
                if name not in _MAYBE:
                    raise self.wrong(where, name, "is missing", f"it must be {rule}")
            elif not _RULES[rule](record[name]):
                raise self.wrong(where, name, f"is {shown(record[name])}", f"it must be {rule}")


def _known(file: _File, record: dict, name: str, known: dict[int, dict], where: str) -> dict:
    if record[name] not in known:
        problem = f"is {record[name]}, which {where} does not hold"
        where = f"annotation {record['id']}"
        raise file.wrong(where, name, problem, "add it there or remove this annotation")
    return known[record[name]]


def _extra(record: dict, *known: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in known}
