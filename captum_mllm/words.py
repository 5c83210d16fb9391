"""From tokens to words: labels, grouping, word lists, word maps and where a word's map peaks.

A person reads words, a model generates tokens. Pure functions, all **our choice**:

- labels are pieces of the text that the tokenizer decodes; words are those of Unicode's
  segmentation of that text, whatever the tokens are, and punctuation stands alone;
- a word's map is the elementwise maximum of its tokens' maps (a cell counts if it supports any
  part of the word), its probability the product of its tokens' probabilities.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.geometry import ImageGeometry

_SPACE_MARKS = ("\u2581", "\u0120")  # how SentencePiece and byte-level BPE write a space
_WORD_STARTS = f" {''.join(_SPACE_MARKS)}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>$")  # how SentencePiece writes a byte of a character
_UNFINISHED = "\ufffd"
_WINDOW = 4  # as many tokens before a token show how it is decoded; a character has 4 bytes

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
        Labels such as ``" dog"``, which make the decoded text when joined; ``"<id 123>"`` without
        a tokenizer. A character of several tokens is in the label of its first one; the labels of
        the others are empty, or begin after it.

    Example:
        >>> token_labels([5, 123])
        ('<id 5>', '<id 123>')
    """
    if tokenizer is None:
        return tuple(f"<id {int(token_id)}>" for token_id in ids)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {token_id for token_id, token in added.items() if getattr(token, "special", False)}
    reader = _Reader(tokenizer)
    for token_id in map(int, ids):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if not token:
            reader.add_whole(f"<id {token_id}>")
        elif byte := _BYTE.match(token):
            reader.add_byte(token_id, bytes.fromhex(byte[1]))
        elif token_id in special:
            reader.add_whole(tokenizer.convert_tokens_to_string([token]) or token)
        else:
            reader.add_piece(token_id, token)
    reader.close()
    return tuple(reader.labels)


@dataclass
class _Reader:
    """Decodes tokens one after another, each with those before it.

    A text whose last character is not finished decodes to U+FFFD; it is known when the token that
    finishes it is there, and given to ``owner``, the token that began it.
    """

    tokenizer: Any
    labels: list[str] = field(default_factory=list)
    before: list[int] = field(default_factory=list)  # ids whose text is known
    group: list[int] = field(default_factory=list)  # ids since then
    text: str = ""  # of the group, with U+FFFD at its end
    owner: int | None = None
    decoder: Any = None  # of bytes; None: the last token was none

    def add_whole(self, label: str) -> None:
        self.close()
        self.before = []
        self.labels.append(label)

    def add_byte(self, token_id: int, byte: bytes) -> None:
        if self.decoder is None:
            self.close()
            self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        fresh = self.decoder.decode(byte)
        self.before = [*self.before, token_id]
        self._append(fresh, unfinished=bool(self.decoder.getstate()[0]))

    def add_piece(self, token_id: int, token: str) -> None:
        if self.decoder is not None or len(self.group) > _WINDOW:
            self.close()
        self.before = self.before[-_WINDOW:] if not self.group else self.before
        known = len(self.text.rstrip(_UNFINISHED))
        self.group.append(token_id)
        base, full = self._decode(self.before), self._decode([*self.before, *self.group])
        if not full.startswith(base):  # pieces that change those before them: this one alone
            self.close()
            base, full = "", self._decode([token_id])
            self.group, known = [token_id], 0
        self.text = full[len(base) :]
        stable = self.text.rstrip(_UNFINISHED)
        fresh = stable[known:]
        if not self.before and len(self.group) == 1 and token.startswith(_SPACE_MARKS):
            fresh = fresh if fresh[:1].isspace() else f" {fresh}"  # stripped as the text's first
        if fresh or self.text:
            self._append(fresh, unfinished=stable != self.text)
        else:
            self._append(" " if token.strip(_WORD_STARTS) == "" else token, unfinished=False)
        if stable == self.text:
            self.before, self.group, self.text = [*self.before, *self.group], [], ""

    def close(self) -> None:
        """Take what is unfinished for what it is: a piece of a character."""
        rest = self.decoder.decode(b"", True) if self.decoder else self.text
        if self.owner is not None:
            self.labels[self.owner] += rest[len(rest.rstrip(_UNFINISHED)) :]
        self.before = [*self.before, *self.group]
        self.group, self.text, self.owner, self.decoder = [], "", None, None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""

    def _append(self, fresh: str, unfinished: bool) -> None:
        if self.owner is not None and fresh:
            self.labels[self.owner] += fresh[0]
        self.labels.append(fresh if self.owner is None else fresh[1:])
        if not unfinished:
            self.owner = None
        elif fresh or self.owner is None:
            self.owner = len(self.labels) - 1


