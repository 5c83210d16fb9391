"""Words and categories: plurals, synonyms, the longest phrase; TAM's rule under parity."""

import hashlib
import json

import numpy as np
import pytest

from captum_mllm.data import (
    COCO_NAMES,
    COCO_SYNONYMS,
    CategoryTable,
    match_categories,
    plural,
)
from captum_mllm.words import group_words

COCO = CategoryTable.coco()


def named(text, table=COCO, **settings):
    return match_categories(text.split(), table, **settings)


def test_coco_has_its_eighty_names_in_order():
    assert len(COCO_NAMES) == len(set(COCO_NAMES)) == 80
    assert (COCO_NAMES[0], COCO_NAMES[16], COCO_NAMES[52]) == ("person", "dog", "hot dog")
    assert (COCO_NAMES[21], COCO_NAMES[77], COCO_NAMES[79]) == ("bear", "teddy bear", "toothbrush")
    assert set(COCO_SYNONYMS) <= set(COCO_NAMES)


def test_no_phrase_of_coco_names_two_categories():
    phrases = [phrase for own in COCO.phrases for phrase in own]
    assert len(phrases) == len(set(phrases))


@pytest.mark.parametrize("name", COCO_NAMES)
def test_every_name_and_its_plural_name_it(name):
    assert set(named(name)) == {name}
    assert set(named(plural(name).upper())) == {name}


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("dog", "dogs"), ("bus", "buses"), ("couch", "couches"), ("toothbrush", "toothbrushes"),
        ("box", "boxes"), ("puppy", "puppies"), ("boy", "boys"), ("knife", "knives"),
        ("giraffe", "giraffes"), ("person", "people"), ("woman", "women"), ("child", "children"),
        ("policeman", "policemen"), ("human", "humans"), ("mouse", "mice"), ("sheep", "sheep"),
        ("scissors", "scissors"), ("skis", "skis"), ("wine glass", "wine glasses"),
        ("hair dryer", "hair dryers"), ("giraffe calf", "giraffe calves"), ("tv", "tvs"),
        ("deer", "deer"), ("fish", "fish"), ("hero", "heroes"), ("german", "germans"),
        ("roman", "romans"), ("talisman", "talismans"), ("ottoman", "ottomans"),
        ("shaman", "shamans"), ("doberman", "dobermans"), ("fireman", "firemen"),
        ("glasses", "glasses"), ("sunglasses", "sunglasses"), ("jeans", "jeans"),
        ("glass", "glasses"), ("people", "people"), ("dogs", "dogs"), ("children", "children"),
        ("passer-by", "passers-by"), ("mother-in-law", "mothers-in-law"),
        ("passerby", "passersby"), ("bowl of soup", "bowls of soup"), ("man (left)", "men (left)"),
        ("lens", "lenses"), ("virus", "viruses"), ("moose", "moose"), ("salmon", "salmon"),
        ("leaf", "leaves"), ("roof", "roofs"), ("photo", "photos"), ("piano", "pianos"),
        ("potato", "potatoes"), ("tooth", "teeth"), ("furniture", "furniture"),
        ("series", "series"), ("t-shirt", "t-shirts"), ("scarf", "scarves"),
    ],
)  # fmt: skip
def test_plurals(one, many):
    assert plural(one) == many


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a dog", [None, "dog"]),
        ("hot dogs", ["hot dog"] * 2),
        ("a hot sunny dog", [None, None, None, "dog"]),
        ("bear", ["bear"]),
        ("teddy bears", ["teddy bear"] * 2),
        ("a teddy-bear", [None, "teddy bear"]),
        ("TV", ["tv"]),
        ("two puppies and men", [None, "dog", None, "person"]),
        ("tennis racket", ["tennis racket"] * 2),
        ("tennis ball", ["sports ball"] * 2),
        ("tv remote control", ["tv", "remote", "remote"]),
        ("traffic light bus", ["traffic light"] * 2 + ["bus"]),
        ("doggy", [None]),
        ("hot", [None]),
        ("", []),
    ],
)
def test_words_name_categories(text, labels):
    assert list(named(text)) == labels


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("woman's hand", (" a", " woman", "'s", " hand")),
        ("woman's hand", (" a", " woman", "'", "s", " hands")),
        ("man (left)", (" a", " man", " (", "left", ")")),
        ("dog ", (" two", " dogs")),
        ("hot  dog", (" a", " hot", "-", "dog")),
        ("T-shirt", (" two", " T", "-", "sh", "irts")),
        ("no. 5", (" a", " no", ".", " 5")),
    ],
)
def test_names_are_cut_into_words_as_answers_are(name, tokens):
    words = [word.text for word in group_words(tokens)]
    labels = match_categories(words, CategoryTable.of([name]))
    assert labels == (None, *[name] * (len(words) - 1))


