"""Questions whose answers name no object: counting, existence, comparison, colour and size.

Every question is a program over the scene, as in CLEVR (Johnson et al. 2017): the answer is what
its last step gives. Which objects are the evidence for an answer follows from the program too, as
in CLEVR-XAI (Arras et al. 2022); see :func:`find_evidence`. A map made of picture and word alone
can't know them: "two" is the same word for dogs and for cups.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from captum_mllm.reference.captions import NUMBERS, Conversation, Turn, Word, Words
from captum_mllm.reference.scenes import COLORS, Scene
from captum_mllm.reference.sprites import CATEGORIES

NUMERALS = ("zero", *NUMBERS, "five", "six", "seven", "eight")
QUESTION_WORDS = ("short", "more", "than", "larger", "people", "knives", *NUMERALS)
CLEARLY = 1.2  # of two objects one of which is called larger: least ratio of their sizes
_PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "fish": "fish"}

Objects = tuple[int, ...]
Answer = int | bool | str


@dataclass(frozen=True)
class Step:
    """A step of a program.

    Args:
        name: "scene"; a filter: "category", "color" or "size"; "unique"; or what ends a program:
            "count", "exist", "query_color", "query_size", "more", "larger".
        value: What a filter lets pass.
        inputs: Indices of the steps whose outputs it reads.
    """

    name: str
    value: str = ""
    inputs: tuple[int, ...] = ()


Program = tuple[Step, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer and its program.

    Args:
        kind: One of `QUESTIONS`.
        turn: Question and answer in words.
        program: Its last step gives the answer.
        word: Index into `turn.answer` of the word that the evidence is for.
    """

    kind: str
    turn: Turn
    program: Program
    word: int = 0

    @property
    def answer(self) -> str:
        """The word that the evidence is for."""
        return self.turn.answer[self.word].text


@dataclass(frozen=True)
class _Description:
    """Words that single out objects; an empty one says nothing."""

    category: str = ""
    color: str = ""
    size: str = ""

    def program(self, start: int = 0) -> list[Step]:
        steps = [Step("scene")]
        for name in ("category", "color", "size"):
            if value := getattr(self, name):
                steps.append(Step(name, value, (start + len(steps) - 1,)))
        return steps

    def match(self, scene: Scene) -> Objects:
        found = _outputs(self.program(), scene)[-1]
        return found if isinstance(found, tuple) else ()

    def words(self, scene: Scene, plural: bool = False) -> Words:
        found = self.match(scene)
        about = found[0] if len(found) == 1 else -1
        looks = [Word(w, "attribute", about) for w in (self.size, self.color) if w]
        *first, last = (self.category or "object").split()
        nouns = [*first, _plural(last) if plural else last]
        role = "noun" if self.category else "function"
        return (*looks, *(Word(noun, role, about) for noun in nouns))


def _plural(noun: str) -> str:
    if noun in _PLURALS:
        return _PLURALS[noun]
    return noun + ("es" if noun.endswith(("s", "sh", "ch")) else "s")


def _outputs(program: Sequence[Step], scene: Scene) -> list[Objects | Answer]:
    """What every step gives: indices of objects in the order of the scene, or an answer."""
    out: list[Objects | Answer] = []
    for step in program:
        out.append(_run(step, [out[i] for i in step.inputs], scene))
    return out


def _run(step: Step, inputs: list, scene: Scene) -> Objects | Answer:
    objects = scene.objects
    if step.name == "scene":
        return tuple(range(len(objects)))
    given = inputs[0]
    if step.name in ("category", "color", "size"):
        field = "size_word" if step.name == "size" else step.name
        return tuple(i for i in given if getattr(objects[i], field) == step.value)
    if step.name == "unique":
        if len(given) != 1:
            raise ValueError(f"unique needs one object; its step found {len(given)}.")
        return given
    ends: dict[str, Callable[[], Answer]] = {
        "count": lambda: len(given),
        "exist": lambda: len(given) > 0,
        "query_color": lambda: objects[given[0]].color or "",
        "query_size": lambda: objects[given[0]].size_word,
        "more": lambda: given > inputs[1],
        "larger": lambda: objects[given[0]].size > objects[inputs[1][0]].size,
    }
    return ends[step.name]()


