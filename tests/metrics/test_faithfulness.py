"""Insertion and deletion: formulas, ranking and changed pictures, against slow twins."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from captum_mllm.adapters import find_adapter
from captum_mllm.geometry import ImageGrid
from captum_mllm.metrics import Faithfulness, curve_at, curve_auc
from captum_mllm.metrics.perturbation import all_masks, pixel_ranks, step_sizes
from captum_mllm.model.baselines import ChangeablePictures, black_pixel, blurred, on_frame
from captum_mllm.model.inputs import read_sample
from tests.oracle.families import above, family

over_seeds = pytest.mark.parametrize("seed", range(6))
over_families = pytest.mark.parametrize("name", above())


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
def test_a_mask_of_a_part_of_the_picture_is_moved_to_its_frame(seed):
    """A twin that asks each pixel for its place; the part may stick out or lie inside."""
    rng = np.random.default_rng(seed)
    mask = torch.tensor(rng.random((4, 6)) < 0.5)
    y, x = [(0, 0), (-2, 1), (2, -1)][seed % 3]  # of the part's corner in the frame, pixels
    picture, size = (30, 35), (6, 5)
    box = (7.0 * x, 5.0 * y, 7.0 * (x + 6), 5.0 * (y + 4))
    found = on_frame(mask, ImageGrid(2, 3, 4, 6, picture=picture, box=box), size)
    for row in range(size[0]):
        for col in range(size[1]):
            own = mask[min(max(row - y, 0), 3), min(max(col - x, 0), 5)]
            assert bool(found[row, col]) == bool(own)


def test_a_mask_of_a_frame_is_its_own():
    mask = torch.rand(3, 4, 6) < 0.5
    assert on_frame(mask, ImageGrid(2, 3, 4, 6, steps=3, frames=3), (4, 6)) is mask


def test_blur_keeps_a_flat_picture_and_spreads_a_point():
    torch.testing.assert_close(blurred(torch.full((3, 5, 8), 0.7), 2.0)[1, 2, 3], torch.tensor(0.7))
    point = torch.zeros(1, 41, 51, dtype=torch.float64)
    point[0, 20, 25] = 1
    spread = blurred(point, 3.0)[0]
    for side in (spread.sum(0), spread.sum(1)):
        at = torch.arange(len(side)).double() - len(side) // 2
        assert float((side * at**2).sum()) == pytest.approx(9.0, rel=1e-3)


OVERVIEWS = {  # where a single image's overview lies in pixel_values, if it has more than one tile
    "LlavaNext": (0, 0),
    "InternVL": (-1,),
    "Idefics3": (0, -1),
    "SmolVLM": (0, -1),
}


@over_families
def test_black_is_what_the_processor_makes_of_a_black_picture(name):
    """All but an overview, which keeps what a resized frame differs from the processor's own.

    How much that is of these pictures of noise, in units in which black to white is 2 (Idefics) or
    about 3.8: 0.07 InternVL, 0.15 Idefics, 0.24 LLaVA-NeXT, but 0.86 in its narrow picture
    (12 x 36), whose frame is itself resized from 36 to 32 rows before it is halved.
    """
    from PIL import Image

    kin = family(name)
    for picture in (kin.picture, kin.wide_picture, kin.tall_picture):
        inputs = encode(kin, picture)
        adapter = find_adapter(kin.model)
        sample = read_sample(inputs, adapter)
        shown = ChangeablePictures(adapter, sample, "black", black_pixel(kin.processor))
        dark = encode(kin, Image.new("RGB", picture.size))["pixel_values"]
        found = shown.replaced(all_masks(sample, True))["pixel_values"].clone()
        if name in OVERVIEWS and sample.grids[0].tiles != (1, 1):
            at = OVERVIEWS[name]
            left = (found[at] - dark[at]).abs()
            tall = name == "LlavaNext" and picture is kin.tall_picture
            assert 0 < float(left.max()) < (0.9 if tall else 0.25)
            before = (inputs["pixel_values"][at] - dark[at]).abs()
            assert float(left.mean()) < (0.1 if tall else 0.04) * float(before.mean())
            found[at] = dark[at]
        torch.testing.assert_close(found, dark.to(found))


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
    """The mean colour is flat in each frame, and differs between pictures; a blur is not flat."""
    kin = family(name)
    inputs = encode(kin, kin.picture, kin.wide_picture)
    adapter = find_adapter(kin.model)
    sample = read_sample(inputs, adapter)
    shown = ChangeablePictures(adapter, sample, baseline, black_pixel(kin.processor))
    replaced = dict(sample.kwargs) | shown.replaced(all_masks(sample, True))
    colours = []
    for old, new in zip(
        adapter.canvases(sample.kwargs, sample.grids),
        adapter.canvases(replaced, sample.grids),
        strict=True,
    ):
        before, after = (frame.movedim(-3, 0).flatten(1) for frame in (old, new))
        colours.append(before.mean(1))
        tolerance = 1e-5 if baseline == "mean" else 0.2
        torch.testing.assert_close(after.mean(1), colours[-1], atol=tolerance, rtol=0)
        assert (float(after.std(1).max()) < 1e-5) == (baseline == "mean")
    assert not torch.allclose(colours[0], colours[1], atol=1e-3)


@pytest.mark.parametrize("name", OVERVIEWS)
def test_an_overview_follows_its_picture(name):
    """The left half replaced: the left half of the picture and of the overview."""
    kin = family(name)
    inputs = encode(kin, kin.wide_picture)
    adapter = find_adapter(kin.model)
    sample = read_sample(inputs, adapter)
    shown = ChangeablePictures(adapter, sample, "black", torch.full((3, 1, 1), -9.0))
    masks = all_masks(sample, False)
    masks[0][:, : masks[0].shape[1] // 2] = True
    replaced = dict(sample.kwargs) | shown.replaced(masks)
    frame = adapter.canvases(replaced, sample.grids)[0]
    half = frame.shape[-1] // 2
    assert bool((frame[..., :half] == -9).all())
    assert bool((frame[..., half:] > -9).all())
    new, old = (kwargs["pixel_values"][OVERVIEWS[name]] for kwargs in (replaced, sample.kwargs))
    half = old.shape[-1] // 2
    # The resized edge rings two pixels far; left of it stays what resizing a frame does otherwise.
    assert torch.equal(new[..., half + 2 :], old[..., half + 2 :])
    assert float((new[..., : half - 2] + 9).abs().max()) < 0.25
