"""From tokens to words: labels, grouping, word lists, word maps and where a word's map peaks.

A person reads words, a model generates tokens. Pure functions, all **our choice**:

- a label that starts with a space starts a word, one without continues it, punctuation stands
  alone;
- a word's map is the elementwise maximum of its tokens' maps (a cell counts if it supports any
  part of the word), its probability the product of its tokens' probabilities.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.geometry import ImageGeometry

_SPACE_MARKS = ("\u2581", "\u0120")  # how SentencePiece and byte-level BPE write a space
_WORD_STARTS = f" {''.join(_SPACE_MARKS)}"

# ---- labels ----------------------------------------------------------------------------------


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer itself; None for None.

    Args:
        processor: a transformers processor or tokenizer, or None.

    Raises:
        TypeError: something else, such as an image processor alone.
    """
    if processor is None:
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None:  # a processor of pictures alone
        return None
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(
            f"processor must be the model's processor (AutoProcessor.from_pretrained(...)) or "
            f"tokenizer, got {type(processor).__name__}."
        )
    return tokenizer


def token_labels(ids: Iterable[int], tokenizer: Any = None) -> tuple[str, ...]:
    """One label per token id; a leading space marks the start of a word.

    Args:
        ids: token ids.
        tokenizer: a transformers tokenizer, or None.

    Returns:
        Labels such as ``" dog"``; ``"<id 123>"`` without a tokenizer.

    Example:
        >>> token_labels([5, 123])
        ('<id 5>', '<id 123>')
    """
    return tuple(_label(int(i), tokenizer) for i in ids)


