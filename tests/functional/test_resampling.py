"""Resizing, windows, tiles and overviews, against exact overlaps of rectangles."""

import inspect
from fractions import Fraction
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from captum_mllm.functional import (
    WHOLE,
    join_windows,
    merge_views,
    resample_cells,
    resize_attributions,
    resize_pixels,
    upsample,
    window_boxes,
)
from tests.functional.cases import TIGHT, as_picture, as_pixels, over_seeds, rand, randn
from tests.oracle import formulas

unchecked = inspect.unwrap  # users run without the tests' type checks


# ---- upsample ----------------------------------------------------------------------------------

SIZES = [
    ((1, 1), (3, 4)),
    ((2, 3), (4, 6)),
    ((3, 3), (7, 5)),
    ((4, 5), (4, 9)),
    ((7, 6), (3, 2)),
    ((1, 5), (4, 5)),
    ((5, 4), (8, 3)),
]

over_sizes = pytest.mark.parametrize(("old", "new"), SIZES, ids=str)


@over_sizes
@over_seeds
def test_upsample_equals_the_reference(old, new, seed):
    maps = randn(2, *old, seed=seed)
    expected = formulas.upsample(maps, new)
    assert_close(upsample(maps, new), expected, **TIGHT)
    assert_close(upsample(maps.float(), new), expected.float(), rtol=1e-4, atol=1e-5)


@over_sizes
def test_upsample_keeps_constants_and_range_and_commutes_with_flips(old, new):
    maps = rand(3, *old)
    up = upsample(maps, new)
    assert up.min() >= maps.min() - 1e-12
    assert up.max() <= maps.max() + 1e-12
    assert_close(upsample(maps.flip(-1), new), up.flip(-1), **TIGHT)
    flat = upsample(torch.full((1, *old), 0.3, dtype=torch.float64), new)
    assert_close(flat, torch.full((1, *new), 0.3, dtype=torch.float64), **TIGHT)


def test_upsample_to_the_same_size_is_the_same_tensor():
    maps = rand(2, 3, 4)
    assert upsample(maps, (3, 4)) is maps


# ---- resize_attributions -----------------------------------------------------------------------


@over_sizes
@over_seeds
@pytest.mark.parametrize("preserve", ["mass", "density"])
def test_resize_equals_the_reference(old, new, seed, preserve):
    attributions = randn(2, 2, *old, seed=seed)
    expected = formulas.resize_attributions(attributions, new, preserve)
    assert_close(resize_attributions(attributions, new, preserve), expected, **TIGHT)
    single = resize_attributions(attributions.float(), new, preserve)
    assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(25))
