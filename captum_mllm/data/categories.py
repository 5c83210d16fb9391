"""Which category a word names: COCO's 80 names, plurals and synonyms; the longest phrase wins."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from captum_mllm.words import group_words

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


_IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice",
    "goose": "geese", "ox": "oxen", "foot": "feet", "tooth": "teeth", "sheep": "sheep",
    "cattle": "cattle", "luggage": "luggage", "people": "people", "skis": "skis",
    "scissors": "scissors", "aircraft": "aircraft", "broccoli": "broccoli", "calf": "calves",
    "knife": "knives", "wife": "wives", "life": "lives", "leaf": "leaves", "loaf": "loaves",
    "shelf": "shelves", "wolf": "wolves", "half": "halves", "potato": "potatoes",
    "tomato": "tomatoes",
}  # fmt: skip


Phrase = tuple[str, ...]


def plural(phrase: str) -> str:
    """The plural of an English noun, or of a noun phrase by its last word.

    Args:
        phrase: lower case, e.g. "wine glass".

    Returns:
        The plural, lower case.

    Example:
        >>> [plural(word) for word in ("wine glass", "knife", "puppy", "person", "sheep")]
        ['wine glasses', 'knives', 'puppies', 'people', 'sheep']
    """
    *before, last = phrase.split(" ")
    if last in _IRREGULAR:
        ending = _IRREGULAR[last]
    elif last.endswith("man") and last != "human":
        ending = last[:-3] + "men"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        ending = last[:-1] + "ies"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        ending = last + "es"
    else:
        ending = last + "s"
    return " ".join([*before, ending])


def _words(phrase: str) -> Phrase:
    """A phrase's words, split as an answer's are: "woman's hand" has three."""
    pieces = re.findall(r"\s*(?:\w+|[^\w\s])", phrase)
    return tuple(word.text for word in group_words(pieces))


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
        rows = []
        for name in kept:
            singular = [" ".join(word.lower().split()) for word in (name, *others.get(name, ()))]
            both = [form for word in singular for form in (word, plural(word))]
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

    By default whole phrases are matched, case ignored: of overlapping ones the longest wins, then
    the category that comes first in the table, then the one further left. A word belongs to one
    phrase at most, so the "dog" of "hot dog" does not name a dog.

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
    order: dict[Phrase, int] = {}
    for number, phrases in enumerate(table.phrases):
        for phrase in phrases:
            order.setdefault(phrase, number)
    longest = max((len(phrase) for phrase in order), default=0)
    matches = [
        (-length, order[phrase], start)
        for length in range(1, longest + 1)
        for start in range(len(lower) - length + 1)
        if (phrase := tuple(lower[start : start + length])) in order
    ]
    labels: list[str | None] = [None] * len(lower)
    for length, number, start in sorted(matches):
        span = slice(start, start - length)
        if not any(labels[span]):
            labels[span] = [table.names[number]] * -length
    return tuple(labels)
