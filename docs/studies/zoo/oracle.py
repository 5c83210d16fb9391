"""A layout checked by painting alone: slow, obvious, and without any code of the package.

One cell of the picture after the other is painted over, the picture goes through the processor
and the model as it is (attention included), and of the view's tokens the one of that cell must
change most. A layout that names the wrong tokens, mirrors, transposes or shifts fails in most
cells. Under random weights a token of a few hundred may lose to a neighbour, so a share is given.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from studies.zoo.subjects import Subject

Box = Sequence[float]


class _Entered(Exception):  # noqa: N818
    """Carries the embeddings of the sequence as they enter the language model."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings


def _enter(_decoder: nn.Module, args: tuple, given: dict[str, Any]) -> None:
    for value in (given.get("inputs_embeds"), *args):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            raise _Entered(value[0].detach())


@torch.no_grad()
def image_tokens(subject: Subject, picture: Image.Image) -> Tensor:
    """What stands on a picture's placeholders when the language model starts.

    Args:
        subject: a subject of the zoo.
        picture: the only picture of the prompt.

    Returns:
        (placeholders, width).

    Raises:
        RuntimeError: no embeddings enter the language model.
    """
    inputs = subject.encode(picture)
    handle = subject.model.get_decoder().register_forward_pre_hook(_enter, with_kwargs=True)
    try:
        subject.model(**inputs, use_cache=False)
    except _Entered as entered:
        return entered.embeddings[inputs["input_ids"][0] == subject.image_token_id]
    finally:
        handle.remove()
    raise RuntimeError("no embeddings of the sequence enter the language model.")


def right_cells(
    subject: Subject,
    picture: Image.Image,
    tokens: Sequence[Sequence[int]],
    box: Box,
    *,
    most: int = 64,
    seed: int = 0,
) -> tuple[int, int]:
    """In how many cells of a view the token that changes most is the one that is claimed.

    Args:
        subject: a subject of the zoo.
        picture: some picture.
        tokens: rows of tokens of the claimed view, each by its index among the placeholders.
        box: (left, upper, right, lower) of the view in pixels of the picture.
        most: cells to try, drawn at random where there are more; default 64.
        seed: of the draw, default 0.

    Returns:
        (right, tried): cells without a token, or without a pixel in the picture, are not tried.
    """
    claimed = torch.tensor([list(row) for row in tokens])
    seen = claimed[claimed >= 0]
    base = image_tokens(subject, picture)
    cells = [(r, c) for r, c in np.ndindex(*claimed.shape) if claimed[r, c] >= 0]
    changes, own = [], []
    for row, col in (cells[i] for i in np.random.default_rng(seed).permutation(len(cells))[:most]):
        painted = _painted(picture, _inner(box, tuple(claimed.shape), row, col))
        if painted is not None:
            changes.append((image_tokens(subject, painted) - base).norm(dim=1)[seen])
            own.append(int(claimed[row, col]))
    if not own:
        return 0, 0
    change = torch.stack(changes)
    change = change / change.mean(0).clamp_min(1e-30)  # some tokens change much at anything
    return int((seen[change.argmax(1)] == torch.tensor(own)).sum()), len(own)


def _inner(box: Box, shape: tuple[int, ...], row: int, col: int) -> tuple[int, int, int, int]:
    """The inner three quarters of a cell along each side, whole pixels of the picture."""
    left, upper, right, lower = box
    dx, dy = (right - left) / shape[1], (lower - upper) / shape[0]
    x, y = left + col * dx, upper + row * dy
    edges = (x + dx / 8, y + dy / 8, x + dx * 7 / 8, y + dy * 7 / 8)
    a, b, c, d = (round(edge) for edge in edges)
    return a, b, max(c, a + 1), max(d, b + 1)


def _painted(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image | None:
    """The picture with a box of it inverted; None if the box lies outside."""
    pixels = np.array(picture)
    left, upper, right, lower = (max(0, edge) for edge in box)
    part = pixels[upper:lower, left:right]
    if not part.size:
        return None
    pixels[upper:lower, left:right] = np.where(part < 128, 255, 0)
    return Image.fromarray(pixels)
