"""The study of relevance: every measure against its slow twin, figures of one example by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from captum_mllm import LogitLens
from captum_mllm.functional import top_k_rankings, upsample
from captum_mllm.metrics import average_precision, energy_in_mask
from captum_mllm.reference.models import model_path
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import make_example
from studies import relevance, relevance_table
from studies.processes import joined, measured
from studies.prompts import answer_ids, conversation_inputs, script_columns
from studies.records import read_record
from studies.relevance_measures import (
    MEASURES,
    cosine_relevance,
    jensen_shannon_relevance,
    relevances,
    shuffled_relevance,
)
from studies.training.models import sha256
from tests.oracle import formulas as reference
from tests.oracle.families import family
from tests.oracle.layouts import logits_of, with_answer
from tests.oracle.published import ARC

over_seeds = pytest.mark.parametrize("seed", range(5))


def rows(seed, n, dim=9):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).double()


# --- measures ---------------------------------------------------------------------------------


@over_seeds
def test_cosine_of_two_states(seed):
    a, b = rows(seed, 3), rows(seed + 9, 5)
    b[2] = 0
    found = cosine_relevance(a, b)
    for i, x in enumerate(a.tolist()):
        for j, y in enumerate(b.tolist()):
            size = math.sqrt(reference.dot(x, x) * reference.dot(y, y))
            expected = max(reference.dot(x, y) / size, 0.0) if size else 0.0
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-12)


@over_seeds
def test_jensen_shannon_of_two_distributions(seed):
    a, b = 3 * rows(seed, 3), 3 * rows(seed + 9, 4)
    b[0] = a[1] + 7  # the same distribution
    found = jensen_shannon_relevance(a, b)

    def shares(logits):
        powers = [math.exp(x) for x in logits]
        return [p / sum(powers) for p in powers]

    for i, x in enumerate(a.tolist()):
        for j, y in enumerate(b.tolist()):
            divergence = 0.0
            for p, q in zip(shares(x), shares(y), strict=True):  # mean of two KL divergences
                middle = (p + q) / 2
                divergence += 0.5 * (p * math.log(p / middle) + q * math.log(q / middle))
            assert float(found[i, j]) == pytest.approx(1 - divergence / math.log(2), abs=1e-9)
    assert float(found[1, 0]) == pytest.approx(1.0)
    far = torch.tensor([[900.0, 0.0]]), torch.tensor([[0.0, 900.0]])
    assert float(jensen_shannon_relevance(*far)) == pytest.approx(0.0)
    assert jensen_shannon_relevance(a[:0], b).shape == (0, 4)


@over_seeds
def test_shuffling_keeps_each_targets_context(seed):
    r, columns = rows(seed, 4, 12).abs(), torch.tensor([0, 3, 7, 12])
    found = shuffled_relevance(r, columns, seed)
    for row, column in enumerate(columns.tolist()):
        assert sorted(found[row, :column].tolist()) == sorted(r[row, :column].tolist())
        assert torch.equal(found[row, column:], r[row, column:])
    assert not torch.equal(found[3], r[3])
    assert torch.equal(found, shuffled_relevance(r, columns, seed))
    assert not torch.equal(found, shuffled_relevance(r, columns, seed + 1))


def test_relevances_are_those_of_the_pairs():
    logits, hidden = rows(1, 6, 20), rows(2, 6)
    logits[4] = logits[1] + 0.01 * rows(3, 1, 20)[0]
    columns, rankings = torch.tensor([3, 5]), top_k_rankings(logits, 7)
    word, about = torch.rand(2, 6) < 0.5, torch.rand(2, 6) < 0.5
    found = relevances(columns, rankings, hidden, logits, word, about, rbo_p=0.8, seed=0)
    assert list(found) == list(MEASURES)
    for name, r in found.items():
        assert r.shape == (2, 6), name
        assert r.dtype == torch.float64, name
        assert 0 <= r.min() <= r.max() <= 1, name
    overlap = reference.rank_biased_overlap(rankings[columns], rankings, 0.8)
    torch.testing.assert_close(found["rbo"], overlap)
    assert found["none"].sum() == 0
    assert found["keep"].sum() == 12
    assert torch.equal(found["same id"], word.double())
    assert torch.equal(found["oracle"], about.double())
    for t, column in enumerate(columns.tolist()):
        for j in range(6):
            same = int(logits[column].argmax()) == int(logits[j].argmax())
            assert float(found["same top-1"][t, j]) == float(same)
            pair = cosine_relevance(hidden[column][None], hidden[j][None])
            assert float(found["cosine"][t, j]) == pytest.approx(float(pair))
            pair = jensen_shannon_relevance(logits[column][None], logits[j][None])
            assert float(found["jensen-shannon"][t, j]) == pytest.approx(float(pair))


@pytest.mark.parametrize("name", ["Llava", "Qwen2VL", "InternVL"])
@pytest.mark.filterwarnings("ignore")
def test_predictions_are_those_of_a_plain_forward(name):
    kin = family(name)
    inputs = kin.encode(kin.picture)
    trace = LogitLens(kin.model, kin.processor).trace(inputs, kin.answer, top_k=5)
    hidden, logits = relevance.predictions(kin.model, inputs, trace)
    plain = logits_of(kin, with_answer(kin, inputs, kin.answer))
    before = trace.text_positions - 1
    torch.testing.assert_close(logits, plain[before], atol=1e-4, rtol=1e-4)
    assert torch.equal(top_k_rankings(logits, 5), trace.rankings)
    head = kin.model.get_output_embeddings()
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), plain[before], atol=1e-4, rtol=1e-4)


def test_padding_moves_no_prediction(model, processor, inputs, answer):
    trace = LogitLens(model, processor).trace(inputs, answer, top_k=5)
    expected = relevance.predictions(model, inputs, trace)
    pads = torch.zeros(1, 3, dtype=torch.int64)
    padded = inputs | {
        name: torch.cat([pads, inputs[name]], 1) for name in ("input_ids", "attention_mask")
    }
    shifted = LogitLens(model, processor).trace(padded, answer, top_k=5)
    assert torch.equal(shifted.text_positions, trace.text_positions + 3)
    for own, other in zip(expected, relevance.predictions(model, padded, shifted), strict=True):
        torch.testing.assert_close(own, other)


# --- figures ----------------------------------------------------------------------------------


@over_seeds
def test_text_figures_are_shares_of_what_is_left(seed):
    scores, r = rows(seed, 1, 9)[0].clamp(min=0) + 0.1, rows(seed + 5, 1, 9)[0].sigmoid()
    about = torch.tensor([-1, 0, 1, 1, 2, -1, 1, 0, 2])
    found = relevance.text_figures(scores, r, about, 1)
    kept = [float(s) * float(x) for s, x in zip(scores, r, strict=True)]
    right = [kept[n] for n in (2, 3, 6)]
    wrong = [kept[n] for n in (1, 4, 7, 8)]
    assert found["share_all"] == pytest.approx(sum(right) / sum(kept))
    assert found["share_named"] == pytest.approx(sum(right) / sum(right + wrong))
    wins = [x > y for x in right for y in wrong]
    assert found["auc_kept"] == pytest.approx(sum(wins) / len(wins))
    wins = [float(r[x] > r[y]) for x in (2, 3, 6) for y in (1, 4, 7, 8)]
    assert found["auc_r"] == pytest.approx(sum(wins) / len(wins))
    assert found["keeps"] == 1.0


def test_text_that_keeps_nothing_counts_as_a_share_of_nothing():
    scores, about = torch.ones(3), torch.tensor([0, 1, -1])
    found = relevance.text_figures(scores, torch.zeros(3).double(), about, 0)
    assert found == {
        "share_named": 0.0, "share_all": 0.0, "auc_r": 0.5, "auc_kept": 0.5, "keeps": 0.0
    }  # fmt: skip
    ones = torch.ones(3).double()
    for wrong in (
        relevance.text_figures(scores, ones, torch.tensor([0, -1, -1]), 0),  # no other object
        relevance.text_figures(scores, ones, torch.tensor([1, 1, -1]), 0),  # nothing relevant
        relevance.text_figures(torch.tensor([0.0, 0.0, 1.0]), ones, about, 0),  # no score
    ):
        assert all(math.isnan(value) for value in wrong.values())


@pytest.fixture(scope="module", params=[("interference", 2), ("twins", 4)])
def made(request, shipped):
    model, processor = shipped
    example = make_example(*request.param)
    picture, masks = render_pil(example.scene, relevance.SIDE)
    inputs = conversation_inputs(processor, picture, example.talk)
    trace = LogitLens(model, processor).trace(inputs, answer_ids(processor, example.talk), top_k=50)
    pairs = script_columns(trace, example.talk)
    states = relevance.predictions(model, inputs, trace)
    found = relevance.example_figures(trace, *states, pairs, masks, 4)
    return example, masks, trace, pairs, found


def targets_by_hand(trace, pairs):
    wanted = ("noun", "attribute", "position")
    return [
        (w, c[0]) for w, c in pairs if w.role in wanted and w.obj >= 0 and c[0] >= trace.n_prompt
    ]


def test_figures_of_an_example_are_those_of_its_words_by_hand(made):
    """ARC written out for the measures whose r needs no model: ECI, raw lens, oracle, same id."""
    _, masks, trace, pairs, (roles, figures) = made
    targets = targets_by_hand(trace, pairs)
    assert roles == [word.role for word, _ in targets]
    assert "noun" in roles
    of = {int(i): cells for i, cells in zip(trace.class_ids, trace.maps[0], strict=True)}
    about = {column: word.obj for word, own in pairs for column in own}
    for t, (word, column) in enumerate(targets[:6]):
        own_id = int(trace.text_ids[column])
        same_word = {int(trace.text_ids[c]) for w, o in pairs if o[0] == column for c in o}
        ids = trace.text_ids[:column].tolist()
        scores = trace.text_scores[column - trace.n_prompt, :column].tolist()
        context = [s if i != own_id else 0.0 for s, i in zip(scores, ids, strict=True)]
        weights = [s / sum(context) if sum(context) else 0.0 for s in context]
        maps = torch.stack([of[i] for i in ids]).flatten(1).double()
        r_of = {
            "none": [0.0] * column,
            "keep": [1.0] * column,
            "oracle": [float(about.get(j, -1) == word.obj) for j in range(column)],
            "same id": [float(i in same_word) for i in ids],
        }
        for name, r in r_of.items():
            for suffix, bound in (("", None), (" bounded", 1.0)):
                cleaned = reference.arc_subtract(
                    of[own_id].flatten()[None].double(), maps,
                    torch.tensor([weights]).double(), torch.tensor([r]).double(), alpha_max=bound,
                )  # fmt: skip
                pixels = upsample(cleaned.view_as(of[own_id]), (112, 112))
                mask = masks[word.obj]
                rest = torch.stack([m for n, m in enumerate(masks) if n != word.obj]).any(0) & ~mask
                expected = {
                    "ap": average_precision(pixels, mask),
                    "own": energy_in_mask(pixels, mask),
                    "others": energy_in_mask(pixels, rest),
                    "removed": 1 - float(cleaned.sum() / of[own_id].sum()),
                }
                for key, value in expected.items():
                    assert figures[name][key + suffix][t] == pytest.approx(float(value), abs=2e-4)
            by_hand = relevance.text_figures(
                torch.tensor(scores), torch.tensor(r).double(),
                torch.tensor([about.get(j, -1) for j in range(column)]), word.obj,
            )  # fmt: skip
            for key, value in by_hand.items():
                np.testing.assert_allclose(figures[name][key][t], value, atol=1e-6)


def test_rbo_is_arcs(made, shipped):
    """Cleaned maps differ from ARC's by its joint normalisation alone: the ranking stays."""
    _, masks, trace, pairs, (_, figures) = made
    unit = ARC(*shipped).attribute_trace(trace).grid_attr[0]
    for t, (word, column) in enumerate(targets_by_hand(trace, pairs)[:4]):
        pixels = upsample(unit[column - trace.n_prompt], (112, 112))
        expected = float(average_precision(pixels, masks[word.obj]))
        assert figures["rbo"]["ap"][t] == pytest.approx(expected, abs=1e-3)


