import pytest
import torch

from captum_mllm.geometry import ImageGeometry
from captum_mllm.words import (
    FUNCTION_WORDS,
    find_peak,
    group_words,
    is_content_word,
    join_tokens,
    marks_spaces,
    region_name,
    word_attributions,
    word_maps,
    word_probabilities,
)


def texts(*tokens):
    return [word.text for word in group_words(tokens)]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ((" a", " zeb", "ra", "."), ["a", "zebra", "."]),
        (("zeb", "ra", " runs"), ["zebra", "runs"]),  # the first token has no space
        (("▁a", "▁zeb", "ra"), ["a", "zebra"]),
        (("Ġa", "Ġzeb", "ra"), ["a", "zebra"]),
        ((" dog", "'s", " tail"), ["dog", "'s", "tail"]),
        ((" don", "'", "t", " go"), ["don't", "go"]),
        ((" dog", "'", "s", " tail"), ["dog", "'s", "tail"]),  # as Llama 2's tokenizer has it
        ((" zeb", "ra", "\u2019", "s", "."), ["zebra", "\u2019s", "."]),
        ((" we", "'", "ll"), ["we", "'ll"]),
        ((" rock", "'", "s", "alt"), ["rock'salt"]),
        ((" dog", "'", "s", "-", "eye"), ["dog's-eye"]),
        ((" ted", "-", "bear"), ["ted-bear"]),
        ((" dog", " -", " cat"), ["dog", "-", "cat"]),
        ((" dog", "-", " cat"), ["dog", "-", "cat"]),
        ((" 3", ".", "5"), ["3.5"]),
        ((" 3", ".", " 5"), ["3", ".", "5"]),
        ((" dog", ".", "Cat"), ["dog", ".", "Cat"]),
        ((" dog", "\n", "cat"), ["dog", "cat"]),
        ((" dog", " ", "cat"), ["dog", "cat"]),
        (("这", "是", "狗"), ["这", "是", "狗"]),
        ((" dog", "</s>", "cat"), ["dog", "</s>", "cat"]),
        ((" caf", "<0xC3>", "<0xA9>"), ["café"]),
        ((" u", " \u0120ur", "\u0121"), ["u", "\u0120ur\u0121"]),  # Maltese, no mark of a space
        ((" dog", ".The"), ["dog", "The"]),  # one token, one word
        ((" dog", '."', "\n\n"), ["dog", '."']),
        ((" 'd", "og", "'"), ["dog", "'"]),  # as GPT-2's tokenizer has it
        ((" & dog", " &", "cat"), ["& dog", "&", "cat"]),
        (("the", "ir dog"), ["their dog"]),  # a token can't be in two words
        (("\u6591", "\u9a6c", "\u5728"), ["\u6591\u9a6c", "\u5728"]),
        (("\u6591", "\u9a6c\u5728"), ["\u6591\u9a6c\u5728"]),
        (("\u00e9", "", "", "t"), ["\u00e9t"]),
        (("", " dog", ""), ["dog"]),
        (("<id 5>", "<id 6>"), ["<id 5>", "<id 6>"]),
        (("dog\ud800",), ["dog"]),  # half of a surrogate pair
        ((), []),
        ((".",), ["."]),
        (("$", "5"), ["$", "5"]),
    ],
)
def test_tokens_become_words(tokens, words):
    assert texts(*tokens) == words


def test_tokenizer_that_marks_no_spaces_has_a_word_per_token():
    tokens = ["a", "dog", "."]
    assert not marks_spaces(tokens)
    assert [word.text for word in group_words(tokens, spaced=False)] == tokens
    assert join_tokens(tokens, spaced=False) == "a dog ."


def test_spaces_are_told_from_the_labels():
    assert marks_spaces(["a", " dog"])
    assert marks_spaces(["a", "▁dog"])
    assert not marks_spaces(["a", " ", ""])


