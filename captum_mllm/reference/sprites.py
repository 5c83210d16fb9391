"""The 64 kinds of object that scenes are made of, and their pictures in two drawing styles.

The pictures are emoji artwork with an alpha channel, 64 px on a side: Noto (Apache-2.0) and
Twemoji (CC-BY-4.0). `data/NOTICE.md` names their authors and licences. A third style, OpenMoji
(CC-BY-SA-4.0), is not shipped: `openmoji` makes it.
"""

from __future__ import annotations

import functools
from importlib import resources

import numpy as np

STYLES = ("noto", "twemoji")  # shipped
"""Drawing styles that are shipped; "openmoji" is made on demand."""

ALL_STYLES = (*STYLES, "openmoji")  # the third is for evaluation only, see `openmoji`

# name of the category -> code point(s) of the emoji, as its file is named in the npm packages
CODE_POINTS = {
    "person": "1f9cd",
    "bicycle": "1f6b2",
    "car": "1f697",
    "motorcycle": "1f3cd-fe0f",
    "airplane": "2708-fe0f",
    "bus": "1f68c",
    "train": "1f682",
    "truck": "1f69a",
    "boat": "26f5",
    "traffic light": "1f6a6",
    "stop sign": "1f6d1",
    "bird": "1f426",
    "cat": "1f408",
    "dog": "1f415",
    "horse": "1f40e",
    "sheep": "1f411",
    "cow": "1f404",
    "elephant": "1f418",
    "zebra": "1f993",
    "giraffe": "1f992",
    "backpack": "1f392",
    "umbrella": "2602-fe0f",
    "handbag": "1f45c",
    "suitcase": "1f9f3",
    "ball": "26bd",
    "kite": "1fa81",
    "skateboard": "1f6f9",
    "racket": "1f3f8",
    "bottle": "1f37e",
    "glass": "1f377",
    "cup": "2615",
    "knife": "1f52a",
    "banana": "1f34c",
    "apple": "1f34e",
    "sandwich": "1f96a",
    "orange": "1f34a",
    "broccoli": "1f966",
    "carrot": "1f955",
    "hot dog": "1f32d",
    "pizza": "1f355",
    "donut": "1f369",
    "cake": "1f370",
    "chair": "1fa91",
    "couch": "1f6cb-fe0f",
    "plant": "1fab4",
    "bed": "1f6cf-fe0f",
    "toilet": "1f6bd",
    "tv": "1f4fa",
    "laptop": "1f4bb",
    "keyboard": "2328-fe0f",
    "phone": "1f4f1",
    "book": "1f4d5",
    "clock": "1f570-fe0f",
    "vase": "1f3fa",
    "teddy bear": "1f9f8",
    "toothbrush": "1faa5",
    "guitar": "1f3b8",
    "key": "1f511",
    "house": "1f3e0",
    "fish": "1f41f",
    "rocket": "1f680",
    "crown": "1f451",
    "flower": "1f33b",
    "camera": "1f4f7",
}
CATEGORIES = tuple(CODE_POINTS)
"""Names of all objects that scenes hold, as captions write them."""

SPRITE_SIZE = 64


@functools.cache
def load_sprites() -> np.ndarray:
    """All sprites of the shipped styles; `openmoji.load_openmoji` has the third style's.

    Returns:
        Read-only uint8 array (styles, categories, 64, 64, 4): red, green, blue, alpha; colour is
        not premultiplied. Axes follow `STYLES` and `CATEGORIES`.

    Example:
        >>> load_sprites().shape
        (2, 64, 64, 64, 4)
    """
    path = resources.files("captum_mllm.reference") / "data" / "sprites.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        names = archive["categories"].tolist()
        if names != list(CATEGORIES):
            raise RuntimeError("data/sprites.npz does not fit CODE_POINTS: run build_sprites.")
        sprites = archive["sprites"]
    sprites.setflags(write=False)
    return sprites
