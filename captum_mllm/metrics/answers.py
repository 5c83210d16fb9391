"""Obj-IoU and Func-IoU of an answer: its words, the categories they name, their masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from captum_mllm.data import CategoryTable, match_categories
from captum_mllm.functional import upsample
from captum_mllm.geometry import ImageGeometry, maps_to_picture
from captum_mllm.metrics._arrays import Maps, Masks, as_maps, as_masks
from captum_mllm.metrics.localization import (
    auc,
    average_precision,
    energy_in_mask,
    obj_iou,
    oracle_iou,
    otsu_threshold,
    pointing_game,
    precision_recall,
)
from captum_mllm.result import UNIT, MLLMAttributionResult
from captum_mllm.words import FUNCTION_WORDS, Word, group_words


def is_function_word(word: str) -> bool:
    """Whether a word is of the closed classes that Func-IoU scores.

    Args:
        word: as written; case does not matter.

    Returns:
        True for a determiner, pronoun, conjunction, modal, interjection, possessive ending,
        wh-word or "there".

    Reference:
        TAM's classes, as a fixed list (`FUNCTION_WORDS`) instead of a tagger's choice.

    Example:
        >>> [is_function_word(word) for word in ("The", "dog", "and", "on")]
        [True, False, True, False]
    """
    return word.strip().lower().replace("\u2019", "'") in FUNCTION_WORDS


def noun_threshold(
    map: Float[np.ndarray, "tokens rows cols"] | Float[Tensor, "tokens rows cols"],
    nouns: Sequence[Sequence[int]],
    size: tuple[int, int],
) -> float:
    """The level above which one image's maps count as lit, set by its nouns.

    Args:
        map: the tokens' maps on the grid, jointly normalised to [0, 1].
        nouns: the tokens of every noun, annotated or not.
        size: (height, width) of the masks, in pixels; thresholds are taken there.

    Returns:
        Mean over nouns of the largest Otsu threshold among their tokens; NaN without nouns.

    Raises:
        ValueError: a noun without tokens, or see :func:`captum_mllm.metrics.otsu_threshold`.
        ImportError: scikit-image is not installed.

    Reference:
        TAM's Func-IoU, its threshold.

    Example:
        >>> import numpy as np
        >>> maps = np.array([[[0.0, 0.0], [1.0, 1.0]], [[0.5, 0.5], [0.0, 0.0]]])
        >>> 0 < noun_threshold(maps, [[0]], (8, 8)) < 1
        True
    """
    if any(not tokens for tokens in nouns):
        raise ValueError("nouns must name at least one token each, got an empty one; leave it out.")
    maps = torch.from_numpy(as_maps(map))  # upsampled one by one, as pictures can be large
    largest = [
        max(float(otsu_threshold(upsample(maps[[t]], size)[0])) for t in tokens) for tokens in nouns
    ]
    return float(np.mean(largest)) if largest else float("nan")


def func_iou(
    map: Float[np.ndarray, "tokens rows cols"] | Float[Tensor, "tokens rows cols"],
    nouns: Sequence[Sequence[int]],
    function_words: Sequence[Sequence[int]],
    size: tuple[int, int],
) -> Float64[np.ndarray, " words"]:
    """How dark an image's function words are: share of cells below the nouns' threshold.

    Args:
        map: the tokens' maps on the grid, jointly normalised to [0, 1]
            (:func:`captum_mllm.functional.joint_min_max`): a map that is normalised on its own
            always lights up somewhere.
        nouns: the tokens of every noun, annotated or not.
        function_words: the tokens of every function word (:func:`is_function_word`).
        size: (height, width) of the masks, in pixels.

    Returns:
        Value in [0, 1] per function word, 1 where its map is dark everywhere; NaN for all where
        there is no noun.

    Raises:
        ValueError: see :func:`noun_threshold`; a function word without tokens.
        ImportError: scikit-image is not installed.

    Reference:
        TAM's Func-IoU: the share of *grid* cells strictly below :func:`noun_threshold`, mean over
        a word's tokens. Despite its name it is not an intersection over union.

    Example:
        >>> import numpy as np
        >>> dog, the = np.array([[0.0, 1.0], [0.0, 0.9]]), np.array([[0.0, 0.0], [0.0, 0.95]])
        >>> func_iou(np.stack([the, dog]), nouns=[[1]], function_words=[[0]], size=(2, 2)).tolist()
        [0.75]
    """
    if any(not tokens for tokens in function_words):
        raise ValueError("function_words must name at least one token each, got an empty one.")
    threshold = noun_threshold(map, nouns, size)
    if np.isnan(threshold):
        return np.full(len(function_words), np.nan)
    dark = (as_maps(map) < threshold).mean((1, 2))
    return np.array([dark[list(tokens)].mean() for tokens in function_words], dtype=np.float64)


def f1_iou(obj: float, func: float) -> float:
    """Harmonic mean of the two global means.

    Args:
        obj: mean Obj-IoU over all words of all images, in [0, 1].
        func: mean Func-IoU, likewise.

    Returns:
        Value in [0, 1]; 0 where both are 0.

    Raises:
        ValueError: a value outside [0, 1].

    Reference:
        TAM's F1-IoU.

    Example:
        >>> round(f1_iou(0.2737, 0.6844), 4)  # TAM on Qwen2-VL-2B, as published
        0.391
    """
    for name, value in (("obj", obj), ("func", func)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")
    return 2 * obj * func / (obj + func) if obj + func else 0.0


@dataclass(frozen=True, eq=False)
class WordScores:
    """The scores of one image's words, see :func:`score_words`.

    Args:
        obj: (mentions,): Obj-IoU of each mention of an annotated category.
        mentions: the category of each.
        func: (function words,): Func-IoU of each; NaN where the answer names no category.
        function_words: those words.
        more: per further metric that was requested, (mentions,): its value of each mention.
    """

    obj: Float64[np.ndarray, " mentions"]
    mentions: tuple[str, ...]
    func: Float64[np.ndarray, " words"]
    function_words: tuple[str, ...]
    more: Mapping[str, Float64[np.ndarray, " mentions"]] = field(default_factory=dict)


MASK_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "obj_iou": obj_iou,
    "average_precision": average_precision,
    "auc": auc,
    "oracle_iou": oracle_iou,
    "pointing_game": pointing_game,
    "energy_in_mask": energy_in_mask,
    "precision": lambda maps, masks: precision_recall(maps, masks)[0],
    "recall": lambda maps, masks: precision_recall(maps, masks)[1],
}
"""Name -> function of a word's tokens for :func:`word_scores_of`: (tokens,) values in [0, 1] from
(tokens, height, width) maps and masks."""


def word_obj_iou(
    map: Maps,
    words: Sequence[Sequence[int]],
    labels: Sequence[str | None],
    masks: Mapping[str, Masks],
) -> Float64[np.ndarray, " mentions"]:
    """Obj-IoU of the words of an answer that name annotated objects.

    Of a word's tokens the best counts; adjacent words with the same label count once, the better
    of them.

    Args:
        map: (tokens, height, width) in [0, 1], at the masks' size, jointly normalised.
        words: the tokens of each word, in the order of the text, punctuation included (it separates
            words that would otherwise be adjacent).
        labels: per word the category that it names, or None
            (:func:`captum_mllm.data.match_categories`).
        masks: per annotated category one mask of all its objects in the picture, (height, width).
            Words of other categories have no mask to be compared with and are left out.

    Returns:
        Value in [0, 1] per mention, in order; NaN where the mask is empty.

    Raises:
        ValueError: ``words`` and ``labels`` of different lengths, a word without tokens, or see
            :func:`captum_mllm.metrics.obj_iou`.
        ImportError: scikit-image is not installed.

    Reference:
        TAM's Obj-IoU.

    Example:
        >>> import numpy as np
        >>> maps = np.array([[[0.0, 0.9]], [[0.9, 0.9]], [[0.9, 0.0]]])
        >>> masks = {"hot dog": np.array([[0, 1]])}
        >>> word_obj_iou(maps, [[0], [1, 2]], ["hot dog", "hot dog"], masks).tolist()
        [1.0]
    """
    return word_scores_of(map, words, labels, masks, ("obj_iou",))["obj_iou"]


def word_scores_of(
    map: Maps,
    words: Sequence[Sequence[int]],
    labels: Sequence[str | None],
    masks: Mapping[str, Masks],
    metrics: Sequence[str],
) -> dict[str, Float64[np.ndarray, " mentions"]]:
    """Any metrics of maps and masks for the words of an answer that name annotated objects.

    Words, mentions and masks are those of :func:`word_obj_iou`. Of a mention's tokens the best
    counts, for each metric on its own; precision and recall belong together, so both are those of
    the token with the best Obj-IoU.

    Args:
        map: see :func:`word_obj_iou`.
        words: likewise.
        labels: likewise.
        masks: likewise.
        metrics: names of :data:`MASK_METRICS`.

    Returns:
        Per metric its value per mention, in order; NaN where the mask is empty (or, for "auc",
        full).

    Raises:
        ValueError: an unknown metric, or see :func:`word_obj_iou`.
        ImportError: scikit-image or scikit-learn is not installed.

    Reference:
        The best token, and precision and recall at it, are TAM's; for the other metrics ours.

    Example:
        >>> import numpy as np
        >>> maps = np.array([[[0.0, 0.9]], [[0.9, 0.9]]])
        >>> scores = word_scores_of(maps, [[0, 1]], ["dog"], {"dog": np.array([[0, 1]])},
        ...     ["precision", "recall", "auc"])
        >>> {name: values.tolist() for name, values in scores.items()}
        {'precision': [1.0], 'recall': [1.0], 'auc': [1.0]}
    """
    mentions = _mentions(words, labels)
    return _scores_of(lambda tokens: map[tokens], mentions, masks, _known(metrics))


def _known(metrics: Sequence[str]) -> Sequence[str]:
    unknown = sorted(set(metrics) - set(MASK_METRICS))
    if unknown:
        raise ValueError(f"metrics: {unknown} are unknown; there are {', '.join(MASK_METRICS)}.")
    return metrics


def _scores_of(
    pixels_of: Callable[[list[int]], Maps],
    mentions: Sequence[tuple[str, list[int]]],
    masks: Mapping[str, Masks],
    metrics: Sequence[str],
) -> dict[str, Float64[np.ndarray, " mentions"]]:
    """See :func:`word_scores_of`; one mention's maps at a time, as pictures can be large."""
    values: dict[str, list[float]] = {name: [] for name in metrics}
    paired = [name for name in metrics if name in ("precision", "recall")]
    for label, tokens in mentions:
        if label not in masks:
            continue
        truth = as_masks(masks[label], f"masks[{label!r}]")
        pixels = as_maps(pixels_of(tokens))
        truths = np.broadcast_to(truth, (len(tokens), *truth.shape))
        best = int(np.argmax(obj_iou(pixels, truths))) if paired else 0
        for name, of_metric in values.items():
            per_token = np.asarray(MASK_METRICS[name](pixels, truths))
            of_metric.append(float(per_token[best] if name in paired else per_token.max()))
    return {name: np.array(mentions, dtype=np.float64) for name, mentions in values.items()}


