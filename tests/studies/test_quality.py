"""Choosing and judging: settings read evidence as the attributors do; rules and tables."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from captum_mllm import ARC, MSEA, JointNormalization, LogitLens, TokenActivationMap
from captum_mllm.metrics import average_precision, func_iou, obj_iou, paired_bootstrap_f1
from captum_mllm.reference.sets import make_example
from studies import (
    choose,
    choose_table,
    quality,
    quality_bounds,
    quality_rows,
    quality_table,
    quality_time,
)
from studies.evidence import (
    HALF_CELLS,
    Setting,
    gather,
    lens_of,
    score,
    shifted_maps,
    training_path,
)
from studies.prompts import answer_ids, conversation_inputs
from studies.retired import merged
from studies.windows import shifted_trace

SCALES = (1.0, 1.5, 2.0)
METRICS = ("obj_iou", "func_iou", "average_precision")


@pytest.fixture(scope="module")
def case():
    """One validation example with its evidence, and what it was gathered from."""
    from captum_mllm.reference.render import render_pil

    lens, processor = lens_of("llava")
    example = make_example("plain", 3, "validation")
    evidence = gather(lens.runner.adapter.model, processor, example, SCALES, shifts=True)
    inputs = conversation_inputs(processor, render_pil(example.scene, 112)[0], example.talk)
    return lens, example, evidence, inputs, answer_ids(processor, example.talk)


class Retired(MSEA):
    """MSEA with the options that were retired, by the studies' own functions on its views."""

    def __init__(self, base, *, aggregation="mean", scale_norm="none", **options):
        super().__init__(base, **options)
        self.retired = aggregation, scale_norm

    def trace(self, inputs, target=None, *, top_k=None, **options):
        views = self.views(inputs, target, top_k=top_k, **options)
        return merged(views, *self.retired, self.scale_weights)


# ---- evidence ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "make"),
    [
        (Setting("lens", calibration=1.5), lambda m: JointNormalization(m, calibration=1.5)),
        (Setting("tam", rank_filter=True), TokenActivationMap),
        (
            Setting("tam", alpha_max=0.5, upsampling=2),
            lambda m: TokenActivationMap(m, rank_filter=False, alpha_max=0.5, upsampling=2),
        ),
        (
            Setting("arc", top_k=20, rbo_p=0.7),
            lambda m: ARC.paper(m, top_k=20, rbo_p=0.7),
        ),
        (
            Setting("arc", scales=(1.0, 2.0), mirrored=True, scale_norm="std", calibration=1.0),
            lambda m: ARC.paper(
                Retired.paper(m, scales=(1.0, 2.0), flip="horizontal", scale_norm="std"),
                calibration=1.0,
            ),
        ),
        (
            Setting("lens", scales=SCALES, aggregation="geometric_mean", scale_weights="adaptive"),
            lambda m: JointNormalization(
                Retired.paper(
                    m, scales=SCALES, aggregation="geometric_mean", scale_weights="adaptive"
                )
            ),
        ),
        (
            Setting("lens", scales=(1.0, 1.5), scale_weights="adaptive, consistency"),
            lambda m: JointNormalization(
                MSEA.paper(m, scales=(1.0, 1.5), scale_weights="adaptive", consistency=True)
            ),
        ),
    ],
)
def test_a_setting_reads_evidence_as_the_attributor_would(case, setting, make):
    lens, _, evidence, inputs, answer = case
    direct = make(LogitLens(lens.runner.adapter.model)).attribute(inputs, answer)
    got = setting.read(setting.trace(evidence), lens)
    assert_close(got.grid_attr[0], direct.grid_attr[0], rtol=1e-4, atol=1e-5)
    assert_close(got.token_attr, direct.token_attr, rtol=1e-4, atol=1e-5)
    retired = setting.scale_norm != "none" or setting.aggregation == "geometric_mean"
    if retired or "consistency" in setting.scale_weights:
        with pytest.raises(ValueError, match="an attributor's own options"):
            quality_time.whole(setting, lens)
        return
    timed = quality_time.whole(setting, lens).attribute(inputs, answer)
    assert_close(timed.grid_attr[0], direct.grid_attr[0], rtol=1e-4, atol=1e-5)


