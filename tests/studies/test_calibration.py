"""The studies of calibration, gates and controls: records, tables, and one example of each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import calibrate
from studies import calibration, controls, direct, gates
from studies.calibration_table import BASE, FIXED, Scenes, tables
from studies.choose import weights_of
from studies.records import read_record

RECORDS = Path("docs/studies/records")


@pytest.mark.parametrize(
    ("name", "draw"),
    [("calibration", tables), ("gates", gates.tables), ("controls", controls.tables)],
)
def test_the_table_is_that_of_the_record(name, draw):
    record = read_record(RECORDS / f"{name}.json.xz")
    assert draw(record) == (RECORDS / f"{name}.md").read_text()
    assert record["weights"] == {training: weights_of(training) for training in record["weights"]}


def test_what_was_chosen_is_the_default():
    """Adaptive calibration gains in every family and set; no other weight or floor clearly does."""
    scenes = Scenes(read_record(RECORDS / "calibration.json.xz"))
    chosen, old = f"{BASE}; mean 0.4", f"{BASE}; {FIXED}"
    gains = scenes.gains(chosen, old)
    assert all(mean > 0 for mean, *_ in gains.values())
    assert gains["all"][1] > 0
    taus = [row for row in scenes.rows() if row.startswith(f"{BASE}; tau")]
    assert all(scenes.gains(row, old)["all"][0] < gains["all"][0] for row in taus)


def test_the_rule_that_was_chosen_is_the_adaptive_one():
    maps = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) ** 3
    assert_close(calibration.by_mean(maps, 0.4), calibrate(maps, "adaptive"))


def test_rules_of_calibration_say_what_they_do():
    maps = torch.rand(5, 400, generator=torch.Generator().manual_seed(1)).double() ** 3
    flat = torch.full((1, 9), 0.5).double()
    for rule in (
        calibration.by_mean,
        calibration.by_quartile,
        calibration.by_threshold,
        calibration.by_mass,
    ):
        found = rule(maps, 0.2)
        assert_close(found.amax(1), maps.amax(1))
        assert torch.equal(found.argsort(dim=1, stable=True), maps.argsort(dim=1, stable=True))
        assert torch.equal(rule(flat, 0.2), flat)
    share = calibration.by_mass(maps, 0.2).mean(1) / maps.amax(1)
    assert_close(share, torch.full_like(share, 0.2), rtol=1e-3, atol=0)


def test_every_setting_on_one_scene(tmp_path):
    job = calibration.Job("llava", "twins", (0,), tmp_path)
    (rows,) = calibration.measure(job)
    assert {f"{BASE}; {FIXED}", "direct lens, beta 2, floor 0.04; mean 0.4", "TAM; tau 2"} <= {
        *rows
    }
    assert all(0 <= v <= 1 for row in rows.values() for v in row["obj_iou"])
    assert len(list(tmp_path.iterdir())) == 1
    assert calibration.measure(job) == [rows]  # read again, not run
    (known,) = direct.measure(direct.Job("llava", "twins", "test", (0,), "cpu", adding=True))
    assert set(known) == {direct.CHECKED, *direct.ADDED}


def test_gains_are_relative_and_per_family():
    def scene(obj):
        return {f"a; {rule}": {"obj_iou": [v], "func_iou": [1.0]} for rule, v in obj.items()}

    rows = [scene({"x": 0.5, "y": 1.0}), scene({"x": 0.5, "y": 1.0})]
    record = {"measured": {n: {"plain": rows} for n in ("llava", "llava-seed1", "qwen2vl")}}
    found = Scenes(record).gains("a; y", "a; x")
    assert set(found) == {"all", "llava, plain", "qwen2vl, plain"}
    assert_close(np.array(found["all"]), np.full(3, 50.0))  # from an F1 of 2/3 to 1


def test_added_rows_must_be_of_the_same_examples():
    old = [{"lens": {"obj_iou": [0.5]}, "TAM": {"obj_iou": [0.4]}}] * 2
    new = {name: {"obj_iou": [0.7]} for name in direct.ADDED}
    for first, other in ((0, 1), (1, 0)):
        both = direct.joined_rows(old, [new | {"lens": {"obj_iou": [0.51]}}], first)
        assert both[first]["lens"] == {"obj_iou": [0.5]}
        assert set(both[first]) == {"lens", "TAM", *direct.ADDED}
        assert both[other] == old[other]
    with pytest.raises(ValueError, match="example 0: obj_iou of the lens is not the record's"):
        direct.joined_rows(old, [new | {"lens": {"obj_iou": [0.6]}}])
    with pytest.raises(ValueError, match="the record has 1 examples, got 2"):
        direct.joined_rows(old[:1], [new | {"lens": {"obj_iou": [0.5]}}] * 2)


def test_gates_of_one_scene_and_one_question():
    for training, name in (("llava", "plain"), gates.QUESTIONS):
        (row,) = gates.measure(gates.Job(training, name, "test", (0,)))
        assert gates.gates_of(row).stable
        assert len(row["drops"]) == len(row["probs"]) == len(row["tokens"]) > 0
        lines = gates.summary({training: {name: {"test": [row]}}})
        assert lines[-1].startswith(f"| {training}, {name} | 1 | ")


def test_controls_of_one_scene():
    (row,) = controls.measure(controls.Job("llava", (0,)))
    assert {"mask", "eroded, 1 cell", "eroded, 0.5 cell", "centre"} <= set(row["LDS"])
    near, far = (np.mean(row["area"][f"eroded, {cells} cell"]) for cells in ("0.5", "1"))
    assert 0 <= far < near < 1 < np.mean(row["area"]["dilated, 0.5 cell"])