def test_columns_are_means_of_the_group(made):
    example, _, trace, _, (roles, figures) = made
    out = relevance.as_columns(example, roles, figures)
    nouns = [t for t, role in enumerate(roles) if role == "noun"]
    assert out["number"] == [example.number]
    assert out["nouns"]["words"] == [len(nouns)]
    assert out["words"]["words"] == [len(roles)]
    for name in MEASURES:
        values = [figures[name]["ap"][t] for t in nouns]
        assert out["nouns"][name]["ap"] == [pytest.approx(np.mean(values))]
        text = [v for v in figures[name]["share_all"] if not math.isnan(v)]
        assert out["words"][name]["share_all"] == [pytest.approx(np.mean(text))]
    nothing = relevance.as_columns(example, ["attribute"] * len(roles), figures)
    assert math.isnan(nothing["nouns"]["rbo"]["ap"][0])
    with pytest.raises(ValueError, match="trace has no rankings"):
        relevance.example_figures(replace(trace, rankings=None), *[torch.zeros(0)] * 2, [], [], 0)


# --- the record -------------------------------------------------------------------------------


def by_hand_columns(lead):
    base = {key: [0.2, 0.4, float("nan")] for key in ("ap", "own", "others", "removed")}
    base |= {f"{key} bounded": [0.1, 0.3, None] for key in tuple(base)}
    base |= {key: [0.5, 0.5, 0.5] for key in (*relevance_table.TEXT, "keeps")}
    more = {key: [v if v is None else v + lead for v in own] for key, own in base.items()}
    own = {name: more if name == "oracle" else base for name in MEASURES}
    return {"number": [0, 1, 2], **{g: {"words": [2, 1, 0], **own} for g in ("nouns", "words")}}


