"""Words of real tokenizers of seven kinds, trained on a few lines: pieces come back as words.

The tokenizers are small, so that most words are in several pieces and letters beyond ASCII in
bytes. Every case is a text and its words; a word is right if its text and its tokens are.
"""

import json
import re
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from captum_mllm.data import CategoryTable, match_categories
from captum_mllm.words import group_words, token_labels

LINES = [
    "a dog and a zebra",
    "two hot dogs near the dining table",
    "a dog's tail",
    "the zebras",
    "斑马 狗 草地",
    "две собаки и кошка",
    "كلب وقطة",
]
MARK = "\u2581"
# How the releases of GPT-4, Llama 3 and Qwen cut a text before they look for pieces.
CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(tokenizer, trainer, lines=LINES, **settings):
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings
    )


def of_bytes(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    return trained(tokenizer, trainer)


@cache
def byte_level():
    """As GPT-2's: bytes, a space is part of the piece after it."""
    return of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False))


@cache
def tiktoken_like():
    """As GPT-4's, Llama 3's and Qwen's: bytes, a sign may be part of the piece after it."""
    cut = pre_tokenizers.Split(Regex(CUT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return of_bytes(pre_tokenizers.Sequence([cut, bytes_]))


def with_marks(normalizer, splitter, strip):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=special, show_progress=False, initial_alphabet=[MARK, *ASCII]
    )
    lines = [line for line in LINES if line.isascii()]
    return trained(tokenizer, trainer, lines, unk_token="<unk>")


ASCII = [chr(code) for code in range(33, 127)]


@cache
def sentencepiece():
    """As Llama 2's: a mark for each space, one more at the beginning, bytes for what is unknown."""
    marks = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    return with_marks(marks, pre_tokenizers.Split(MARK, "merged_with_next"), strip=True)


@cache
def sentencepiece_unprefixed():
    """As Gemma's: a mark for each space, none at the beginning."""
    splitter = pre_tokenizers.Split(MARK, "merged_with_next")
    return with_marks(normalizers.Replace(" ", MARK), splitter, strip=False)


def unigrams(scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(MARK, prepend_scheme=scheme)
    letters = sorted({character for text, _ in TEXTS for character in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=len(set(letters) | set(ASCII)) + 60,
        initial_alphabet=[*ASCII, *letters],
        special_tokens=["<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    return trained(tokenizer, trainer, unk_token="<unk>")


@cache
def unigram():
    """As T5's and XLM-R's: pieces by likelihood, a mark for each space and at the beginning."""
    return unigrams("always")


@cache
def unigram_unprefixed():
    """The same without a mark at the beginning."""
    return unigrams("never")


@cache
def wordpiece():
    """As BERT's: pieces inside a word begin with ##, spaces are not in the pieces."""
    letters = sorted({*ASCII, *(character for text, _ in TEXTS for character in text)})
    pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces += ["dog", "cat", "and", "the", "ze", "##bra", "##gs"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


# Texts by script and their words; those without letters, digits or emoji are left out.
CASES = json.loads(Path(__file__).with_name("word_cases.json").read_text(encoding="utf-8"))
TEXTS = [(text, words) for cases in CASES.values() for text, words in cases]
EXACT = [byte_level, tiktoken_like, sentencepiece, sentencepiece_unprefixed, unigram]
EXACT += [unigram_unprefixed]
ALL = [*EXACT, wordpiece]
NOT_IN_ICU = {"一辆自行车"}  # 自行车, a bicycle, becomes two words
WRONG = {make.__name__: NOT_IN_ICU for make in ALL}  # docs/limits.md lists them
for make in (sentencepiece, sentencepiece_unprefixed):
    WRONG[make.__name__] = NOT_IN_ICU | {"the dog's tail"}  # "dog's" is one token
WRONG["wordpiece"] = NOT_IN_ICU | {"don't", "don\u2019t go", "м'яч"}  # "don ' t" when decoded

by_name = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
exact_by_name = pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)


def ids_of(make, text):
    return make()(text, add_special_tokens=False)["input_ids"]


def grouped(make, text):
    """(labels, words) of a text."""
    labels = token_labels(ids_of(make, text), make())
    return labels, group_words(labels)


def named(words):
    """The texts of words with letters, digits or emoji."""
    texts = [word.text for word in words]
    return [t for t in texts if any(c.isalnum() or c >= "\U0001f000" or c == "\u2764" for c in t)]


def expected(make, words):
    """WordPiece puts spaces around the signs inside a word, which decoding keeps."""
    parts = re.sub(r"(?<=\w)[-\u2011_.,:/]", " ", words) if make is wordpiece else words
    return parts.split()


@by_name
def test_hard_cases(make):
    wrong = {
        text for text, words in TEXTS if named(grouped(make, text)[1]) != expected(make, words)
    }
    assert wrong == WRONG[make.__name__]


def test_hard_cases_are_many_and_few_are_wrong():
    assert len(TEXTS) * len(ALL) >= 650
    assert {"Latin", "Cyrillic", "Arabic", "Chinese", "Japanese", "Thai"} <= set(CASES)
    assert sum(map(len, WRONG.values())) <= 0.02 * len(TEXTS) * len(ALL)
    for make in ALL:  # the cases are hard: words are in pieces, letters in bytes
        tokens = sum(len(grouped(make, text)[0]) for text, _ in TEXTS)
        assert tokens > 1.5 * sum(len(grouped(make, text)[1]) for text, _ in TEXTS)


@exact_by_name
@pytest.mark.parametrize("text", [text for text, _ in TEXTS])
def test_labels_are_the_decoded_text_and_each_token_is_in_one_word(make, text):
    labels, words = grouped(make, text)
    decoded = make().decode(ids_of(make, text), clean_up_tokenization_spaces=False)
    assert "".join(labels).removeprefix(" ") == decoded.removeprefix(" ") == text
    tokens = [token for word in words for token in word.tokens]
    assert tokens == sorted(set(tokens))
    assert all(not labels[n].strip() for n in set(range(len(labels))) - set(tokens))
    for word in words:
        own = "".join(labels[n] for n in word.tokens)
        assert word.text in own
        assert list(word.tokens) == list(range(word.tokens[0], word.tokens[-1] + 1))


@by_name
@pytest.mark.parametrize("words", [["zebra"], ["斑马"], ["зебра"], ["a", "zebu"]])
def test_answer_after_a_prompt(make, words):
    tokenizer = make()
    answer = ids_of(make, " ".join(words))
    prompt = ids_of(make, "a dog:" if words != ["斑马"] else "狗:")
    labels = token_labels([*prompt, *answer], tokenizer)[len(prompt) :]
    found = group_words(labels)
    assert [word.text for word in found] == words
    spaces = {n for n, label in enumerate(labels) if label == " "}
    assert {n for word in found for n in word.tokens} == set(range(len(answer))) - spaces


@pytest.mark.parametrize(
    "make", [byte_level, tiktoken_like, sentencepiece], ids=lambda m: m.__name__
)
def test_character_of_several_tokens_is_in_its_first_label(make):
    labels, words = grouped(make, "é\U0001f415")
    assert labels[-6:] == ("é", "", "\U0001f415", "", "", "")
    assert [len(word.tokens) for word in words] == [len("".join(labels[:-4]).strip()) + 1, 4]


@pytest.mark.parametrize(
    "make", [byte_level, tiktoken_like, sentencepiece], ids=lambda m: m.__name__
)
def test_answer_that_ends_in_a_character(make):
    ids = ids_of(make, "dog \U0001f415")[:-1]
    labels = token_labels(ids, make())
    assert len(labels) == len(ids)
    assert "".join(labels).strip().rstrip("\ufffd") == "dog "
    assert "\ufffd" in "".join(labels)
    assert group_words(labels)[0].text == "dog"


def test_special_tokens_and_unknown_ids_stand_alone():
    tokenizer = byte_level()
    dog = ids_of(byte_level, " dog")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    try:
        labels = token_labels([*dog, *ids_of(byte_level, "</s>"), *dog, 99999], tokenizer)
        assert [word.text for word in group_words(labels)] == ["dog", "</s>", "dog", "<id 99999>"]
    finally:
        byte_level.cache_clear()


def test_pieces_without_any_marks_are_words():
    """What such a tokenizer decodes has a space between all pieces."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "zeb": 1, "ra": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    labels = token_labels([0, 1, 2], tokenizer)
    assert labels == ("a", " zeb", " ra")
    assert [word.text for word in group_words(labels)] == ["a", "zeb", "ra"]


@by_name
def test_names_are_found_in_what_tokenizers_make_of_them(make):
    table = CategoryTable.of(["teddy bear", "stop_sign", "woman's hand", "zebra", "斑马"])
    text = "Teddy-bear, stop sign/Zebras.The woman's hand: stop_sign"
    words = grouped(make, text)[1]
    labels = match_categories([word.text for word in words], table)
    runs = [label for label, _ in groupby(labels) if label]
    assert runs == ["teddy bear", "stop_sign", "zebra", "woman's hand", "stop_sign"]