def marks_spaces(tokens: Sequence[str]) -> bool:
    """Whether labels hold the spaces between words: those of :func:`token_labels` do.

    Args:
        tokens: labels of another source, of a whole text; the longer the better.

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

_CLITIC = re.compile(r"['\u2019](s|re|ve|ll|d|m)$", re.IGNORECASE)
_SPECIAL = re.compile(r"<(?!0x)[^<>\s]+>$|\[[A-Z]+\]$|<id \d+>$")
_HYPHENS = "-\u2010\u2011"
# What Unicode leaves open: hyphens and underscores join words, signs between digits numbers; a
# point or colon between letters ends a sentence or a key, except in "e.g." and "U.S.".
_JOINED = re.compile(rf"(?<=[^\W_])[{_HYPHENS}](?=[^\W_])|(?<=\d)[.,:/](?=\d)")
_ABBREVIATION = re.compile(r"(?<![^\W_])(?:[^\W\d_]\.){2,}(?![^\W_])")
_APART = re.compile(r"(?<=[^\W_] )['\u2019] (?=(?:s|re|ve|ll|d|m)(?![^\W_]))")  # "dog ' s"
_CUT = re.compile(r"(?<=[^\W\d_])[.:](?=[^\W_])|(?<=[^\W_])[.:](?=[^\W\d_])|^_+|_+$")


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


def split_words(text: str) -> tuple[tuple[int, int], ...]:
    """Where the words of a text are, by Unicode's rules and ICU's dictionaries.

    Chinese, Japanese, Thai, Lao, Khmer and Burmese words are found by dictionary. Punctuation and
    the clitics ('s, 're, ...) are words of their own; hyphens, underscores and other apostrophes
    inside a word and points inside a number belong to it. White space is not a word.

    Args:
        text: any text.

    Returns:
        (start, end) of each word, in characters, in order.

    Reference:
        Unicode Standard Annex 29, "Unicode Text Segmentation", word boundaries; the rest is our
        choice.

    Example:
        >>> text = "A teddy-bear's tail.The 斑马在草地上"
        >>> [text[start:end] for start, end in split_words(text)]
        ['A', 'teddy-bear', "'s", 'tail', '.', 'The', '斑马', '在', '草地', '上']
    """
    from icu4py.breakers import WordBreaker  # ICU's dictionaries: not before they are needed

    sizes = (1 + (ord(character) > 0xFFFF) for character in text)  # ICU counts in UTF-16
    place = {units: index for index, units in enumerate(accumulate(sizes, initial=0))}
    coarse = WordBreaker(text.encode("utf-8", "replace").decode(), "en").segments()
    cuts = {place[start] for start, _ in coarse} | {len(text)}
    cuts -= {edge for match in _JOINED.finditer(text) for edge in match.span()}
    for match in _ABBREVIATION.finditer(text):
        cuts -= set(range(match.start() + 1, match.end()))
    for match in _APART.finditer(text):
        cuts -= {match.end() - 1, match.end()}
    spans: list[tuple[int, int]] = []
    for start, end in pairwise(sorted(cuts | {0})):
        if not text[start:end].isspace():
            spans += _finer(text, start, end)
    return tuple(spans)


def _finer(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """One of Unicode's words, cut where we cut more."""
    word = text[start:end]
    inside: set[int] = set()
    if not _ABBREVIATION.fullmatch(word):
        inside = {edge for match in _CUT.finditer(word) for edge in match.span()}
    if (clitic := _CLITIC.search(word)) and clitic.start():
        inside.add(clitic.start())
    return [(start + a, start + b) for a, b in pairwise(sorted({0, len(word)} | inside))]


