"""Which category a word names: COCO's 80 names, plurals and synonyms; the longest phrase wins."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from captum_mllm.words import split_words

_COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""


COCO_NAMES: tuple[str, ...] = tuple(name.strip() for name in _COCO.split(","))
"""The names of COCO's 80 categories, in the order of their ids."""


COCO_SYNONYMS: dict[str, tuple[str, ...]] = {
    "person": ("man", "woman", "boy", "girl", "child", "kid", "baby", "toddler", "guy", "lady",
               "human", "people", "player", "skier", "surfer", "skateboarder", "snowboarder",
               "rider", "cyclist", "batter", "pitcher", "catcher", "pedestrian", "chef"),
    "bicycle": ("bike",),
    "car": ("sedan", "suv", "taxi", "automobile"),
    "motorcycle": ("motorbike", "motor bike", "scooter", "moped"),
    "airplane": ("plane", "aeroplane", "aircraft", "jet", "airliner"),
    "bus": ("double decker",),
    "train": ("locomotive", "tram"),
    "truck": ("lorry", "pickup truck", "fire truck"),
    "boat": ("ship", "sailboat", "canoe", "kayak", "ferry"),
    "traffic light": ("stoplight", "stop light", "traffic signal"),
    "fire hydrant": ("hydrant",),
    "bird": ("duck", "goose", "pigeon", "seagull", "parrot", "owl", "swan"),
    "cat": ("kitten", "kitty"),
    "dog": ("puppy",),
    "horse": ("pony", "foal"),
    "sheep": ("lamb",),
    "cow": ("cattle", "calf", "bull", "ox"),
    "backpack": ("rucksack", "knapsack"),
    "umbrella": ("parasol",),
    "handbag": ("purse", "hand bag"),
    "tie": ("necktie",),
    "suitcase": ("luggage",),
    "skis": ("ski",),
    "sports ball": ("ball", "soccer ball", "tennis ball", "football", "basketball", "baseball",
                    "volleyball"),
    "baseball glove": ("mitt",),
    "skateboard": ("skate board",),
    "surfboard": ("surf board",),
    "tennis racket": ("racket", "racquet", "tennis racquet"),
    "wine glass": ("wineglass",),
    "cup": ("mug", "coffee cup"),
    "hot dog": ("hotdog",),
    "donut": ("doughnut",),
    "couch": ("sofa",),
    "potted plant": ("houseplant", "house plant", "pot plant"),
    "dining table": ("table", "dinner table"),
    "tv": ("television", "television set", "tv screen"),
    "laptop": ("laptop computer", "notebook computer"),
    "mouse": ("computer mouse",),
    "remote": ("remote control", "game controller", "wii remote"),
    "cell phone": ("phone", "cellphone", "mobile phone", "smartphone", "smart phone"),
    "microwave": ("microwave oven",),
    "oven": ("stove",),
    "refrigerator": ("fridge", "freezer"),
    "teddy bear": ("teddy", "stuffed bear"),
    "hair drier": ("hair dryer", "hairdryer", "blow dryer"),
    "toothbrush": ("tooth brush",),
}  # fmt: skip
"""Common synonyms of COCO's names, without their plurals: our choice, far from complete."""


# What pluralizer's rules get wrong among the names of things.
_UNCOUNTABLE = "baggage broccoli cattle furniture jewelry luggage police"
_MANS = "caiman cayman doberman german hetman norman ottoman roman shaman talisman turkoman"
_IRREGULAR = {
    "lens": "lenses", "virus": "viruses", "buffalo": "buffaloes",
    **{word: f"{word}s" for word in _MANS.split()},
}  # fmt: skip
_PLURAL_ONLY = """binoculars clothes glasses goggles headphones jeans leggings overalls pajamas
pants pliers pyjamas scissors shears shorts stairs sunglasses tights tongs trousers tweezers"""
_BEFORE_NOUNS = "at|by|for|from|in|of|on|to|under|with"  # "passer-by", "bowl of soup"
_HEAD = re.compile(rf"(.+?)((?:[ -](?:{_BEFORE_NOUNS})(?:[ -].*)?| \(.*)?)")

