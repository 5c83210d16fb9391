"""A result read word by word: probability, peak and its place; and the table of them."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.geometry import ImageGeometry, ImageGrid, Preprocessing, maps_to_picture
from captum_mllm.words import (
    Peak,
    Word,
    find_peak,
    group_words,
    join_tokens,
    word_attributions,
    word_maps,
    word_probabilities,
)


class ResultLike(Protocol):
    """What the visualization reads of a result: ``MLLMAttributionResult`` has all of it."""

    @property
    def grid_attr(self) -> tuple[Tensor, ...]:
        """Per image (targets, rows, cols), per video (targets, frames, rows, cols)."""
        ...

    @property
    def token_attr(self) -> Tensor:
        """(targets, text tokens)."""
        ...

    @property
    def seq_attr(self) -> Tensor:
        """(text tokens,)."""
        ...

    @property
    def input_tokens(self) -> tuple[str, ...]:
        """Labels of the text tokens: prompt, then answer."""
        ...

    @property
    def output_tokens(self) -> tuple[str, ...]:
        """Labels of the targets."""
        ...

    @property
    def output_probs(self) -> Tensor:
        """(targets,)."""
        ...

    @property
    def grids(self) -> tuple[ImageGrid, ...]:
        """One per image."""
        ...

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How the processor crops and resizes a picture, or None."""
        ...

    @property
    def scales(self) -> tuple[float, ...]:
        """Scales of the input."""
        ...

    @property
    def consistency(self) -> tuple[float, ...] | None:
        """How well each scale still predicts the answer, or None."""
        ...

    @property
    def relevance(self) -> Tensor | None:
        """(targets, text tokens), or None."""
        ...

    @property
    def units(self) -> str:
        """Units of all values."""
        ...

    @property
    def method(self) -> str:
        """Name of the attributor."""
        ...

    def select(self, targets: Sequence[int]) -> "ResultLike":
        """The result of some targets only.

        Args:
            targets: rows to keep.
        """
        ...

    def geometry(self, i: int, size: tuple[int, int]) -> ImageGeometry:
        """The box of the original picture that an image's canvas shows.

        Args:
            i: which image.
            size: (height, width) of the picture, pixels.
        """
        ...

    def time_profile(self, i: int = 0) -> Tensor:
        """(targets, frames): the mean of each target's map over each frame of a video.

        Args:
            i: which image.
        """
        ...


@dataclass(frozen=True)
class WordSummary:
    """One word of the answer.

    Args:
        word: the word and its tokens.
        probability: product of its tokens' probabilities.
        peak: where its map is largest; None where the map is 0 all over the picture.
        frame: of a video, the frame of map and peak: the first one that supports it most.
        image: which image the peak is in, where several were compared; else None.
    """

    word: Word
    probability: float
    peak: Peak | None
    frame: int | None = None
    image: int | None = None

    @property
    def where(self) -> str:
        """Where the peak lies, in words and in pixels."""
        if self.peak is None:
            return "nowhere"
        place = f"{self.peak.region} ({self.peak.x}, {self.peak.y})"
        place = place if self.frame is None else f"frame {self.frame}: {place}"
        return place if self.image is None else f"image {self.image}, {place}"


@dataclass(frozen=True, eq=False)
class AnswerSummary:
    """An answer word by word, over one picture.

    Args:
        words: the words of the answer, in order.
        grid_maps: (words, rows, cols): their maps on the model's grid; of a video each word's map
            of its own frame.
        context: the words of the text (prompt, then answer) that may support them.
        context_attr: (words, context): attribution of each context word, >= 0; a word's own
            column and those after it are 0.
        vmax: the largest value of any word's map: the one full colour for all words.
        geometry: the part of the picture that the model saw.
        assumed: whether the geometry is only assumed (the whole picture, stretched).
        size: (height, width) of the picture, pixels.
        units: units of all values.
    """

    words: tuple[WordSummary, ...]
    grid_maps: Float[Tensor, "words _ _"]
    context: tuple[Word, ...]
    context_attr: Float[Tensor, "words context"]
    vmax: float
    geometry: ImageGeometry
    assumed: bool
    size: tuple[int, int]
    units: str

    def map_of(self, index: int, size: tuple[int, int]) -> Float[Tensor, "height width"]:
        """One word's map in pixels of the picture, resized.

        Args:
            index: which word.
            size: (height, width) to which the picture is resized, pixels.

        Returns:
            (height, width), 0 where the model saw nothing of the picture.
        """
        (height, width), (full_h, full_w) = size, self.size
        left, upper, right, lower = self.geometry.box
        box = (
            left * width / full_w,
            upper * height / full_h,
            right * width / full_w,
            lower * height / full_h,
        )
        return maps_to_picture(self.grid_maps[index : index + 1], ImageGeometry(box), size)[0]


def answer_words(result: ResultLike) -> tuple[Word, ...]:
    """The words of the answer.

    Args:
        result: what ``attribute`` returned.
    """
    return group_words(result.output_tokens)


def answer_text(result: ResultLike) -> str:
    """The answer as a text.

    Args:
        result: what ``attribute`` returned.

    Returns:
        The tokens joined as the tokenizer would.
    """
    return join_tokens(result.output_tokens)