def test_times_of_settings():
    rows = {"k 5": Setting("arc", top_k=5), "2 scales": Setting("arc", scales=(1.0, 2.0))}
    threads = torch.get_num_threads()
    found = quality_time.seconds("llava", rows, runs=2)
    assert {name: len(own) for name, own in found.items()} == {
        "LogitLens": 2, "k 5": 2, "2 scales": 2,
    }  # fmt: skip
    assert min(min(own) for own in found.values()) > 0
    assert torch.get_num_threads() == threads
    measured = {"llava": {"plain": {n: {m: [[0.5]] for m in METRICS} for n in rows}}}
    first = quality_table.sensitivity_table(measured, {}).splitlines()
    timed = quality_table.sensitivity_table(measured, {"llava": found}).splitlines()
    assert [line.count("|") for line in (first[0], timed[0])] == [4, 5]
    assert timed[3].endswith(f"| {quality_time.ratios(found)['2 scales']:.1f} |")


def test_what_the_goal_takes():
    found = quality_bounds.mask_scores("plain", 2)
    assert 0.5 < found["14"] < found["28"] < 1
    for obj, func in ((0.3, 0.9), (0.8, 1.0), (0.71, 0.98)):
        f1 = 2 * obj * func / (obj + func)
        assert quality_bounds.needed_obj_iou(f1, func) == pytest.approx(obj)
    with pytest.raises(ValueError, match="f1 must be below"):
        quality_bounds.needed_obj_iou(0.9, 0.4)
    record = json.loads((quality.RECORDS / "quality.json").read_text())
    own = record["measured"]["methods"]["llava"]["plain"]
    rows = quality_table.needs_table({"llava": {"plain": own}}, {"plain": found}).splitlines()
    wanted = 1.145 * quality_table.interval(own, "TAM, chosen", "f1_iou").mean
    assert rows[2].startswith(f"| llava, plain | {wanted:.3f} | ")
    assert rows[2].endswith(f"| {found['14']:.3f} | {found['28']:.3f} |")


def test_scores_equal_the_metrics_word_by_word(case):
    _, _, evidence, *_ = case
    setting = Setting("lens")
    maps = setting.read(setting.trace(evidence), case[0]).grid_attr[0]
    got = score(maps, evidence)
    pixels = torch.nn.functional.interpolate(maps[None], (112, 112), mode="bilinear")[0]
    expected = {"obj_iou": [], "average_precision": []}
    for obj, tokens in evidence.nouns:
        for name, metric in (("obj_iou", obj_iou), ("average_precision", average_precision)):
            each = [float(metric(pixels[t], evidence.masks[obj])) for t in tokens]
            expected[name].append(max(each))
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, abs=1e-4)
    nouns = [list(tokens) for _, tokens in evidence.nouns]
    dark = [list(tokens) for tokens in evidence.functions]
    assert got["func_iou"] == pytest.approx(func_iou(maps, nouns, dark, (112, 112)).tolist())


def test_shifts_are_those_of_the_older_study(case):
    lens, _, evidence, inputs, answer = case
    expected = shifted_trace(lens.runner, inputs, answer)
    rows = expected.map_rows[expected.targets]
    got = shifted_maps(lens, inputs, answer)[rows]
    assert_close(got, expected.maps[0][rows], rtol=1e-3, atol=1e-3)
    assert len(HALF_CELLS) == 9
    assert evidence.shifted.shape[-1] == 28


def test_smoothing_blurs_raw_maps(case):
    evidence = case[2]
    sharp = Setting("lens").trace(evidence).maps[0]
    flat = Setting("lens", smoothing=50.0).trace(evidence).maps[0]
    assert_close(flat, sharp.mean((1, 2), keepdim=True).expand_as(flat), rtol=0.02, atol=0.02)


def test_trainings_that_are_not_shipped():
    assert training_path("llava") is None
    assert training_path("llava-one-size").name == "llava-one-size"


# ---- the rule of choosing ---------------------------------------------------------------------


def row(f1, ap):
    return {"f1_iou": f1, "average_precision": ap}


@pytest.mark.parametrize(
    ("rows", "taken"),
    [
        ([row(0.5, 0.5), row(0.6, 0.1)], 1),  # F1-IoU counts
        ([row(0.599, 0.5), row(0.6, 0.5)], 0),  # within a tie the first
        ([row(0.599, 0.4), row(0.6, 0.5)], 1),  # unless its average precision is worse
        ([row(0.59, 0.9), row(0.6, 0.5)], 1),  # which can't outweigh F1-IoU
    ],
)
def test_the_rule(rows, taken):
    assert choose.best_of(rows, 0.002) is rows[taken]