def run_program(program: Program, scene: Scene) -> str:
    """The answer that a program gives, as a word.

    Args:
        program: Of a question.
        scene: The scene.

    Returns:
        A number, "yes", "no", a colour, "small" or "large".

    Raises:
        ValueError: A step "unique" that finds no object, or several.

    Example:
        >>> from captum_mllm.reference import make_scene
        >>> run_program((Step("scene"), Step("count", inputs=(0,))), make_scene(5))
        'one'
    """
    answer = _outputs(program, scene)[-1]
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return NUMERALS[answer] if isinstance(answer, int) else str(answer)


def find_evidence(program: Program, scene: Scene) -> dict[str, Objects]:
    """Which objects are the evidence for a program's answer, by four definitions of CLEVR-XAI.

    Args:
        program: Of a question.
        scene: The scene.

    Returns:
        Indices into `scene.objects`, ascending:

        - "unique": what the steps "unique" give: the object asked about, two in a comparison of
          sizes. Empty where a program has no such step.
        - "first": back from the answer along every branch, the first objects found. Never empty:
          where filters find nothing the scene's objects are first (our reading).
        - "union": all that any filter lets pass; without a filter all objects. Empty where the
          first filter of every branch finds nothing.
        - "all": all objects.
    """
    out = _outputs(program, scene)
    found = [set(value) if isinstance(value, tuple) else set() for value in out]

    def first(place: int) -> set[int]:
        return found[place] or set().union(*map(first, program[place].inputs))

    def given(*names: str) -> set[int]:
        return set().union(*(f for f, s in zip(found, program, strict=True) if s.name in names))

    filters = ("category", "color", "size")
    filtered = any(step.name in filters for step in program)
    sets = {
        "unique": given("unique"),
        "first": first(len(program) - 1),
        "union": given(*filters) if filtered else given("scene"),
        "all": set(range(len(scene.objects))),
    }
    return {name: tuple(sorted(own)) for name, own in sets.items()}


_Asked = tuple[Program, Words]


def _say(*parts: str | Words) -> Words:
    out = [Word("in"), Word("short"), Word(",", "punctuation")]
    for part in parts:
        out += [Word(text) for text in part.split()] if isinstance(part, str) else part
    return (*out, Word("?", "punctuation"))


def _one(description: _Description, *ends: str) -> Program:
    steps = description.program()
    for end in ends:
        steps.append(Step(end, inputs=(len(steps) - 1,)))
    return tuple(steps)


def _two(a: _Description, b: _Description, each: str, end: str) -> Program:
    steps = a.program()
    steps.append(Step(each, inputs=(len(steps) - 1,)))
    first = len(steps) - 1
    steps += b.program(len(steps))
    steps.append(Step(each, inputs=(len(steps) - 1,)))
    return (*steps, Step(end, inputs=(first, len(steps) - 1)))


def _absent(scene: Scene, pick: random.Random) -> str:
    return pick.choice([name for name in CATEGORIES if name not in scene.categories])


def _kinds(scene: Scene) -> list[str]:
    return list(dict.fromkeys(scene.categories))


def _tinted(scene: Scene, category: str = "") -> bool:
    """Whether colours can be asked for: a natural colour has no name."""
    return all(o.color for o in scene.objects if category in ("", o.category))


def _many(scene: Scene, asked: Sequence[_Description]) -> list[_Asked]:
    return [
        (_one(one, "count"), _say("how many", one.words(scene, True), "are there")) for one in asked
    ]


def _count(scene: Scene, pick: random.Random) -> list[_Asked]:
    return _many(scene, [_Description(c) for c in (*_kinds(scene), _absent(scene, pick))])


def _count_some(scene: Scene, _pick: random.Random) -> list[_Asked]:
    sizes = ("small", "large")
    asked = [_Description(c, size=size) for c in ("", *_kinds(scene)) for size in sizes]
    if _tinted(scene):
        asked += [_Description(color=color) for color in COLORS]
    return _many(scene, asked)


def _total(scene: Scene, _pick: random.Random) -> list[_Asked]:
    return _many(scene, [_Description()])


def _exist(scene: Scene, pick: random.Random) -> list[_Asked]:
    form = pick.choice(("category", "color", "size"))
    kinds = [c for c in _kinds(scene) if form != "color" or _tinted(scene, c)]
    asked = [_Description(c) for c in (*kinds, *(_absent(scene, pick) for _ in kinds))]
    if form == "color" and kinds:
        asked = [_Description(c, color=color) for c in kinds for color in COLORS]
    if form == "size":
        asked = [_Description(c, size=size) for c in kinds for size in ("small", "large")]
    out = []
    for one in asked:
        words = one.words(scene)
        article = "an" if words[0].text[0] in "aeiou" else "a"
        out.append((_one(one, "exist"), _say("is there", article, words)))
    return out