def test_table_gives_means_and_leads_over_rbo():
    text = relevance_table.table({"llava": {"twins": by_hand_columns(0.125)}})
    assert "**llava, twins: image side, 3 nouns, alpha <= 1**" in text
    blocks = text.split("\n\n")
    assert len(blocks) == 10
    lead = "+0.125 [+0.125, +0.125]"
    assert blocks[1].splitlines()[2] == "| rbo | 0.300 | - | 0.300 | - | 0.300 | - | 0.300 |"
    cells = f"0.425 | {lead} | " * 3
    assert blocks[1].splitlines()[-1] == f"| oracle | {cells}0.425 |"
    assert blocks[3].splitlines()[-1].startswith(f"| oracle | 0.325 | {lead} |")
    assert blocks[9].splitlines()[-1].endswith(f"0.625 | {lead} | 0.625 |")


RECORD = Path(relevance.__file__).parent / "records" / "relevance.json.xz"


@pytest.mark.skipif(not RECORD.exists(), reason="no record: make study NAME=relevance")
def test_the_record_is_of_the_shipped_weights():
    record = read_record(RECORD)
    for name, own in record["weights"].items():
        assert own == sha256(model_path(name) / "model.safetensors")
    assert relevance_table.table(record["measured"]) in RECORD.with_name("relevance.md").read_text()


