"""The study of hallucinations: which words are made up, and every score against plain forwards."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from captum_mllm import LogitLens, TokenActivationMap
from captum_mllm.metrics import hallucination_scores, map_entropy, mass_area
from captum_mllm.reference import load
from captum_mllm.reference.captions import converse, named_objects, text_of
from captum_mllm.reference.models import model_path
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import make_scene
from captum_mllm.reference.sets import make_example
from studies import hallucination, hallucination_table
from studies.compare import methods
from studies.prompts import default_inputs
from studies.training.models import sha256
from tests.oracle.families import family
from tests.oracle.layouts import at_scale, logits_of, visual_ids
from tests.oracle.published import ARC, MSEA


@pytest.fixture(scope="module")
def biased():
    return load("biased")


@pytest.fixture(scope="module")
def said(biased):
    """A scene that breaks the rule, and what the biased model says about it."""
    picture, _ = render_pil(make_example("biased", 0).scene, 112)
    inputs = dict(default_inputs(biased[1], picture))
    return inputs, LogitLens(*biased).trace(inputs, top_k=50), MSEA(*biased).trace(inputs, top_k=50)


@pytest.fixture(scope="module")
def found():
    """The first four scenes, of which every other one breaks the rule."""
    return hallucination.measure("biased", 4)


# --- words ------------------------------------------------------------------------------------


def test_named_words_are_those_of_the_script(shipped):
    """Scripts with names of two words; the tokens of each mention spell the name."""
    tokenizer, pick = shipped[1].tokenizer, random.Random(0)
    two = 0
    for number in range(60):
        talk = converse(make_scene(number), pick.choice(["list", "describe", "see"]))
        text = text_of(talk.turns[-1].answer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        labels = tokenizer.convert_ids_to_tokens(ids)
        words = hallucination.named_words(labels)
        assert [kind for kind, _ in words] == named_objects(text)
        for kind, tokens in words:
            assert tokenizer.decode([ids[t] for t in tokens]).strip() == kind
            two += " " in kind
    assert two > 5


def test_two_of_a_kind_in_a_row_are_two_words():
    labels = ["dog", " dog", " teddy", " bear", " teddy", " bear"]
    expected = [("dog", (0,)), ("dog", (1,)), ("teddy bear", (2, 3)), ("teddy bear", (4, 5))]
    assert hallucination.named_words(labels) == expected


def test_a_word_is_hallucinated_where_its_object_is_absent(found, biased):
    model, processor = biased
    at = 0
    for number in range(4):
        example = make_example("biased", number)
        picture, _ = render_pil(example.scene, 112)
        inputs = default_inputs(processor, picture)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=128)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for kind in named_objects(text):
            assert (found["number"][at], found["word"][at]) == (number, kind)
            assert found["hallucinated"][at] == (kind not in example.scene.categories)
            assert found["partner"][at] == (kind == example.planted[1])
            at += 1
    assert at == len(found["word"])
    made_up = [n for n, h in zip(found["number"], found["hallucinated"], strict=True) if h]
    assert made_up  # and where nothing breaks the rule nothing is made up
    assert all(n % 2 == 0 for n in made_up)
    assert {len(values) for values in found["scores"].values()} == {at}


# --- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llava", "Qwen2VL", "InternVL"])
@pytest.mark.filterwarnings("ignore")
def test_decodability_at_scales_is_that_of_plain_forwards(name):
    """Pixels resized by hand, a plain forward of the prompt, the best cell of all views."""
    kin = family(name)
    inputs = kin.encode(kin.picture)
    scales = (1.0, 1.5)
    found = hallucination.decodability(kin.model, kin.processor, inputs, kin.answer, scales)
    for row, scale in zip(found, scales, strict=True):
        scaled = at_scale(kin, inputs, [kin.picture], scale)[0] if scale > 1 else inputs
        is_cell = torch.isin(scaled["input_ids"][0], torch.tensor(visual_ids(kin)))
        cells = logits_of(kin, scaled)[is_cell].double().log_softmax(-1)
        expected = cells[:, kin.answer].amax(0)
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
    base = hallucination_scores(kin.model, inputs, kin.answer, processor=kin.processor)
    torch.testing.assert_close(found[0], base.decodability, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_one_size_has_no_scales():
    kin = family("Gemma3")
    with pytest.raises(ValueError, match="one size only"):
        hallucination.decodability(
            kin.model, kin.processor, kin.encode(kin.picture), kin.answer, (1.0,)
        )


def test_word_scores_are_turned_so_that_high_is_doubtful(biased, said):
    """Each score from a public call or a plain forward, with its sign written out."""
    model, processor = biased
    inputs, single, several = said
    answer = single.text_ids[single.n_prompt :]
    words = [tokens for _, tokens in hallucination.named_words(single.labels[single.n_prompt :])]
    words = [(0,), *words[:2], (1, 2)]
    rows = [row for row in methods(model) if row.name in hallucination.MAPS]
    scores = hallucination.word_scores(model, processor, inputs, (single, several), words, rows)
    every = hallucination_scores(model, inputs, answer, processor=processor)
    pixels, prompt = inputs["pixel_values"], inputs["input_ids"]
    # one scale after the other: 14 x 14, 18 x 18 and 21 x 21 tokens of 8 pixels
    decoded, image = [], prompt[0] == model.config.image_token_id
    for side in (14, 18, 21):
        first, last = torch.nonzero(image)[[0, -1], 0].tolist()
        marks = torch.full((side * side,), model.config.image_token_id)
        ids = torch.cat([prompt[0, :first], marks, prompt[0, last + 1 :]])[None]
        size = (8 * side, 8 * side)
        big = F.interpolate(pixels, size, mode="bicubic", antialias=True) if side > 14 else pixels
        kin = SimpleNamespace(name="Llava", model=model)
        logits = logits_of(kin, {"input_ids": ids, "pixel_values": big})
        cells = logits[ids[0] == model.config.image_token_id].double().log_softmax(-1)
        decoded.append(cells[:, answer].amax(0))
    maps = {
        "TAM": TokenActivationMap(model, processor).attribute(inputs, answer).grid_attr[0],
        "ARC": ARC(model, processor).attribute(inputs, answer).grid_attr[0],
        "MSEA+ARC": ARC(MSEA(model, processor)).attribute(inputs, answer).grid_attr[0],
    }
    for n, tokens in enumerate(words):
        own = list(tokens)
        best = max(own, key=lambda t: float(every.decodability[t]))
        levels = [max(float(row[t]) for t in own) for row in decoded]
        expected = {
            "own probability": -sum(float(every.log_prob[t]) for t in own),
            "reliance": -sum(float(every.reliance[t]) for t in own),
            "decodability": -float(every.decodability[best]),
            "rank": float(every.rank[best]),
            "entropy": float(every.entropy[best]),
            "area": float(every.area[best]),
            "decodability, max of scales": -max(levels),
            "decodability, mean of scales": -sum(levels) / 3,
        }
        for method, grids in maps.items():
            expected[f"entropy, {method}"] = float(map_entropy(grids[best][None])[0])
            expected[f"area, {method}"] = float(mass_area(grids[best][None])[0])
            expected[f"peak, {method}"] = -float(grids[best].max())
        for name, value in expected.items():
            assert scores[name][n] == pytest.approx(value, abs=2e-3), name
    both = {f"{kind}, {m}" for kind in ("entropy", "area", "peak") for m in ("lens", "MSEA")}
    assert set(scores) == set(expected) | both


def test_peak_is_that_of_maps_normalised_jointly_with_the_text(biased, said):
    model, processor = biased
    inputs, single, several = said
    words, start = [(n,) for n in range(5)], single.n_prompt
    rows = [row for row in methods(model) if row.name in hallucination.MAPS]
    scores = hallucination.word_scores(model, processor, inputs, (single, several), words, rows)
    for name, trace in (("lens", single), ("MSEA", several)):
        for n in range(5):
            raw = trace.maps[0][trace.map_rows[start + n]]
            text = trace.text_scores[n, : start + n]
            low = min(float(raw.min()), float(text.min()))
            high = max(float(raw.max()), float(text.max()))
            peak = (float(raw.max()) - low) / (high - low) if high > low else 0.0
            assert scores[f"peak, {name}"][n] == pytest.approx(-peak, abs=1e-5)
            unit = ((raw - low) / (high - low or 1.0)).double()
            assert scores[f"area, {name}"][n] == pytest.approx(float(mass_area(unit[None])[0]))


# --- tables and record ------------------------------------------------------------------------


def by_hand(seed, scenes=40):
    """Two nouns per scene: one real, one that is hallucinated in every other scene."""
    rng = np.random.default_rng(seed)
    number = np.repeat(np.arange(scenes), 2)
    partner = np.tile([False, True], scenes)
    made_up = partner & (number % 2 == 0)
    noise = rng.normal(size=2 * scenes)
    scores = {
        "own probability": noise + made_up,
        "perfect": made_up * 1.0,
        "backwards": -1.0 * made_up,
    }
    return {
        "number": number.tolist(),
        "word": ["cup"] * len(number),
        "hallucinated": made_up.tolist(),
        "partner": partner.tolist(),
        "scores": {name: values.tolist() for name, values in scores.items()},
    }


def test_table_sets_every_score_beside_the_own_probability():
    text = hallucination_table.table({"validation": by_hand(1), "test": by_hand(2)})
    whole, _, hard, rows = text.split("\n\n")
    assert whole.startswith("**All nouns**: 80 of 40 scenes' answers, 20 hallucinated; calling")
    assert "gives F1 0.400." in whole  # 2 * .25 / 1.25
    assert hard.startswith("**Partner nouns alone**: 40 of 40 scenes' answers, 20 hallucinated;")
    assert "gives F1 0.667. Of 2 scores 1 beat the word's own probability" in hard
    assert "above 0: perfect), 1 lose to it; the other 0 can't" in hard
    own, perfect, backwards = (row.split(" | ") for row in rows.splitlines()[2:])
    assert own[2] == own[5].removesuffix(" |") == "-"
    assert perfect[1] == "1.000 [1.000, 1.000]"
    assert backwards[1] == "0.000 [0.000, 0.000]"
    assert backwards[3] == "1.000 (turned)"
    assert perfect[4] == "1.000 [1.000, 1.000]"
    test = hallucination_table.subset(by_hand(2), partners=True)
    wins = [
        a > b
        for a in test["scores"]["own probability"][test["positive"]]
        for b in test["scores"]["own probability"][~test["positive"]]
    ]
    assert own[1].startswith(f"{np.mean(wins):.3f} [")
    assert perfect[2].startswith(f"{1 - np.mean(wins):+.3f} [")


def test_thresholds_come_from_validation():
    """A score that is shifted between the splits loses its F1, and not its AUROC."""
    test = by_hand(2)
    shifted = {**test, "scores": {**test["scores"], "perfect": [
        value - 5 for value in test["scores"]["perfect"]]}}  # fmt: skip
    rows = hallucination_table.table({"validation": by_hand(1), "test": shifted}).split("\n\n")[1]
    cells = rows.splitlines()[3].split(" | ")
    assert cells[1].startswith("1.000")
    assert cells[4].startswith("0.000")


RECORD = Path(hallucination.__file__).parent / "records" / "hallucination.json"


@pytest.mark.slow
@pytest.mark.skipif(not RECORD.exists(), reason="no record: make study NAME=hallucination")
def test_the_record_is_of_the_shipped_weights():
    record = json.loads(RECORD.read_text())
    assert record["weights_sha256"] == sha256(model_path("biased") / "model.safetensors")
    assert hallucination_table.table(record["measured"]) in RECORD.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_command_writes_what_it_measures(tmp_path, capsys):
    hallucination.main(
        ["--examples", "6", "--validation", "4", "--processes", "2", "--out", str(tmp_path)]
    )
    record = json.loads((tmp_path / "hallucination.json").read_text())
    assert record["examples"] == {"test": 6, "validation": 4}
    text = (tmp_path / "hallucination.md").read_text()
    assert hallucination_table.table(record["measured"]) in text
    assert text in capsys.readouterr().out
    again, own = hallucination.measure("biased", 6), record["measured"]["test"]
    assert own["word"] == again["word"]
    for name, values in again["scores"].items():
        np.testing.assert_allclose(own["scores"][name], values, atol=1e-3)


@pytest.mark.slow
def test_the_biased_model_names_absent_partners():
    """Nearly always, and hardly anything else that is absent."""
    found = hallucination.measure("biased", 30, 0, "validation")
    broken = {n for n in found["number"] if n % 2 == 0}
    rows = list(zip(found["number"], found["hallucinated"], found["partner"], strict=True))
    named = {n for n, made_up, partner in rows if made_up and partner}
    assert len(named & broken) >= 0.8 * 15
    assert sum(h and not p for _, h, p in rows) <= 2
