"""The studies of maps that read the context: their records, tables and small parts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from captum_mllm.reference.sets import make_example
from studies import direct, direct_cost, direct_faithful
from studies.choose import weights_of
from studies.direct_table import adaptive_table, padded, tables
from studies.evidence import Evidence
from studies.records import read_record

RECORDS = Path("docs/studies/records")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_table_is_that_of_the_record(split):
    record = read_record(RECORDS / f"direct.{split}.json.xz")
    assert record["split"] == split
    first = next(iter(record["measured"]))
    some = record | {"measured": {first: {"plain": record["measured"][first]["plain"]}}}
    text = (RECORDS / f"direct.{split}.md").read_text()
    drawn = tables(some).split("\n\n", 2)
    assert all(part.strip() in text for part in drawn)
    assert text.endswith(adaptive_table(record))
    assert bool(adaptive_table(record)) == (split == "test")


@pytest.mark.parametrize(
    "name", ["direct.validation.json.xz", "direct.test.json.xz", "direct_faithful.json.xz"]
)
def test_records_are_of_the_weights_that_are_here(name):
    weights = read_record(RECORDS / name)["weights"]
    assert weights
    assert weights == {training: weights_of(training) for training in weights}


def test_what_was_chosen_is_the_default():
    """The turned views and beta 1 on validation scenes, against what else was tried."""
    measured = read_record(RECORDS / "direct.validation.json.xz")["measured"]

    def f1(name):
        found = []
        for sets in measured.values():
            for rows in sets.values():
                obj, func = (np.nanmean(padded(rows, name, m)) for m in ("obj_iou", "func_iou"))
                found.append(2 * obj * func / (obj + func))
        return np.mean(found)

    chosen = f1("product, turned, 1, tau 1.5")
    assert chosen == pytest.approx(f1("direct lens"))
    for other in ("plain, 1, tau 1.5", "mirrored, 1, tau 1.5", "turned, 0.5, tau 1.5"):
        assert chosen > f1(f"product, {other}")
    assert chosen > f1("product, turned, 1, tau 2")
    assert abs(chosen - f1("product, turned, 2, tau 1.5")) < 0.01  # a tie: the plainer one


def test_faithfulness_and_cost_tables():
    record = read_record(RECORDS / "direct_faithful.json.xz")
    lines = direct_faithful.tables(record).splitlines()
    text = (RECORDS / "direct_faithful.md").read_text().splitlines()
    assert lines == text
    cost = json.loads((RECORDS / "direct_cost.json").read_text())
    assert direct_cost.as_text(cost) == (RECORDS / "direct_cost.md").read_text()


def test_the_right_twin():
    example = make_example("twins", 3, "validation")
    kinds = example.scene.categories
    kind = next(k for k in kinds if kinds.count(k) == 2)
    one, other = (o for o, k in enumerate(kinds) if k == kind)
    masks = torch.zeros(len(kinds), 8, 8, dtype=torch.bool)
    for o in range(len(kinds)):
        masks[o, :, o] = True
    evidence = Evidence(None, (), ((one, (0,)), (other, (1,)), (-1, (2,))), (), masks)
    maps = torch.zeros(3, 8, 8)
    maps[0, :, one] = 1  # right
    maps[1, :, one] = 1  # the other twin
    assert direct.twins(maps, evidence, example) == [1.0, 0.0]
    assert direct.twins(torch.ones(3, 8, 8), evidence, example) == [0.5, 0.5]


def test_every_row_on_one_scene():
    rows = direct.measure(direct.Job("llava", "twins", "validation", (0,), "cpu"))[0]
    assert {"lens", "TAM", "direct", "direct lens", "product, plain, 1, tau 2"} <= set(rows)
    assert all(0 <= v <= 1 for row in rows.values() for v in row["obj_iou"])
    few = direct.measure(direct.Job("llava", "twins", "test", (0,), "cpu"))[0]
    assert set(few) < set(rows)


def test_evidence_of_a_question():
    (found,) = direct_faithful.measure(direct_faithful.Job("llava-questions", "questions", (0,)))
    assert {"lens", "direct lens", "centre"} <= set(found["all"])
    assert all(0 <= share <= 1 for each in found["all"].values() for share in each)
