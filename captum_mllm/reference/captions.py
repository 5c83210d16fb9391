"""Conversations about scenes, every word annotated with the object that it is about.

A question and its scene have exactly one answer, so a model can learn to give it greedily. Objects
are named from left to right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from captum_mllm.reference.scenes import Scene, SceneObject
from captum_mllm.reference.sprites import CATEGORIES

ROLES = (
    "noun",  # part of an object's name
    "pronoun",  # "it"
    "attribute",  # size or colour
    "position",  # left, right, top, bottom, middle
    "number",
    "background",  # the background or its colour
    "decision",  # yes, no, nothing
    "function",
    "punctuation",
)
NUMBERS = ("one", "two", "three", "four")
DEFAULT_QUESTION = "what is in the picture?"


@dataclass(frozen=True)
class Word:
    """A word or punctuation mark.

    Args:
        text: As written; a noun of two words is two words.
        role: One of `ROLES`.
        obj: Index into `Scene.objects` of the object that the word is about, or -1. A noun that
            names an absent object has -1.
    """

    text: str
    role: str = "function"
    obj: int = -1


Words = tuple[Word, ...]


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: its words.
        answer: its words.
    """

    question: Words
    answer: Words


@dataclass(frozen=True)
class Conversation:
    """One or more turns about one scene.

    Args:
        turns: in their order.
    """

    turns: tuple[Turn, ...]

    def messages(self, answer_last: bool = True) -> list[dict]:
        """As messages for a processor's `apply_chat_template`; the first turn holds the image.

        Args:
            answer_last: Whether to include the last turn's answer.

        Returns:
            One mapping of role and content per message.
        """
        out: list[dict] = []
        for i, turn in enumerate(self.turns):
            question = [{"type": "text", "text": text_of(turn.question)}]
            out.append(
                {"role": "user", "content": [{"type": "image"}, *question] if i == 0 else question}
            )
            answer = {"type": "text", "text": text_of(turn.answer)}
            out.append({"role": "assistant", "content": [answer]})
        return out if answer_last else out[:-1]


def text_of(words: Sequence[Word]) -> str:
    """Write words as text: a space before each but the first and punctuation marks."""
    text = "".join(("" if w.role == "punctuation" else " ") + w.text for w in words)
    return text.strip()


def _say(text: str, **slots: Words) -> Words:
    """Words of a template; `{name}` stands for the words given as `name`."""
    out: list[Word] = []
    for part in re.findall(r"\{\w+\}|\w+|[^\w\s]", text):
        if part.startswith("{"):
            out.extend(slots[part[1:-1]])
        elif part.isalnum():
            out.append(Word(part, "background" if part == "background" else "function"))
        else:
            out.append(Word(part, "punctuation"))
    return tuple(out)


def _noun(category: str, index: int) -> Words:
    return tuple(Word(part, "noun", index) for part in category.split())


def _attributes(obj: SceneObject, index: int) -> Words:
    words = (obj.size_word,) if obj.color is None else (obj.size_word, obj.color)
    return tuple(Word(word, "attribute", index) for word in words)


def _with_article(words: Words) -> Words:
    return (Word("an" if words[0].text[0] in "aeiou" else "a"), *words)


def _position(obj: SceneObject, index: int) -> Words:
    words = obj.position_words
    lead = {"left": "on the", "right": "on the", "top": "at the", "bottom": "at the"}
    start = "in the" if words == ("middle",) else lead[words[0]]
    return (*_say(start), *(Word(word, "position", index) for word in words))


def _join(items: Sequence[Words]) -> Words:
    out: list[Word] = list(items[0])
    for i, item in enumerate(items[1:], 2):
        out.append(Word("and") if i == len(items) else Word(",", "punctuation"))
        out.extend(item)
    return tuple(out)


def _named(scene: Scene) -> list[Words]:
    return [_with_article(_noun(o.category, i)) for i, o in enumerate(scene.objects)]


def _list(scene: Scene, _pick: random.Random) -> Turn:
    items = [
        (
            *_with_article((*_attributes(o, i), *_noun(o.category, i))),
            *_position(o, i),
        )
        for i, o in enumerate(scene.objects)
    ]
    return Turn(_say(DEFAULT_QUESTION), _say("there is {items}.", items=_join(items)))


def _names(scene: Scene, _pick: random.Random) -> Turn:
    return Turn(_say("name the objects."), _say("{items}.", items=_join(_named(scene))))


def _describe(scene: Scene, _pick: random.Random) -> Turn:
    answer = list(_say("this picture shows {items}.", items=_join(_named(scene))))
    for i, o in enumerate(scene.objects):
        answer += _say(
            "the {noun} is {looks} and {it} is {place}.",
            noun=_noun(o.category, i),
            looks=_join([(word,) for word in _attributes(o, i)]),
            it=(Word("it", "pronoun", i),),
            place=_position(o, i),
        )
    return Turn(_say("describe the picture."), tuple(answer))


def _see(scene: Scene, _pick: random.Random) -> Turn:
    items = [
        _say("{place} there is {noun}", place=_position(o, i), noun=noun)
        for i, (o, noun) in enumerate(zip(scene.objects, _named(scene), strict=True))
    ]
    return Turn(_say("what can you see, and where?"), _say("{items}.", items=_join(items)))


def _where(scene: Scene, pick: random.Random) -> Turn:
    i = pick.randrange(len(scene.objects))
    noun, place = _noun(scene.objects[i].category, i), _position(scene.objects[i], i)
    return Turn(
        _say("where is the {noun}?", noun=noun),
        _say("the {noun} is {place} of the picture.", noun=noun, place=place),
    )


