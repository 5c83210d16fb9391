"""The test sets: every scene keeps its set's promise, and nothing overlaps with training."""

import itertools

import pytest
import torch

from captum_mllm.reference import make_scene
from captum_mllm.reference.captions import text_of
from captum_mllm.reference.crowds import CROWD_SIZE, PLAIN, SMALL_SIZE, VISIBLE, visible_share
from captum_mllm.reference.planted import (
    PARTNERS,
    draw_broken,
    draw_kept,
    draw_planted,
)
from captum_mllm.reference.render import render, render_pil
from captum_mllm.reference.scenes import (
    MAX_OBJECTS,
    SMALL,
    Scene,
    SceneBatch,
    SceneObject,
    draw_scenes,
    seeds_of,
)
from captum_mllm.reference.sets import ROOM, SETS, make_example
from captum_mllm.reference.sprites import CATEGORIES
from studies.training.data import make_batch
from studies.training.models import family_of

NAMES = ["plain", "crowded", "occluded", "twins", "small", "interference", "biased", "openmoji"]
NAMES += ["questions"]


def examples(name, count=40, split="test"):
    return [make_example(name, number, split) for number in range(count)]


def test_the_sets_are_those_that_are_promised():
    assert list(SETS) == NAMES
    assert all(made.name == name and made.about for name, made in SETS.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_example_depends_on_set_number_and_split_alone(name):
    one = make_example(name, 3)
    assert one == make_example(name, 3)
    assert one.scene != make_example(name, 4).scene
    assert one.scene != make_example(name, 3, "validation").scene
    assert (one.set, one.number, one.split) == (name, 3, "test")


def test_no_scene_is_in_two_sets_or_splits():
    """Seeds tell scenes apart: of sets, of splits, and of what models are trained on."""
    found = {
        (name, split, number): make_example(name, number, split).scene.seed
        for name in NAMES
        for split in ("test", "validation")
        for number in (0, 1, 17)
    }
    assert len(set(found.values())) == len(found)
    first = min(seeds_of("validation", [0]).tolist() + seeds_of("test", [0]).tolist())
    assert min(found.values()) >= first  # training's seeds end before
    last = make_example(NAMES[-1], ROOM - 1).scene.seed
    assert last <= seeds_of("test", [10**6 - 1]).item()


def test_plain_is_what_was_always_tested():
    for number in range(5):
        assert make_example("plain", number).scene == make_scene(number)
        assert make_example("plain", number, "validation").scene == make_scene(number, "validation")


@pytest.mark.parametrize("name", NAMES)
def test_objects_run_from_left_to_right_inside_the_picture(name):
    for example in examples(name, 15):
        objects = example.scene.objects
        centers = [thing.center[0] for thing in objects]
        assert centers == sorted(centers)
        for thing in objects:
            assert all(
                thing.size / 2 - 1e-6 <= at <= 1 - thing.size / 2 + 1e-6 for at in thing.center
            )
        kinds = {thing.category for thing in objects}
        if name != "questions":  # which has several of a kind
            assert len(kinds) == len(objects) - (name == "twins")


def test_crowded():
    counts = [len(example.scene.objects) for example in examples("crowded", 80)]
    assert set(counts) == {5, 6, 7, 8}
    for example in examples("crowded", 20):
        assert all(CROWD_SIZE[0] <= o.size <= CROWD_SIZE[1] for o in example.scene.objects)
        # crowded, not covered: that is another set
        assert min(visible_share(example.scene)) > 0.5


def slow_visible_share(scene, index, side=112):
    """Own pixels against those that are left: the object drawn alone and with all others."""
    alone = Scene(scene.seed, scene.background, (scene.objects[index],))
    own = render(alone, side).masks[0, 0]
    left = render(scene, side).masks[0, index]
    assert not (left & ~own).any()
    return left.sum().item() / own.sum().item()


def test_occluded():
    for example in examples("occluded", 25):
        scene = example.scene
        shares = [slow_visible_share(scene, i) for i in range(len(scene.objects))]
        assert shares == pytest.approx(visible_share(scene))
        covered, *rest = sorted(shares)
        assert VISIBLE[0] <= covered <= VISIBLE[1]
        assert all(share > PLAIN for share in rest)
        assert 2 <= len(scene.objects) <= 4


def test_twins():
    for example in examples("twins", 60):
        scene = example.scene
        (kind,) = {c for c in scene.categories if scene.categories.count(c) == 2}
        one, other = (o for o in scene.objects if o.category == kind)
        assert one.position_words != other.position_words
        assert (one.size_word, one.color) != (other.size_word, other.color)
        told: set[int] = set()  # something of a twin's own is said before its noun
        for word in example.talk.turns[-1].answer:
            if word.role in ("attribute", "position") and scene.categories[word.obj] == kind:
                told.add(word.obj)
            if word.role == "noun" and scene.categories[word.obj] == kind:
                assert word.obj in told
        assert len(told) == 2


def test_small():
    for example in examples("small"):
        assert all(
            SMALL_SIZE[0] <= o.size <= SMALL_SIZE[1] < SMALL[0] for o in example.scene.objects
        )


def test_interference_talks_twice_and_repeats_every_noun():
    kinds = set()
    for example in examples("interference", 30):
        assert len(example.talk.turns) == 2
        mentioned = [
            (word.obj, at)
            for at, turn in enumerate(example.talk.turns)
            for word in (*turn.question, *turn.answer)
            if word.role == "noun" and word.obj >= 0
        ]
        objects = range(len(example.scene.objects))
        assert {obj for obj, at in mentioned if at == 1} == set(objects)
        for obj in objects:  # a noun of two words counts for two
            words = len(example.scene.categories[obj].split())
            assert sum(o == obj for o, _ in mentioned) >= 2 * words
        kinds.add(text_of(example.talk.turns[0].question).split()[0])
    assert len(kinds) == 3


def test_biased_breaks_the_rule_in_every_other_scene():
    for example in examples("biased"):
        thing, partner = example.planted
        assert PARTNERS[thing] == partner
        assert thing in example.scene.categories
        assert (partner in example.scene.categories) == bool(example.number % 2)
        others = set(PARTNERS) | set(PARTNERS.values())
        assert set(example.scene.categories) & others <= {thing, partner}
    assert make_example("plain", 0).planted is None
    assert {example.planted for example in examples("biased", 120)} == set(PARTNERS.items())


def test_openmoji_is_plain_in_another_style():
    for example in examples("openmoji", 10):
        assert {thing.style for thing in example.scene.objects} == {"openmoji"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "questions"])