def _more(scene: Scene, _pick: random.Random) -> list[_Asked]:
    counts = {c: scene.categories.count(c) for c in _kinds(scene)}
    pairs = [
        (_Description(a), _Description(b)) for a in counts for b in counts if counts[a] != counts[b]
    ]
    return [
        (
            _two(a, b, "count", "more"),
            _say("are there more", a.words(scene, True), "than", b.words(scene, True)),
        )
        for a, b in pairs
    ]


def _singled(scene: Scene, by: str) -> dict[int, _Description]:
    """Objects that category alone, or category and one look ("color", "size"), single out."""
    out = {}
    for i, thing in enumerate(scene.objects):
        look = thing.size_word if by == "size" else thing.color
        for one in (_Description(thing.category), _Description(thing.category, **{by: look or ""})):
            if one.match(scene) == (i,) and (_tinted(scene, thing.category) or not one.color):
                out.setdefault(i, one)
    return out


def _larger(scene: Scene, _pick: random.Random) -> list[_Asked]:
    named, out = _singled(scene, "color"), []
    for i, a in named.items():
        for j, b in named.items():
            small, large = sorted((scene.objects[i].size, scene.objects[j].size))
            if i != j and large >= CLEARLY * small:
                words = _say("is the", a.words(scene), "larger than the", b.words(scene))
                out.append((_two(a, b, "unique", "larger"), words))
    return out


def _color(scene: Scene, _pick: random.Random) -> list[_Asked]:
    return [
        (_one(one, "unique", "query_color"), _say("what color is the", one.words(scene)))
        for i, one in _singled(scene, "size").items()
        if scene.objects[i].color
    ]


def _size(scene: Scene, _pick: random.Random) -> list[_Asked]:
    return [
        (_one(one, "unique", "query_size"), _say("how big is the", one.words(scene)))
        for one in _singled(scene, "color").values()
    ]


QUESTIONS: dict[str, Callable[[Scene, random.Random], list[_Asked]]] = {
    "count": _count,  # of a category, none of an absent one
    "count_some": _count_some,  # of a size or colour, of a category's small or large ones
    "total": _total,
    "exist": _exist,  # of a category; of one of its colours or sizes
    "more": _more,  # of one category than of another
    "larger": _larger,  # of two objects
    "color": _color,
    "size": _size,
}


def ask(scene: Scene, kind: str, seed: int | random.Random = 0) -> Question | None:
    """Ask about a scene; every answer that is possible here is as likely as any other.

    Args:
        scene: The scene.
        kind: One of `QUESTIONS`.
        seed: Picks the question; or the source of randomness itself.

    Returns:
        The question, or None if the scene has none of this kind: no two objects of clearly
        different size, say. Scenes of `assortments` have every kind.

    Raises:
        ValueError: Unknown kind.

    Example:
        >>> from captum_mllm.reference import make_scene
        >>> from captum_mllm.reference.captions import text_of
        >>> found = ask(make_scene(5), "total")
        >>> text_of(found.turn.question), found.answer
        ('in short, how many objects are there?', 'one')
    """
    if kind not in QUESTIONS:
        raise ValueError(f"kind {kind!r} is unknown; there are {list(QUESTIONS)}.")
    pick = seed if isinstance(seed, random.Random) else random.Random(seed)
    found: dict[str, list[_Asked]] = {}
    for program, words in QUESTIONS[kind](scene, pick):
        found.setdefault(run_program(program, scene), []).append((program, words))
    if not found:
        return None
    answer = pick.choice(sorted(found))
    program, words = pick.choice(found[answer])
    role = "number" if answer in NUMERALS else "decision" if answer in ("yes", "no") else ""
    about = find_evidence(program, scene)["unique"] if not role else ()
    said = (Word(answer, role or "attribute", *about), Word(".", "punctuation"))
    return Question(kind, Turn(words, said), program)


def ask_several(scene: Scene, pick: random.Random, most: int = 4) -> Conversation:
    """Ask questions of different kinds, as in training.

    Args:
        scene: The scene.
        pick: Source of randomness.
        most: Number of questions, if the scene has so many kinds.
    """
    asked = (ask(scene, kind, pick) for kind in pick.sample(list(QUESTIONS), len(QUESTIONS)))
    turns = (one.turn for one in asked if one is not None)
    return Conversation(tuple(itertools.islice(turns, most)))
