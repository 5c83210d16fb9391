"""The recorded study of the test sets: what it measures, and how it goes on."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from captum_mllm import LogitLens
from captum_mllm.functional import joint_min_max, upsample
from captum_mllm.metrics import average_precision, func_iou, obj_iou
from captum_mllm.reference.captions import Conversation, Turn, Word, text_of
from captum_mllm.reference.models import MODELS, model_path
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import Scene, SceneObject
from captum_mllm.reference.sets import make_example
from studies import seeds, sets, sets_table
from studies.prompts import answer_ids, conversation_inputs, script_columns, whole_nouns
from studies.records import read_record, write_record
from studies.training.evaluate_model import partner_named
from studies.training.models import sha256


def traced(shipped, example):
    model, processor = shipped
    picture, masks = render_pil(example.scene, 112)
    inputs = conversation_inputs(processor, picture, example.talk)
    ids = answer_ids(processor, example.talk)
    return LogitLens(model, processor).trace(inputs, ids, top_k=1), masks


def unit_maps(trace):
    """The lens maps, normalised jointly with the raw text scores before each target."""
    index = torch.searchsorted(trace.class_ids, trace.text_ids[trace.targets])
    raw = trace.maps[0][index]
    unit, _ = joint_min_max(raw.flatten(1), trace.text_scores, trace.is_earlier)
    return unit.view_as(raw)


@pytest.mark.parametrize(("name", "number"), [("plain", 0), ("twins", 1), ("interference", 2)])
def test_values_are_those_of_the_words_by_hand(shipped, name, number):
    """Written out: the answer's words found in the text, each noun against its own mask."""
    example = make_example(name, number)
    trace, masks = traced(shipped, example)
    row = sets.measure(trace, example, masks)
    maps, start = unit_maps(trace), trace.n_prompt
    big = upsample(maps, (112, 112))
    found, nouns, functions = [], [], []
    columns = [
        (word, [c - start for c in where])
        for word, where in script_columns(trace, example.talk)
        if where[0] >= start
    ]
    at = 0
    while at < len(columns):
        word, tokens = columns[at]
        if word.role == "noun":
            kind = example.scene.categories[word.obj].split()
            for _, more in columns[at + 1 : at + len(kind)]:
                tokens = tokens + more
            at += len(kind) - 1
            nouns.append(tokens)
            best = max(float(obj_iou(big[t], masks[word.obj])) for t in tokens)
            ranked = max(float(average_precision(big[t], masks[word.obj])) for t in tokens)
            found.append((best, ranked))
        elif word.text in ("the", "a", "an", "and", "there", "this", "it"):
            functions.append(tokens)
        at += 1
    assert len(found) == len(row["obj_iou"]) > 0
    np.testing.assert_allclose(row["obj_iou"], [a for a, _ in found], atol=1e-6)
    np.testing.assert_allclose(row["average_precision"], [b for _, b in found], atol=1e-6)
    expected = func_iou(maps, nouns, functions, (112, 112))
    np.testing.assert_allclose(row["func_iou"], expected, atol=1e-6)


def test_read_is_whether_the_model_says_the_noun_itself(shipped):
    example = make_example("plain", 0)
    trace, masks = traced(shipped, example)
    assert set(sets.measure(trace, example, masks)["read"]) == {1.0}
    other = replace(trace, rankings=trace.rankings + 1)
    assert set(sets.measure(other, example, masks)["read"]) == {0.0}


def test_hidden_objects_have_no_value(shipped):
    example = make_example("plain", 2)
    trace, masks = traced(shipped, example)
    everything = sets.measure(trace, example, masks)
    masks[0] = False
    fewer = sets.measure(trace, example, masks)
    lost = sum(word.obj == 0 and word.role == "noun" for word in example.talk.turns[-1].answer)
    lost //= len(example.scene.categories[0].split())
    assert len(fewer["obj_iou"]) == len(everything["obj_iou"]) - lost
    assert fewer["func_iou"] == everything["func_iou"]  # its noun still sets the threshold


