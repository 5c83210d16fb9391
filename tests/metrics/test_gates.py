"""Gates of samples, diagnostics of maps, wins and losses."""

import math

import numpy as np
import pytest

from captum_mllm.metrics import (
    border_mass,
    centroid_distance,
    gates_table,
    sample_gates,
    wins_ties_losses,
)
from tests.metrics.test_perturbation import scene_of


def test_a_model_that_sees_passes_and_a_foreign_answer_does_not():
    model, processor, inputs, answer, tokens, _ = scene_of("llava", 3, 112)
    found = sample_gates(model, inputs, answer, processor=processor, tokens=tokens)
    assert found.sample
    assert found.passing == tuple(tokens)
    assert sample_gates(model, inputs, processor=processor).answer_ids == tuple(answer.tolist())
    other = sample_gates(model, inputs, answer.flip(0), processor=processor)
    assert other.stable
    assert not other.greedy
    assert other.passing == ()
    table = gates_table([found, other])
    assert "| stable greedy answer | 2 samples | 2 | 100 % |" in table
    assert "| the answer is the greedy one | 2 samples | 1 | 50 % |" in table


def test_ids_that_do_not_survive_are_seen(model, processor, inputs, answer, monkeypatch):
    assert sample_gates(model, inputs, answer, processor=processor).reencoded
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *_, **__: "a dog")
    found = sample_gates(model, inputs, answer, processor=processor)
    assert not found.reencoded
    assert not found.sample
    monkeypatch.undo()
    with pytest.raises(ValueError, match="baseline must be one of"):
        sample_gates(model, inputs, processor=processor, baseline="grey")
    with pytest.raises(ValueError, match="gates is empty"):
        gates_table([])


@pytest.mark.parametrize("seed", range(4))
def test_border_and_centroid_by_loops(seed):
    rng = np.random.default_rng(seed)
    values, mask = rng.normal(size=(2, 5, 7)), rng.random((2, 5, 7)) < 0.3
    border, apart = border_mass(values, 2), centroid_distance(values, mask)
    for n in range(2):
        cells = [(y, x, max(values[n, y, x], 0)) for y, x in np.ndindex(5, 7)]
        total = sum(v for _, _, v in cells)
        outer = sum(v for y, x, v in cells if y < 2 or y > 2 or x < 2 or x > 4)
        assert border[n] == pytest.approx(outer / total)
        own = [sum(place[k] * place[2] for place in cells) / total for k in (0, 1)]
        theirs = np.argwhere(mask[n]).mean(0)
        expected = math.dist(own, theirs) / math.hypot(5, 7)
        assert apart[n] == pytest.approx(expected)
    assert border_mass(np.zeros((4, 4))) == 0.75
    assert math.isnan(centroid_distance(values[0], np.zeros((5, 7))))
    with pytest.raises(ValueError, match="width must be"):
        border_mass(values, 0)


@pytest.mark.parametrize("seed", range(4))
def test_wins_by_loops(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(4, size=(2, 9, 3)).astype(float)
    a[0, 0] = math.nan
    pairs = [(x, y) for x, y in zip(a.flat, b.flat, strict=True) if not math.isnan(x)]
    expected = (
        sum(x - y > 1 for x, y in pairs),
        sum(abs(x - y) <= 1 for x, y in pairs),
        sum(y - x > 1 for x, y in pairs),
    )
    assert wins_ties_losses(a, b, tolerance=1) == expected
    assert wins_ties_losses(b, a, tolerance=1) == expected[::-1]
    with pytest.raises(ValueError, match="tolerance must lie"):
        wins_ties_losses(a, b, tolerance=-1)
