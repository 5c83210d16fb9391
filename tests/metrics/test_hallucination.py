"""Hallucination scores: the formulas against slow twins, the wrapper against plain forwards."""

import copy
import math
import warnings

import pytest
import torch

from captum_mllm import LogitLens
from captum_mllm.metrics import (
    hallucination_scores,
    insertion_deletion,
    log_normalizer,
    map_entropy,
    mass_area,
    rank_of,
)
from tests.oracle.families import family
from tests.oracle.layouts import logits_of, visual_ids, with_answer
from tests.oracle.model_state import check_same, state, worn

over_seeds = pytest.mark.parametrize("seed", range(6))


def head(seed, n=5, dim=7, vocabulary=23):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=generator).double()
    weight = torch.randn(vocabulary, dim, generator=generator).double()
    bias = torch.randn(vocabulary, generator=generator).double() if seed % 2 else None
    return hidden, weight, bias


# --- formulas ---------------------------------------------------------------------------------


@over_seeds
@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
def test_log_normalizer_is_the_sum_of_exponentials(seed, chunk):
    hidden, weight, bias = head(seed)
    expected = []
    for h in hidden:
        logits = [
            float(w @ h) + (0 if bias is None else float(bias[v])) for v, w in enumerate(weight)
        ]
        expected.append(math.log(sum(math.exp(x) for x in logits)))
    found = log_normalizer(hidden, weight, bias, chunk=chunk)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    shifted = log_normalizer(hidden, weight, torch.full((23,), 900.0).double(), chunk=chunk)
    bare = log_normalizer(hidden, weight, chunk=chunk)
    torch.testing.assert_close(shifted, bare + 900)


@over_seeds
@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
def test_rank_is_the_place_in_the_sorted_list(seed, chunk):
    hidden, weight, bias = head(seed)
    weight = weight.round() if seed % 3 == 0 else weight  # makes ties
    hidden = hidden.round() if seed % 3 == 0 else hidden
    bias = None if seed % 3 == 0 else bias
    ids = torch.tensor([0, 22, 7, 7, 13])
    expected = []
    for h, own in zip(hidden, ids.tolist(), strict=True):
        logits = [
            float(w @ h) + (0 if bias is None else float(bias[v])) for v, w in enumerate(weight)
        ]
        expected.append(sorted(range(23), key=lambda v: (-logits[v], v)).index(own) + 1)
    assert rank_of(hidden, ids, weight, bias, chunk=chunk).tolist() == expected


def test_ties_in_rank_go_to_the_lower_id():
    flat = torch.zeros(9, 3)
    ids = torch.tensor([0, 4, 8])
    assert rank_of(torch.ones(3, 3), ids, flat, chunk=2).tolist() == [1, 5, 9]


def slow_shares(cells):
    positive = [max(float(x), 0.0) for x in cells]
    total = sum(positive)
    return [x / total for x in positive] if total else [1 / len(positive)] * len(positive)


@over_seeds
@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 6), (1, 2, 3, 4)])
def test_entropy_and_area_are_those_of_the_slow_twins(seed, shape):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for row, values in enumerate(maps.flatten(1)):
        shares = slow_shares(values)
        entropy = -sum(p * math.log(p) for p in shares if p) / math.log(len(shares))
        assert float(map_entropy(maps)[row]) == pytest.approx(entropy, abs=1e-9)
        for mass in (0.5, 0.85, 1.0):
            held, n = 0.0, 0
            for share in sorted(shares, reverse=True):
                if held >= mass - 1e-9:
                    break
                held, n = held + share, n + 1
            assert float(mass_area(maps, mass)[row]) == pytest.approx(n / len(shares))


