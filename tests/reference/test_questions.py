"""Questions: answers and evidence against slow twins, balance, and where the objects lie."""

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from captum_mllm.reference.assortments import CLEAR, draw_assorted, scatter
from captum_mllm.reference.captions import named_objects, text_of
from captum_mllm.reference.crowds import visible_share
from captum_mllm.reference.questions import (
    CLEARLY,
    NUMERALS,
    QUESTIONS,
    Step,
    ask,
    ask_several,
    find_evidence,
    run_program,
)
from captum_mllm.reference.render import render
from captum_mllm.reference.scenes import COLORS, Scene, SceneObject, make_scene, seeds_of
from captum_mllm.reference.sets import make_example
from captum_mllm.reference.sprites import CATEGORIES
from studies.training.data import encode, make_batch, prefix_ids
from studies.training.mixture import draw_mixed
from studies.training.models import family_of

SINGULAR = {"people": "person", "knives": "knife", "glasses": "glass", "buses": "bus"}
SINGULAR |= {"toothbrushes": "toothbrush", "couches": "couch", "sandwiches": "sandwich"}


def assorted(count, split="test"):
    return draw_assorted(seeds_of(split, torch.arange(count))).scenes()


def asked(count=40, kinds=tuple(QUESTIONS)):
    for number, scene in enumerate(assorted(count)):
        for kind in kinds:
            question = ask(scene, kind, number)
            assert question is not None
            yield scene, question


def read(phrase):
    """What a phrase of a question says, by its words alone: category, colour, size."""
    words = phrase.split()
    size = words.pop(0) if words[0] in ("small", "large") else None
    # "orange" is no colour here, and neither are other first words of nouns
    color = words.pop(0) if words[0] in COLORS else None
    noun = " ".join(words)
    for one in (noun, noun.removesuffix("s"), *(noun.replace(p, s) for p, s in SINGULAR.items())):
        if one in CATEGORIES:
            return one, color, size
    assert noun in ("object", "objects"), noun
    return None, color, size


def slow_find(phrase, scene):
    """Objects that fit all the words of a phrase, and what each word in turn lets pass."""
    category, color, size = read(phrase)
    left, passed = set(range(len(scene.objects))), set()
    for wanted, of in (
        (category, lambda o: o.category),
        (color, lambda o: o.color),
        (size, lambda o: "large" if o.size > 0.37 else "small"),
    ):
        if wanted is not None:
            left = {i for i in left if of(scene.objects[i]) == wanted}
            passed |= left
    return left, passed if (category or color or size) else set(range(len(scene.objects)))


PATTERNS = {
    r"how many (.+) are there": lambda _, a: NUMERALS[len(a)],
    r"is there an? (.+)": lambda _, a: "yes" if a else "no",
    r"are there more (.+) than (.+)": lambda _, a, b: "yes" if len(a) > len(b) else "no",
    r"is the (.+) larger than the (.+)": lambda s, a, b: (
        "yes" if s.objects[min(a)].size > s.objects[min(b)].size else "no"
    ),
    r"what color is the (.+)": lambda s, a: s.objects[min(a)].color,
    r"how big is the (.+)": lambda s, a: "large" if s.objects[min(a)].size > 0.37 else "small",
}


def slow(question, scene):
    """Answer and evidence from the question's text, without its program."""
    text = re.fullmatch(r"in short, (.+)\?", text_of(question.turn.question)).group(1)
    (found, answer), *others = [
        (match, answer) for p, answer in PATTERNS.items() if (match := re.fullmatch(p, text))
    ]
    assert not others
    sides = [slow_find(phrase, scene) for phrase in found.groups()]
    everything = set(range(len(scene.objects)))
    unique = text.startswith(("is the ", "what color", "how big"))
    if unique:
        assert all(len(own) == 1 for own, _ in sides)
    first = set()
    for phrase, (own, _) in zip(found.groups(), sides, strict=True):
        words = [w for w in read(phrase) if w is not None]
        # nothing fits all words: what fits the noun alone, or else the whole scene
        noun = slow_find(words[0] if words and words[0] in CATEGORIES else "object", scene)[0]
        first |= own or noun or everything
    return answer(scene, *(own for own, _ in sides)), {
        "unique": set().union(*(own for own, _ in sides)) if unique else set(),
        "first": first,
        "union": set().union(*(passed for _, passed in sides)),
        "all": everything,
    }


def test_answers_and_evidence_follow_from_the_words():
    """Read from the question's text and the scene, without the program."""
    for scene, question in asked(60):
        answer, evidence = slow(question, scene)
        assert question.answer == answer == run_program(question.program, scene)
        found = find_evidence(question.program, scene)
        assert {name: set(own) for name, own in found.items()} == evidence
        assert all(list(own) == sorted(own) for own in found.values())


def test_evidence_is_there_where_it_is_promised():
    empty = Counter()
    for scene, question in asked(60):
        evidence = find_evidence(question.program, scene)
        assert evidence["first"]
        assert evidence["all"]
        assert len(evidence["unique"]) == {"larger": 2, "color": 1, "size": 1}.get(question.kind, 0)
        assert set(evidence["unique"]) <= set(evidence["union"]) <= set(evidence["all"])
        if question.answer not in ("zero", "no"):
            assert evidence["union"]
        empty[question.kind] += not evidence["union"]
    assert {kind for kind, number in empty.items() if number} == {"count", "count_some", "exist"}


