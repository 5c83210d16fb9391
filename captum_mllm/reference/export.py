"""Write the test sets in COCO format, with exact masks.

    python -m captum_mllm.reference.export --set crowded --split test --count 200 --out DIR

writes `DIR/crowded` with `images/000000.png ...`, `instances.json`, `captions.json`, `NOTICE.md`;
`--set all` writes every set, and the one called "openmoji" needs its style made first (`openmoji`).
`coco.CocoDataset` reads them, as does anything else that reads COCO. The same call writes the same
bytes. Beyond COCO's fields there are

- per image: `set`, `number` (as for `sets.make_example`; it is the image's id too), `split`,
  `seed`, `background`, `hidden` (indices of objects without a visible pixel);
- per object: `object` (index into `Scene.objects`, from left to right), `size_word`, `color` (null:
  its natural colours), `position_words`, `style`. Its id is 100 * image id + index + 1. The mask is
  what is visible of it; `area` and `bbox` are the mask's;
- per caption: `question` (the last one; the caption is its answer), `turns` (the whole
  conversation: `question` and `answer` as lists of words with `text`, `role` and `obj`, the
  object's index or -1), `planted` (in the biased set: an object, and the partner that the planted
  rule wants; else null). In the set "questions" also `evidence`: per definition the indices of
  the objects that the answer's first word rests on (`questions.find_evidence`).

COCO knows no empty masks: an object without a visible pixel is not among the annotations. The
captions still speak of it, with its index.

A set is drawn in a folder `.NAME.*` beside its own and moved into place when it is whole. Errors,
Ctrl-C and, on the command line, SIGTERM take that folder away and leave or bring back what was
there. Only what ends the process at once (SIGKILL, a power cut) leaves it behind; it may be
deleted, but if `--force` was replacing a set that is now missing, that one is its `before`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captum_mllm.data.coco_masks import mask_tools
from captum_mllm.reference import openmoji
from captum_mllm.reference.captions import Words, text_of
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import ROOM, SETS, Example, make_example
from captum_mllm.reference.sprites import CATEGORIES

APACHE, CC_BY = (
    "https://www.apache.org/licenses/LICENSE-2.0",
    "https://creativecommons.org/licenses/by/4.0/",
)
LICENSES = (  # of an image: by the styles of the objects in it
    ({"noto"}, "Noto Emoji, Copyright Google Inc.: Apache-2.0", APACHE),
    ({"twemoji"}, "Twemoji, Copyright 2020 Twitter, Inc and contributors: CC-BY-4.0", CC_BY),
    ({"noto", "twemoji"}, "Noto Emoji: Apache-2.0; Twemoji: CC-BY-4.0", CC_BY),
    ({"openmoji"}, f"OpenMoji: {openmoji.LICENSE}", openmoji.LICENSE_URL),
)
NOTICE = """# Pictures of the test set {name!r}

Made by captum_mllm {version} (`python -m captum_mllm.reference.export`): {about}.
The drawings in the pictures are scaled, mirrored and at times tinted copies of

{artwork}

Each picture's `license` in `instances.json` says which of them are in it. Masks, captions and
backgrounds are captum_mllm's own. Without warranty; no endorsement by the authors of the drawings
is implied.
"""
SHIPPED = f"""- Noto Emoji, Copyright Google Inc., https://github.com/googlefonts/noto-emoji,
  Apache License 2.0, {APACHE}
- Twemoji, Copyright 2020 Twitter, Inc and other contributors, https://github.com/jdecked/twemoji,
  CC-BY-4.0, {CC_BY}"""
THIRD = f"""- OpenMoji, the open-source emoji and icon project, https://openmoji.org,
  {openmoji.LICENSE}, {openmoji.LICENSE_URL}