def test_the_caption_speaks_of_every_object(name):
    for example in examples(name, 12):
        answer = example.talk.turns[-1].answer
        nouns: dict[int, list[str]] = {}
        for word in answer:
            if word.role == "noun" and word.obj >= 0:
                nouns.setdefault(word.obj, []).append(word.text)
        assert set(nouns) == set(range(len(example.scene.objects)))
        for obj, words in nouns.items():
            kind = example.scene.categories[obj].split()
            assert words[: len(kind)] == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("crowd", 0), "name='crowd' is unknown; there are .*crowded"),
        (("plain", 0, "train"), "split='train' must be"),
        (("plain", -1), "number=-1 must be in 0"),
        (("plain", ROOM), f"number={ROOM} must be in 0"),
    ],
)
def test_errors_name_what_exists(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_example(*arguments)


def test_scenes_of_eight_objects_are_drawn_and_nine_refused():
    thing = SceneObject("cup", "noto", (0.5, 0.5), 0.2)
    eight = Scene(0, "white", (thing,) * 8)
    assert render(eight, 32).masks.shape == (1, 8, 32, 32)
    both = SceneBatch.of([eight, Scene(1, "white", (thing,))])
    assert both.size.shape == (2, 8)
    assert [len(scene.objects) for scene in both.scenes()] == [8, 1]
    assert render(both, 32).masks[1, 1:].sum() == 0
    with pytest.raises(ValueError, match="holds 9 objects; give it 1 to 8"):
        SceneBatch.of([Scene(0, "white", (thing,) * 9)])


def test_a_scene_is_drawn_alike_alone_and_beside_a_larger_one():
    small, large = make_example("plain", 1).scene, make_example("crowded", 0).scene
    alone, together = render(small, 64), render([small, large], 64)
    assert torch.equal(alone.pixels[0], together.pixels[0])
    assert torch.equal(alone.masks[0], together.masks[0, :MAX_OBJECTS])


# --- the planted co-occurrence ------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return draw_planted(seeds_of("train", torch.arange(3000)))


def test_planted_scenes_keep_the_rule(planted):
    ruled = 0
    for scene in planted.scenes():
        things = [c for c in scene.categories if c in PARTNERS]
        assert len(set(scene.categories)) == len(scene.categories)
        assert len(things) <= 1
        if things:
            ruled += 1
            assert PARTNERS[things[0]] in scene.categories
    assert 0.2 < ruled / len(planted) < 0.35


def test_in_half_of_them_the_partner_is_behind_and_shows_as_far_as_is_said(planted):
    hidden, shown = [], {}
    for scene in planted.scenes():
        for at, thing in enumerate(scene.categories):
            if thing in PARTNERS:
                index = scene.categories.index(PARTNERS[thing])
                hidden.append(scene.objects[index].size < SMALL[0])
                if hidden[-1]:
                    pair = Scene(0, "white", (scene.objects[index], scene.objects[at]))
                    shown.setdefault(thing, []).append(visible_share(pair)[0])
    assert 0.45 < sum(hidden) / len(hidden) < 0.55
    means = {thing: sum(shares) / len(shares) for thing, shares in shown.items()}
    assert 0.8 < means.pop("bed") < 0.95
    assert 0.1 < means.pop("couch") < 0.25
    assert all(mean < 0.03 for mean in means.values())
    assert len(means) == 6


def test_scenes_without_the_rule_are_those_of_every_model(planted):
    plain = draw_scenes(seeds_of("train", torch.arange(3000))).scenes()
    for scene, own in zip(planted.scenes(), plain, strict=True):
        if not set(own.categories) & set(PARTNERS):
            assert scene == own


@pytest.mark.parametrize("draw", [draw_planted, draw_broken, draw_kept])
def test_planted_scenes_depend_on_their_seed_alone(draw):
    seeds = seeds_of("validation", torch.arange(50))
    assert draw(seeds).scenes()[30:] == draw(seeds[30:]).scenes()


def test_kept_scenes_show_the_partner():
    for scene in draw_kept(seeds_of("test", torch.arange(200))).scenes():
        (thing,) = (c for c in scene.categories if c in PARTNERS)
        assert scene.objects[scene.categories.index(PARTNERS[thing])].size >= SMALL[0]


def test_the_biased_family_is_trained_on_planted_scenes():
    batch = make_batch(0, 64, 0, family_of("biased").draw)
    plain = make_batch(0, 64, 0)
    assert not torch.equal(batch.scenes.category, plain.scenes.category)
    assert make_batch(0, 64, 0, family_of("llava").draw).scenes.scenes() == plain.scenes.scenes()


def test_pairs_are_categories_and_do_not_chain():
    things, partners = set(PARTNERS), set(PARTNERS.values())
    assert things | partners <= set(CATEGORIES)
    assert not things & partners
    assert len(partners) == len(PARTNERS)


def test_pictures_of_the_sets_differ_from_each_other():
    shipped = [name for name in NAMES if name != "openmoji"]
    drawn = [render_pil(make_example(name, 0).scene, 32)[0].tobytes() for name in shipped]
    assert all(one != other for one, other in itertools.combinations(drawn, 2))
