"""Insertion and deletion on models: against plain loops, its properties, its errors."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from captum_mllm import LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.metrics import insertion_deletion
from captum_mllm.model.baselines import BASELINES, black_pixel
from captum_mllm.reference.models import load
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import make_scene
from studies.prompts import answer_words, default_inputs
from tests.oracle.families import above, family, video
from tests.oracle.model_state import check_same, state, worn

STEPS = 4


def encode(kin, *pictures):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kin.encode(*pictures)


def random_maps(inputs, kin, n=None, seed=0):
    """No ties: on the frame's own pixels."""
    generator = torch.Generator().manual_seed(seed)
    grids = find_adapter(kin.model).grids(inputs)
    lead = () if n is None else (n,)
    return tuple(torch.rand(*lead, g.height, g.width, generator=generator) for g in grids)


def run(kin, inputs, maps, **settings):
    settings = {"steps": STEPS, "perturbations_per_eval": 3, **settings}
    return insertion_deletion(
        kin.model, inputs, kin.answer, maps, processor=kin.processor, **settings
    )


# --- plain loops ------------------------------------------------------------------------------


def changed_by_hand(kin, inputs, masks, black):
    """pixel_values with black where a mask is set; each family's layout written out."""
    pixels = inputs["pixel_values"].clone()
    if kin.name == "Llava":
        for n, mask in enumerate(masks):
            pixels[n][:, mask] = black[:, :, 0]
    elif kin.name == "Qwen2VL":
        change_patches(pixels, inputs["image_grid_thw"].tolist(), masks, black)
    else:
        grids = find_adapter(kin.model).grids(inputs)
        change_tiles(pixels, [grid.tiles for grid in grids], masks, black)
    return pixels


def change_patches(pixels, shapes, masks, black):
    """Rows of 4 x 4 patches, in blocks of 2 x 2; each holds (channel, frame, y, x)."""
    row = 0
    for mask, (_, high, wide) in zip(masks, shapes, strict=True):
        blocks = [(y, x) for y in range(0, high, 2) for x in range(0, wide, 2)]
        for block_y, block_x in blocks:
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                top, left = 4 * (block_y + y), 4 * (block_x + x)
                own = mask[top : top + 4, left : left + 4]
                patch = pixels[row].reshape(3, 2, 4, 4)
                patch[:, :, own] = black.expand(3, 2, int(own.sum()))
                row += 1


def change_tiles(pixels, layouts, masks, black):
    """Tiles of 32 px row by row, then the thumbnail: it gets their change, shrunk."""
    at = 0
    for mask, (down, across) in zip(masks, layouts, strict=True):
        change = torch.zeros(3, 32 * down, 32 * across)
        for y in range(down):
            for x in range(across):
                here = (slice(None), slice(32 * y, 32 * y + 32), slice(32 * x, 32 * x + 32))
                change[here] = (black - pixels[at]) * mask[here[1:]]
                pixels[at] += change[here]
                at += 1
        if down * across > 1:
            pixels[at] += F.interpolate(change[None], (32, 32), mode="bicubic", antialias=True)[0]
            at += 1


def probability(kin, inputs, token):
    """p of one token of the answer: nothing but a forward over all before it."""
    n = token
    ids = torch.cat([inputs["input_ids"], kin.answer[None, :n]], 1)
    longer = dict(inputs) | {"input_ids": ids}
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = F.pad(inputs[name], (0, n), value=fill)
    with torch.no_grad():
        logits = kin.model(**longer).logits[0, -1]
    return float(logits.softmax(-1)[kin.answer[token]])


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("name", ["Llava", "Qwen2VL", "InternVL"])
def test_curves_are_those_of_a_plain_loop(name, per_token):
    kin = family(name)
    inputs = encode(kin, kin.picture, kin.wide_picture)
    maps = random_maps(inputs, kin, 2 if per_token else None)
    found = run(kin, inputs, maps, tokens=[1, 4])
    black = black_pixel(kin.processor)
    for row, token in enumerate((1, 4)):
        own = [m[row] if per_token else m for m in maps]
        values = torch.cat([m.flatten() for m in own]).sort(descending=True).values
        for step in range(STEPS + 1):
            n = round(step * len(values) / STEPS)
            best = [m >= values[n - 1] if n else torch.zeros_like(m, dtype=torch.bool) for m in own]
            for curve, masks in (
                (found.insertion, [~mask for mask in best]),
                (found.deletion, best),
            ):
                pixels = changed_by_hand(kin, inputs, masks, black)
                expected = probability(kin, inputs | {"pixel_values": pixels}, token)
                assert float(curve[row, step]) == pytest.approx(expected, abs=1e-5)