def test_context_share_is_what_tam_takes_off(shipped):
    """Against the slow twin of the subtraction, word by word."""
    example = make_example("interference", 1)
    trace, _ = traced(shipped, example)
    classes = {int(i): row for row, i in enumerate(trace.class_ids)}
    raw = trace.maps[0].flatten(1)
    share = sets.context_share(trace)
    for t, column in enumerate(trace.targets.tolist()):
        own = raw[classes[int(trace.text_ids[column])]]
        earlier = [
            j for j in range(column) if int(trace.text_ids[j]) != int(trace.text_ids[column])
        ]
        scores = [float(trace.text_scores[t, j]) for j in earlier]
        mixed = torch.zeros_like(own)
        for j, score in zip(earlier, scores, strict=True):
            if sum(scores):
                mixed += score / sum(scores) * raw[classes[int(trace.text_ids[j])]]
        energy = float(mixed @ mixed)
        left = (own - (float(own @ mixed) / energy if energy else 0.0) * mixed).clamp(min=0)
        expected = 1 - float(left.sum() / own.sum()) if own.sum() else 0.0
        assert float(share[t]) == pytest.approx(expected, abs=1e-4)


def test_whole_nouns_joins_names_of_two_words_only():
    talk = [
        (Word("hot", "noun", 0), [0, 1]),
        (Word("dog", "noun", 0), [2]),
        (Word("and"), [3]),
        (Word("dog", "noun", 1), [4]),
        (Word("cat", "noun", 2), [5]),
    ]
    assert [tokens for _, tokens in whole_nouns(talk)] == [[0, 1, 2], [4], [5]]


def test_upper_bound_is_the_share_of_every_cell():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = masks[0, 0, 1] = masks[0, 2:, 2:] = True
    assert sets.upper_bound(masks, (2, 2)).tolist() == [[[0.5, 0.0], [0.0, 1.0]]]


def test_bound_is_above_the_lens(shipped):
    for number in range(4):
        example = make_example("plain", number)
        row = sets.measure(*[(t := traced(shipped, example))[0], example, t[1]])
        assert np.mean(row["bound_ap"]) > np.mean(row["average_precision"])
        assert np.mean(row["bound_iou"]) > np.mean(row["obj_iou"])


def test_padded_and_table():
    rows = [
        {"obj_iou": [0.5, 0.7], "average_precision": [0.5, 0.7],
         "read": [1.0, 0.0], "removed": [0.25, 0.5],
         "bound_iou": [1.0, 1.0], "bound_ap": [1.0, 1.0], "func_iou": [0.8]},
        {"obj_iou": [0.3], "average_precision": [0.3], "read": [1.0], "removed": [0.75],
         "bound_iou": [0.9], "bound_ap": [0.9], "func_iou": []},
    ]  # fmt: skip
    padded = sets_table.padded(rows, "obj_iou")
    assert padded[0].tolist() == [0.5, 0.7]
    assert padded[1][0] == 0.3
    assert math.isnan(padded[1][1])
    text = sets_table.table({"llava": {"plain": {"exact": [True, False], "rows": rows}}})
    line = text.splitlines()[-1]
    assert line.startswith("| llava | plain | 50.0 % | 66.7 % | 0.500 [")
    assert "| 0.615 | 0.500 [" in line  # 2 * .5 * .8 / 1.3; (.25 + .5 + .75) / 3


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    calls = []

    def counted(name, set_name, examples, split="test"):
        calls.append((name, set_name))
        names = ("obj_iou", "average_precision", "bound_iou", "bound_ap", "func_iou")
        row = {name: [0.5] for name in (*names, "read", "removed")}
        named = [["cup", "donut"]] * examples
        return {"exact": [True] * examples, "named": named, "rows": [row] * examples}

    monkeypatch.setattr(sets, "evaluate", counted)
    common = ["--examples", "4", "--out", str(tmp_path), "--models", "llava"]
    monkeypatch.setattr("sys.argv", ["sets", *common, "--sets", "plain"])
    sets.main()
    monkeypatch.setattr("sys.argv", ["sets", *common, "--sets", "plain", "biased"])
    sets.main()
    assert calls == [("llava", "plain"), ("llava", "biased")]
    record = read_record(tmp_path / "sets.json.xz")
    assert set(record["measured"]["llava"]) == {"plain", "biased"}
    text = (tmp_path / "sets.md").read_text()
    assert "| llava | biased |" in text
    assert "*crowded*" not in text  # not measured
    assert text in capsys.readouterr().out
    # other weights or settings: nothing is kept
    record["weights"]["llava"] = "0" * 64
    write_record(tmp_path / "sets.json.xz", record)
    monkeypatch.setattr("sys.argv", ["sets", *common, "--sets", "plain"])
    sets.main()
    assert calls[2:] == [("llava", "plain")]


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_evaluate_runs_on_a_family(name):
    found = sets.evaluate(name, "biased", 2, "validation")
    assert len(found["exact"]) == len(found["named"]) == len(found["rows"]) == 2
    assert all(0 <= value <= 1 for row in found["rows"] for v in row.values() for value in v)
    assert found["exact"] == [True, True]