def test_every_token_belongs_to_at_most_one_word_in_order():
    tokens = (" a", " zeb", "ra", "'s", " ", " teddy", "-", "bear", ".", "</s>")
    indices = [token for word in group_words(tokens) for token in word.tokens]
    assert indices == [0, 1, 2, 3, 5, 6, 7, 8, 9]  # 4 is white space


@pytest.mark.parametrize(
    "word", ["the", "The", "is", "on", "'s", "\u2019s", "don\u2019t", "which", ".", "$"]
)
def test_function_words_and_punctuation_are_no_content(word):
    assert not is_content_word(word)


@pytest.mark.parametrize("word", ["dog", "left", "two", "3.5", "small", "狗", "café"])
def test_content_words(word):
    assert is_content_word(word)


def test_map_of_a_word_is_the_maximum_and_its_probability_the_product():
    words = group_words([" a", " zeb", "ra"])
    maps = torch.rand(3, 4, 5)
    torch.testing.assert_close(
        word_maps(maps, words), torch.stack([maps[0], torch.maximum(maps[1], maps[2])])
    )
    probs = torch.tensor([0.5, 0.4, 0.2])
    torch.testing.assert_close(word_probabilities(probs, words), torch.tensor([0.5, 0.08]))


def test_no_words_make_empty_tensors():
    assert word_maps(torch.rand(2, 3, 4), ()).shape == (0, 3, 4)
    assert word_probabilities(torch.rand(2), ()).shape == (0,)
    assert word_attributions(torch.rand(2, 5), (), group_words([" a"])).shape == (0, 1)


def test_attribution_between_words_is_the_maximum_over_both_words_tokens():
    attr = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 6.0]])
    rows, columns = group_words([" zeb", "ra"]), group_words([" pic", "ture", " of"])
    assert word_attributions(attr, rows, columns).tolist() == [[5.0, 6.0]]


def test_peak_is_the_centre_of_the_largest_cell_in_pixels_of_the_picture():
    cells = torch.zeros(2, 4)
    cells[1, 3] = 0.5
    peak = find_peak(cells, ImageGeometry.stretched(height=100, width=200), (100, 200))
    assert peak is not None
    assert (peak.value, peak.x, peak.y, peak.region) == (0.5, 175, 75, "bottom right")


def test_peak_undoes_a_crop():
    cells = torch.zeros(1, 2)
    cells[0, 0] = 1
    peak = find_peak(cells, ImageGeometry((100.0, 0.0, 200.0, 100.0)), (100, 300))
    assert peak is not None
    assert (peak.x, peak.y, peak.region) == (125, 50, "centre")


def test_peak_in_the_padding_does_not_count():
    cells = torch.tensor([[9.0], [1.0], [0.0]])  # the first row lies above the picture
    peak = find_peak(cells, ImageGeometry((0.0, -100.0, 100.0, 200.0)), (100, 100))
    assert peak is not None
    assert (peak.value, peak.y) == (1.0, 50)


def test_map_of_zeros_has_no_peak():
    assert find_peak(torch.zeros(3, 3), ImageGeometry.stretched(9, 9), (9, 9)) is None


@pytest.mark.parametrize(
    ("x", "y", "name"),
    [
        (0, 0, "top left"),
        (50, 10, "top"),
        (99, 50, "right"),
        (50, 99, "bottom"),
        (50, 50, "centre"),
    ],
)
def test_regions(x, y, name):
    assert region_name(x, y, (100, 100)) == name


def test_display_greys_more_than_func_iou_measures():
    measured_only = {"&", "'", "hi", "ok", "okay", "wow", "yourselves"}
    assert {word for word in FUNCTION_WORDS if is_content_word(word)} == measured_only - {"&", "'"}
    for word in ("so", "can't", "is", "not", "of", "beside", "well"):
        assert word not in FUNCTION_WORDS
        assert not is_content_word(word)
    assert len(FUNCTION_WORDS) == 91
