"""Read pictures whose masks are label images: `anno.json` next to pictures and label PNGs.

The layout in which TAM's authors publish their evaluation's GranDf and OpenPSG. A folder holds
`anno.json`, a list of records of four entries:

    ["image/0001.jpg", "A dog on the grass.", "seg_label/0001.png", {"dog": 1, "grass": 2}]

the picture, its caption, its label image (both relative to the folder), and the label of each
category: the value of its pixels in the label image, 1 to 255. A pixel has one label, so masks
don't overlap, and all objects of a category are one mask. Other values belong to no category.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from captum_mllm.data.annotations import (
    MAX_MASK_PIXELS,
    check_files,
    is_text,
    mask_memory_problem,
    read_json,
)
from captum_mllm.data.coco import CocoDataset, CocoObject, CocoSample, check_header
from captum_mllm.data.coco_masks import check_limit, pixel_limit, shown
from captum_mllm.pictures import decoding

FILE = "anno.json"


_ENTRIES = ("picture", "caption", "label image", "categories")


_MOST = 255  # a label image has 8 bits, and 0 is no category


class LabelMapDataset(Sequence[CocoSample]):
    """Pictures, label images and captions, in the order of the file.

    Samples are those of :class:`~captum_mllm.data.coco.CocoDataset`: a category that the label
    image shows is one object, whose mask is all of it. `extra["names"]` holds all categories of the
    record, shown or not. Everything except the pixels is checked when the set is opened; a label
    image is decoded when its sample is accessed, after the picture's header was found to be of the
    same size.

    TAM's evaluation treats a missing label image as an empty one; here it is an error.

    Args:
        folder: Holds `anno.json` and what it names.
        max_pixels: See :class:`~captum_mllm.data.coco.CocoDataset`; of label images, too.
        max_mask_pixels: Likewise; each category of a record counts as a mask.
        allow_outside: Likewise.

    Raises:
        FileNotFoundError: The folder or `anno.json` is missing, or pictures or label images are.
        ValueError: Something in the file is wrong, beyond a limit, or names a file outside the
            folder; the message says where, what it is and how to fix it. On access, a damaged
            label image, or one that is not of its picture's size.

    Reference:
        The layout is that of TAM's released evaluation (ICCV 2025).

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (4, 2)).save(folder / "a.png")
        >>> Image.fromarray(np.array([[0, 7, 7, 1]] * 2, np.uint8)).save(folder / "labels.png")
        >>> record = ["a.png", "a dog", "labels.png", {"dog": 7, "cat": 2}]
        >>> _ = (folder / "anno.json").write_text(json.dumps([record]))
        >>> sample = LabelMapDataset(folder)[0]
        >>> sample.captions, [(thing.category, thing.area) for thing in sample.objects]
        (['a dog'], [('dog', 4.0)])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_pixels: int | None = None,
        max_mask_pixels: int = MAX_MASK_PIXELS,
        allow_outside: bool = False,
    ) -> None:
        self._max_pixels = pixel_limit(max_pixels)
        self._max_mask_pixels = check_limit("max_mask_pixels", max_mask_pixels)
        self._folder = Path(folder)
        self.path = self._folder / FILE
        if not self.path.is_file():
            raise FileNotFoundError(f"folder={str(folder)!r} holds no {FILE}.")
        records = read_json(self.path, str(self.path))
        if not isinstance(records, list):
            raise ValueError(f"{self.path}: must hold a list of records, got {shown(records)}.")
        self._records = [self._checked(n, record) for n, record in enumerate(records)]
        names = [name for record in self._records for name in (record[0], record[2])]
        check_files(self.path, self._folder, names, "files", allow_outside)
        # What is annotated: the masks are in the label images.
        self.files = (self.path, *(self._folder / record[2] for record in self._records))
        self._sizes = [self._size(n) for n in range(len(records))]

    def _checked(self, n: int, record: Any) -> tuple[str, str, str, dict[str, int]]:
        if not isinstance(record, list) or len(record) != len(_ENTRIES):
            raise ValueError(
                f"{self.path}: record {n} is {shown(record)}; it must be a list of "
                f"{', '.join(_ENTRIES)}."
            )
        for at, name in enumerate(_ENTRIES[:3]):
            if not is_text(record[at]):
                fix = "it must be a text that is not empty, of valid Unicode"
                raise self._wrong(n, name, record[at], fix)
        labels = record[3]
        if not isinstance(labels, dict) or not all(map(is_text, labels)):
            raise self._wrong(n, _ENTRIES[3], labels, "it must be an object, label by name")
        for name, label in labels.items():
            if type(label) is not int or not 1 <= label <= _MOST:
                fix = f"the label of {name!r} must be a whole number in 1..{_MOST}"
                raise self._wrong(n, _ENTRIES[3], label, fix)
        if len(set(labels.values())) < len(labels):
            fix = "give every name a unique label"
            raise self._wrong(n, _ENTRIES[3], labels, fix)
        return record[0], record[1], record[2], labels

    def _wrong(self, n: int, name: str, value: Any, fix: str) -> ValueError:
        at = _ENTRIES.index(name)
        return ValueError(f"{self.path}: record {n}: entry {at} ({name}) is {shown(value)}; {fix}.")

    def _size(self, n: int) -> tuple[int, int]:
        """(height, width) of the label image, from its head."""
        name, labels = self._records[n][2:]
        try:
            with decoding(self._folder / name, self._max_pixels, header_only=True) as image:
                size, mode = image.size, image.mode
        except (OSError, ValueError) as error:
            fix = f"it cannot be read as a picture ({error})"
            raise self._wrong(n, _ENTRIES[2], name, fix) from error
        if mode not in ("L", "P", "1", "RGB"):  # RGB where all three are the label
            fix = f"it has pixels of kind {mode!r}: write one label of 8 bits per pixel"
            raise self._wrong(n, _ENTRIES[2], name, fix)
        problem = mask_memory_problem(len(labels), size[1], size[0], self._max_mask_pixels)
        if problem:
            raise self._wrong(n, _ENTRIES[2], name, f"its {problem}")
        return size[1], size[0]

    @property
    def categories(self) -> tuple[str, ...]:
        """The names of all records, in the order in which they first come."""
        return tuple(dict.fromkeys(name for record in self._records for name in record[3]))

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> CocoSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[CocoSample]: ...
    def __getitem__(self, index: int | slice) -> CocoSample | list[CocoSample]:
        numbers = range(len(self._records))[index]
        if isinstance(numbers, int):
            return self._sample(numbers)
        return [self._sample(n) for n in numbers]

    def _sample(self, n: int) -> CocoSample:
        name, caption, _, labels = self._records[n]
        check_header(self._folder / name, self._sizes[n], f"record {n} of {self.path}")
        pixels = self._labels(n)
        seen = set(np.unique(pixels).tolist())
        masks = {category: pixels == label for category, label in labels.items() if label in seen}
        return CocoSample(
            image_id=n,
            file_name=name,
            path=self._folder / name,
            size=self._sizes[n],
            captions=[caption],
            objects=tuple(
                CocoObject(category, mask, float(mask.sum()), is_crowd=False, id=labels[category])
                for category, mask in masks.items()
            ),
            extra={"names": list(labels)},
            caption_extra=({},),
        )

    def _labels(self, n: int) -> np.ndarray:
        """Labels (height, width): a palette's indices, not its colours."""
        name = self._records[n][2]
        try:
            with decoding(self._folder / name, self._max_pixels) as image:
                pixels = np.asarray(image).astype(np.uint8, copy=False)
        except (OSError, ValueError) as error:
            fix = f"it cannot be read as a picture ({error})"
            raise self._wrong(n, _ENTRIES[2], name, fix) from error
        if pixels.ndim == 2:
            return pixels
        if (pixels != pixels[..., :1]).any():
            fix = "it has colours: write one label of 8 bits per pixel"
            raise self._wrong(n, _ENTRIES[2], name, fix)
        return pixels[..., 0]