def test_ranges_stand_from_cheap_to_dear():
    cost = [sum(s * s for s in one["scales"]) for one in choose.RANGES]
    assert [round(c, 2) for c in cost] == sorted(round(c, 2) for c in cost)
    assert {s for one in choose.RANGES for s in one["scales"]} <= set(choose.SCALES)


def test_the_record_follows_the_rule():
    record = json.loads((quality.RECORDS / "choose.json").read_text())
    assert record["split"] == "validation"
    for method in record["methods"]:
        setting = dict(method["start"])
        for one in method["rounds"]:
            costs = one["option"] in ("scales", "mirrored views")
            tie = record["worth"] if costs else record["tie"]
            assert choose.best_of(one["tried"], tie)["options"] == one["taken"]
            setting |= one["taken"]
        assert setting == method["chosen"]
    text = (quality.RECORDS / "choose.md").read_text()
    assert choose_table.table(record) in text


# ---- what is judged ---------------------------------------------------------------------------


def test_rows():
    found = quality.chosen_settings(quality.RECORDS / "choose.json")
    compared = quality_rows.methods(found)
    assert compared["chosen, scales alone"].mirrored is False
    assert compared["chosen, mirrored alone"].scales == (1.0,)
    assert compared["chosen, 9 half-cell shifts"].shifted
    assert {s.method for s in compared.values()} == {"lens", "tam", "arc"}
    some = quality_rows.ranges(found)
    assert len(some) == 1 + 4 * len(choose.RANGES)
    assert quality.scales_of(tuple(some.items()))[0] == 1.0
    assert {s.top_k for n, s in quality_rows.sensitivity(found).items() if n[0] == "k"} == {
        5, 10, 20, 50, 100, 200,
    }  # fmt: skip


def test_intervals_are_of_pooled_words():
    own = {
        "a": {"obj_iou": [[0.2, 0.4], [0.9]], "func_iou": [[0.5], [0.7, 0.9]]},
        "b": {"obj_iou": [[0.1, None], [0.5]], "func_iou": [[0.5], [0.6, 0.8]]},
    }
    found = quality_table.interval(own, "a", "f1_iou")
    obj, func = 0.5, 0.7
    assert found.mean == pytest.approx(2 * obj * func / (obj + func))
    pads = [
        tuple(quality_table.padded(own[name][m]) for m in ("obj_iou", "func_iou")) for name in "ab"
    ]
    assert quality_table.interval(own, "a", "f1_iou", "b") == paired_bootstrap_f1(*pads, seed=0)
    assert quality_table.interval(own, "a", "obj_iou").mean == pytest.approx(0.5)
    assert np.isnan(quality_table.padded([[1.0, None], []])).sum() == 3


@pytest.mark.slow
def test_the_record_makes_the_tables():
    record = json.loads((quality.RECORDS / "quality.json").read_text())
    assert (quality.RECORDS / "quality.md").read_text() == quality_table.tables(record)
    assert {*record["measured"], "bounds", "time"} == set(quality.PARTS)
    assert set(record["seconds"]) == set(quality.FAMILIES)
    assert set(record["measured"]["faithfulness"]) == set(quality.FAMILIES)


@pytest.mark.slow
def test_both_commands_end_to_end(tmp_path, monkeypatch):
    choosing = ["--trainings", "llava", "--sets", "plain", "--examples", "1", "--workers", "1"]
    places = ["--out", str(tmp_path), "--evidence", str(tmp_path / "e")]
    monkeypatch.setattr("sys.argv", ["choose", *choosing, *places])
    choose.main()
    judging = ["--trainings", "llava", "--parts", "ranges", "sensitivity", "time"]
    judging += [
        "--ranges",
        "1",
        "--runs",
        "1",
        "--workers",
        "1",
        "--chosen",
        str(tmp_path / "choose.json"),
    ]
    judging += ["--progress", str(tmp_path / "p"), "--out", str(tmp_path)]
    quality.main(judging)
    record = json.loads((tmp_path / "quality.json").read_text())
    own = record["measured"]["ranges"]["llava"]["plain"]
    assert len(own) == 41
    assert len(own["single"]["obj_iou"]) == 1
    done = sorted((tmp_path / "p").iterdir())
    stamps = [path.stat().st_mtime_ns for path in done]
    quality.main(judging)
    assert [path.stat().st_mtime_ns for path in done] == stamps
    again = json.loads((tmp_path / "quality.json").read_text())
    assert {**again, "seconds": record["seconds"]} == record