LVIS = ["stop_sign", "mouse_(computer_equipment)", "bow_(weapon)", "bow_(decorative_ribbons)",
        "T-shirt", "first-aid_kit", "fish", "fish_(food)", "ottoman", "jean"]  # fmt: skip
PANOPTIC = ["person", "tree-merged", "sky-other-merged", "wall-brick", "wall-other-merged",
            "window-blind", "window-other", "floor-wood", "table-merged", "door-stuff"]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "text", "labels"),
    [
        (LVIS, "a stop sign", [None, "stop_sign", "stop_sign"]),
        (LVIS, "two stop_signs", [None, "stop_sign"]),
        (LVIS, "a Stop-Sign", [None, "stop_sign"]),
        (LVIS, "a mouse", [None, "mouse_(computer_equipment)"]),
        (LVIS, "three mice", [None, "mouse_(computer_equipment)"]),
        (LVIS, "a bow", [None, None]),  # which of the two?
        (LVIS, "bow ( weapon )", ["bow_(weapon)"] * 4),
        (LVIS, "a t-shirt", [None, "T-shirt"]),
        (LVIS, "two T shirts", [None, "T-shirt", "T-shirt"]),
        (LVIS, "a first-aid kit", [None, "first-aid_kit", "first-aid_kit"]),
        (LVIS, "a fish", [None, "fish"]),
        (LVIS, "two ottomans", [None, "ottoman"]),
        (LVIS, "ottomen", [None]),
        (LVIS, "blue jeans", [None, "jean"]),
        (PANOPTIC, "trees", ["tree-merged"]),
        (PANOPTIC, "the sky", [None, "sky-other-merged"]),
        (PANOPTIC, "a brick wall", [None, "wall-brick", "wall-brick"]),
        (PANOPTIC, "the wall", [None, "wall-other-merged"]),
        (PANOPTIC, "two window blinds", [None, "window-blind", "window-blind"]),
        (PANOPTIC, "windows", ["window-other"]),
        (PANOPTIC, "a wood floor", [None, "floor-wood", "floor-wood"]),
        (PANOPTIC, "tables and doors", ["table-merged", None, "door-stuff"]),
        (PANOPTIC, "people", ["person"]),
        (["people", "person"], "a person", [None, "person"]),
        (["people", "person"], "people", ["people"]),
        (["people"], "a person", [None, "people"]),
        (["children", "leaves"], "a child and a leaf", [None, "children", None, None, "leaves"]),
        (["glasses", "cup"], "a glass", [None, None]),
        (["glasses", "glass"], "a glass", [None, "glass"]),
        (["glasses", "glass"], "two glasses", [None, "glasses"]),
        (["glass", "glasses"], "two glasses", [None, "glasses"]),  # a name before a plural
        (["skis", "jeans"], "skis and jeans", ["skis", None, "jeans"]),
        (["passer-by"], "two passers-by", [None, "passer-by"]),
        (["passer-by"], "passers by", ["passer-by"] * 2),
        (["teddy bear"], "teddy - bear", ["teddy bear"] * 3),  # as WordPiece decodes it
        (["teddy bear"], "teddy\u2011bears", ["teddy bear"]),
        (["dog"], "dog-friendly", [None]),
        (["dog"], "dog -", ["dog", None]),
        (["café"], "cafe\u0301s", ["café"]),
        (["woman\u2019s hand"], "woman 's hands", ["woman\u2019s hand"] * 3),
        (["斑马"], "斑马", ["斑马"]),
        (["自行车"], "一 辆 自行 车", [None, None, "自行车", "自行车"]),
        (["-other", "_"], "dog", [None]),
    ],
)
def test_names_as_data_sets_write_them(names, text, labels):
    assert list(named(text, CategoryTable.of(names))) == labels