# --- properties -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", above())
def test_ends_complement_and_probabilities(name):
    """Insertion of a map is the deletion of its opposite, backwards; ends are full and black."""
    kin = family(name)
    inputs = encode(kin, kin.wide_picture)
    maps = random_maps(inputs, kin, len(kin.answer))
    found = run(kin, inputs, maps)
    opposite = run(kin, inputs, tuple(-m for m in maps))
    close = {"atol": 1e-6, "rtol": 1e-4}
    torch.testing.assert_close(found.insertion, opposite.deletion.flip(1), **close)
    torch.testing.assert_close(found.deletion, opposite.insertion.flip(1), **close)
    usual = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)
    torch.testing.assert_close(found.probs.float(), usual.output_probs, **close)
    assert torch.equal(found.insertion[:, -1], found.probs)
    assert torch.equal(found.deletion[:, 0], found.probs)
    assert torch.equal(found.insertion[:, 0], found.black_probs)
    assert torch.equal(found.deletion[:, -1], found.black_probs)
    assert not torch.allclose(found.insertion[:, 1], found.deletion[:, 1], atol=1e-4)


@pytest.mark.parametrize("baseline", ["black", "mean", "blur"])
def test_batches_tokens_and_one_map_for_all(baseline):
    kin = family("Llava")
    inputs = encode(kin, kin.picture, kin.other_picture)
    maps = random_maps(inputs, kin)
    whole = run(kin, inputs, maps, baseline=baseline)
    single = run(kin, inputs, maps, baseline=baseline, perturbations_per_eval=1)
    each = tuple(m.expand(len(kin.answer), -1, -1) for m in maps)
    for other in (single, run(kin, inputs, each, baseline=baseline)):
        torch.testing.assert_close(whole.insertion, other.insertion, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(whole.deletion, other.deletion, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(whole.black_probs, other.black_probs, atol=1e-6, rtol=1e-5)
    some = run(kin, inputs, each, baseline=baseline, tokens=[-1, 2])
    assert some.tokens == (4, 2)
    torch.testing.assert_close(some.insertion, whole.insertion[[4, 2]], atol=1e-6, rtol=1e-5)
    assert torch.equal(whole.black_probs, whole.insertion[:, 0]) == (baseline == "black")


def test_a_result_ranks_as_its_maps_do():
    kin = family("Qwen2VL")
    inputs = encode(kin, kin.picture, kin.tall_picture)
    result = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)
    by_result = run(kin, inputs, result, tokens=[2, 0])
    by_maps = run(kin, inputs, tuple(m[[2, 0]] for m in result.grid_attr), tokens=[2, 0])
    assert torch.equal(by_result.insertion, by_maps.insertion)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen3VL"])
def test_a_video_is_changed_frame_by_frame(name):
    kin = family(name)
    inputs = video(kin)
    grid = find_adapter(kin.model).grids(inputs)[0]
    maps = torch.rand(grid.frames, grid.rows, grid.cols)
    found = run(kin, inputs, maps)
    assert torch.equal(found.insertion[:, -1], found.probs)
    steps = run(kin, inputs, torch.rand(grid.steps, grid.rows, grid.cols))
    assert not torch.allclose(steps.insertion, found.insertion)
    with pytest.raises(ValueError, match=f"{grid.frames} frames"):
        run(kin, inputs, torch.rand(grid.frames + 1, grid.rows, grid.cols))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, processor, inputs, answer, fails, monkeypatch):
    used = worn(copy.deepcopy(model))
    before = state(used)
    if fails:
        monkeypatch.setattr(type(used.lm_head), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            insertion_deletion(used, inputs, answer, torch.rand(4, 4), processor=processor)
    else:
        insertion_deletion(used, inputs, answer, torch.rand(4, 4), processor=processor, steps=3)
    check_same(before, used)


def test_progress_bar_counts_the_versions(model, processor, inputs, answer, capsys):
    insertion_deletion(
        model, inputs, answer, torch.rand(4, 4),
        processor=processor, steps=5, perturbations_per_eval=4, show_progress=True,
    )  # fmt: skip
    assert "10/10" in capsys.readouterr().err


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"baseline": "grey"}, "baseline must be one of black, mean, blur, got 'grey'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be"),
        ({"perturbations_per_eval": 0}, "perturbations_per_eval must be"),
        ({"areas": (1.5,)}, "areas must lie between 0 and 1"),
        ({"tokens": [5]}, r"tokens must hold .* \(0\.\.4\)"),
        ({"tokens": []}, "tokens must hold"),
        ({"attribution": torch.rand(3, 4, 4)}, r"one map for the sequence.*got \[3\]"),
        ({"attribution": torch.rand(4)}, r"attribution must be \(tokens, rows, cols\)"),
        ({"attribution": torch.full((4, 4), torch.nan)}, "attribution holds NaN"),
        ({"attribution": (torch.rand(4, 4),) * 2}, r"one tensor of maps per image \(1\), got 2"),
    ],
)
def test_bad_values_are_named(model, processor, inputs, answer, change, match):
    given = {"attribution": torch.rand(4, 4), **change}
    with pytest.raises(ValueError, match=match):
        insertion_deletion(model, inputs, answer, processor=processor, **given)