def test_resize_keeps_the_mass_at_any_ratio_up_and_down(seed):
    sides = torch.randint(1, 20, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    attributions = randn(2, 3, *sides[:2], seed=seed)
    resized = resize_attributions(attributions, (sides[2], sides[3]))
    assert resized.shape == (2, 3, *sides[2:])
    assert_close(resized.sum((2, 3)), attributions.sum((2, 3)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("seed", range(25))
def test_resize_for_density_keeps_constants_at_any_ratio(seed):
    sides = torch.randint(1, 20, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    flat = torch.full((1, 1, *sides[:2]), 0.7, dtype=torch.float64)
    expected = torch.full((1, 1, *sides[2:]), 0.7, dtype=torch.float64)
    resized = resize_attributions(flat, (sides[2], sides[3]), preserve="density")
    assert_close(resized, expected, **TIGHT)


@pytest.mark.parametrize("seed", range(25))
def test_resize_for_mass_keeps_constants_at_any_ratio(seed):
    """A flat attribution has no ripple, up and down, where the ratio is not whole either."""
    sides = torch.randint(1, 40, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    flat = torch.full((1, 1, *sides[:2]), 0.7, dtype=torch.float64)
    level = 0.7 * sides[0] * sides[1] / (sides[2] * sides[3])
    expected = torch.full((1, 1, *sides[2:]), level, dtype=torch.float64)
    assert_close(resize_attributions(flat, (sides[2], sides[3])), expected, **TIGHT)


@pytest.mark.parametrize(("new", "area"), [((12, 16), 4.0), ((3, 4), 0.25)])
def test_resize_by_2_is_bilinear_interpolation_by_the_area_ratio(new, area):
    attributions = randn(2, 3, 6, 8)
    bilinear = F.interpolate(attributions, size=new, mode="bilinear", align_corners=False)
    assert_close(resize_attributions(attributions, new), bilinear / area, **TIGHT)
    density = resize_attributions(attributions, new, preserve="density")
    assert_close(density, bilinear, **TIGHT)


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_resize_by_a_whole_ratio_down_sums_blocks(ratio):
    attributions = randn(1, 2, 12, 24)
    blocks = F.avg_pool2d(attributions, ratio) * ratio**2
    size = (12 // ratio, 24 // ratio)
    assert_close(resize_attributions(attributions, size), blocks, **TIGHT)


def test_resize_splits_a_cell_by_its_overlap():
    # Three cells into two: the middle one is halved.
    row = torch.tensor([[[[1.0, 10.0, 100.0]]]])
    assert_close(resize_attributions(row, (1, 2)), torch.tensor([[[[6.0, 105.0]]]]))


@pytest.mark.parametrize("preserve", ["mass", "density"])
def test_resize_is_linear_and_commutes_with_flips(preserve):
    a, b = randn(1, 1, 5, 6), randn(1, 1, 5, 6, seed=1)

    def resize(x):
        return resize_attributions(x, (7, 4), preserve)

    assert_close(resize(2 * a - b), 2 * resize(a) - resize(b), **TIGHT)
    assert_close(resize(a.flip(-1)), resize(a).flip(-1), **TIGHT)
    assert_close(resize(a.flip(-2)), resize(a).flip(-2), **TIGHT)


def test_resize_to_the_same_size_is_the_same_tensor_and_one_axis_stays_exact():
    attributions = randn(1, 2, 4, 6)
    assert resize_attributions(attributions, (4, 6)) is attributions
    down = resize_attributions(attributions, (2, 6))
    assert_close(down, attributions.reshape(1, 2, 2, 2, 6).sum(3), **TIGHT)


def test_resize_unknown_preserve_raises():
    with pytest.raises(ValueError, match="preserve must be one of mass, density, got 'sum'"):
        unchecked(resize_attributions)(torch.zeros(1, 1, 2, 2), (4, 4), preserve="sum")


# ---- resample_cells ----------------------------------------------------------------------------


# (rows, cols) of the map, its box, (rows, cols) of the frame
PLACES = {
    "whole, same": ((3, 4), WHOLE, (3, 4)),
    "whole, finer": ((2, 3), WHOLE, (4, 9)),
    "whole, coarser": ((6, 4), WHOLE, (2, 1)),
    "no whole ratio": ((3, 5), WHOLE, (7, 4)),
    "finer and coarser": ((2, 7), WHOLE, (5, 3)),
    "a part, as many cells": ((3, 4), (1 / 3, 0.0, 2 / 3, 1 / 2), (3, 4)),
    "a part": ((2, 2), (1 / 3, 1 / 4, 2 / 3, 1 / 2), (4, 6)),
    "a part across cells": ((2, 3), (1 / 5, 1 / 7, 4 / 5, 5 / 7), (3, 4)),
    "sticks out": ((3, 3), (-1 / 3, -1 / 4, 4 / 3, 5 / 4), (4, 3)),
    "sticks out of one side": ((2, 5), (1 / 2, 0.0, 3 / 2, 1.0), (2, 4)),
    "one cell": ((1, 1), (1 / 3, 0.0, 1.0, 1.0), (3, 3)),
    "beside the frame": ((2, 2), (1.0, 0.0, 2.0, 1.0), (2, 3)),
}

over_places = pytest.mark.parametrize(("grid", "box", "size"), PLACES.values(), ids=PLACES)


@over_seeds
@over_places
def test_resample_equals_the_reference(grid, box, size, seed):
    maps = rand(2, *grid, seed=seed) - 0.3
    expected = torch.stack([formulas.resample_cells(m, box, size) for m in maps])
    assert_close(resample_cells(maps, box, size), expected, **TIGHT)
    single = resample_cells(maps.float(), box, size)
    assert_close(single, expected.float(), rtol=1e-5, atol=1e-6)


@over_places
def test_resample_keeps_a_constant_where_it_reaches_and_0_elsewhere(grid, box, size):
    placed = resample_cells(torch.full((1, *grid), 0.7, dtype=torch.float64), box, size)[0]
    left, upper, right, lower = formulas.exact_box(box)
    for (y, x), value in zip(
        [(y, x) for y in range(size[0]) for x in range(size[1])],
        placed.flatten().tolist(),
        strict=True,
    ):
        across = left < Fraction(x + 1, size[1]) and right > Fraction(x, size[1])
        down = upper < Fraction(y + 1, size[0]) and lower > Fraction(y, size[0])
        assert value == pytest.approx(0.7 if across and down else 0.0, abs=1e-12), (y, x)


@pytest.mark.parametrize("seed", range(20))
def test_resample_of_the_whole_keeps_the_mean(seed):
    sides = torch.randint(1, 13, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    maps = rand(3, *sides[:2], seed=seed)
    placed = resample_cells(maps, WHOLE, (sides[2], sides[3]))
    assert_close(placed.mean((1, 2)), maps.mean((1, 2)), **TIGHT)


@pytest.mark.parametrize("n", [3, 7, 24, 49])
def test_resample_does_not_take_rounding_for_an_overlap(n):
    """A frame cell that a map ends at is 0, though the product k / n * n may lie beyond k."""
    for k in range(1, n):
        for cells in range(1, 8):
            placed = resample_cells(torch.ones(cells, 1), (0.0, 0.0, 1.0, k / n), (n, 1))[:, 0]
            assert placed.tolist() == pytest.approx([1] * k + [0] * (n - k))
            placed = resample_cells(torch.ones(cells, 1), (0.0, k / n, 1.0, 1.0), (n, 1))[:, 0]
            assert placed.tolist() == pytest.approx([0] * k + [1] * (n - k))


def test_resample_to_the_same_cells_is_the_same_tensor():
    maps = rand(2, 3, 4)
    assert resample_cells(maps, WHOLE, (3, 4)) is maps


def test_resample_lets_a_cell_show_where_it_lies_and_nowhere_else():
    base, bumped = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    bumped[1, 2] = 1.0
    changed = resample_cells(bumped, WHOLE, (6, 6)) != resample_cells(base, WHOLE, (6, 6))
    assert changed.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (2, 3, 1), (0,)], ids=str)
@over_places
def test_resample_of_a_batch_equals_one_by_one(grid, box, size, lead):
    maps = rand(*lead, *grid)
    placed = resample_cells(maps, box, size)
    assert placed.shape == (*lead, *size)
    for ours, one in zip(placed.reshape(-1, *size), maps.reshape(-1, *grid), strict=True):
        assert_close(ours, resample_cells(one, box, size), **TIGHT)


@over_places
def test_resample_commutes_with_flips_and_transposition(grid, box, size):
    maps, (left, upper, right, lower) = rand(*grid), box
    placed = resample_cells(maps, box, size)
    mirrored = (1 - right, upper, 1 - left, lower)
    assert_close(resample_cells(maps.flip(-1), mirrored, size), placed.flip(-1), **TIGHT)
    turned = resample_cells(maps.T, (upper, left, lower, right), (size[1], size[0]))
    assert_close(turned, placed.T, **TIGHT)


# ---- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [(1, 1), (2, 3), (4, 4), (5, 7)], ids=str)
@pytest.mark.parametrize("extra", [(0, 0), (1, 3), (3, 2), (5, 7)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_window_boxes_equal_the_reference(cells, extra, n):
    enlarged = (cells[0] + extra[0], cells[1] + extra[1])
    boxes = window_boxes(cells, enlarged, n)
    assert [formulas.exact_box(box) for box in boxes] == formulas.window_boxes(cells, enlarged, n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(1, 12), cols=st.integers(1, 12), scale=st.floats(1, 3))
def test_windows_cover_every_cell_and_stay_inside(rows, cols, scale):
    """With as many windows as the attributors take, for any size and scale."""
    large = round(rows * scale), round(cols * scale)
    n = max(ceil(large[0] / rows), ceil(large[1] / cols))
    boxes = window_boxes((rows, cols), large, n)
    assert len(boxes) == n * n
    hits = [[0] * large[1] for _ in range(large[0])]
    for box in boxes:
        left, upper, right, lower = formulas.exact_box(box)
        assert left >= 0
        assert upper >= 0
        assert right <= 1
        assert lower <= 1
        top, start = upper * large[0], left * large[1]
        assert top.denominator == start.denominator == 1  # whole cells
        assert (lower - upper, right - left) == (Fraction(rows, large[0]), Fraction(cols, large[1]))
        for y in range(int(top), int(top) + rows):
            for x in range(int(start), int(start) + cols):
                hits[y][x] += 1
    assert min(map(min, hits)) >= 1
    # And so the windows of a constant make that constant.
    flat = [torch.full((rows, cols), 0.3, dtype=torch.float64)] * len(boxes)
    joined = join_windows(flat, boxes, large)
    assert_close(joined, torch.full(large, 0.3, dtype=torch.float64), **TIGHT)


@over_seeds
@pytest.mark.parametrize(
    ("cells", "large", "n", "size"),
    [
        ((2, 2), (3, 4), 2, (3, 4)),
        ((3, 2), (5, 5), 3, (5, 5)),
        ((2, 3), (3, 5), 2, (4, 7)),  # on another grid than the windows' own
        ((4, 4), (6, 6), 2, (2, 3)),
    ],
    ids=str,
)
def test_join_of_windows_equals_the_reference(cells, large, n, size, seed):
    boxes = window_boxes(cells, large, n)
    maps = [rand(2, *cells, seed=seed + 10 * i) for i in range(len(boxes))]
    joined = join_windows(maps, boxes, size)
    for row in range(2):
        expected = formulas.join_windows([m[row] for m in maps], boxes, size)
        assert_close(joined[row], expected, **TIGHT)


@over_seeds
def test_join_of_boxes_that_stick_out_or_leave_holes_equals_the_reference(seed):
    boxes = [(-1 / 4, 0.0, 1 / 2, 2 / 3), (1 / 2, 1 / 3, 5 / 4, 3 / 2), (0.0, 4 / 5, 1 / 7, 1.0)]
    maps = [rand(3, 2, seed=seed + 10 * i) for i in range(3)]
    joined = join_windows(maps, boxes, (5, 6))
    assert_close(joined, formulas.join_windows(maps, boxes, (5, 6)), **TIGHT)
    assert joined[0, 3:].tolist() == [0, 0, 0]  # no window reaches there


@over_seeds
def test_join_does_not_see_the_order_of_windows_nor_of_maps(seed):
    boxes = window_boxes((2, 3), (4, 5), 2)
    maps = [rand(5, 2, 3, seed=seed + 10 * i) for i in range(4)]
    joined = join_windows(maps, boxes, (4, 5))
    turned = join_windows(maps[::-1], boxes[::-1], (4, 5))
    assert_close(turned, joined, **TIGHT)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(join_windows([m[order] for m in maps], boxes, (4, 5)), joined[order], **TIGHT)


def test_join_cuts_a_map_into_windows_and_back():
    whole = rand(2, 6, 7)
    boxes = window_boxes((4, 5), (6, 7), 2)
    corners = [(round(box[1] * 6), round(box[0] * 7)) for box in boxes]
    maps = [whole[:, top : top + 4, left : left + 5] for top, left in corners]
    assert_close(join_windows(maps, boxes, (6, 7)), whole, **TIGHT)


@pytest.mark.parametrize("lead", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_join_keeps_leading_axes_and_type(lead, dtype):
    boxes = window_boxes((2, 2), (3, 3), 2)
    maps = [rand(*lead, 2, 2, seed=i, dtype=dtype) for i in range(4)]
    joined = join_windows(maps, boxes, (3, 3))
    assert joined.shape == (*lead, 3, 3)
    assert joined.dtype == dtype


def test_join_wants_a_box_per_map():
    with pytest.raises(ValueError, match="zip"):
        join_windows([rand(1, 1)], [], (1, 1))


# ---- merge_views -------------------------------------------------------------------------------


@over_seeds
@pytest.mark.parametrize(
    ("grids", "boxes", "shape"),
    [
        ([(4, 6), (2, 2)], [WHOLE, WHOLE], (4, 6)),  # tiles and overview
        ([(3, 5), (2, 2)], [WHOLE, (-1 / 8, -1 / 9, 9 / 8, 10 / 9)], (3, 5)),  # sticks out
        ([(3, 5), (4, 4)], [WHOLE, (1 / 16, 1 / 9, 15 / 16, 8 / 9)], (3, 5)),
        ([(2, 2), (3, 3), (5, 1)], [WHOLE, WHOLE, WHOLE], (4, 3)),
        ([(2, 3)], [WHOLE], (3, 2)),
    ],
    ids=str,
)
def test_merge_equals_the_reference(grids, boxes, shape, seed):
    views = [rand(3, *grid, seed=seed + 10 * i) for i, grid in enumerate(grids)]
    merged = merge_views(views, boxes, shape)
    for row in range(3):
        expected = formulas.merge_views([view[row] for view in views], boxes, shape)
        assert_close(merged[row], expected, **TIGHT)
    order = torch.tensor([2, 0, 1])
    assert_close(merge_views([v[order] for v in views], boxes, shape), merged[order], **TIGHT)


def test_merge_of_the_only_view_is_that_view_bit_for_bit():
    for grid in ((3, 4), (2, 3, 4)):
        view = rand(5, *grid, dtype=torch.float32)
        assert merge_views([view], [WHOLE], grid) is view


def test_merge_of_equal_constants_is_that_constant():
    views = [torch.full((2, rows, cols), 0.4) for rows, cols in ((6, 9), (2, 2), (5, 5))]
    assert_close(merge_views(views, [WHOLE] * 3, (6, 9)), torch.full((2, 6, 9), 0.4))


def test_merge_of_a_video_equals_step_by_step():
    views = [rand(3, 4, 6, 6), rand(3, 4, 2, 2, seed=1)]
    merged = merge_views(views, [WHOLE, WHOLE], (4, 6, 6))
    assert merged.shape == (3, 4, 6, 6)
    for step in range(4):
        alone = merge_views([v[:, step] for v in views], [WHOLE, WHOLE], (6, 6))
        assert_close(merged[:, step], alone, **TIGHT)


# ---- resize_pixels -----------------------------------------------------------------------------

PIXEL_SIZES = [
    ((8, 8), (16, 16)),
    ((16, 12), (8, 6)),
    ((15, 21), (10, 28)),
    ((30, 9), (7, 9)),
    ((7, 50), (13, 11)),
]


@over_seeds
@pytest.mark.parametrize(("old", "new"), PIXEL_SIZES, ids=str)
def test_resize_pixels_is_what_pil_makes_of_the_picture(old, new, seed):
    # Middling values: PIL cuts what overshoots black and white after each axis.
    picture = as_picture(0.25 + 0.5 * rand(3, *old, seed=seed))
    expected = as_pixels(picture.resize(new[::-1], Image.Resampling.BICUBIC))
    got = resize_pixels(as_pixels(picture)[None], new)[0]
    # PIL rounds to 8 bits after each axis.
    assert_close(got, expected, rtol=0, atol=2.5 / 255)
    assert float((got - expected).abs().mean()) < 0.6 / 255


@pytest.mark.parametrize(("old", "new"), PIXEL_SIZES, ids=str)
def test_resize_pixels_keeps_constants_and_commutes_with_flips(old, new):
    flat = resize_pixels(torch.full((1, 3, *old), 0.3), new)
    assert_close(flat, torch.full((1, 3, *new), 0.3))
    pixels = rand(2, 3, *old, dtype=torch.float32)
    resized = resize_pixels(pixels, new)
    for axis in (-1, -2):
        assert_close(resize_pixels(pixels.flip(axis), new), resized.flip(axis))
    for i in range(2):  # a batch is one by one
        assert_close(resize_pixels(pixels[i : i + 1], new), resized[i : i + 1])


def test_resize_pixels_to_the_same_size_is_the_same_tensor():
    pixels = rand(1, 3, 5, 4)
    assert resize_pixels(pixels, (5, 4)) is pixels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_resize_pixels_keeps_the_type_and_computes_in_float32(dtype):
    pixels = rand(1, 3, 6, 6).to(dtype)
    resized = resize_pixels(pixels, (9, 4))
    assert resized.dtype == dtype
    assert_close(resized, resize_pixels(pixels.float(), (9, 4)).to(dtype), rtol=0, atol=0)
