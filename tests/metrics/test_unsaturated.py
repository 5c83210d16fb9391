"""Log-odds, the LDS, keep and remove: their maths, their properties, models that see."""

import copy

import pytest
import torch

from captum_mllm.adapters import find_adapter
from captum_mllm.geometry import ImageGrid
from captum_mllm.methods import control_maps
from captum_mllm.metrics import (
    insertion_deletion,
    keep_and_remove,
    linear_datamodeling_score,
    relative_log_odds,
    subset_correlation,
)
from captum_mllm.metrics.datamodeling import cell_means, random_subsets
from captum_mllm.metrics.perturbation import pixel_ranks, spread_cells
from tests.metrics.test_perturbation import encode, random_maps, scene_of
from tests.oracle import formulas
from tests.oracle.families import family, video
from tests.oracle.model_state import check_same, state, worn

over_seeds = pytest.mark.parametrize("seed", range(5))


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- formulas ---------------------------------------------------------------------------------


@over_seeds
def test_relative_log_odds(seed):
    odds, ends = 20 * draw(4, 3, seed=seed) - 10, 20 * draw(2, 4, seed=seed + 9) - 10
    found = relative_log_odds(odds, *ends)
    for row, (full, blank) in enumerate(ends.T.tolist()):
        for column, value in enumerate(odds[row].tolist()):
            if full <= blank:
                assert torch.isnan(found[row, column])
            else:
                share = min(1.0, max(0.0, (value - blank) / (full - blank)))
                assert float(found[row, column]) == pytest.approx(share)
    assert bool(relative_log_odds(odds, ends[0], ends[0]).isnan().all())


@over_seeds
@pytest.mark.parametrize("levels", [2, 1000])
def test_correlation_of_subsets_is_that_of_a_loop(seed, levels):
    maps = (draw(3, 12, seed=seed) * levels).floor()
    kept, outputs = random_subsets(12, 9, 0.3, seed), draw(3, 9, seed=seed + 50)
    listed = [row.nonzero().flatten().tolist() for row in kept]
    expected = [
        formulas.subset_correlation(m, listed, o)
        for m, o in zip(maps.tolist(), outputs.tolist(), strict=True)
    ]
    found = subset_correlation(maps, kept, outputs)
    torch.testing.assert_close(found.tolist(), expected, atol=1e-9, rtol=0)


@over_seeds
def test_an_additive_model_is_predicted_by_its_weights(seed):
    weights = draw(1, 20, seed=seed) - 0.5
    kept = random_subsets(20, 32, 0.2, seed)
    outputs = 3 + weights @ kept.double().T
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(subset_correlation(weights, kept, outputs), one)
    torch.testing.assert_close(subset_correlation(-weights, kept, outputs), -one)
    torch.testing.assert_close(subset_correlation(5 * weights + 2, kept, outputs.exp()), one)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    noisy = outputs + draw(1, 32, seed=seed + 7)
    there = subset_correlation(weights[:, order], kept[:, order], noisy)
    torch.testing.assert_close(there, subset_correlation(weights, kept, noisy))
    flat = torch.full((1, 20), 0.1 + seed / 3, dtype=torch.float64)
    assert float(subset_correlation(flat, kept, outputs)) == 0


@over_seeds
def test_subsets_are_of_one_size_and_seeded(seed):
    found = random_subsets(49, 10, 0.2, seed)
    assert found.sum(1).tolist() == [10] * 10
    assert torch.equal(found, random_subsets(49, 10, 0.2, seed))
    assert not torch.equal(found, random_subsets(49, 10, 0.2, seed + 1))


def test_cells_and_pixels():
    grids = [ImageGrid(1, 2, 2, 4), ImageGrid(1, 2, 1, 2, steps=2, frames=4)]
    pixels = spread_cells(torch.arange(6), grids)
    assert pixels[0].tolist() == [[0, 0, 1, 1]] * 2
    assert pixels[1].tolist() == [[[2, 3]], [[2, 3]], [[4, 5]], [[4, 5]]]
    assert cell_means([p.double() for p in pixels], grids).tolist() == list(range(6))


@over_seeds
def test_random_ties_keep_the_order_of_values(seed):
    grid = ImageGrid(3, 4, 6, 8)
    values = (draw(6, 8, seed=seed) * 3).floor()
    (found,) = pixel_ranks([values], [grid], seed)
    assert found.flatten().sort().values.tolist() == list(range(48))
    in_order = values.flatten()[found.flatten().argsort()]
    assert bool((in_order[1:] <= in_order[:-1]).all())
    (flat,) = pixel_ranks([torch.ones(3, 4)], [grid], seed)
    assert not torch.equal(flat, pixel_ranks([torch.ones(3, 4)], [grid])[0])
    first = spread_cells((torch.arange(12)), [grid])[0][flat < 4]
    assert first.unique().numel() == 1  # a cell is shown whole before the next


