"""A layout checked by painting alone: slow, obvious, and without any code of the package.

One cell of the picture after the other is painted over, the picture goes through the processor
and the model as it is (attention included), and of the view's tokens that of the cell should
change most, each compared with how much it changes at anything. Under random weights it does so in
nearly all cells; in convolutional towers, where a token hears its whole neighbourhood, in a few,
and there the *middle* of the change still follows the cell. A layout that names the wrong tokens
fails in both; one that is shifted by a cell in the first; one that is transposed or mirrored has
a correlation of 0 or -1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Painted(NamedTuple):
    """How a view stood the painting.

    Attributes:
        right: cells whose own token changed most.
        tried: cells painted.
        follows: correlation of the painted cells with the middles of the change, over rows and
            over columns, the lower of the two; 1 where there are fewer than 3 lines of either.
    """

    right: int
    tried: int
    follows: float


def painted_cells(
    subject: Subject,
    picture: Image.Image,
    tokens: Sequence[Sequence[int]],
    box: Box,
    *,
    most: int = 64,
    seed: int = 0,
) -> Painted:
    """Paint over cells of a claimed view, one at a time.

    Args:
        subject: a subject of the zoo.
        picture: some picture.
        tokens: rows of tokens of the claimed view, each by its index among the placeholders.
        box: (left, upper, right, lower) of the view in pixels of the picture.
        most: cells to try, drawn at random where there are more; default 64.
        seed: of the draw, default 0.

    Returns:
        What followed; cells without a token, or without a pixel in the picture, are not tried.
    """
    claimed = torch.tensor([list(row) for row in tokens])
    places = (claimed >= 0).nonzero()  # (cells, 2): row and column
    seen = claimed[claimed >= 0]
    base = image_tokens(subject, picture)
    changes, own = [], []
    for i in np.random.default_rng(seed).permutation(len(places))[:most]:
        row, col = places[i].tolist()
        painted = _painted(picture, _inner(box, tuple(claimed.shape), row, col))
        if painted is not None:
            changes.append((image_tokens(subject, painted) - base).norm(dim=1)[seen])
            own.append(int(i))
    if not own:
        return Painted(0, 0, 0.0)
    change = torch.stack(changes).double()
    change = change / change.mean(0).clamp_min(1e-30)  # some tokens change much at anything
    right = int((change.argmax(1) == torch.tensor(own)).sum())
    return Painted(right, len(own), _follows(change, places[own].double(), places.double()))


def _follows(change: Tensor, painted: Tensor, places: Tensor) -> float:
    """Correlation of painted cells (painted, 2) with the middles of change (painted, tokens)."""
    share = (change / change.mean(1, keepdim=True) - 1).clamp_min(0).square()
    middles = share @ places / share.sum(1, keepdim=True).clamp_min(1e-30)
    found = [1.0]
    for axis in (0, 1):
        if len(painted[:, axis].unique()) > 2:
            pair = torch.stack([painted[:, axis], middles[:, axis]])
            found.append(float(torch.corrcoef(pair)[0, 1]))
    return round(min(found), 3)


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
