"""What a page holds: words, pictures, and the maps of one or several methods, in 8 bits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from captum_mllm.pictures import to_eight_bits
from captum_mllm.validation import ArgumentError
from captum_mllm.visualization.atlas import Atlas, grey_png, make_atlas, to_levels
from captum_mllm.visualization.summary import (
    AnswerSummary,
    ResultLike,
    answer_text,
    answer_words,
    summarise,
)
from captum_mllm.words import Word

if TYPE_CHECKING:
    from PIL.Image import Image

NEAR_ZERO = 0.02
"""Share of the full colour below which a page calls evidence none."""

UNSURE = 0.5
"""Probability below which a page marks a word."""

FRAMES = 8
"""Frames of a video in a page, at most; evenly spaced."""


@dataclass(frozen=True)
class PageWord:
    """A word of the prompt or of the answer, as a page shows it.

    Args:
        text: the word.
        before: what stands between the word before it and this one.
        part: "template" (of the prompt, but not the user's), "prompt" or "answer".
        content: whether it carries meaning of its own.
        probability: of the answer's words; None for the prompt's.
    """

    text: str
    before: str
    part: str
    content: bool
    probability: float | None = None


@dataclass(frozen=True)
class PagePicture:
    """A picture or a frame, as a page shows it.

    Args:
        title: its caption.
        width: of the original picture, pixels.
        height: of it.
        box: (left, upper, right, lower) of the part that the model saw, pixels.
        assumed: whether that box is only assumed.
        image: the picture itself.
    """

    title: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    assumed: bool
    image: "Image"


@dataclass(frozen=True)
class PageMethod:
    """The evidence of one method.

    Args:
        name: what the reader chooses it by.
        about: the composition of attributors and the scales.
        units: of all values.
        top: largest value over all words and pictures: the one full colour.
        text_top: largest attribution of a word to a word.
        atlases: one per picture.
        text: (words, context words) as a grey picture of 8 bits, 255 for ``text_top``; "" without.
        peaks: per word, the picture of the page that supports it most, the largest value (of all
            frames of a video) and where that is; None where it is near zero.
    """

    name: str
    about: str
    units: str
    top: float
    text_top: float
    atlases: tuple[Atlas, ...]
    text: str
    peaks: tuple[tuple[int, float, str] | None, ...]


@dataclass(frozen=True)
class Contents:
    """All that a page shows.

    Args:
        prompt: the user's prompt.
        answer: the answer as the tokenizer decodes it.
        context: words of the prompt, then of the answer.
        first: how many words of ``context`` belong to the prompt.
        pictures: pictures and frames.
        methods: the first one is shown first.
        whole: whether every token of the answer is explained; if not, the words before ``first``
            are those of the whole text.
        notes: sentences on what the page leaves out.
    """

    prompt: str
    answer: str
    context: tuple[PageWord, ...]
    first: int
    pictures: tuple[PagePicture, ...]
    methods: tuple[PageMethod, ...]
    whole: bool = True
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[PageWord, ...]:
        """The words of the answer."""
        return self.context[self.first :]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        pictures = [
            {key: value for key, value in vars(picture).items() if key != "image"}
            for picture in self.pictures
        ]
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "first": self.first,
            "context": [asdict(word) for word in self.context],
            "pictures": pictures,
            "methods": [asdict(method) for method in self.methods],
            "whole": self.whole,
        }


def contents_of(
    results: Mapping[str, ResultLike],
    pictures: "Sequence[Image | Sequence[Image]]",
    *,
    prompt: str = "",
    titles: Sequence[str] = (),
) -> Contents:
    r"""Gather what a page shows.

    Args:
        results: name of a method -> its result; all of the same answer. The first is shown first.
        pictures: the original pictures in order; of a video the list of its frames, as the model
            was given them (of a single video the flat list will do).
        prompt: the user's text. Words of the model's template around it are told apart by it.
        titles: a caption per picture, default "picture 1", ...

    Returns:
        The contents.

    Raises:
        ArgumentError: no result, results of different answers, another number of pictures.

    Example:
        >>> from PIL import Image
        >>> from captum_mllm import LogitLens
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> lens = LogitLens(model, processor).attribute(inputs, target="there is a dog")
        >>> contents = contents_of({"lens": lens}, [picture], prompt="what is this ?")
        >>> [word.text for word in contents.words]
        ['there', 'is', 'a', 'dog']
        >>> [word.part for word in contents.context[: contents.first]]
        ['prompt', 'prompt', 'prompt', 'prompt', 'template', 'template']
    """
    if not results:
        raise ArgumentError("results", "is empty: give at least one result by its method's name.")
    first = next(iter(results.values()))
    for name, result in results.items():
        _check_same(name, result, first)
    if len(first.grids) == 1 < len(pictures) and first.grids[0].steps:
        pictures = [pictures]  # type: ignore[list-item]
    if len(pictures) != len(first.grids):
        raise ArgumentError(
            "pictures",
            f"must be one per image of the result ({len(first.grids)}), got {len(pictures)}.",
        )
    views = _views(first, pictures, titles)
    sizes = [(view.image.height, view.image.width) for view in views]
    summaries = {
        name: [
            summarise(result, size, view.number, view.frame)
            for view, size in zip(views, sizes, strict=True)
        ]
        for name, result in results.items()
    }
    shown = next(iter(summaries.values()))
    context, count, whole = _context(first, shown[0], prompt)
    return Contents(
        prompt,
        answer_text(first),
        context,
        count,
        tuple(_picture(view, summary) for view, summary in zip(views, shown, strict=True)),
        tuple(
            _method(results[name], name, views, summaries[name], len(context)) for name in results
        ),
        whole,
        tuple(_left_out(first, views)),
    )


def _picture(view: "_View", summary: AnswerSummary) -> PagePicture:
    width, height = view.image.size
    box = summary.geometry.box
    return PagePicture(view.title, width, height, box, summary.assumed, view.image)


def _check_same(name: str, result: ResultLike, first: ResultLike) -> None:
    same = result.output_tokens == first.output_tokens and len(result.grids) == len(first.grids)
    if not same or result.input_tokens != first.input_tokens:
        raise ArgumentError(
            "results",
            f"must explain one answer to one prompt, but {name!r} explains "
            f"{answer_text(result)!r} and the first one {answer_text(first)!r}.",
        )
    if not answer_words(result):
        raise ArgumentError("results", f"{name!r} explains no word.")


@dataclass(frozen=True)
class _View:
    """A picture, or a frame of a video."""

    title: str
    image: "Image"
    number: int
    frame: int | None


def _views(
    result: ResultLike, pictures: "Sequence[Image | Sequence[Image]]", titles: Sequence[str]
) -> list[_View]:
    views: list[_View] = []
    for number, (picture, grid) in enumerate(zip(pictures, result.grids, strict=True)):
        title = titles[number] if number < len(titles) else f"picture {number + 1}"
        if not grid.steps:
            if isinstance(picture, Sequence):
                raise ArgumentError("pictures", f"{number} must be one picture, got several.")
            views.append(_View(title, to_eight_bits(picture).convert("RGB"), number, None))
            continue
        if not isinstance(picture, Sequence) or not 0 < len(picture) <= grid.frames:
            raise ArgumentError(
                "pictures",
                f"{number} must be the video's {grid.frames} frames, as the model was given them.",
            )
        count = min(FRAMES, grid.steps)
        steps = torch.linspace(0, grid.steps - 1, count).round().long().tolist()
        for frame in (step * (grid.frames // grid.steps) for step in steps):
            image = to_eight_bits(picture[min(frame, len(picture) - 1)]).convert("RGB")
            views.append(_View(f"{title}, frame {frame}", image, number, frame))
    return views


def _left_out(result: ResultLike, views: Sequence[_View]) -> list[str]:
    """What the page does not show of videos."""
    frames = {
        number: (sum(view.number == number for view in views), grid.frames)
        for number, grid in enumerate(result.grids)
        if grid.steps
    }
    return [
        f"{shown} of {every} frames are shown; the table and the full colour are of all of them."
        for shown, every in frames.values()
        if shown < every
    ]


def _context(
    result: ResultLike, summary: AnswerSummary, prompt: str
) -> tuple[tuple[PageWord, ...], int, bool]:
    """The words of prompt and answer, how many are the prompt's, and if all are explained."""
    labels = list(result.input_tokens)
    rows = len(result.output_tokens)
    start = len(labels) - rows
    answer = [entry.word for entry in summary.words]
    whole = start >= 0 and tuple(labels[start:]) == tuple(result.output_tokens)
    if whole:
        before = summary.context[: len(summary.context) - len(answer)]
        labels_before = labels[:start]
    else:  # only some tokens are explained: the rest of the answer is among the text
        before, labels_before = summary.context, labels
    asked = _asked(labels_before, prompt) if whole else set()
    parts = ["prompt" if set(word.tokens) & asked or not asked else "template" for word in before]
    gaps = [*_gaps(labels_before, before), *_gaps(list(result.output_tokens), answer)]
    probabilities = [None] * len(before) + [entry.probability for entry in summary.words]
    words = tuple(
        PageWord(word.text, gap, part, word.content, probability)
        for word, gap, part, probability in zip(
            [*before, *answer],
            gaps,
            [*parts, *["answer"] * len(answer)],
            probabilities,
            strict=True,
        )
    )
    return words, len(before), whole


def _asked(labels: Sequence[str], prompt: str) -> set[int]:
    """The tokens of the user's own text among the prompt's; none where it is not found."""
    letters = [(n, c) for n, label in enumerate(labels) for c in label if not c.isspace()]
    text, wanted = "".join(c for _, c in letters), "".join(prompt.split())
    at = text.find(wanted) if wanted else -1
    return {n for n, _ in letters[at : at + len(wanted)]} if at >= 0 else set()


def _gaps(labels: Sequence[str], words: Sequence[Word]) -> list[str]:
    """What stands between each word and the one before it."""
    gaps, at, text = [], 0, "".join(labels)
    starts = [0]
    for label in labels:
        starts.append(starts[-1] + len(label))
    for word in words:
        found = text.find(word.text, max(at, starts[word.tokens[0]]))
        begin = found if found >= 0 else max(at, starts[word.tokens[0]])
        gaps.append(text[at:begin])
        at = begin + len(word.text) if found >= 0 else starts[word.tokens[-1] + 1]
    return gaps


def _method(
    result: ResultLike,
    name: str,
    views: Sequence[_View],
    summaries: Sequence[AnswerSummary],
    columns: int,
) -> PageMethod:
    """The evidence of one method; ``summaries`` are of the views, ``columns`` words of context."""
    sizes = {view.number: (view.image.height, view.image.width) for view in views}
    every = [summarise(result, size, number) for number, size in sizes.items()]  # all frames
    top = max(summary.vmax for summary in every)
    text = summaries[0].context_attr
    text = torch.nn.functional.pad(text, (0, columns - text.shape[1]))
    text_top = max(float(text.max()), 0.0) if text.numel() else 0.0
    scales = ", ".join(f"{scale:.3g}" for scale in result.scales)
    return PageMethod(
        name,
        f"{result.method}; scales {scales}" if result.method else f"scales {scales}",
        result.units,
        top,
        text_top,
        tuple(make_atlas(summary.grid_maps, top) for summary in summaries),
        grey_png(to_levels(text, text_top)) if text_top > 0 else "",
        tuple(_peak(n, every, views, summaries) for n in range(len(text))),
    )


def _peak(
    word: int,
    every: Sequence[AnswerSummary],
    views: Sequence[_View],
    summaries: Sequence[AnswerSummary],
) -> tuple[int, float, str] | None:
    """Where one word has most evidence; None where that is near zero everywhere."""
    top = max(summary.vmax for summary in every)
    entries = [summary.words[word] for summary in every]
    peaks = [(entry.peak.value, -n, entry.where) for n, entry in enumerate(entries) if entry.peak]
    value, image, where = max(peaks, default=(0.0, 0, ""))
    if value < NEAR_ZERO * top or value <= 0:
        return None
    own = [n for n, view in enumerate(views) if view.number == -image]
    shown = max(own, key=lambda n: float(summaries[n].grid_maps[word].max()))
    title = views[own[0]].title.split(", frame ")[0]
    return shown, value, f"{title}: {where}" if len(every) > 1 else where
