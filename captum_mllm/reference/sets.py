"""Test sets that tell methods apart: scenes that are harder, each in its own way.

Every set has a split for choosing ("validation") and one for reporting ("test"); its scenes are
determined by their numbers, and no scene of a set is one of another's or of the training's.
`export` writes them in COCO format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from captum_mllm.reference.assortments import assort
from captum_mllm.reference.captions import Conversation, converse
from captum_mllm.reference.crowds import crowd, occlude, shrink, twin
from captum_mllm.reference.planted import PARTNERS, draw_broken, draw_kept
from captum_mllm.reference.questions import QUESTIONS, Question, ask, find_evidence
from captum_mllm.reference.scenes import Scene, draw_scenes, seeds_of

ROOM = 10**5  # scenes of a set within a split; the first set begins at scene 0 of the split


def _converse(scene: Scene, kinds: Sequence[str], number: int) -> Conversation:
    return converse(scene, kinds[0], number, *kinds[1:])


def _ask(scene: Scene, kinds: Sequence[str], number: int) -> Conversation:
    return Conversation((_question(scene, kinds[0], number).turn,))


def _question(scene: Scene, kind: str, number: int) -> Question:
    question = ask(scene, kind, number)
    if question is None:
        raise RuntimeError(f"scene {scene.seed} has no question of the kind {kind!r}.")
    return question


@dataclass(frozen=True)
class TestSet:
    """A test set.

    Args:
        name: One of `SETS`.
        about: What is hard about it.
        make: Scene of (number of the scene in the split, the split).
        talks: Kinds of questions (`captions.KINDS`), taken in turn: one, or two in a row.
        talk: Makes the conversation of scene, kinds and number of the example.
    """

    __test__ = False  # no test of pytest's

    name: str
    about: str
    make: Callable[[int, str], Scene]
    talks: tuple[tuple[str] | tuple[str, str], ...] = (("list",), ("see",), ("describe",))
    talk: Callable[[Scene, Sequence[str], int], Conversation] = _converse


@dataclass(frozen=True)
class Example:
    """A scene of a test set and what is said about it.

    Args:
        set: Name of the set.
        number: Of the example within its set and split, from 0.
        split: "validation" or "test".
        scene: The scene.
        talk: The conversation; the last answer is the reference caption.
    """

    set: str
    number: int
    split: str
    scene: Scene
    talk: Conversation

    @property
    def planted(self) -> tuple[str, str] | None:
        """In the biased set: the object, and the partner that the planted rule wants with it."""
        if self.set != "biased":
            return None
        first = next(name for name in self.scene.categories if name in PARTNERS)
        return first, PARTNERS[first]

    @property
    def question(self) -> Question | None:
        """In the set "questions": the question with its program."""
        if self.set != "questions":
            return None
        kind = list(QUESTIONS)[self.number % len(QUESTIONS)]
        return _question(self.scene, kind, self.number)

    @property
    def evidence(self) -> dict[str, tuple[int, ...]] | None:
        """In the set "questions": the evidence for the answer, see `questions.find_evidence`."""
        question = self.question
        return None if question is None else find_evidence(question.program, self.scene)


def _drawn(number: int, split: str) -> Scene:
    return draw_scenes(seeds_of(split, [number])).scenes()[0]


def _biased(number: int, split: str) -> Scene:
    draw = draw_kept if number % 2 else draw_broken
    return draw(seeds_of(split, [number])).scenes()[0]


def _openmoji(number: int, split: str) -> Scene:
    scene = _drawn(number, split)
    return replace(scene, objects=tuple(replace(o, style="openmoji") for o in scene.objects))


def _from_seed(make: Callable[[torch.Tensor], Scene]) -> Callable[[int, str], Scene]:
    return lambda number, split: make(seeds_of(split, [number]))


_LONG = (("names", "describe"), ("where", "describe"), ("beside", "describe"))
SETS = {
    made.name: made
    for made in (
        TestSet("plain", "scenes as in training", _drawn),
        TestSet("crowded", "5-8 objects, smaller than in training", _from_seed(crowd)),
        TestSet("occluded", "an object is largely covered by another", _from_seed(occlude)),
        TestSet(
            "twins",
            "two objects of one kind, told apart by size, colour or place before the noun",
            _from_seed(twin),
            (("list",), ("see",)),
        ),
        TestSet("small", "objects half as large as in training", _from_seed(shrink)),
        TestSet(
            "interference",
            "two questions, long answers, every noun repeated",
            _drawn,
            _LONG,
        ),
        TestSet("biased", "every other scene breaks a planted co-occurrence", _biased),
        TestSet("openmoji", "plain scenes in a style of drawing never trained on", _openmoji),
        TestSet(
            "questions",
            "answers that name no object: numbers, yes and no, colours, sizes",
            _from_seed(assort),
            tuple((kind,) for kind in QUESTIONS),
            _ask,
        ),
    )
}
"""Name -> test set, for :func:`make_example`; ``SETS[name].about`` says what is hard in it."""


def make_example(name: str, number: int, split: str = "test") -> Example:
    """Make one example of a test set.

    Args:
        name: One of `SETS`.
        number: Of the example, from 0 to 99,999.
        split: "test", or "validation" for choosing between methods.

    Returns:
        The example.

    Raises:
        ValueError: No such set, a number out of range, or another split.

    Example:
        >>> example = make_example("twins", 0)
        >>> len(example.scene.categories) - len(set(example.scene.categories))
        1
    """
    if name not in SETS:
        raise ValueError(f"name={name!r} is unknown; there are {list(SETS)}.")
    if split not in ("test", "validation"):
        raise ValueError(f"split={split!r} must be 'test' or 'validation'.")
    if not 0 <= number < ROOM:
        raise ValueError(f"number={number} must be in 0..{ROOM - 1}.")
    kind = SETS[name]
    place = number + ROOM * list(SETS).index(name)
    scene = kind.make(place, split)
    talk = kind.talks[number // (2 if name == "biased" else 1) % len(kind.talks)]
    return Example(name, number, split, scene, kind.talk(scene, talk, number))