def _mentions(
    words: Sequence[Sequence[int]], labels: Sequence[str | None]
) -> list[tuple[str, list[int]]]:
    """Runs of adjacent words with one label: the label and all their tokens."""
    if len(words) != len(labels):
        raise ValueError(
            f"labels must hold one entry per word, got {len(labels)} for {len(words)} words."
        )
    if any(not len(tokens) for tokens in words):
        raise ValueError("words must name at least one token each, got an empty one; leave it out.")
    runs = groupby(zip(words, labels, strict=True), key=lambda pair: pair[1])
    return [
        (label, [token for tokens, _ in run for token in tokens])
        for label, run in runs
        if label is not None
    ]


def score_words(
    result: MLLMAttributionResult,
    masks: Mapping[str, Masks],
    *,
    table: CategoryTable | None = None,
    parity: bool = False,
    image: int = 0,
    geometry: ImageGeometry | None = None,
    processor: Any = None,
    metrics: Sequence[str] = (),
) -> WordScores:
    r"""Obj-IoU and Func-IoU of one answer about one annotated picture.

    A noun is a word that names a category of the table, annotated or not; no tagger is used.

    Args:
        result: jointly normalised maps (units "[0, 1]") of a whole answer.
        masks: per annotated category one mask of all its objects, (height, width) of the original
            picture.
        table: the categories, default COCO's 80.
        parity: default False. True reproduces two defects of TAM's released evaluation: the last
            matching category wins (:func:`match_categories`), and the model's map is stretched
            over the whole picture even where the processor had cropped its centre. (That it skips
            samples whose token counts differ, and gives no interval, has no counterpart here:
            another number of tokens is an error, intervals are :func:`paired_bootstrap`'s.)
        image: which image the masks are of, default the first.
        geometry: the box of the picture that the model saw; see ``result.to_image``.
        processor: gives that box where the result doesn't know it.
        metrics: further metrics of the mentions, names of :data:`MASK_METRICS`; default none.

    Returns:
        :class:`WordScores`. The mean over all values of all images is the metric; their harmonic
        mean is :func:`captum_mllm.metrics.f1_iou`.

    Raises:
        ValueError: raw maps, no masks, masks of different sizes or of categories that the table
            lacks, an unknown geometry, a video.
        ImportError: scikit-image is not installed.

    Reference:
        TAM's evaluation, corrected unless ``parity``.

    Example:
        >>> from captum_mllm import TokenActivationMap
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> scene = make_scene(1)
        >>> picture, drawn = render_pil(scene, 112)
        >>> masks = {name: drawn[n] for n, name in enumerate(scene.categories)}
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> answer = f"there is a {scene.categories[0]}"
        >>> result = TokenActivationMap(model, processor).attribute(inputs, target=answer)
        >>> scores = score_words(result, masks, table=CategoryTable.of(scene.categories))
        >>> scores.mentions == scene.categories[:1], scores.function_words
        (True, ('there', 'a'))
    """
    if result.units != UNIT:
        raise ValueError(
            f"result must hold jointly normalised maps (units {UNIT!r}), such as those of ARC "
            f"and TokenActivationMap, got units {result.units!r}: thresholds on raw logits are not "
            f"comparable."
        )
    table = table or CategoryTable.coco()
    size = _check_masks(masks, table)
    maps = result.grid_attr[image]
    if maps.ndim != 3:
        raise ValueError("result's image is a video, which has no mask of one picture.")
    words = group_words(result.output_tokens)
    labels = match_categories([word.text for word in words], table, parity=parity)
    box = None if parity else result.geometry(image, size, geometry=geometry, processor=processor)

    def pixels_of(rows: list[int]) -> Maps:
        chosen = maps[rows]
        return upsample(chosen, size) if box is None else maps_to_picture(chosen, box, size)

    tokens = [word.tokens for word in words]
    mentions = _mentions(tokens, labels)
    function_words: list[Word] = [word for word in words if is_function_word(word.text)]
    scores = _scores_of(pixels_of, mentions, masks, _known(["obj_iou", *metrics]))
    return WordScores(
        obj=scores["obj_iou"],
        mentions=tuple(label for label, _ in mentions if label in masks),
        func=func_iou(
            maps,
            nouns=[of_mention for _, of_mention in mentions],
            function_words=[word.tokens for word in function_words],
            size=size,
        ),
        function_words=tuple(word.text for word in function_words),
        more={name: scores[name] for name in metrics},
    )


def _check_masks(masks: Mapping[str, Masks], table: CategoryTable) -> tuple[int, int]:
    """The masks' one size (height, width)."""
    unknown = sorted(set(masks) - set(table.names))
    if unknown:
        raise ValueError(
            f"masks are of categories {unknown}, which the table lacks: pass "
            f"table=CategoryTable.of(names, synonyms)."
        )
    sizes = {tuple(mask.shape) for mask in masks.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 2:
        raise ValueError(
            f"masks must be (height, width), all of the picture's size, got {sorted(sizes)}."
        )
    height, width = next(iter(sizes))
    return int(height), int(width)
