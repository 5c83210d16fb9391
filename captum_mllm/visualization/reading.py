"""A result read in words: by word, phrase or place.

One rule, here as in report, plots and metrics: what several tokens have together (a word, a
phrase) is at each place, and from each text token, the **largest** value of its tokens, and its
probability is the **product** of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.functional import upsample
from captum_mllm.geometry import ImageGrid, maps_to_picture
from captum_mllm.validation import as_index, picture_size
from captum_mllm.visualization.summary import ResultLike, checked_frame
from captum_mllm.words import Word, group_words, split_words

if TYPE_CHECKING:
    from PIL.Image import Image

Key = int | str | tuple[str, int] | slice
"""A word of the answer: its index, its text, (text, which mention), or a slice of words."""

_LISTED = 40


@dataclass(frozen=True, eq=False)
class Phrase:
    """One or several words of an answer, and what supports them.

    Args:
        text: as it stands in the answer.
        words: indices of its words in the answer.
        rows: indices of its tokens in the result.
        probability: product of its tokens' probabilities.
        grid_attr: per image (rows, cols), per video (frames, rows, cols): elementwise maximum of
            its tokens' maps.
        token_attr: (text tokens,): maximum of its tokens' attributions; 0 from its own first
            token on.
        units: of all values.
    """

    text: str
    words: tuple[int, ...]
    rows: tuple[int, ...]
    probability: float
    grid_attr: tuple[Float[Tensor, "..."], ...]
    token_attr: Float[Tensor, " tokens"]
    units: str


def find_words(words: Sequence[Word], key: Key) -> tuple[int, ...]:
    """The words that a key names.

    Texts are compared without regard to case; a phrase matches words that follow one another. Of
    several mentions, the first, or the one whose number is given with the text: ``("dog", 1)``.

    Args:
        words: of the answer.
        key: index (negative counts from the end), text, (text, mention), or slice.

    Returns:
        Indices of the words, at least one.

    Raises:
        KeyError: no such word or mention; the message lists the words that are there.
        IndexError: no such index, or a slice of no words.
        TypeError: a key of another kind.

    Example:
        >>> words = group_words([" a", " gray", " dog", " and", " a", " dog"])
        >>> find_words(words, "gray dog"), find_words(words, ("dog", 1)), find_words(words, -1)
        ((1, 2), (5,), (5,))
    """
    if isinstance(key, slice):
        chosen = tuple(range(len(words))[key])
        if not chosen:
            raise IndexError(f"{key} names no word: the answer has {len(words)} words.")
        return chosen
    if (index := as_index(key)) is not None:
        if not -len(words) <= index < len(words):
            raise IndexError(f"word {index} is out of range: the answer has {len(words)} words.")
        return (index % len(words),)
    text, mention = key if isinstance(key, tuple) and len(key) == 2 else (key, 0)
    if not isinstance(text, str) or not isinstance(mention, int):
        raise TypeError(
            f"a word is named by its index, its text, (text, mention) or a slice, got {key!r}."
        )
    found = _mentions(words, text)
    if not found or not -len(found) <= mention < len(found):
        raise KeyError(_missing(words, text, len(found)))
    return found[mention]


def _mentions(words: Sequence[Word], text: str) -> list[tuple[int, ...]]:
    """Where a text stands among the words, each time."""
    wanted = [text[start:end].casefold() for start, end in split_words(text)]
    have = [word.text.casefold() for word in words]
    size = len(wanted) or len(have) + 1
    return [
        tuple(range(n, n + size))
        for n in range(len(have) - size + 1)
        if have[n : n + size] == wanted
    ]


def _missing(words: Sequence[Word], text: str, mentions: int) -> str:
    have = list(dict.fromkeys(word.text for word in words))
    if mentions:
        times = "once" if mentions == 1 else f"{mentions} times"
        return f"{text!r} occurs {times} in the answer; mentions count from 0."
    near = get_close_matches(text, have, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    more = f", and {len(have) - _LISTED} more" if len(have) > _LISTED else ""
    return f"the answer has no {text!r}.{hint} Its words: {', '.join(have[:_LISTED])}{more}."


def phrase_of(result: ResultLike, key: Key) -> Phrase:
    """What supports some words of the answer.

    Args:
        result: what ``attribute`` returned.
        key: see :func:`find_words`.

    Returns:
        Maps, text attributions and probability of the words together.

    Raises:
        KeyError: see :func:`find_words`.
        IndexError: see :func:`find_words`.
    """
    words = group_words(result.output_tokens)
    chosen = find_words(words, key)
    rows = tuple(row for n in chosen for row in words[n].tokens)
    inside = (
        range(rows[0], rows[-1] + 1) if chosen == tuple(range(chosen[0], chosen[-1] + 1)) else rows
    )
    text = "".join(result.output_tokens[row] for row in inside).strip()
    attr = result.token_attr[list(rows)].amax(0).clone()
    start = len(result.input_tokens) - len(result.output_tokens)
    if start >= 0 and result.input_tokens[start:] == result.output_tokens:
        attr[start + rows[0] :] = 0
    return Phrase(
        text,
        chosen,
        rows,
        float(result.output_probs[list(rows)].prod()),
        tuple(maps[list(rows)].amax(0) for maps in result.grid_attr),
        attr,
        result.units,
    )


@dataclass(frozen=True)
class PlaceSupport:
    """How strongly a place of a picture supports one word.

    Args:
        word: index of the word in the answer.
        text: the word.
        value: mean of the word's map over the place, in the result's units.
    """

    word: int
    text: str
    value: float


def words_at(
    result: ResultLike,
    place: Sequence[float],
    picture: "tuple[int, int] | Image | None" = None,
    *,
    image: int = 0,
    frame: int | None = None,
) -> tuple[PlaceSupport, ...]:
    """The words that a place of a picture supports, strongest first.

    Args:
        result: what ``attribute`` returned.
        place: (x, y) of a pixel, or (left, upper, right, lower) of a box, pixels.
        picture: (height, width) of the original picture, or the picture itself; default None: the
            image as the model saw it.
        image: which image, default the first.
        frame: of a video, which frame; None (default) for the largest over time.

    Returns:
        One entry per word of the answer; the mean of its map over the place.

    Raises:
        ValueError: ``place`` is neither, or lies outside the picture.
        IndexError: no such image or frame.
    """
    grid, maps = _image(result, image)
    words = group_words(result.output_tokens)
    if grid.steps:
        chosen = checked_frame(grid, frame)
        maps = maps.amax(1) if chosen is None else maps[:, chosen]
    elif frame is not None:
        raise ValueError(f"image {image} is a still image: frame= is for videos, leave it out.")
    if picture is None:
        size, box = (grid.height, grid.width), None
    else:
        size = picture_size(picture)
        box = result.geometry(image, size)
    left, upper, right, lower = _pixels_of(place, size)
    placed = _in_picture(maps, grid, size, box)
    means = [
        float(placed[list(word.tokens)].amax(0)[upper:lower, left:right].mean()) for word in words
    ]
    order = sorted(range(len(words)), key=lambda n: -means[n])
    return tuple(PlaceSupport(n, words[n].text, means[n]) for n in order)


def _image(result: ResultLike, image: int) -> tuple[ImageGrid, Tensor]:
    if not -len(result.grids) <= image < len(result.grids):
        raise IndexError(f"image {image} is out of range: there are {len(result.grids)} images.")
    return result.grids[image], result.grid_attr[image]


def _in_picture(maps: Tensor, grid: ImageGrid, size: tuple[int, int], box: Any) -> Tensor:
    if box is None:
        return upsample(maps, (grid.height, grid.width))
    return maps_to_picture(maps, box, size)


def _pixels_of(place: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels of a place: left, upper, right, lower; at least one."""
    numbers = torch.as_tensor([float(value) for value in place])
    if numbers.shape not in ((2,), (4,)) or not bool(torch.isfinite(numbers).all()):
        raise ValueError(
            f"place must be (x, y) or (left, upper, right, lower) in pixels, got {tuple(place)}."
        )
    height, width = size
    x0, y0 = (int(value) for value in numbers[:2])
    x1, y1 = (x0 + 1, y0 + 1) if len(numbers) == 2 else (int(value) for value in numbers[2:])
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"place must lie in the picture of {width} x {height} pixels, its left and upper edge "
            f"first; got {tuple(place)}."
        )
    return x0, y0, x1, y1