@pytest.mark.slow
def test_the_command_writes_what_its_parts_measure(tmp_path, capsys):
    arguments = "--models llava --sets twins --examples 2 --first 5 --split validation --out"
    relevance.main([*arguments.split(), str(tmp_path)])
    record = read_record(tmp_path / "relevance.json.xz")
    columns = record["measured"]["llava"]["twins"]
    assert columns["number"] == [5, 6]
    assert (record["examples"], record["split"]) == (2, "validation")
    text = (tmp_path / "relevance.md").read_text()
    assert relevance_table.table(record["measured"]) in text
    assert text in capsys.readouterr().out
    parts = [relevance.measure("llava", 1, n, "validation", "twins") for n in (5, 6)]
    again = joined(parts)
    for name in MEASURES:
        for key, values in columns["words"][name].items():
            wanted = [v if v == v else None for v in again["words"][name][key]]
            assert values == [v if v is None else pytest.approx(v, abs=1e-4) for v in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2vl", "internvl"])
def test_several_processes_find_the_same(name):
    settings = {"examples": 2, "first": 0, "split": "validation", "set_name": "interference"}
    one = measured(relevance.measure, name, **settings)
    two = measured(relevance.measure, name, **settings, processes=2, size=1)
    assert one["number"] == two["number"]
    np.testing.assert_allclose(one["nouns"]["rbo"]["ap"], two["nouns"]["rbo"]["ap"], atol=1e-5)
    np.testing.assert_allclose(
        one["words"]["oracle"]["share_all"], two["words"]["oracle"]["share_all"], atol=1e-5
    )


@pytest.mark.slow
def test_knowing_the_object_is_best_for_text():
    """The oracle bounds every measure, and the raw score lies below rank-biased overlap."""
    found = relevance.measure("llava", 20, 0, "validation")["words"]
    mean = {name: relevance_table.mean_of(np.array(found[name]["share_all"])) for name in MEASURES}
    assert max(mean, key=mean.__getitem__) == "oracle"
    assert mean["rbo"] > mean["keep"] > mean["none"] == 0.0