def test_controls_of_a_mask():
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:10, 6:14] = True
    found = control_maps(mask, (8, 8))
    sums = {name: int(found[name].sum()) for name in ("mask", "eroded", "dilated", "shifted")}
    assert sums == {"mask": 48, "eroded": 8, "dilated": 120, "shifted": 48}
    assert torch.equal(found["shifted"][:, 4:12], found["mask"][:, 6:14])
    assert all(float(m.min()) >= 0 and float(m.max()) <= 1 for m in found.values())
    assert torch.equal(found["random"][::2, ::2], found["random"][1::2, 1::2])
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        control_maps(mask.float(), (8, 8))
    with pytest.raises(ValueError, match="grid must be"):
        control_maps(mask, (80, 8))


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llava", "InternVL"])
def test_two_images_batches_and_named_maps(name):
    kin = family(name)
    inputs = encode(kin, kin.picture, kin.wide_picture)
    maps, other = random_maps(inputs, kin, 2), random_maps(inputs, kin, seed=1)
    masks = tuple((m > 0.7) for m in random_maps(inputs, kin, seed=2))
    call = {"processor": kin.processor, "tokens": [1, 4]}
    both = {"a": maps, "b": other}
    question = (kin.model, inputs, kin.answer)
    one = linear_datamodeling_score(*question, both, subsets=6, **call)
    many = linear_datamodeling_score(*question, maps, subsets=6, perturbations_per_eval=4, **call)
    cells = sum(grid.cells for grid in find_adapter(kin.model).grids(inputs))
    assert one.kept.shape == (6, cells)
    torch.testing.assert_close(one.log_odds, many.log_odds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.scores["a"], many.scores["attribution"])
    kr = keep_and_remove(*question, both, masks, perturbations_per_eval=5, **call)
    back = keep_and_remove(*question, other, masks, **call)
    torch.testing.assert_close(
        kr.keep["b"], back.keep["attribution"], atol=1e-4, rtol=1e-3, equal_nan=True
    )
    assert kr.pixels.tolist() == [sum(int(m.sum()) for m in masks)] * 2


def test_a_video_has_its_cells():
    kin = family("Qwen2VL")
    inputs = video(kin)
    grid = find_adapter(kin.model).grids(inputs)[0]
    found = linear_datamodeling_score(
        kin.model, inputs, kin.answer, torch.rand(grid.shape), processor=kin.processor, subsets=3
    )
    assert found.kept.shape == (3, grid.cells)


def test_curves_in_log_odds(model, processor, inputs, answer):
    call = {"processor": processor, "steps": 4, "perturbations_per_eval": 8}
    maps = draw(16, 16).float()
    usual = insertion_deletion(model, inputs, answer, maps, **call)
    found = insertion_deletion(model, inputs, answer, maps, units="log_odds", **call)
    torch.testing.assert_close(found.probs, usual.probs)
    torch.testing.assert_close(found.black_probs, usual.black_probs)
    expected = relative_log_odds(
        usual.insertion.logit(), usual.probs.logit(), usual.black_probs.logit()
    )
    torch.testing.assert_close(found.insertion, expected, atol=1e-3, rtol=1e-3, equal_nan=True)
    with pytest.raises(ValueError, match="units must be one of"):
        insertion_deletion(model, inputs, answer, maps, processor=processor, units="nats")
    with pytest.raises(ValueError, match="ties must be one of"):
        insertion_deletion(model, inputs, answer, maps, processor=processor, ties="none")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"subsets": 0}, "subsets must be a whole number"),
        ({"kept": 1.0}, "kept must lie strictly"),
        ({"kept": 0.99}, "kept keeps all of 16 cells"),
        ({"seed": -1}, "seed must be"),
        ({"baseline": "grey"}, "baseline must be one of"),
        ({"attributions": {}}, "attributions is empty"),
        ({"attributions": {"a": torch.rand(4)}}, r"attributions\['a'\] must be \(tokens"),
    ],
)
def test_bad_values_of_the_lds_are_named(model, processor, inputs, answer, change, match):
    given = {"attributions": torch.rand(4, 4), **change}
    with pytest.raises(ValueError, match=match):
        linear_datamodeling_score(model, inputs, answer, processor=processor, **given)


def test_masks_are_checked_and_empty_ones_have_no_score(model, processor, inputs, answer):
    used = worn(copy.deepcopy(model))
    before = state(used)
    maps = torch.rand(4, 4)
    for mask in (torch.zeros(4, 4), torch.ones(4, 4)):
        found = keep_and_remove(used, inputs, answer, maps, mask, processor=processor)
        assert bool(found.scores["attribution"].isnan().all())
    check_same(before, used)
    with pytest.raises(ValueError, match=r"masks must be bool or shares in \[0, 1\]"):
        keep_and_remove(used, inputs, answer, maps, 2 * torch.ones(4, 4), processor=processor)


def test_the_order_of_known_maps():
    """Of three scenes: the mask before its near misses, those before maps that know nothing."""
    kept, lds = [], []
    for number in (100, 101, 102):
        model, processor, inputs, answer, tokens, truth = scene_of("llava", number, 112)
        per = [control_maps(mask.bool(), (14, 14)) for mask in truth]
        maps = {name: torch.stack([one[name] for one in per]) for name in per[0]}
        maps |= {"inverse": 1 - truth, "flat": torch.ones(14, 14)}
        call = {"processor": processor, "tokens": tokens, "perturbations_per_eval": 8}
        kept.append(keep_and_remove(model, inputs, answer, maps, truth, **call).means())
        lds.append(linear_datamodeling_score(model, inputs, answer, maps, **call).means())
    mean = {name: sum(one[name] for one in kept) / 3 for name in kept[0]}
    assert mean["mask"] > mean["shifted"] > max(mean["centre"], mean["random"])
    assert mean["mask"] > 0.5 > 0 > mean["inverse"]
    assert abs(mean["flat"] - mean["random"]) < 0.4
    mean = {name: sum(one[name] for one in lds) / 3 for name in lds[0]}
    assert mean["mask"] > mean["shifted"] > max(mean["centre"], mean["random"])
    assert mean["flat"] == 0
