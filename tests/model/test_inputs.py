"""Where text stands once the images have other numbers of placeholders."""

import pytest
import torch

from captum_mllm.adapters import find_adapter
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.inputs import (
    Sample,
    append_answer,
    moved_positions,
    read_sample,
    rescaled_inputs,
)
from tests.oracle.families import family
from tests.oracle.layouts import ANY_SIZE


def by_hand(length, before, after, positions):
    """One token after the other: a run of placeholders becomes one of another length."""
    found, place = {}, 0
    start_of = {run[0]: new for run, new in zip(before, after, strict=True)}
    inside = {p for run in before for p in run}
    for p in range(length):
        if p in start_of:
            place += start_of[p]
        elif p not in inside:
            found[p] = place
            place += 1
    return [found[p] for p in positions]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([[2, 3, 4]], [6]),  # more of them
        ([[2, 3, 4]], [1]),  # fewer
        ([[0, 1], [5, 6, 7, 8]], [4, 2]),  # the first grows, the second shrinks
        ([[1], [2, 3]], [3, 3]),  # two images without text between
        ([[3, 4]], [2]),  # as many
    ],
)
def test_positions_equal_a_loop(before, after):
    text = [p for p in range(12) if not any(p in run for run in before)]
    grids = tuple(ImageGrid(1, len(run), 8, 8) for run in before)
    ids = torch.arange(12)[None]
    sample = Sample({"input_ids": ids[:, :9]}, grids, tuple(map(torch.tensor, before)), 9, 0)
    length = 12 + sum(after) - sum(map(len, before))
    runs, shift = [], 0
    for run, new in zip(before, after, strict=True):
        runs.append(torch.arange(run[0] + shift, run[0] + shift + new))
        shift += new - len(run)
    grids = tuple(ImageGrid(1, new, 8, 8) for new in after)
    scaled = Sample({"input_ids": torch.zeros(1, length)}, grids, tuple(runs), length, 0)
    for positions in (text, text[::-1], text[-2:], text[:1]):
        got = moved_positions(sample, scaled, torch.tensor(positions))
        assert got.tolist() == by_hand(12, before, after, positions)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_every_text_token_is_found_again(name, factor):
    """Two images of different shapes, padding before the prompt, an answer after it."""
    subject = family(name)
    adapter = find_adapter(subject.model)
    inputs = subject.encode(subject.wide_picture, subject.tall_picture)
    tokens = inputs["input_ids"].shape
    padded = {
        key: torch.cat([value.new_zeros(1, 3), value], 1) if value.shape == tokens else value
        for key, value in inputs.items()
    }
    sample = read_sample(padded, adapter)
    full = append_answer(sample, subject.answer, adapter)
    grids = [adapter.scaled_grid(grid, factor) for grid in sample.grids]
    scaled = rescaled_inputs(full, sample, grids, {}, adapter)
    ids = full["input_ids"][0]
    images = torch.cat(sample.image_positions)
    text = torch.tensor([p for p in range(len(ids)) if p not in images])
    got = moved_positions(sample, scaled, text)
    assert torch.equal(scaled.prompt_ids[got], ids[text])
    everything = torch.cat([got, *scaled.image_positions]).sort().values
    assert torch.equal(everything, torch.arange(len(scaled.prompt_ids)))
    assert bool((got.diff() > 0).all())
    if factor == 1.0:
        assert torch.equal(got, text)
    else:
        assert len(scaled.prompt_ids) != len(ids)
