"""Masks of segments, against reference implementations and their definitions."""

import pytest
import torch

from captum_mllm.functional import grid_mask, rank_mask
from tests.oracle import formulas


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (9, 5), (12, 12)])
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 2), (4, 5)])
def test_grids(size, grid):
    if grid[0] > size[0] or grid[1] > size[1]:
        with pytest.raises(ValueError, match=r"(rows|cols) must lie in 1\.\.\d+"):
            grid_mask(size, *grid)
        return
    mask = grid_mask(size, *grid)
    assert torch.equal(mask, formulas.grid_mask(size, *grid))
    counts = mask.unique(return_counts=True)
    assert counts[0].tolist() == list(range(grid[0] * grid[1]))
    most, least = counts[1].max(), counts[1].min()
    assert most <= -(-size[0] // grid[0]) * -(-size[1] // grid[1])
    assert least >= (size[0] // grid[0]) * (size[1] // grid[1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("segments", [1, 2, 5, 30])
def test_bands_by_rank(seed, segments):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 6 if seed % 2 else 1000, (5, 6), generator=g).float()  # with ties
    mask = rank_mask(values, segments)
    assert torch.equal(mask, formulas.rank_mask(values, segments))
    counts = mask.flatten().bincount(minlength=segments)
    assert int(counts.max()) - int(counts.min()) <= 1
    for band in range(segments - 1):
        assert values[mask == band].min() >= values[mask == band + 1].max()
    assert torch.equal(rank_mask(values * 3 + 1, segments), mask)  # ranks alone count


@pytest.mark.parametrize("segments", [0, 31])
def test_no_more_bands_than_pixels(segments):
    with pytest.raises(ValueError, match=r"segments must lie in 1\.\.30"):
        rank_mask(torch.zeros(5, 6), segments)