def group_words(tokens: Sequence[str], spaced: bool = True) -> tuple[Word, ...]:
    """Group the labels of tokens to the words of the text that they make (:func:`split_words`).

    Special tokens stand alone. A token belongs to one word at most: what is in one token is one
    word, without the punctuation at its ends if there is more.

    Args:
        tokens: labels as in ``result.output_tokens``.
        spaced: False: the labels don't hold the spaces (:func:`marks_spaces`), so every token is a
            word. Default True.

    Example:
        >>> [word.text for word in group_words(["A", " zeb", "ra", "'s", " tail", "."])]
        ['A', 'zebra', "'s", 'tail', '.']
    """
    labels = _plain_labels(tokens)
    found = [] if spaced else [(x.strip(), (n,)) for n, x in enumerate(labels) if x.strip()]
    start = 0
    for n, label in enumerate([*labels, "</s>"] if spaced else ()):  # one more ends the last run
        if _SPECIAL.match(label.strip()):
            found += _words_of_run(labels[start:n], start)
            found += [(label.strip(), (n,))] * (n < len(labels))
            start = n + 1
    return tuple(Word(text, group, is_content_word(text)) for text, group in found)


def _plain_labels(tokens: Sequence[str]) -> list[str]:
    """Labels in which spaces, line breaks and characters stand as they are."""
    decoded = any(" " in token for token in tokens)  # so that U+0120 is a letter of Maltese
    reader = _Reader(None)
    for token in tokens:
        if byte := _BYTE.match(token):
            reader.add_byte(0, bytes.fromhex(byte[1]))
        elif decoded:
            reader.add_whole(token)
        else:
            body = token.lstrip(_WORD_STARTS)
            reader.add_whole(" " * (len(token) - len(body)) + body.replace("\u010a", "\n"))
    reader.close()
    return reader.labels


def _words_of_run(labels: Sequence[str], first: int) -> list[tuple[str, tuple[int, ...]]]:
    """(text, tokens) of the words of labels without special tokens."""
    text = "".join(labels)
    ends = list(accumulate(map(len, labels)))
    spans = split_words(text)
    groups: list[tuple[list[int], list[int]]] = []  # (spans, tokens) of each word
    at = 0
    for token, (label, end) in enumerate(zip(labels, ends, strict=True)):
        start = end - len(label)
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        touched = [*takewhile(lambda n, end=end: spans[n][0] < end, range(at, len(spans)))]
        if not label and groups and groups[-1][1][-1] == token - 1:
            groups[-1][1].append(token)  # it finishes a character of the token before
        elif touched and groups and groups[-1][0][-1] >= touched[0]:
            groups[-1][0].extend(n for n in touched if n > groups[-1][0][-1])
            groups[-1][1].append(token)
        elif touched:
            groups.append((touched, [token]))
    return [
        (_text_of(text, [spans[n] for n in own]), tuple(first + token for token in group))
        for own, group in groups
    ]


def _text_of(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text of a word, without punctuation at its ends where that shares a token with it."""
    whole = text[spans[0][0] : spans[-1][1]]
    if _CLITIC.fullmatch(whole.replace(" ", "")):
        return whole.replace(" ", "")
    named = [n for n, (a, b) in enumerate(spans) if any(map(str.isalnum, text[a:b]))]
    together = named == [*range(named[0], named[-1] + 1)] if named else False
    if not together or whole.split() != [whole]:  # "<b>dog</b>", "& dog": more than signs around it
        return whole
    return text[spans[named[0]][0] : spans[named[-1]][1]]


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