def test_bad_kinds_are_named(model, processor, inputs, answer):
    maps = torch.rand(4, 4)
    with pytest.raises(TypeError, match=r"target is None.*output_ids"):
        insertion_deletion(model, inputs, None, maps, processor=processor)
    with pytest.raises(TypeError, match=r"attribution must be a result.*str"):
        insertion_deletion(model, inputs, answer, "map", processor=processor)
    with pytest.raises(ValueError, match=r"processor must be.*NoneType"):
        insertion_deletion(model, inputs, answer, maps, processor=None)


def test_a_result_of_another_answer_is_an_error(model, processor, inputs, answer):
    result = LogitLens(model, processor).attribute(inputs, answer.flip(0) + 1)
    with pytest.raises(ValueError, match=r"attribution explains the ids .*output_ids as target"):
        insertion_deletion(model, inputs, answer, result, processor=processor)


def test_a_replaced_head_is_an_error(model, processor, inputs, answer, monkeypatch):
    def twice(**kwargs):
        model.lm_head(torch.zeros(1, 300, 24))
        return forward(**kwargs)

    forward = model.forward
    monkeypatch.setattr(model, "forward", twice)
    with pytest.raises(ValueError, match="LM head ran 2 times"):
        insertion_deletion(model, inputs, answer, torch.rand(4, 4), processor=processor)


# --- models that see --------------------------------------------------------------------------


def scene_of(name, number, side):
    """Inputs, answer, tokens of its objects and their true masks."""
    model, processor = load(name)
    scene = make_scene(number)
    picture, masks = render_pil(scene, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = default_inputs(processor, picture)
    trace = LogitLens(model, processor).trace(inputs)
    words = answer_words(trace, scene)
    tokens = [tokens[0] for tokens in words.values()]
    truth = torch.stack([masks[obj].float() for obj in words])
    return model, processor, inputs, trace.text_ids[trace.n_prompt :], tokens, truth


def difference(name, number, baseline, side, n_objects=None):
    """Insertion minus deletion of the true masks, a random map and the reversed masks."""
    model, processor, inputs, answer, tokens, truth = scene_of(name, number, side)
    truth, tokens = truth[:n_objects], tokens[:n_objects]
    generator = torch.Generator().manual_seed(number)
    maps = (truth, torch.rand(len(tokens), 14, 14, generator=generator), -truth)
    scores = []
    for own in maps:
        found = insertion_deletion(
            model, inputs, answer, own, processor=processor, tokens=tokens,
            steps=8, perturbations_per_eval=7, baseline=baseline,
        )  # fmt: skip
        assert bool(found.sensitive.all())  # what such a model names, it sees
        scores.append(found.means(sensitive_only=True)["difference"])
    return scores


def test_true_masks_beat_random_and_reversed_ones():
    truth, random, reversed_ = difference("llava", 3, "black", 112, 1)
    assert truth > random + 0.1
    assert random > reversed_ + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "baseline"),
    [
        *((name, 112, b) for name in ("llava", "qwen2vl", "internvl") for b in BASELINES),
        ("internvl", 224, "mean"),  # four tiles and a thumbnail
    ],
)
def test_true_masks_beat_random_and_reversed_ones_everywhere(name, side, baseline):
    """In the mean: black leaves the Qwen2-VL next to nothing in some scenes, whatever the map."""
    numbers = (3,) if side > 112 else (3, 5, 8)
    runs = [difference(name, number, baseline, side, 1) for number in numbers]
    truth, random, reversed_ = torch.tensor(runs).mean(0).tolist()
    assert truth > random > reversed_, runs