def test_parity_on_coco_is_that_of_the_release():
    """Word by word what the table of COCO gave before names of other data sets were read."""
    phrases = zip(COCO.names, COCO.phrases, strict=True)
    words = sorted({word for _, own in phrases for phrase in own for word in phrase})
    labels = match_categories(words, COCO, parity=True)
    table = {word: label for word, label in zip(words, labels, strict=True) if label}
    assert len(table) == 471
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    assert digest == "40ab83cb3fd6463156d4e37868e86781463a47ddf955a3bd59230e711eb403b4"


def test_parity_takes_no_punctuation_for_a_category():
    table = CategoryTable.of(["woman's hand", "man (left)"])
    labels = match_categories(["dog", "'s", "(", "hand"], table, parity=True)
    assert labels == (None, None, None, "woman's hand")


def test_the_longest_phrase_wins_then_the_table_then_the_left():
    table = CategoryTable.of(["a b", "b c", "c d e"])
    assert named("a b c d", table) == ("a b", "a b", None, None)
    assert named("a b c d e", table) == ("a b", "a b", "c d e", "c d e", "c d e")
    assert named("b c d e", table) == (None, "c d e", "c d e", "c d e")
    swapped = CategoryTable.of(["b c", "a b"])
    assert named("a b c", swapped) == (None, "b c", "b c")
    assert named("x x x", CategoryTable.of(["x x"])) == ("x x", "x x", None)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("dog", ["hot dog"]),
        ("a bear", [None, "teddy bear"]),
        ("hot dog", ["hot dog"] * 2),
        ("people", ["person"]),
        ("ball", ["sports ball"]),
        ("cat", ["cat"]),
    ],
)
def test_parity_lets_the_last_matching_category_win(text, labels):
    assert list(named(text, parity=True)) == labels


def slow_labels(words, table, parity):
    if parity:
        return [
            ([n for n, own in zip(table.names, table.phrases, strict=True)
              if any(word in phrase for phrase in own)] or [None])[-1]
            for word in words
        ]  # fmt: skip
    names = {own[0] for own in table.phrases}
    spans = [(a, b) for a in range(len(words)) for b in range(a + 1, len(words) + 1)]
    found = [
        (b - a, n, a, b)
        for a, b in spans
        for n, own in enumerate(table.phrases)
        if tuple(words[a:b]) in own
        if tuple(words[a:b]) == own[0] or tuple(words[a:b]) not in names
    ]
    labels = [None] * len(words)
    while found:
        best = min(found, key=lambda f: (-f[0], f[1], f[2]))
        labels[best[2] : best[3]] = [table.names[best[1]]] * best[0]
        found = [f for f in found if f[3] <= best[2] or f[2] >= best[3]]
    return labels


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_matching_is_that_of_the_slow_twin(seed, parity):
    rng = np.random.default_rng(seed)
    letters = "abcd"
    names = {" ".join(rng.choice(list(letters), rng.integers(1, 4))) for _ in range(6)}
    table = CategoryTable.of(sorted(names), {min(names): ["c c"]})
    for _ in range(20):
        words = [str(w) for w in rng.choice(list(letters), 8)]
        expected = slow_labels(words, table, parity)
        assert list(match_categories(words, table, parity=parity)) == expected


def test_bad_tables_are_errors():
    with pytest.raises(ValueError, match="names must be distinct"):
        CategoryTable.of(["dog", "dog"])
    with pytest.raises(ValueError, match=r"synonyms are given for \['cat'\]"):
        CategoryTable.of(["dog"], {"cat": ["kitten"]})
