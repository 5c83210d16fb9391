"""Function words: a map of "the" should light up nowhere."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from captum_mllm.functional import upsample
from captum_mllm.metrics._arrays import as_maps
from captum_mllm.metrics.localization import otsu_threshold

# The words of the Penn Treebank classes that TAM's evaluation takes: CC DT EX MD POS PRP PRP$ UH
# WDT WP WP$ WRB. A fixed list, without a tagger: a word that is in one of them *and* elsewhere
# ("that" as conjunction, "no" as answer) always counts.
FUNCTION_WORDS = frozenset(
    """
    and or but nor & plus
    a an the this that these those each every some any no all both either neither another
    there
    can could may might must shall should will would ought 'll 'd
    's '
    i you he she it we they me him her us them mine yours his hers ours theirs
    myself yourself himself herself itself ourselves yourselves themselves
    my your its our their
    yes oh hi hello ok okay wow please
    which what whatever whichever who whom whoever whose when where why how whenever wherever
    """.split()  # noqa: SIM905
)
"""The function words, lower case: see :func:`is_function_word`."""


def is_function_word(word: str) -> bool:
    """Whether a word is of the closed classes that Func-IoU looks at.

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
    maps = torch.from_numpy(as_maps(map))  # brought to pixels one by one, as pictures can be large
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
        a word's tokens. Despite its name no intersection over union.

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
