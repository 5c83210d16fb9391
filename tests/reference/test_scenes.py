import dataclasses
import itertools
import random

import pytest
import torch

from captum_mllm.reference import make_scene, named_objects, render_pil
from captum_mllm.reference.captions import (
    KINDS,
    ROLES,
    converse,
    draw_conversation,
    text_of,
)
from captum_mllm.reference.render import draw, render
from captum_mllm.reference.scenes import SPLITS, SceneBatch, draw_scenes, seeds_of
from captum_mllm.reference.sprites import CATEGORIES, STYLES, load_sprites
from studies.training.data import IGNORE, encode, prefix_ids
from studies.training.tokenizer import SPECIAL, SPLIT_NOUNS, build_processor


@pytest.fixture(scope="module")
def batch():
    return draw_scenes(seeds_of("test", range(200)))


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_a_scene_depends_on_its_seed_alone(batch):
    scenes = batch.scenes()
    assert [make_scene(i) for i in (0, 7, 199)] == [scenes[i] for i in (0, 7, 199)]
    assert len({dataclasses.replace(s, seed=0) for s in scenes}) == len(scenes)


def test_splits_share_no_seed():
    ranges = sorted((first, first + size) for first, size in SPLITS.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    with pytest.raises(ValueError, match="must be in"):
        seeds_of("test", [SPLITS["test"][1]])
    with pytest.raises(ValueError, match="must be in"):
        seeds_of("train", [-1])
    with pytest.raises(ValueError, match="unknown"):
        make_scene(0, "exam")


def test_scenes_keep_their_promises(batch):
    for scene in batch.scenes():
        xs = [o.center[0] for o in scene.objects]
        assert xs == sorted(xs)
        assert 1 <= len(scene.objects) <= 4
        assert len(set(scene.categories)) == len(scene.objects)
        for o in scene.objects:
            assert 0.22 <= o.size <= 0.5
            assert all(o.size / 2 - 1e-6 <= c <= 1 - o.size / 2 + 1e-6 for c in o.center)
    assert set(batch.count.tolist()) == {1, 2, 3, 4}


def test_scenes_and_tensors_say_the_same(batch):
    again = SceneBatch.of(batch.scenes())
    present = torch.arange(4) < batch.count[:, None]
    for name in ("category", "style", "color", "flip", "size"):
        torch.testing.assert_close(getattr(again, name)[present], getattr(batch, name)[present])


def test_sprites():
    sprites = load_sprites()
    assert sprites.shape == (len(STYLES), len(CATEGORIES), 64, 64, 4)
    assert len(CATEGORIES) == 64
    assert ((sprites[..., 3] > 127).mean((2, 3)) > 0.08).all()


def test_without_an_object_only_its_own_pixels_change(batch):
    for scene in [s for s in batch.scenes() if len(s.objects) > 1][:10]:
        whole = render(scene, 128)
        for i in range(len(scene.objects)):
            rest = dataclasses.replace(scene, objects=scene.objects[:i] + scene.objects[i + 1 :])
            changed = (render(rest, 128).pixels - whole.pixels)[0].abs().amax(0) > 0.02
            mask = whole.masks[0, i]
            near = torch.nn.functional.max_pool2d(mask[None].float(), 7, 1, 3)[0] > 0
            # the rest are faint edges; inside the mask a few pixels look like what is behind
            assert (changed & ~near).sum() <= 0.12 * mask.sum()
            assert (changed & mask).sum() >= 0.7 * mask.sum()
        assert not whole.masks[0, len(scene.objects) :].any()


def test_masks_do_not_overlap_and_follow_the_size(batch):
    scenes = SceneBatch.of(batch.scenes()[:8])
    small, large = render(scenes, 64), render(scenes, 192)
    assert (large.masks.sum(1) <= 1).all()
    share = [x.masks.float().mean((2, 3)) for x in (small, large)]
    torch.testing.assert_close(share[0], share[1], atol=0.01, rtol=0.15)
    torch.testing.assert_close(draw(scenes, 64), small.pixels)


def test_render_pil_is_render(batch):
    scene = batch.scenes()[1]
    image, masks = render_pil(scene, 80)
    drawn = render(scene, 80)
    pixels = torch.tensor(list(image.tobytes())).view(80, 80, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(pixels, drawn.pixels[0], atol=0.5 / 255 + 1e-6, rtol=0)
    assert torch.equal(masks, drawn.masks[0, : len(scene.objects)])


def test_annotations_fit_the_scene(batch):
    for scene in batch.scenes()[:60]:
        for kind in KINDS:
            for turn in converse(scene, kind, seed=scene.seed).turns:
                for word in (*turn.question, *turn.answer):
                    assert word.role in ROLES
                    assert -1 <= word.obj < len(scene.objects)
                    if word.obj < 0:
                        continue
                    about = scene.objects[word.obj]
                    told = {
                        "noun": about.category.split(),
                        "attribute": [about.size_word, about.color],
                        "position": about.position_words,
                        "pronoun": ["it"],
                    }
                    assert word.text in told[word.role]


def test_lists_name_the_objects_from_left_to_right(batch):
    for scene in batch.scenes():
        for kind in ("list", "names", "see"):
            answer = text_of(converse(scene, kind).turns[0].answer)
            assert named_objects(answer) == list(scene.categories)
        twice = named_objects(text_of(converse(scene, "describe").turns[0].answer))
        assert twice == list(scene.categories) * 2
    with pytest.raises(ValueError, match="unknown"):
        converse(scene, "sonnet")


def test_nouns_split_and_their_first_pieces_differ(processor):
    pieces = {category: processor.tokenizer.tokenize(category) for category in CATEGORIES}
    assert len({p[0] for p in pieces.values()}) == len(CATEGORIES)
    assert len(SPLIT_NOUNS) * 3 >= len(CATEGORIES)
    for noun, split in SPLIT_NOUNS.items():
        assert pieces[noun] == ["▁" + split.split()[0], *split.split()[1:]]


@pytest.mark.parametrize(
    "text", ["there is a zebra, a dog and an umbrella.", "xylophone no. 7?", "it's (well) 3-4!"]
)
def test_tokenizer_round_trip(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert ids[0] == SPECIAL.index("<s>")
    assert SPECIAL.index("<unk>") not in ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_training_and_processor_encode_alike(batch, processor):
    pick = random.Random(0)
    image = SPECIAL.index("<image>")
    for scene in batch.scenes()[:60]:
        talk = draw_conversation(scene, pick)
        ids, labels = encode(talk)
        chat = processor.apply_chat_template(talk.messages(), tokenize=False)
        wanted = [i for i in processor.tokenizer(chat)["input_ids"] if i != image]
        ours = [*prefix_ids(), *ids]
        assert wanted[: len(ours)] == ours
        learnt = processor.tokenizer.decode([i for i in labels if i != IGNORE])
        answers = [text_of(turn.answer) for turn in talk.turns]
        assert learnt.split("</s>")[0].split() == answers[0].split()
        assert learnt.count("</s>") == ids.count(SPECIAL.index("</s>"))
