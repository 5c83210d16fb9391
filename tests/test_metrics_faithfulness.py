"""Insertion and deletion: formulas, ranking and changed pictures, against slow twins."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import NAMES, family

from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.picture_views import change_pictures
from captum_mllm.functional import WHOLE
from captum_mllm.geometry import ImageGrid
from captum_mllm.inputs import read_sample
from captum_mllm.metrics import Faithfulness, curve_at, curve_auc
from captum_mllm.metrics._perturbation import (
    ChangeablePictures,
    black_pixel,
    blurred,
    on_view,
    pixel_ranks,
    step_sizes,
)
from captum_mllm.metrics._versions import all_masks

over_seeds = pytest.mark.parametrize("seed", range(6))
over_families = pytest.mark.parametrize("name", NAMES)


def encode(kin, *pictures):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kin.encode(*pictures)


# --- formulas ---------------------------------------------------------------------------------


def slow_auc(values):
    width = 1 / (len(values) - 1)
    return sum(width * (a + b) / 2 for a, b in pairwise(values))


@over_seeds
@pytest.mark.parametrize("points", [2, 3, 65])
def test_auc_is_the_trapezoid_sum(seed, points):
    curves = torch.rand(3, points, generator=torch.Generator().manual_seed(seed)).double()
    expected = torch.tensor([slow_auc(row) for row in curves.tolist()], dtype=torch.float64)
    torch.testing.assert_close(curve_auc(curves), expected)
    torch.testing.assert_close(curve_auc(curves.flip(1)), expected)


def test_auc_by_hand():
    assert float(curve_auc(torch.tensor([1.0, 0.0]))) == 0.5
    assert float(curve_auc(torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))) == 0.875
    with pytest.raises(ValueError, match="at least two points"):
        curve_auc(torch.tensor([1.0]))


@over_seeds
def test_values_between_steps_are_linear(seed):
    curve = torch.rand(9, generator=torch.Generator().manual_seed(seed)).double()
    grid = np.linspace(0, 1, 9)
    for area in (0.0, 0.01, 0.05, 0.125, 0.3, 0.999, 1.0):
        expected = np.interp(area, grid, curve.numpy())
        assert float(curve_at(curve, area)) == pytest.approx(expected, abs=1e-12)


def test_scores_by_hand():
    found = Faithfulness(
        insertion=torch.tensor([[0.1, 0.9, 0.9], [0.2, 0.3, 0.4]], dtype=torch.float64),
        deletion=torch.tensor([[0.9, 0.3, 0.1], [0.4, 0.2, 0.2]], dtype=torch.float64),
        probs=torch.tensor([0.9, 0.4], dtype=torch.float64),
        black_probs=torch.tensor([0.1, 0.3], dtype=torch.float64),
        tokens=(3, 4),
        baseline="black",
        areas=(0.25, 0.5),
    )
    assert found.insertion_auc.tolist() == pytest.approx([0.7, 0.3])
    assert found.deletion_auc.tolist() == pytest.approx([0.4, 0.25])
    assert found.difference.tolist() == pytest.approx([0.3, 0.05])
    assert found.comprehensiveness[0.5].tolist() == pytest.approx([0.6, 0.2])
    assert found.comprehensiveness[0.25].tolist() == pytest.approx([0.3, 0.1])
    assert found.sufficiency[0.5].tolist() == pytest.approx([0.0, 0.1])
    assert found.sufficiency[0.25].tolist() == pytest.approx([0.4, 0.15])
    assert found.sensitive.tolist() == [True, False]
    means = found.means()
    assert means["insertion"] == pytest.approx(0.5)
    assert means["comprehensiveness@0.5"] == pytest.approx(0.4)
    assert found.means(sensitive_only=True)["sufficiency@0.25"] == pytest.approx(0.4)


@pytest.mark.parametrize(("pixels", "steps"), [(16, 4), (16, 64), (7, 3), (12544, 64), (5, 1)])
def test_steps_are_equal_in_area(pixels, steps):
    sizes = step_sizes(pixels, steps)
    assert sizes[0] == 0
    assert sizes[-1] == pixels
    assert all(abs(n - k * pixels / steps) <= 0.5 for k, n in enumerate(sizes))


# --- ranking ----------------------------------------------------------------------------------


def slow_ranks(images):
    """Sorted pairs of (-value, place)."""
    places = [(n, y, x) for n, m in enumerate(images) for y, x in np.ndindex(*m.shape)]
    ordered = sorted(places, key=lambda p: (-images[p[0]][p[1], p[2]], p))
    ranks = [np.zeros(m.shape, dtype=int) for m in images]
    for rank, (n, y, x) in enumerate(ordered):
        ranks[n][y, x] = rank
    return ranks


@over_seeds
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_ranks_of_several_images_ties_in_order(seed, levels):
    rng = np.random.default_rng(seed)
    images = [rng.integers(levels, size=s) - levels // 2 for s in ((4, 6), (3, 5))]
    grids = [ImageGrid(*m.shape, *m.shape) for m in images]
    found = pixel_ranks([torch.tensor(m, dtype=torch.float32) for m in images], grids)
    for own, expected in zip(found, slow_ranks(images), strict=True):
        np.testing.assert_array_equal(own.numpy(), expected)


@pytest.mark.parametrize("value", [0.0, 0.3, -1 / 3, 1e-30, 7e20])
def test_a_flat_map_scans_from_the_top(value):
    grid = ImageGrid(3, 3, 10, 7)
    ranks = pixel_ranks([torch.full((3, 3), value)], [grid])[0]
    assert torch.equal(ranks, torch.arange(70).reshape(10, 7))


def test_a_map_is_brought_to_pixels_bilinearly():
    ranks = pixel_ranks([torch.tensor([[0.0, 1.0]])], [ImageGrid(1, 2, 1, 4)])[0]
    assert ranks.tolist() == [[3, 2, 1, 0]]


# --- pictures ---------------------------------------------------------------------------------


@over_seeds
def test_masks_on_a_view_are_means_of_finely_drawn_ones(seed):
    """A twin that counts tiny squares; the view may reach beyond the frame."""
    rng = np.random.default_rng(seed)
    mask = torch.tensor(rng.random((4, 6)) < 0.5).double()
    box = [(0.0, 0.0, 1.0, 1.0), (-0.25, 0.0, 1.25, 1.0), (0.0, -0.5, 1.0, 1.5)][seed % 3]
    size, fine = (3, 5), 40
    left, upper, right, lower = box
    expected = torch.zeros(size, dtype=torch.float64)
    for y in range(size[0] * fine):
        for x in range(size[1] * fine):
            down = upper + (y + 0.5) / (size[0] * fine) * (lower - upper)
            across = left + (x + 0.5) / (size[1] * fine) * (right - left)
            row, col = min(max(int(down * 4), 0), 3), min(max(int(across * 6), 0), 5)
            expected[y // fine, x // fine] += mask[row, col] / fine**2
    torch.testing.assert_close(on_view(mask, box, size), expected, atol=0.03, rtol=0)


def test_masks_on_a_view_of_whole_pixels_are_exact():
    mask = torch.zeros(8, 8, dtype=torch.float64)
    mask[:4] = 1
    assert on_view(mask, WHOLE, (8, 8)) is mask
    assert on_view(mask, WHOLE, (2, 4)).tolist() == [[1.0] * 4, [0.0] * 4]
    shifted = on_view(mask, (0.0, -0.25, 1.0, 1.25), (12, 8))
    assert shifted[:, 0].tolist() == [1.0] * 6 + [0.0] * 6
    assert float(on_view(torch.ones(9, 7).double(), WHOLE, (4, 5)).float().min()) == 1.0


def test_blur_keeps_a_flat_picture_and_spreads_a_point():
    torch.testing.assert_close(
        blurred(torch.full((3, 5, 8), 0.7), (2.0, 1.0))[1, 2, 3], torch.tensor(0.7)
    )
    point = torch.zeros(1, 41, 41, dtype=torch.float64)
    point[0, 20, 20] = 1
    spread = blurred(point, (2.0, 3.0))[0]
    at = torch.arange(41.0).double() - 20
    assert float((spread.sum(1) * at**2).sum()) == pytest.approx(4.0, rel=1e-3)
    assert float((spread.sum(0) * at**2).sum()) == pytest.approx(9.0, rel=1e-3)


@over_families
def test_black_is_what_the_processor_makes_of_a_black_picture(name):
    """In every view; padding is left as it is."""
    from PIL import Image

    kin = family(name)
    for picture in (kin.picture, kin.wide_picture, kin.tall_picture):
        inputs = encode(kin, picture)
        adapter = find_adapter(kin.model)
        sample = read_sample(inputs, adapter)
        shown = ChangeablePictures(adapter, sample, "black", black_pixel(kin.processor))
        dark = encode(kin, Image.new("RGB", picture.size))
        found = shown.replaced(all_masks(sample, True))
        torch.testing.assert_close(
            found["pixel_values"], dark["pixel_values"].to(inputs["pixel_values"])
        )


@over_families
@pytest.mark.parametrize("baseline", ["black", "mean", "blur"])
def test_nothing_replaced_is_bit_for_bit_the_picture(name, baseline):
    kin = family(name)
    inputs = encode(kin, kin.picture, kin.wide_picture)
    adapter = find_adapter(kin.model)
    sample = read_sample(inputs, adapter)
    shown = ChangeablePictures(adapter, sample, baseline, black_pixel(kin.processor))
    found = shown.replaced(all_masks(sample, False))
    for key, value in found.items():
        if key in sample.kwargs:
            assert torch.equal(value, sample.kwargs[key]), key
    assert not torch.equal(
        shown.replaced(all_masks(sample, True))["pixel_values"], sample.kwargs["pixel_values"]
    )


@pytest.mark.parametrize("baseline", ["mean", "blur"])
@over_families
def test_baselines_are_of_each_picture(name, baseline):
    """The mean colour is flat in each view, and differs between pictures; a blur is not flat."""
    kin = family(name)
    inputs = encode(kin, kin.picture, kin.wide_picture)
    adapter = find_adapter(kin.model)
    sample = read_sample(inputs, adapter)
    shown = ChangeablePictures(adapter, sample, baseline, black_pixel(kin.processor))
    spreads, colours = [], {}

    def look(image, view, box):
        pixels = view.movedim(-3, 0).flatten(1)
        spreads.append(float(pixels.std(1).max()))
        colours.setdefault(image, []).append(pixels.mean(1))
        return view

    replaced = dict(sample.kwargs) | shown.replaced(all_masks(sample, True))
    change_pictures(adapter, replaced, sample.grids, look)
    means = {}

    def mean_of(image, view, box):
        means.setdefault(image, view.movedim(-3, 0).flatten(1).mean(1))
        return view

    change_pictures(adapter, sample.kwargs, sample.grids, mean_of)
    for image, own in colours.items():
        for colour in own:
            tolerance = 1e-5 if baseline == "mean" else 0.2
            torch.testing.assert_close(colour, means[image], atol=tolerance, rtol=0)
    assert (max(spreads) < 1e-5) == (baseline == "mean")


@pytest.mark.parametrize("name", ["InternVL", "Idefics3", "LlavaNext"])
def test_overlapping_views_change_together(name):
    """The left half replaced: the left half of the tiles and of the overview."""
    kin = family(name)
    inputs = encode(kin, kin.wide_picture)
    adapter = find_adapter(kin.model)
    sample = read_sample(inputs, adapter)
    shown = ChangeablePictures(adapter, sample, "black", torch.full((3, 1, 1), -9.0))
    masks = all_masks(sample, False)
    masks[0][:, : masks[0].shape[1] // 2] = True
    views = []

    def look(image, view, box):
        views.append(view)
        return view

    replaced = dict(sample.kwargs) | shown.replaced(masks)
    change_pictures(adapter, replaced, sample.grids, look)
    assert len(views) == 2
    for view in views:
        half = view.shape[-1] // 2
        assert bool((view[..., : half - 1] == -9).all())
        assert bool((view[..., half + 1 :] > -9).all())


def test_an_unknown_layout_is_an_error():
    class Other: ...

    with pytest.raises(NotImplementedError, match=r"Other.*change_pictures\.register"):
        change_pictures(Other(), {}, [], lambda *_: None)