def summarise(
    result: ResultLike,
    size: tuple[int, int],
    image: int = 0,
    frame: int | None = None,
) -> AnswerSummary:
    """Read a result word by word.

    Args:
        result: what ``attribute`` returned.
        size: (height, width) of the original picture, pixels.
        image: which image or video, default the first.
        frame: which frame of a video; None (default) for the frame that supports each word most.

    Returns:
        The answer's words with their maps, peaks and contexts.

    Raises:
        IndexError: no such frame.
        ValueError: a frame of a still image.
    """
    words = answer_words(result)
    grid = result.grids[image]
    frames: list[int | None] = [None] * len(words)
    maps = result.grid_attr[image]
    if grid.steps:
        maps, frames = _frame_maps(maps, words, checked_frame(grid, frame))
    elif frame is not None:
        raise ValueError(f"image {image} is a still image: frame= is for videos, leave it out.")
    else:
        maps = word_maps(maps, words)
    probabilities = word_probabilities(result.output_probs, words)
    geometry, assumed = _geometry(result, size, image)
    context, attr = context_of(result, words)
    summaries = tuple(
        WordSummary(word, float(p), find_peak(cells, geometry, size), at)
        for word, p, cells, at in zip(words, probabilities, maps, frames, strict=True)
    )
    vmax = float(maps.max()) if maps.numel() else 0.0
    return AnswerSummary(
        summaries, maps, context, attr, vmax, geometry, assumed, size, result.units
    )


def summarise_images(result: ResultLike) -> AnswerSummary:
    """Read a result word by word, each word on the image that supports it most, at its own size.

    Args:
        result: what ``attribute`` returned.

    Returns:
        The answer's words; of several images or videos ``grid_maps``, ``geometry`` and ``size`` are
        those of the first one.

    Raises:
        ValueError: a result without images.
    """
    if not result.grids:
        raise ValueError("result has no image.")
    summaries = [
        summarise(result, (grid.height, grid.width), image)
        for image, grid in enumerate(result.grids)
    ]
    if len(summaries) == 1:
        return summaries[0]
    words = []
    for entries in zip(*(summary.words for summary in summaries), strict=True):
        values = [entry.peak.value if entry.peak else 0.0 for entry in entries]
        image = values.index(max(values))
        words.append(replace(entries[image], image=image))
    return replace(
        summaries[0],
        words=tuple(words),
        vmax=max(summary.vmax for summary in summaries),
        assumed=any(summary.assumed for summary in summaries),
    )


def checked_frame(grid: ImageGrid, frame: int | None) -> int | None:
    """The frame's index from the start of a video.

    Args:
        grid: the video's.
        frame: which frame, negative counts from the end; or None.

    Raises:
        IndexError: no such frame.
    """
    if frame is None:
        return None
    if not -grid.frames <= frame < grid.frames:
        raise IndexError(f"frame {frame} is out of range: the video has {grid.frames} frames.")
    return frame % grid.frames


def _frame_maps(
    maps: Float[Tensor, "targets frames _ _"], words: Sequence[Word], frame: int | None
) -> tuple[Tensor, list[int | None]]:
    """A map per word, of one frame of a video, and which frame that is."""
    if frame is not None:
        return word_maps(maps[:, frame], words), [frame] * len(words)
    over_time = [maps[list(word.tokens)].amax(0) for word in words]
    if not over_time:
        return maps[:0, 0], []
    frames = [int(each.amax((1, 2)).argmax()) for each in over_time]
    chosen = [each[at] for each, at in zip(over_time, frames, strict=True)]
    return torch.stack(chosen), list(frames)


def context_of(
    result: ResultLike, words: Sequence[Word]
) -> tuple[tuple[Word, ...], Float[Tensor, "words context"]]:
    """The words of the text, and how strongly each supports each word of the answer.

    Args:
        result: what ``attribute`` returned.
        words: the words of the answer.

    Returns:
        Words whose ``tokens`` are columns of ``token_attr``, and the attributions
        (words, context).
    """
    labels, rows = result.input_tokens, len(result.output_tokens)
    start = len(labels) - rows
    aligned = start >= 0 and labels[start:] == result.output_tokens
    if not aligned:  # only some tokens are explained
        context = group_words(labels)
        return context, word_attributions(result.token_attr, words, context)
    answer = tuple(
        Word(word.text, tuple(start + token for token in word.tokens), word.content)
        for word in words
    )
    prompt = group_words(labels[:start])
    context = prompt + answer
    attr = word_attributions(result.token_attr, words, context)
    for row in range(len(words)):  # a word's later tokens are supported by its first one
        attr[row, len(prompt) + row :] = 0
    return context, attr


def _geometry(result: ResultLike, size: tuple[int, int], image: int) -> tuple[ImageGeometry, bool]:
    grid = result.grids[image]
    try:
        return result.geometry(image, size), False
    except ValueError:  # not known, or not of a picture of this size
        return ImageGeometry.stretched(*size), size != (grid.height, grid.width)


def format_table(summary: AnswerSummary, *, content_only: bool = True) -> str:
    """The words as an aligned plain-text table: word, probability, peak, where it lies.

    Args:
        summary: an answer word by word.
        content_only: leave function words and punctuation out, default True.

    Returns:
        Lines without trailing spaces; plain text without colours.
    """
    rows = [("word", "probability", f"peak, {summary.units}", "where (x, y in pixels)")]
    for entry in summary.words:
        if content_only and not entry.word.content:
            continue
        value = "0"
        if entry.peak is not None:
            value = f"{entry.peak.value:.3f}"
        rows.append((entry.word.text, f"{entry.probability:.3f}", value, entry.where))
    widths = [max(_width(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(_pad(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _pad(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Text to the left, numbers to the right."""
    space = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
    return [row[0] + space[0], space[1] + row[1], space[2] + row[2], row[3] + space[3]]


def _width(text: str) -> int:
    """Columns that a terminal uses for a text."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
