"""Words of real tokenizers of both kinds, trained on a few lines: pieces come back as words."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from captum_mllm.words import group_words, marks_spaces, token_labels

LINES = ["a dog and a zebra", "two hot dogs near the dining table", "a dog's tail", "the zebras"]


def byte_level():
    """As GPT-2's, Qwen's and Llama 3's: bytes, a space is part of the piece after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece():
    """As Llama 2's: a mark for each space, one more at the beginning, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    splitter = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=310, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, sentencepiece], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "words",
    [
        ["a", "dog", "and", "a", "zebu"],
        ["two", "hot", "dogs", "on", "a", "table"],
        ["bathtub", "and", "zest"],
    ],
)
def test_pieces_come_back_as_words(make, words):
    tokenizer = make()
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    labels = token_labels(ids, tokenizer)
    assert len(labels) > len(words)  # some word is in pieces
    assert marks_spaces(labels)
    found = group_words(labels)
    assert [word.text for word in found] == words
    spaces = {n for n, label in enumerate(labels) if not label.strip()}  # a space on its own
    assert [t for word in found for t in word.tokens] == sorted(set(range(len(ids))) - spaces)


@pytest.mark.parametrize("make", [byte_level, sentencepiece], ids=lambda make: make.__name__)
def test_punctuation_stands_alone_and_hyphens_join(make):
    tokenizer = make()
    text = "a teddy-bear, two dogs."
    labels = token_labels(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)
    assert [word.text for word in group_words(labels)] == [
        "a",
        "teddy-bear",
        ",",
        "two",
        "dogs",
        ".",
    ]