What is made of these pictures must be under the same licence. Use them for evaluation only."""


def export(
    name: str,
    out: str | os.PathLike[str],
    split: str = "test",
    count: int = 200,
    size: int = 448,
    force: bool = False,
) -> Path:
    """Write the first examples of a test set; whole or, if anything goes wrong, not at all.

    What `force` replaces is the same set as this function wrote it: not a folder that holds
    anything else.

    Args:
        name: One of `sets.SETS`.
        out: Folder in which the set's own folder is made.
        split: "test" or "validation". Default: "test".
        count: Number of examples. Default: 200.
        size: Side of the pictures in pixels. Default: 448.
        force: Whether to replace an earlier export. Default: no.

    Returns:
        The set's folder.

    Raises:
        FileExistsError: The folder is not empty, and `force` is not given or it is no export of
            this set or holds other files too.
        FileNotFoundError: The set needs a style that was not made.
        ImportError: pycocotools is missing.
        ValueError: No such set or split, `count` or `size` out of range.

    Example:
        >>> folder = export("twins", tempfile.mkdtemp(), count=2, size=96)
        >>> sorted(path.name for path in folder.iterdir())
        ['NOTICE.md', 'captions.json', 'images', 'instances.json']
    """
    target = Path(out) / name
    _check(name, split, count, size, target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as partial:
        made = Path(partial) / "made"
        (made / "images").mkdir(parents=True)
        _write(made, [make_example(name, n, split) for n in range(count)], size)
        before = Path(partial) / "before"
        _check_target(name, target, force)  # anew: drawing took its time
        try:
            if target.exists():
                target.rename(before)
            made.rename(target)
        except BaseException:
            if before.exists() and not target.exists():
                before.rename(target)
            raise
    return target


def _check(name: str, split: str, count: int, size: int, target: Path, force: bool) -> None:
    mask_tools("export")
    if not 1 <= count <= ROOM or size < 1:
        raise ValueError(f"count={count} must be in 1..{ROOM}, and size={size} at least 1.")
    make_example(name, 0, split)
    if name == "openmoji":
        openmoji.load_openmoji()
    _check_target(name, target, force)


def _check_target(name: str, target: Path, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name another folder.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{target} is not empty; --force replaces an earlier export.")
    written = _written(name, target)
    found = {p.relative_to(target).as_posix() + "/" * p.is_dir() for p in target.rglob("*")}
    others = sorted(found - written)
    shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
    if not written:
        raise FileExistsError(
            f"{target} holds no instances.json of the set {name!r}, so it is no earlier export: "
            f"not replaced. It holds {shown}."
        )
    if others:
        raise FileExistsError(
            f"{target} holds more than an export: {shown}. --force would delete that: not "
            "replaced. Move it elsewhere, or name another folder."
        )


def _written(name: str, target: Path) -> set[str]:
    """What an earlier export of the set wrote into its folder; nothing if it is none."""
    try:
        data = json.loads((target / "instances.json").read_text(encoding="utf-8"))
        if data["info"]["set"] != name:
            return set()
        pictures = {f"images/{image['file_name']}" for image in data["images"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()
    return pictures | {"images/", "instances.json", "captions.json", "NOTICE.md"}


def _write(folder: Path, examples: Sequence[Example], size: int) -> None:
    images: list[dict] = []
    objects: list[dict] = []
    for example in examples:
        picture, masks = render_pil(example.scene, size)
        image = _image(example, size)
        picture.save(folder / "images" / image["file_name"], optimize=False)
        here = _objects(example, masks.numpy())
        seen = {record["object"] for record in here}
        image["hidden"] = [i for i in range(len(example.scene.objects)) if i not in seen]
        images.append(image)
        objects += here
    head = _head(examples[0], size)
    categories = [
        {"id": i, "name": name, "supercategory": "object"} for i, name in enumerate(CATEGORIES, 1)
    ]
    _write_json(
        folder / "instances.json",
        {**head, "images": images, "categories": categories, "annotations": objects},
    )
    captions = [_caption(example) for example in examples]
    _write_json(folder / "captions.json", {**head, "images": images, "annotations": captions})
    kind = SETS[examples[0].set]
    artwork = THIRD if kind.name == "openmoji" else SHIPPED
    text = NOTICE.format(
        name=kind.name,
        about=kind.about,
        version=importlib.metadata.version("captum_mllm"),
        artwork=artwork,
    )
    (folder / "NOTICE.md").write_bytes(text.encode())


def _write_json(path: Path, data: dict) -> None:
    path.write_bytes(json.dumps(data).encode() + b"\n")


def _head(example: Example, size: int) -> dict[str, Any]:
    about = SETS[example.set].about
    return {
        "info": {
            "description": f"captum_mllm test set {example.set!r}: {about}",
            "version": importlib.metadata.version("captum_mllm"),
            "contributor": "captum_mllm; drawings: see licenses and NOTICE.md",
            "set": example.set,
            "split": example.split,
            "size": size,
        },
        "licenses": [
            {"id": i, "name": name, "url": url} for i, (_, name, url) in enumerate(LICENSES, 1)
        ],
    }


def _image(example: Example, size: int) -> dict[str, Any]:
    styles = {thing.style for thing in example.scene.objects}
    return {
        "id": example.number,
        "file_name": f"{example.number:06d}.png",
        "width": size,
        "height": size,
        "license": 1 + [of for of, _, _ in LICENSES].index(styles),
        "set": example.set,
        "number": example.number,
        "split": example.split,
        "seed": example.scene.seed,
        "background": example.scene.background,
    }


def _objects(example: Example, masks: np.ndarray) -> list[dict[str, Any]]:
    tools, out = mask_tools("export"), []
    for i, (thing, mask) in enumerate(zip(example.scene.objects, masks, strict=True)):
        if not mask.any():
            continue
        runs = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        out.append(
            {
                "id": 100 * example.number + i + 1,
                "image_id": example.number,
                "category_id": CATEGORIES.index(thing.category) + 1,
                "segmentation": {
                    "size": list(mask.shape),
                    "counts": runs["counts"].decode("ascii"),
                },
                "area": int(mask.sum()),
                "bbox": tools.toBbox(runs).tolist(),
                "iscrowd": 0,
                "object": i,
                "size_word": thing.size_word,
                "color": thing.color,
                "position_words": list(thing.position_words),
                "style": thing.style,
            }
        )
    return out


def _caption(example: Example) -> dict[str, Any]:
    turns, planted, evidence = example.talk.turns, example.planted, example.evidence
    more = {} if evidence is None else {"evidence": evidence}
    return {
        "id": example.number + 1,
        "image_id": example.number,
        "caption": text_of(turns[-1].answer),
        "question": text_of(turns[-1].question),
        "turns": [
            {"question": _words(turn.question), "answer": _words(turn.answer)} for turn in turns
        ],
        "planted": None if planted is None else list(planted),
        **more,
    }


def _words(words: Words) -> list[dict[str, Any]]:
    return [{"text": word.text, "role": word.role, "obj": word.obj} for word in words]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sets that the command line names.

    SIGTERM ends it as Ctrl-C does, with nothing half written; a handler of the caller's is kept.

    Args:
        arguments: Of the command line. Default: the process's own.
    """
    parser = argparse.ArgumentParser(description="Write test sets in COCO format.")
    parser.add_argument("--set", nargs="+", required=True, choices=[*SETS, "all"])
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--count", type=int, default=200, help="examples per set; default: 200")
    parser.add_argument("--size", type=int, default=448, help="side in pixels; default: 448")
    parser.add_argument("--out", type=Path, required=True, help="folder; each set gets its own")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    args = parser.parse_args(arguments)
    names = list(SETS) if "all" in args.set else list(dict.fromkeys(args.set))
    how = (args.split, args.count, args.size)
    try:
        with _terminable():
            for name in names:  # all of them before the first is written
                _check(name, *how, args.out / name, args.force)
            for name in names:
                folder = export(name, args.out, *how, force=args.force)
                print(f"{folder}: {args.count} pictures of {args.size} px", flush=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM a SystemExit for a while, unless the caller handles it in its own way."""
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
