"""Results by word, phrase and place, against the tensors by hand."""

import numpy as np
import pytest
import torch

from captum_mllm.visualization.reading import find_words, phrase_of, words_at
from captum_mllm.words import group_words
from tests.oracle.pages import page_of

WORDS = group_words([" a", " gray", " zeb", "ra", " and", " a", " zebra", ",", " two-", "tone"])


@pytest.fixture(scope="module")
def result():
    return page_of(("lens",)).results["lens"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("zebra", (2,)),
        ("Gray  Zebra", (1, 2)),
        (("zebra", 1), (5,)),
        (("zebra", -1), (5,)),
        (("a", 1), (4,)),
        (-1, (7,)),
        (slice(1, 3), (1, 2)),
        (np.int64(2), (2,)),
        (torch.tensor(2), (2,)),
        ("zebra, two-tone", (5, 6, 7)),
        ("two-tone", (7,)),
    ],
)
def test_words_by_key(key, expected):
    assert find_words(WORDS, key) == expected


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("zebr", KeyError, "Did you mean 'zebra'.*Its words: a, gray, zebra, and"),
        (("zebra", 2), KeyError, "'zebra' occurs 2 times"),
        (("gray", 1), KeyError, "'gray' occurs once"),
        ("gray and", KeyError, "no 'gray and'"),
        ("", KeyError, "no ''"),
        (8, IndexError, "8 words"),
        (slice(9, 12), IndexError, "names no word"),
        (1.5, TypeError, "index, its text"),
        (("a", "b"), TypeError, "index, its text"),
        (True, TypeError, "index, its text"),
    ],
)
def test_other_keys_say_what_there_is(key, error, message):
    with pytest.raises(error, match=message):
        find_words(WORDS, key)


def test_phrase_is_the_largest_of_its_tokens(result):
    phrase = phrase_of(result, slice(3, 5))
    words = group_words(result.output_tokens)
    rows = [row for word in words[3:5] for row in word.tokens]
    assert phrase.rows == tuple(rows)
    assert phrase.text == f"{words[3].text} {words[4].text}"
    assert torch.equal(
        phrase.grid_attr[0], torch.stack([result.grid_attr[0][r] for r in rows]).amax(0)
    )
    assert phrase.probability == pytest.approx(float(result.output_probs[rows].prod()))
    start = len(result.input_tokens) - len(result.output_tokens)
    assert torch.equal(phrase.token_attr[: start + rows[0]],
                       result.token_attr[rows, : start + rows[0]].amax(0))  # fmt: skip
    assert not phrase.token_attr[start + rows[0] :].any()


def test_words_at_a_place(result):
    picture = (336, 336)
    maps = result.to_image(0, picture)
    words = group_words(result.output_tokens)
    for place, box in (((200, 90), (200, 90, 201, 91)), ((20, 100, 150, 260), (20, 100, 150, 260))):
        left, upper, right, lower = box
        found = words_at(result, place, picture)
        by_hand = {
            n: float(maps[list(word.tokens)].amax(0)[upper:lower, left:right].mean())
            for n, word in enumerate(words)
        }
        assert {each.word: each.value for each in found} == pytest.approx(by_hand)
        values = [each.value for each in found]
        assert values == sorted(values, reverse=True)
        assert found[0].text == words[found[0].word].text


@pytest.mark.parametrize(
    "place", [(400, 3), (-1, 3), (3,), (5, 5, 5, 9), (0, 0, 337, 9), (float("nan"), 1)]
)
def test_places_outside_are_refused(result, place):
    with pytest.raises(ValueError, match="place must"):
        words_at(result, place, (336, 336))


def test_as_the_model_saw_it_without_a_picture(result):
    grid = result.grids[0]
    found = words_at(result, (5, 9))
    by_hand = result.image_attr[0][:, 9, 5]
    assert found[0].value == pytest.approx(float(by_hand.max()))
    with pytest.raises(ValueError, match=f"{grid.width} x {grid.height} pixels"):
        words_at(result, (grid.width, 0))
    with pytest.raises(IndexError, match="1 images"):
        words_at(result, (1, 1), image=1)
