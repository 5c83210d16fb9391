"""What stands for one picture in a prompt, where it is more than a row of placeholders.

Each function takes what the image processor made of one picture, and gives the ids of its span.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from studies.zoo.shrink import IMAGE

ROW_END, IMAGE_END = 99, 95
SLICE_START, SLICE_END = 105, 106
FENCE, WHOLE_NAME, TILE_NAMES = 109, 110, 111
IMAGE_OPEN, IMAGE_CLOSE = 107, 108

Made = Mapping[str, Any]


def rows_of_cells(made: Made) -> list[int]:
    """Pixtral's: a break after each row, an end after the last; a cell has 8 x 8 pixels."""
    height, width = (int(side) // 8 for side in made["image_sizes"][0])
    return [*([*[IMAGE] * width, ROW_END] * height)[:-1], IMAGE_END]


def slices(made: Made) -> list[int]:
    """MiniCPM-V's: the whole picture, then its slices row by row; 4 x 4 patches are a token."""
    tokens = (made["target_sizes"].prod(-1) // 16).tolist()
    ids = [IMAGE_OPEN, *[IMAGE] * tokens[0], IMAGE_CLOSE]
    rows, columns = (int(number) for number in made["grids"][0])
    for row in range(rows if len(tokens) > 1 else 0):
        for count in tokens[1 + row * columns : 1 + (row + 1) * columns]:
            ids += [SLICE_START, *[IMAGE] * count, SLICE_END]
        ids += [ROW_END] * (row + 1 < rows)
    return ids


def named_tiles(made: Made) -> list[int]:
    """Idefics 3's: each tile behind a fence and its name, a line break after a row, then the whole.

    The zoo's processors cut 2 x 2 tiles, of 16 tokens each.
    """
    side = math.isqrt(made["pixel_values"].shape[1] - 1)
    ids: list[int] = []
    for row in range(side):
        for column in range(side):
            ids += [FENCE, TILE_NAMES + row * side + column, *[IMAGE] * 16]
        ids.append(ROW_END)
    return [*ids, FENCE, WHOLE_NAME, *[IMAGE] * 16, FENCE]


def rows_of_patches(made: Made) -> list[int]:
    """Fuyu's: a newline after each row of patches of 4 x 4 pixels."""
    height, width = (side // 4 for side in made["images"][0][0].shape[-2:])
    return [*[IMAGE] * width, ROW_END] * height


def fuyu_patches(made: Made) -> dict[str, Tensor]:
    """Fuyu's pixel input, which its processor makes together with the text: rows of patches."""
    pictures = [torch.as_tensor(picture[0]).float() for picture in made["images"]]
    patches = [
        picture.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 3, 4, 0).flatten(0, 1).flatten(1)
        for picture in pictures
    ]
    return {"pixel_values": torch.cat(patches)[None]}