def test_a_comparison_has_the_evidence_of_both_sides():
    things = [("dog", 0.2), ("dog", 0.25), ("cup", 0.41)]
    objects = tuple(
        SceneObject(name, "noto", (0.2 + 0.3 * i, 0.2), size, COLORS[i])
        for i, (name, size) in enumerate(things)
    )
    scene = Scene(0, "white", objects)
    program = (
        Step("scene"),
        Step("category", "dog", (0,)),
        Step("size", "large", (1,)),
        Step("count", inputs=(2,)),
        Step("scene"),
        Step("category", "cup", (4,)),
        Step("count", inputs=(5,)),
        Step("more", inputs=(3, 6)),
    )
    assert run_program(program, scene) == "no"
    assert find_evidence(program, scene) == {
        "unique": (),
        "first": (0, 1, 2),  # no dog is large: the dogs
        "union": (0, 1, 2),
        "all": (0, 1, 2),
    }
    with pytest.raises(ValueError, match="unique needs one object; its step found 2"):
        run_program((*program[:2], Step("unique", inputs=(1,))), scene)


def test_answers_name_no_object():
    for _, question in asked(20):
        text = text_of(question.turn.answer)
        assert not named_objects(text)
        assert len(text.split()) == 1
        assert question.turn.answer[question.word].text == question.answer


def test_no_answer_wins_by_being_common():
    """The commonest answer of a kind, said always, is right in at most 60 %."""
    found = {kind: Counter() for kind in QUESTIONS}
    for _, question in asked(300):
        found[question.kind][question.answer] += 1
    for kind, answers in found.items():
        assert max(answers.values()) <= 0.6 * 300, (kind, answers)


def test_nothing_covers_the_middle():
    scenes = assorted(400)
    for thing in itertools.chain.from_iterable(scene.objects for scene in scenes):
        away = max(abs(at - 0.5) for at in thing.center)
        assert away >= CLEAR - 1e-6
        assert thing.size / 2 < CLEAR
    masks = render(scenes[:50], 113).masks
    assert not masks[:, :, 56, 56].any()


def test_assorted_scenes():
    for scene in assorted(200):
        counts = Counter(scene.categories)
        assert 3 <= len(scene.objects) <= 6
        assert 1 in counts.values()
        assert len(counts) in (2, 3)
        assert len(set(counts.values())) > 1  # "more" has an answer
        looks = [(o.category, o.color) for o in scene.objects]
        assert None not in {color for _, color in looks}
        assert len(set(looks)) == len(looks)
        assert sum(o.size_word == "large" for o in scene.objects) in (1, 2)
        sizes = {
            word: [o.size for o in scene.objects if o.size_word == word]
            for word in ("small", "large")
        }
        assert min(sizes["large"]) > CLEARLY * max(sizes["small"])
    assert min(min(visible_share(scene)) for scene in assorted(60)) > 0.6


def test_a_scene_depends_on_its_seed_alone():
    scenes = assorted(30)
    assert draw_assorted(seeds_of("test", [17])).scenes() == [scenes[17]]
    splits = [assorted(200, split) for split in ("train", "validation", "test")]
    looks = [{replace(scene, seed=0) for scene in own} for own in splits]
    assert [len(own) for own in looks] == [200] * 3
    assert all(not one & other for one, other in itertools.combinations(looks, 2))


def test_objects_lie_where_they_cut_others_least():
    """With nothing in the way any place will do; two large ones find room beside each other."""
    looks = {
        "category": torch.zeros(64, 2, dtype=torch.int64),
        "style": torch.zeros(64, 2, dtype=torch.int64),
        "color": torch.zeros(64, 2, dtype=torch.int64),
        "flip": torch.zeros(64, 2, dtype=torch.bool),
        "size": torch.full((64, 2), 0.3),
    }
    scenes = scatter(torch.arange(64), torch.full((64,), 2), looks)
    apart = (scenes.center[:, 0] - scenes.center[:, 1]).abs()
    assert (apart.amax(1) >= 0.3).all()
    assert (scenes.center[:, 0, 0] <= scenes.center[:, 1, 0]).all()


def test_kinds_that_a_scene_has_not():
    lonely = replace(make_scene(0), objects=make_scene(0).objects[:1])
    assert ask(lonely, "larger") is None
    assert ask(lonely, "more") is None
    assert len(ask_several(lonely, random.Random(0), 9).turns) <= len(QUESTIONS) - 2
    with pytest.raises(ValueError, match="kind 'why' is unknown"):
        ask(lonely, "why")


def test_examples_know_their_question():
    for number in range(16):
        example = make_example("questions", number)
        assert example.question.kind == list(QUESTIONS)[number % len(QUESTIONS)]
        assert example.talk.turns == (example.question.turn,)
        assert example.evidence == find_evidence(example.question.program, example.scene)
    plain = make_example("plain", 0)
    assert plain.question is None
    assert plain.evidence is None


def test_training_reads_questions_as_the_processor_does():
    processor = family_of("questions").build_processor()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    for number in range(64):
        example = make_example("questions", number)
        text = processor.apply_chat_template(example.talk.messages(), tokenize=False)
        ids = processor.tokenizer(text)["input_ids"]
        at = ids.index(image)
        assert tuple(ids[:at]) == prefix_ids()
        assert ids[at + 1 :] == encode(example.talk)[0]
        answer = example.question.answer
        assert processor.tokenizer.tokenize(answer) == ["▁" + answer]


def test_the_mixture_does_not_depend_on_the_batch():
    seeds = seeds_of("train", torch.arange(200))
    scenes = draw_mixed(seeds).scenes()
    assert draw_mixed(seeds[50:53]).scenes() == scenes[50:53]
    several = [len(set(scene.categories)) < len(scene.objects) for scene in scenes]
    crowded = [len(scene.objects) > 6 for scene in scenes]
    assert 80 <= sum(several) <= 120
    assert 3 <= sum(crowded) <= 25
    family = family_of("questions")
    batch = make_batch(0, 32, 0, family.draw, family.converse)
    assert batch.scenes.scenes() == scenes[:32]
    assert (batch.labels >= 0).any(1).all()