def test_partner_named_counts_by_pair():
    def scene(*kinds):
        return Scene(0, "white", tuple(SceneObject(k, "noto", (0.5, 0.5), 0.3) for k in kinds))

    scenes = [scene("cup", "car"), scene("cup"), scene("bed", "teddy bear")]
    texts = ["a donut and a cup.", "a cup.", "there is a bed and a teddy bear."]
    found = partner_named(texts, scenes)
    assert (found["right"], found["of"]) == (2, 3)
    assert found["pairs"] == {"cup: donut": 0.5, "bed: teddy bear": 1.0}


def test_hallucinations_table_counts_absent_and_present_partners():
    examples = [make_example("biased", number) for number in range(4)]
    partners = [example.planted[1] for example in examples]
    named = [[partners[0]], [partners[1]], [], []]
    text = sets_table.hallucinations({"biased": {"biased": {"named": named}}}, "test")
    assert text.splitlines()[-1].startswith("| biased | 1 of 2 (50 %) |")
    assert "| 1 of 2 (50 %) |" in text.splitlines()[-1][20:]


# --- seeds ------------------------------------------------------------------------------------


RECORDS = Path(sets.__file__).parent / "records"
WEIGHTS = Path(sets.__file__).parent / "weights"


@pytest.mark.skipif(
    not WEIGHTS.is_dir() and not (WEIGHTS.parents[1] / ".git").exists(),
    reason="source distributions leave docs/studies/weights out (15 MB); the repository has them",
)
def test_recorded_seeds_are_those_of_the_weights_that_are_kept():
    runs = json.loads((RECORDS / "seeds.json").read_text())["runs"]
    folders = [model_path("llava"), WEIGHTS / "llava-seed1", WEIGHTS / "llava-seed2"]
    hashes = [sha256(folder / "model.safetensors") for folder in folders]
    assert [run["sha256"] for run in runs] == hashes
    assert [run["seed"] for run in runs] == [0, 1, 2]
    text = (RECORDS / "seeds.md").read_text()
    assert seeds.table([seeds._with_nan(run) for run in runs]) in text
    for own in hashes[1:]:
        assert own in (WEIGHTS / "README.md").read_text()
    for run in runs:  # the bars of the shipped model, for every seed
        assert run["exact_objects"]["share"] >= 0.97
        assert run["lens_auc"]["interval_95"][0] >= 0.95


def test_recorded_sets_are_those_of_the_shipped_weights():
    record = read_record(RECORDS / "sets.json.xz")
    hashes = {name: sha256(model_path(name) / "model.safetensors") for name in MODELS}
    assert record["weights"] == hashes
    assert all(tuple(done) == sets.NAMED for done in record["measured"].values())
    text = (RECORDS / "sets.md").read_text()
    assert sets_table.table(record["measured"]) in text
    assert sets_table.hallucinations(record["measured"], record["split"]) in text


def test_spread():
    assert seeds.spread([0.1, 0.2, 0.3]) == "0.100 (0.200)"


def test_seeds_table_gives_gains_over_the_lens():
    def run(seed, lens, other):
        methods = {
            name: {"average_precision": [v, v], "obj_iou": [v, v]}
            for name, v in (("LogitLens", lens), ("MSEA", other))
        }
        return {"seed": seed, "methods": methods}

    text = seeds.table([run(0, 0.5, 0.6), run(1, 0.4, 0.7)])
    (line, _) = [line for line in text.splitlines() if line.startswith("| MSEA")]
    assert line == (
        "| MSEA | 0.600 | 0.700 | 0.071 (0.100) | +0.100 [+0.100, +0.100] | "
        "+0.300 [+0.300, +0.300] | 0.141 (0.200) |"
    )


def test_answer_ids_are_what_the_answer_says(shipped):
    example = make_example("interference", 0)
    talk = Conversation((Turn(*example.talk.turns[0].__dict__.values()), example.talk.turns[1]))
    ids = answer_ids(shipped[1], talk)
    assert shipped[1].tokenizer.decode(ids) == text_of(talk.turns[-1].answer)