def test_entropy_and_area_by_hand():
    maps = torch.tensor([[5.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [-1, -2, 0, 3]])
    assert map_entropy(maps).tolist() == pytest.approx([0, 1, 1, 0])
    assert mass_area(maps, 0.5).tolist() == [0.25, 0.5, 0.5, 0.25]
    assert mass_area(torch.ones(1, 20)).tolist() == [0.85]
    assert torch.equal(map_entropy(maps * 7), map_entropy(maps))
    assert map_entropy(torch.ones(2, 1)).tolist() == [0.0, 0.0]


def test_bad_values_are_errors():
    for call, match in (
        (lambda: mass_area(torch.ones(1, 2), 0), "mass must lie above 0"),
        (lambda: map_entropy(torch.ones(3)), r"maps must be \(targets"),
        (lambda: map_entropy(torch.full((1, 2), torch.nan)), "NaN"),
        (lambda: log_normalizer(torch.ones(1, 2), torch.ones(3, 2), chunk=0), "chunk"),
        (lambda: log_normalizer(torch.ones(1, 2), torch.ones(0, 2)), "weight is empty"),
        (lambda: rank_of(torch.ones(1, 2), torch.tensor([0]), torch.ones(3, 2), chunk=0), "chunk"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# --- the wrapper ------------------------------------------------------------------------------


def encode(kin, *pictures):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kin.encode(*pictures)


@pytest.mark.parametrize("name", ["Llava", "Qwen2VL", "InternVL", "Idefics3", "Gemma3"])
def test_scores_are_those_of_plain_forwards(name):
    """Several images; every image token is a cell of some view."""
    kin = family(name)
    inputs = encode(kin, kin.picture, kin.wide_picture)
    found = hallucination_scores(kin.model, inputs, kin.answer, processor=kin.processor)
    logits = logits_of(kin, with_answer(kin, inputs, kin.answer)).double()
    is_cell = torch.isin(inputs["input_ids"][0], torch.tensor(visual_ids(kin)))
    cells = logits[: len(is_cell)][is_cell].log_softmax(-1)
    for row, token in enumerate(kin.answer.tolist()):
        best = max(range(len(cells)), key=lambda c: float(cells[c, token]))
        value = float(cells[best, token])
        assert float(found.decodability[row]) == pytest.approx(value, abs=1e-4)
        assert int(found.rank[row]) == 1 + int((cells[best] > cells[best, token]).sum())
        own = float(logits[len(is_cell) - 1 + row].log_softmax(-1)[token])
        assert float(found.log_prob[row]) == pytest.approx(own, abs=1e-4)
    lens = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)
    maps = torch.cat([m.flatten(1) for m in lens.grid_attr], 1)
    torch.testing.assert_close(found.entropy, map_entropy(maps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.area, mass_area(maps), atol=1e-5, rtol=0)
    black = insertion_deletion(
        kin.model, inputs, kin.answer, lens, processor=kin.processor, steps=1
    )
    expected = black.probs.log() - black.black_probs.log()
    torch.testing.assert_close(found.reliance, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_other_blank_images_other_tokens_other_maps(baseline):
    kin = family("Qwen2VL")
    inputs = encode(kin)
    lens = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)
    maps = torch.rand(5, 3, 4)
    found = hallucination_scores(
        kin.model, inputs, kin.answer,
        processor=kin.processor, tokens=[3, -4], attribution=maps, baseline=baseline,
    )  # fmt: skip
    assert found.tokens == (3, 1)
    torch.testing.assert_close(found.entropy, map_entropy(maps[[3, 1]]))
    ends = insertion_deletion(
        kin.model, inputs, kin.answer, lens,
        processor=kin.processor, steps=1, tokens=[3, 1], baseline=baseline,
    )  # fmt: skip
    expected = ends.probs.log() - ends.insertion[:, 0].log()
    torch.testing.assert_close(found.reliance, expected, atol=1e-4, rtol=1e-4)
    one = hallucination_scores(
        kin.model, inputs, kin.answer, processor=kin.processor, attribution=maps[0]
    )
    torch.testing.assert_close(one.area, mass_area(maps[:1]).expand(5))


def test_words_follow_the_chain_rule_and_their_most_decodable_token(
    model, processor, inputs, answer
):
    found = hallucination_scores(model, inputs, answer, processor=processor)
    words = found.of_words([[0], [1, 2, 3]])
    best = max((1, 2, 3), key=lambda t: float(found.decodability[t]))
    assert words.tokens == (0, best)
    for name in ("decodability", "rank", "entropy", "area"):
        assert float(getattr(words, name)[1]) == float(getattr(found, name)[best])
    for name in ("log_prob", "reliance"):
        total = sum(float(getattr(found, name)[t]) for t in (1, 2, 3))
        assert float(getattr(words, name)[1]) == pytest.approx(total)
        assert float(getattr(words, name)[0]) == float(getattr(found, name)[0])
    assert found.of_words([]).tokens == ()
    for wrong in ([[]], [[9]]):
        with pytest.raises(ValueError, match="words must hold positions among"):
            found.of_words(wrong)


def test_wrong_arguments_are_named(model, processor, inputs, answer):
    with pytest.raises(ValueError, match="baseline must be one of"):
        hallucination_scores(model, inputs, answer, processor=processor, baseline="grey")
    with pytest.raises(TypeError, match="target is None"):
        hallucination_scores(model, inputs, None, processor=processor)
    with pytest.raises(ValueError, match="processor must be"):
        hallucination_scores(model, inputs, answer, processor=None)


def test_the_model_is_left_as_it_was(model, processor, inputs, answer):
    used = worn(copy.deepcopy(model))
    before = state(used)
    hallucination_scores(used, inputs, answer, processor=processor)
    check_same(before, used)


def test_what_is_there_is_decodable_and_relied_on(shipped):
    """The reference model: an object of the picture against one that is not there."""
    from captum_mllm.reference import make_scene, render_pil
    from studies.prompts import default_inputs

    model, processor = shipped
    scene = make_scene(3)
    picture, _ = render_pil(scene, 112)
    inputs = default_inputs(processor, picture)
    absent = next(n for n in ("dog", "cat", "pizza") if n not in scene.categories)
    found = {}
    for name in (scene.categories[0], absent):
        ids = processor.tokenizer(f"there is a {name}", add_special_tokens=False)["input_ids"]
        tokens = list(range(3, len(ids)))
        scores = hallucination_scores(model, inputs, ids, processor=processor, tokens=tokens)
        found[name] = scores.of_words([tokens])
    real, made_up = found[scene.categories[0]], found[absent]
    assert real.decodability > made_up.decodability + 1
    assert int(real.rank) < int(made_up.rank)
    assert real.reliance > made_up.reliance + 1