def _label(token_id: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return f"<id {token_id}>"
    token = tokenizer.convert_ids_to_tokens(token_id)
    if not token:
        return f"<id {token_id}>"
    starts_word = token.startswith(_SPACE_MARKS)
    text = tokenizer.convert_tokens_to_string([token])
    if "\ufffd" in text:  # a byte of a longer character: the raw token tells more
        return token
    return f" {text.strip(' ')}" if starts_word else text or token


def marks_spaces(tokens: Sequence[str]) -> bool:
    """Whether a tokenizer marks the spaces between words, judged by labels of a whole text.

    Args:
        tokens: labels as in ``result.input_tokens``; the longer the better.

    Example:
        >>> marks_spaces(["a", " dog"]), marks_spaces(["a", "dog"])
        (True, False)
    """
    return any(token[:1] in tuple(_WORD_STARTS) and token.strip(_WORD_STARTS) for token in tokens)


def join_tokens(tokens: Sequence[str], spaced: bool = True) -> str:
    """The text of tokens.

    Args:
        tokens: labels as in ``result.output_tokens``.
        spaced: as for :func:`group_words`.

    Example:
        >>> join_tokens([" a", " zeb", "ra"]), join_tokens(["a", "zebra"], spaced=False)
        ('a zebra', 'a zebra')
    """
    return ("" if spaced else " ").join(tokens).strip()


# ---- words -----------------------------------------------------------------------------------

_APOSTROPHES = "'\u2019"
_CLITIC = re.compile(rf"[{_APOSTROPHES}](s|re|ve|ll|d|m)$", re.IGNORECASE)
_SPECIAL = re.compile(r"<(?!0x)[^<>\s]+>$|\[[A-Z]+\]$")
_NO_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@dataclass(frozen=True)
class Word:
    """One word of a text.

    Args:
        text: the word without the space before it.
        tokens: indices of its tokens.
        content: whether it carries meaning of its own (see :func:`is_content_word`).
    """

    text: str
    tokens: tuple[int, ...]
    content: bool


def group_words(tokens: Sequence[str], spaced: bool = True) -> tuple[Word, ...]:
    """Group the labels of tokens to words.

    A leading space starts a word; so does the first token. Punctuation, special tokens, the
    clitics ('s, 're, ..., of one token or two) and tokens of scripts written without spaces stand
    alone. Hyphens and other apostrophes inside a word and points inside a number belong to it.
    White space is not a word.

    Args:
        tokens: labels as in ``result.output_tokens``.
        spaced: whether the tokenizer marks spaces (:func:`marks_spaces`); with False every token
            is a word. Default True.

    Example:
        >>> [word.text for word in group_words(["A", " zeb", "ra", "'s", " tail", "."])]
        ['A', 'zebra', "'s", 'tail', '.']
    """
    groups: list[list[int]] = []
    bare = [_bare(token) for token in tokens]
    joins = False  # may the next token continue the last group?
    for index, token in enumerate(tokens):
        if not bare[index]:
            joins = False
            continue
        starts = token[0] in _WORD_STARTS or token[0].isspace()
        if joins and spaced and _ends_as_clitic(bare, tokens, index):
            groups.append([index])  # the apostrophe; its letters follow
            continue
        if not spaced or _stands_alone(bare, tokens, index):
            groups.append([index])
            joins = False
            continue
        if joins and not starts:
            groups[-1].append(index)
        else:
            groups.append([index])
        joins = not token[-1].isspace()
    texts = ["".join(bare[index] for index in group) for group in groups]
    return tuple(
        Word(text, tuple(group), is_content_word(text))
        for text, group in zip(texts, groups, strict=True)
    )


def _bare(token: str) -> str:
    """A label without white space around it, in whatever way that is written."""
    return token.strip().strip(_WORD_STARTS).replace("\u010a", "").strip()


def _stands_alone(bare: Sequence[str], tokens: Sequence[str], index: int) -> bool:
    text = bare[index]
    if _SPECIAL.match(text) or _CLITIC.match(text):
        return True
    if unicodedata.name(text[0], "").startswith(_NO_SPACES):
        return True
    if not all(unicodedata.category(character)[0] in "PS" for character in text):
        return False
    if "\ufffd" in text:  # a piece of a character
        return False
    return not _connects(bare, tokens, index)


def _connects(bare: Sequence[str], tokens: Sequence[str], index: int) -> bool:
    """Whether this punctuation sits inside a word (teddy-bear) or a number (3.5)."""
    if not 0 < index < len(tokens) - 1 or bare[index] != tokens[index]:
        return False
    left, right = bare[index - 1], bare[index + 1]
    if not left or not right or right != tokens[index + 1].rstrip():
        return False
    if bare[index] in f"-{_APOSTROPHES}":
        return left[-1].isalnum() and right[0].isalnum()
    return bare[index] in ".,:/" and left[-1].isdigit() and right[0].isdigit()


def _ends_as_clitic(bare: Sequence[str], tokens: Sequence[str], index: int) -> bool:
    """Whether this apostrophe and the token after it are a clitic that ends the word."""
    if bare[index] not in tuple(_APOSTROPHES) or not _connects(bare, tokens, index):
        return False
    after = index + 2
    if not _CLITIC.match(bare[index] + bare[index + 1]):
        return False
    if after == len(tokens) or not bare[after] or tokens[index + 1][-1].isspace():
        return True
    starts = tokens[after][0] in _WORD_STARTS or tokens[after][0].isspace()
    return starts or _stands_alone(bare, tokens, after)


# ---- word lists ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ClosedClass:
    """The words of one class; those that only one of the two lists takes stand apart."""

    words: str = ""
    func_iou_only: str = ""
    display_only: str = ""


# A fixed list, as a tagger would need a download: a word that is in a class *and* elsewhere ("that"
# as conjunction, "no" as answer) always counts. The tags are the Penn Treebank's.
_CLOSED_CLASSES = {
    "CC": _ClosedClass("and but or nor plus", "&", "so yet"),
    "DT": _ClosedClass(
        "a an the this that these those each every some any no all both either neither another"
    ),
    "EX": _ClosedClass("there"),
    "MD": _ClosedClass(
        "can could may might must shall should will would ought 'll 'd",
        display_only="cannot can't couldn't shouldn't won't wouldn't",
    ),
    "POS": _ClosedClass("'s", "'"),
    "PRP": _ClosedClass(
        "i you he she it we they me him her us them mine yours his hers ours theirs "
        "myself yourself himself herself itself ourselves themselves",
        "yourselves",
    ),
    "PRP$": _ClosedClass("my your his its our their"),
    "UH": _ClosedClass("oh yes hello please", "hi ok okay wow", "ah hey well"),
    "WDT, WP, WP$, WRB": _ClosedClass(
        "which what whatever whichever who whom whose whoever when where why how whenever wherever"
    ),
    "auxiliary verbs, negation": _ClosedClass(
        display_only="am is are was were be been being do does did has have had having 're 've 'm "
        "isn't aren't wasn't weren't don't doesn't didn't hasn't haven't hadn't not n't"
    ),
    "IN, TO, RP": _ClosedClass(
        display_only="of in on at by for with from to into onto upon over under above below "
        "between among near beside behind before after across through along around against about "
        "as like than if while because since until unless although though during without within "
        "off out up down"
    ),
}

FUNCTION_WORDS = frozenset(
    word
    for group in _CLOSED_CLASSES.values()
    for word in f"{group.words} {group.func_iou_only}".split()
)
"""The function words of TAM's evaluation, lower case, as a fixed list of its Penn Treebank tags
CC DT EX MD POS PRP PRP$ UH WDT WP WP$ WRB: see :func:`captum_mllm.metrics.is_function_word`."""

_DISPLAYED_AS_FUNCTION_WORDS = frozenset(
    word
    for group in _CLOSED_CLASSES.values()
    for word in f"{group.words} {group.display_only}".split()
)


def is_content_word(text: str) -> bool:
    """Whether a word carries meaning of its own: not a function word, punctuation or special token.

    Function words are here, next to the tags of :data:`FUNCTION_WORDS`, also prepositions,
    auxiliary verbs and negations.

    Args:
        text: one word.

    Example:
        >>> [is_content_word(text) for text in ("Dog", "the", ".", "</s>", "two")]
        [True, False, False, False, True]
    """
    if _SPECIAL.match(text) or not any(character.isalnum() for character in text):
        return False
    return (
        text.lower().replace("\u2019", "'").strip('.,;:!?"()') not in _DISPLAYED_AS_FUNCTION_WORDS
    )


# ---- maps of words ---------------------------------------------------------------------------


def word_maps(
    maps: Float[Tensor, "targets rows cols"], words: Sequence[Word]
) -> Float[Tensor, "words rows cols"]:
    """A map per word: the elementwise maximum over its tokens' maps.

    Args:
        maps: one map per token, on any grid.
        words: their grouping.

    Example:
        >>> maps = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> word_maps(maps, group_words([" zeb", "ra"])).tolist()
        [[[1.0, 2.0]]]
    """
    if not words:
        return maps[:0]
    return torch.stack([maps[list(word.tokens)].amax(0) for word in words])


def word_probabilities(
    probs: Float[Tensor, " targets"], words: Sequence[Word]
) -> Float[Tensor, " words"]:
    """A probability per word: the product over its tokens.

    Args:
        probs: one probability per token.
        words: their grouping.

    Example:
        >>> word_probabilities(torch.tensor([0.5, 0.5]), group_words([" zeb", "ra"])).tolist()
        [0.25]
    """
    if not words:
        return probs[:0]
    return torch.stack([probs[list(word.tokens)].prod() for word in words])


def word_attributions(
    token_attr: Float[Tensor, "targets tokens"], words: Sequence[Word], context: Sequence[Word]
) -> Float[Tensor, "words context"]:
    """Attribution of each context word to each word: the maximum over both words' tokens.

    Args:
        token_attr: attributions of tokens to tokens.
        words: grouping of the rows.
        context: grouping of the columns.

    Example:
        >>> attr = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
        >>> pair = group_words([" zeb", "ra"])
        >>> word_attributions(attr, pair, group_words([" a", " b"])).tolist()
        [[0.30000001192092896, 0.4000000059604645]]
    """
    columns = [token_attr[:, list(word.tokens)].amax(1) for word in context]
    if not columns or not words:
        return token_attr.new_zeros(len(words), len(context))
    by_column = torch.stack(columns, dim=1)
    return torch.stack([by_column[list(word.tokens)].amax(0) for word in words])


# ---- peaks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Where a map is largest.

    Args:
        value: the map's largest value, in its units.
        x: column in pixels of the original picture.
        y: row in pixels of the original picture.
        region: the same in words, e.g. "top left".
    """

    value: float
    x: int
    y: int
    region: str


def region_name(x: float, y: float, size: tuple[int, int]) -> str:
    """Which ninth of a picture a point lies in, in words.

    Args:
        x: column, pixels.
        y: row, pixels.
        size: (height, width) of the picture, pixels.

    Example:
        >>> region_name(10, 90, (100, 100)), region_name(50, 50, (100, 100))
        ('bottom left', 'centre')
    """
    height, width = size
    row = ("top", "", "bottom")[min(2, max(0, int(3 * y / height)))]
    col = ("left", "", "right")[min(2, max(0, int(3 * x / width)))]
    return f"{row} {col}".strip() or "centre"


def find_peak(
    cells: Float[Tensor, "rows cols"], geometry: ImageGeometry, size: tuple[int, int]
) -> Peak | None:
    """The largest cell of a map, placed in the original picture.

    Args:
        cells: the map on the model's grid.
        geometry: the part of the picture that the grid covers.
        size: (height, width) of the picture, pixels.

    Returns:
        The centre of the largest cell whose centre lies in the picture; None where the map is
        0 everywhere in it.

    Example:
        >>> whole = ImageGeometry.stretched(height=40, width=40)
        >>> find_peak(torch.tensor([[0.0, 0.0], [0.0, 0.7]]), whole, (40, 40)).region
        'bottom right'
    """
    rows, cols = cells.shape
    height, width = size
    left, upper, right, lower = geometry.box
    x = left + (torch.arange(cols) + 0.5) * (right - left) / cols
    y = upper + (torch.arange(rows) + 0.5) * (lower - upper) / rows
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None, :]
    visible = torch.where(inside, cells, torch.zeros_like(cells))
    best = int(visible.argmax())
    value = float(visible.flatten()[best])
    if value <= 0:
        return None
    column, row = int(x[best % cols]), int(y[best // cols])
    return Peak(value, column, row, region_name(column, row, size))