# How COCO panoptic and COCO stuff write names: what is left over, and "wall-brick".
_LEFT_OVER = re.compile(r"(?:-(?:other|merged|stuff))+$")
_SURFACE = re.compile(r"(wall|floor|ceiling)-(\w+)$")
_LINK = re.compile(r"[-_\u2010\u2011]")


Phrase = tuple[str, ...]


@cache
def _pluralizer() -> Any:
    from pluralizer import Pluralizer

    rules = Pluralizer()
    for word in _UNCOUNTABLE.split():
        rules.add_uncountable_rule(word)
    for one, many in _IRREGULAR.items():
        rules.add_irregular_rule(one, many)
    rules.add_plural_rule(re.compile("([\u00e0-\u00f6\u00f8-\u00ff])$"), "$1s")  # "cafés"
    return rules


def plural(phrase: str) -> str:
    """The plural of an English noun, or of a noun phrase by its head: the word before "of", "by".

    Args:
        phrase: lower case, e.g. "wine glass". What is a plural already stays as it is.

    Returns:
        The plural, lower case.

    Example:
        >>> [plural(word) for word in ("wine glass", "knife", "puppy", "person", "passer-by")]
        ['wine glasses', 'knives', 'puppies', 'people', 'passers-by']
    """
    match = _HEAD.fullmatch(phrase)
    if match is None:
        return phrase
    head, rest = match[1], match[2]
    before = head[: 1 + max(head.rfind(mark) for mark in " -_")]
    return f"{before}{_pluralizer().plural(head[len(before) :])}{rest}"


def _words(phrase: str) -> Phrase:
    """A phrase's words, split as an answer's are: "woman's hand" has three."""
    return tuple(phrase[start:end] for start, end in split_words(phrase))


def _plain_name(name: str) -> str:
    """A name as people write it: of LVIS ("stop_sign"), of COCO panoptic ("sky-other-merged")."""
    return " ".join(_LEFT_OVER.sub("", name.lower().replace("_", " ")).split()) or name.lower()


def _variants(name: str) -> tuple[str, ...]:
    """Other ways to say a name; they count if no other category is called so."""
    bare = re.sub(r" ?\([^()]*\)$", "", name)  # "mouse (computer equipment)", of LVIS
    turned = _SURFACE.sub(r"\2 \1", name)  # "wall-brick", of COCO panoptic
    *before, last = name.split(" ")
    one = last if last in _PLURAL_ONLY.split() else _pluralizer().singular(last)
    if _pluralizer().plural(one) != last or not _pluralizer().is_plural(last):
        one = last
    single = " ".join([*before, one])  # "people"
    return tuple(form for form in dict.fromkeys((bare, turned, single)) if form and form != name)


@dataclass(frozen=True)
class CategoryTable:
    """Names of categories and the phrases that stand for each; the order of the names counts.

    Args:
        names: the categories' names.
        phrases: per name, the phrases that name it, each a tuple of lower-case words.
    """

    names: tuple[str, ...]
    phrases: tuple[tuple[Phrase, ...], ...]

    @classmethod
    def of(
        cls, names: Iterable[str], synonyms: Mapping[str, Sequence[str]] | None = None
    ) -> "CategoryTable":
        """A table of names and synonyms; plurals of both and hyphens ("teddy-bear") are added.

        Names may be written as data sets do: "stop_sign", "mouse_(computer_equipment)",
        "sky-other-merged", "wall-brick" are named by "stop sign", "mouse", "sky", "brick wall",
        the qualified ones where no other name or qualified name is the same word.

        Args:
            names: the categories' names, in the order that breaks ties.
            synonyms: other words for some of them, singular.

        Returns:
            The table, for :func:`match_categories` and :func:`score_words`.

        Raises:
            ValueError: an empty or repeated name, or synonyms of an unknown name.

        Example:
            >>> table = CategoryTable.of(["dog"], {"dog": ["puppy"]})
            >>> [" ".join(phrase) for phrase in table.phrases[0]]
            ['dog', 'dogs', 'puppy', 'puppies']
        """
        kept, others = tuple(names), dict(synonyms or {})
        if len(set(kept)) < len(kept) or any(not name.strip() for name in kept):
            raise ValueError(f"names must be distinct and not empty, got {list(kept)}.")
        unknown = sorted(set(others) - set(kept))
        if unknown:
            raise ValueError(f"synonyms are given for {unknown}, which are not among the names.")
        plain = [_plain_name(name) for name in kept]
        taken = Counter(plain)
        taken.update(form for name in plain for form in _variants(name))
        rows = []
        for name, own in zip(kept, plain, strict=True):
            free = [form for form in _variants(own) if taken[form] == 1]
            others_own = [_plain_name(word) for word in others.get(name, ())]
            both = [form for word in (own, *free, *others_own) for form in (word, plural(word))]
            both += [form.replace(" ", "-") for form in both]
            rows.append(tuple(_words(form) for form in dict.fromkeys(both)))
        return cls(kept, tuple(rows))

    @classmethod
    def coco(cls) -> "CategoryTable":
        """COCO's 80 categories with common plurals and synonyms.

        Example:
            >>> len(CategoryTable.coco().names)
            80
        """
        return cls.of(COCO_NAMES, COCO_SYNONYMS)