def write_label_maps(data: CocoDataset, folder: str | os.PathLike[str]) -> Path:
    """Write a COCO set in the layout that :class:`LabelMapDataset` reads.

    Each record takes a picture's first caption and names all of the set's categories. Where masks
    overlap, the later annotation's label wins: a label image holds one per pixel.

    Args:
        data: The set; every picture needs a caption.
        folder: To write; created if it is missing, else it must be empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is not empty.
        ValueError: A picture without caption, or more than 255 categories.

    Example:
        >>> import tempfile
        >>> from captum_mllm.reference.export import export
        >>> source = export("plain", tempfile.mkdtemp(), count=2, size=64)
        >>> files = (source / name for name in ("images", "instances.json", "captions.json"))
        >>> folder = write_label_maps(CocoDataset(*files), tempfile.mkdtemp())
        >>> len(LabelMapDataset(folder)), sorted(path.name for path in folder.iterdir())
        (2, ['anno.json', 'image', 'seg_label'])
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"folder={str(folder)!r} is not an empty folder; name another one.")
    names = tuple(dict.fromkeys(data.categories))
    if len(names) > _MOST:
        raise ValueError(f"data has {len(names)} categories; a label image has room for {_MOST}.")
    for part in ("image", "seg_label"):
        (target / part).mkdir(parents=True)
    labels = {name: label for label, name in enumerate(names, 1)}
    records = []
    for sample in data:
        if not sample.captions:
            raise ValueError(
                f"data: image {sample.image_id} has no caption, which the layout needs; remove "
                "it from the instances file, or add a caption."
            )
        pixels = np.zeros(sample.size, np.uint8)
        for thing in sample.objects:
            pixels[thing.mask] = labels[thing.category]
        name = f"{sample.image_id:012d}.png"
        sample.image.save(target / "image" / name)
        Image.fromarray(pixels).save(target / "seg_label" / name)
        records.append([f"image/{name}", sample.captions[0], f"seg_label/{name}", labels])
    (target / FILE).write_text(json.dumps(records) + "\n", encoding="utf-8")
    return target