def _color(scene: Scene, pick: random.Random) -> Turn:
    colored = [i for i, o in enumerate(scene.objects) if o.color]
    if not colored:
        return _background(scene, pick)
    i = pick.choice(colored)
    noun = _noun(scene.objects[i].category, i)
    color = (Word(scene.objects[i].color or "", "attribute", i),)
    return Turn(
        _say("what color is the {noun}?", noun=noun),
        _say("the {noun} is {color}.", noun=noun, color=color),
    )


def _size(scene: Scene, pick: random.Random) -> Turn:
    i = pick.randrange(len(scene.objects))
    noun = _noun(scene.objects[i].category, i)
    size = (Word(scene.objects[i].size_word, "attribute", i),)
    return Turn(
        _say("how big is the {noun}?", noun=noun),
        _say("the {noun} is {size}.", noun=noun, size=size),
    )


def _background(scene: Scene, _pick: random.Random) -> Turn:
    color = (Word(scene.background, "background"),)
    return Turn(
        _say("what color is the background?"), _say("the background is {color}.", color=color)
    )


def _count(scene: Scene, _pick: random.Random) -> Turn:
    number = (Word(NUMBERS[len(scene.objects) - 1], "number"),)
    form = "there is {n} object." if len(scene.objects) == 1 else "there are {n} objects."
    return Turn(_say("how many objects are there?"), _say(form, n=number))


def _present(scene: Scene, pick: random.Random) -> Turn:
    question = "is there {noun}?"
    if pick.random() < 0.5:
        absent = pick.choice([c for c in CATEGORIES if c not in scene.categories])
        noun = _with_article(_noun(absent, -1))
        answer = _say("{no}, there is no {noun}.", no=(Word("no", "decision"),), noun=noun[1:])
        return Turn(_say(question, noun=noun), answer)
    i = pick.randrange(len(scene.objects))
    noun = _named(scene)[i]
    answer = _say(
        "{yes}, there is {noun} {place}.",
        yes=(Word("yes", "decision"),),
        noun=noun,
        place=_position(scene.objects[i], i),
    )
    return Turn(_say(question, noun=noun), answer)


def _beside(scene: Scene, pick: random.Random) -> Turn:
    i = pick.randrange(len(scene.objects))
    noun = _noun(scene.objects[i].category, i)
    other = (Word("nothing", "decision"),)
    if i + 1 < len(scene.objects):
        other = (Word("the"), *_noun(scene.objects[i + 1].category, i + 1))
    return Turn(
        _say("what is to the right of the {noun}?", noun=noun),
        _say("{other} is to the right of the {noun}.", other=other, noun=noun),
    )


KINDS: dict[str, Callable[[Scene, random.Random], Turn]] = {
    "list": _list,  # the answer to DEFAULT_QUESTION: sizes, colours, nouns, positions
    "names": _names,  # nouns alone
    "describe": _describe,  # every noun twice
    "see": _see,  # positions before nouns
    "where": _where,
    "color": _color,  # of an object; of the background if all have their natural colours
    "size": _size,
    "background": _background,
    "count": _count,
    "present": _present,
    "beside": _beside,
}
LONG_KINDS = ("list", "names", "describe", "see")
KIND_WEIGHTS = {"list": 10, "names": 2, "describe": 4, "see": 2}  # the others weigh 1
TWO_TURNS = 0.35


def converse(
    scene: Scene, kind: str = "list", seed: int = 0, second: str | None = None
) -> Conversation:
    """Talk about a scene.

    Args:
        scene: The scene.
        kind: Kind of the first question, one of `KINDS`.
        seed: Picks the object that a question is about, where it is about one.
        second: Kind of a second question, asked after the first answer; None: none.

    Returns:
        A `Conversation` of one or two turns.

    Raises:
        ValueError: Unknown kind.

    Example:
        >>> from captum_mllm.reference import make_scene
        >>> talk = converse(make_scene(5), "names")
        >>> text_of(talk.turns[0].question)
        'name the objects.'
    """
    pick = random.Random(seed)
    turns = []
    for name in (kind,) if second is None else (kind, second):
        if name not in KINDS:
            raise ValueError(f"kind {name!r} is unknown; there are {list(KINDS)}.")
        turns.append(KINDS[name](scene, pick))
    return Conversation(tuple(turns))


def draw_conversation(scene: Scene, pick: random.Random) -> Conversation:
    """Draw a conversation of random kinds, as in training.

    Args:
        scene: The scene.
        pick: Source of randomness.

    Returns:
        One turn, or two different ones.
    """
    names = list(KINDS)
    first = pick.choices(names, [KIND_WEIGHTS.get(name, 1) for name in names])[0]
    second = pick.choice([name for name in names if name not in (*LONG_KINDS, first)])
    turns = [KINDS[first](scene, pick)]
    if pick.random() < TWO_TURNS:
        turns.append(KINDS[second](scene, pick))
    return Conversation(tuple(turns))


_NAMES = re.compile(
    r"\b(" + "|".join(sorted(map(re.escape, CATEGORIES), key=len, reverse=True)) + r")\b"
)


def named_objects(text: str) -> list[str]:
    """The categories that a text names, in its order, each as often as it is named.

    Args:
        text: an answer, in any case.

    Returns:
        Names of :data:`CATEGORIES`.

    Example:
        >>> named_objects("A hot dog on the left and a dog.")
        ['hot dog', 'dog']
    """
    return _NAMES.findall(text.lower())