def match_categories(
    words: Sequence[str], table: CategoryTable, *, parity: bool = False
) -> tuple[str | None, ...]:
    """The category that each word of a text names, or helps to name.

    By default whole phrases are matched; case, hyphens and underscores, and the ways to write an
    accent or apostrophe make no difference. Of overlapping phrases the longest wins, then the
    category that comes first in the table, then the phrase further left. A category's own name is
    not taken for a form of another's name. A word belongs to one phrase at most, so the "dog" of
    "hot dog" does not name a dog; nor does the one of "dog-friendly".

    Args:
        words: a text's words in order, punctuation as words of its own
            (:func:`captum_mllm.words.group_words`).
        table: the categories.
        parity: default False. True: as TAM's released evaluation, which looks at one word at a
            time and lets the last matching category win: a word takes the last category in the
            table one of whose phrases contains it. So "dog" becomes "hot dog", "bear" "teddy
            bear", and "table", "light" or "glass" alone match too.

    Returns:
        One category name or None per word.

    Reference:
        ``parity``: a known defect of TAM's released evaluation; that a word matches by being a
        whole word of a phrase is our reading. The default is ours. Neither uses a part-of-speech
        tagger: the colour in "an orange cat" names an orange.

    Example:
        >>> words = "a dog and two hot dogs".split()
        >>> match_categories(words, CategoryTable.coco())
        (None, 'dog', None, None, 'hot dog', 'hot dog')
        >>> match_categories(["dog"], CategoryTable.coco(), parity=True)
        ('hot dog',)
    """
    lower = [word.lower() for word in words]
    if parity:
        last = {
            word: name
            for name, phrases in zip(table.names, table.phrases, strict=True)
            for phrase in phrases
            for word in phrase
            if word[0].isalnum()  # neither punctuation nor 's
        }
        return tuple(last.get(word) for word in lower)
    parts, ends = _parts(words)
    order: dict[Phrase, int] = {}
    for number, phrases in enumerate(table.phrases):  # a name before other forms of another name
        order.setdefault(_parts(phrases[0])[0], number)
    for number, phrases in enumerate(table.phrases):
        for phrase in phrases:
            order.setdefault(_parts(phrase)[0], number)
            order.setdefault(_parts(_LINK.sub(" - ", " ".join(phrase)).split())[0], number)
    starts = [0, *ends]
    words_at = {place: word for word, place in enumerate(starts)}
    matches = [
        (-length, order[phrase], start)
        for length in range(1, max(map(len, order), default=0) + 1)
        for start in starts
        if start + length in words_at
        if (phrase := parts[start : start + length]) in order
    ]
    labels: list[str | None] = [None] * len(words)
    for length, number, start in sorted(matches):
        span = slice(words_at[start], words_at[start - length])
        if not any(labels[span]):
            labels[span] = [table.names[number]] * (span.stop - span.start)
    return tuple(labels)


def _parts(words: Sequence[str]) -> tuple[Phrase, list[int]]:
    """What words are compared by, and how many parts there are up to each word's end."""
    parts: list[str] = []
    ends = []
    for word in words:
        plain = unicodedata.normalize("NFKC", word).casefold().replace("\u2019", "'")
        parts += [part for part in _LINK.split(plain) if part] or ["-"]
        ends.append(len(parts))
    return tuple(parts), ends
