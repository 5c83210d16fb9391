"""Tiles and patch rows: against loops, PIL and the real image processor."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from captum_mllm.functional import (
    find_layout,
    frames_to_patches,
    join_tiles,
    patches_to_frames,
    resize_pixels,
    split_tiles,
)
from tests.functional.cases import as_picture, as_pixels, over_seeds, rand
from tests.oracle import formulas

# ---- tiles -------------------------------------------------------------------------------------

LAYOUTS = [(1, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2), (4, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tile", [(1, 1), (2, 2), (3, 4)], ids=str)
def test_tiles_equal_the_reference_and_round_trip(layout, tile):
    tiles = rand(layout[0] * layout[1], 3, *tile)
    picture = join_tiles(tiles, layout)
    assert torch.equal(picture, formulas.join_tiles(tiles, layout))
    assert torch.equal(split_tiles(picture, layout), tiles)


def test_tiles_are_those_that_a_picture_is_cut_into():
    picture = rand(3, 6, 12)
    tiles = split_tiles(picture, (2, 3))
    for n, (row, col) in enumerate([(r, c) for r in range(2) for c in range(3)]):
        cut = picture[:, 3 * row : 3 * row + 3, 4 * col : 4 * col + 4]
        assert torch.equal(tiles[n], cut)


def kinds(height, width):
    """Pictures in [0, 1] of several kinds."""
    y = torch.linspace(0, 1, height, dtype=torch.float64)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width, dtype=torch.float64)[None, :].expand(height, width)
    waves = torch.sin(5 * x + 3 * y) + torch.cos(7 * y - 2 * x * y)
    disc = ((x - 0.3) ** 2 + (y - 0.6) ** 2 < 0.05).double()
    return {
        "noise": rand(3, height, width),
        "across": torch.stack([x, x, x]),
        "down": torch.stack([y, y, y]),
        "slanted": torch.stack([x, y, (x + y) / 2]),
        "smooth": torch.stack([waves, waves.flip(0), waves.flip(1)]) / 4 + 0.5,
        "disc": torch.stack([disc, disc, disc]),
    }


def factors(n):
    return [(down, n // down) for down in range(1, n + 1) if n % down == 0]


EVERY_LAYOUT = [layout for n in (1, 2, 3, 4, 5, 6, 8, 9, 12) for layout in factors(n)]


@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=str)
@pytest.mark.parametrize("kind", list(kinds(2, 2)))
def test_layout_is_found_from_what_pil_makes_of_the_picture(layout, kind):
    """Tiles and overview each resized by PIL from one picture of another size, as processors do."""
    side = 32
    original = as_picture(kinds(37 * layout[0] + 5, 41 * layout[1] + 3)[kind])
    size = (side * layout[1], side * layout[0])
    tiles = split_tiles(as_pixels(original.resize(size, Image.Resampling.BICUBIC)), layout)
    overview = as_pixels(original.resize((side, side), Image.Resampling.BICUBIC))
    found, certain = find_layout(2 * tiles - 1, 2 * overview - 1)  # normalised
    assert found == layout
    assert certain


@pytest.mark.parametrize("layout", [(1, 2), (2, 1), (2, 3), (3, 2), (1, 6), (6, 1)], ids=str)
@over_seeds
def test_layout_of_tiny_tiles_and_a_noisy_overview(layout, seed):
    picture = rand(3, 4 * layout[0], 4 * layout[1], seed=seed)
    overview = resize_pixels(picture[None].float(), (4, 4))[0]
    noise = 0.02 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    assert find_layout(split_tiles(picture.float(), layout), overview + noise) == (layout, True)


@over_seeds
@pytest.mark.parametrize("n", [2, 4, 6])
def test_layout_is_that_of_the_least_error(n, seed):
    """Also where the overview is of another picture: the least error wins, if by a tenth."""
    tiles, overview = rand(n, 2, 4, 4, seed=seed), rand(2, 4, 4, seed=seed + 50)
    errors = {layout: formulas.layout_error(tiles, overview, layout) for layout in factors(n)}
    ordered = sorted(errors, key=errors.__getitem__)
    found, certain = find_layout(tiles, overview)
    assert certain == (errors[ordered[0]] < 0.9 * errors[ordered[1]])
    assert not certain or found == ordered[0]


@pytest.mark.parametrize(
    ("n", "nearest"), [(2, {(1, 2), (2, 1)}), (4, {(2, 2)}), (6, {(2, 3), (3, 2)})]
)
@pytest.mark.parametrize("level", [0.0, 0.4, -1.7])
def test_layout_of_a_blank_picture_is_not_certain(n, nearest, level):
    found, certain = find_layout(torch.full((n, 3, 8, 8), level), torch.full((3, 8, 8), level))
    assert not certain
    assert found in nearest


def test_layout_of_one_tile_needs_no_look():
    assert find_layout(torch.zeros(1, 3, 4, 4), torch.ones(3, 4, 4)) == ((1, 1), True)


# ---- patches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "rows", "cols", "patch", "temporal", "merge", "channels"),
    [
        (1, 1, 1, 2, 1, 1, 1),
        (1, 2, 3, 2, 2, 2, 3),
        (3, 2, 1, 1, 2, 2, 3),
        (2, 1, 2, 3, 3, 1, 2),
        (2, 1, 2, 1, 1, 3, 2),
    ],
)
def test_patches_equal_the_reference_and_round_trip(
    steps, rows, cols, patch, temporal, merge, channels
):
    side = patch * merge
    frames = rand(steps * temporal, channels, rows * side, cols * side)
    patches = frames_to_patches(frames, patch=patch, temporal=temporal, merge=merge)
    assert torch.equal(patches, formulas.frames_to_patches(frames, patch, temporal, merge))
    grid = (steps, rows * merge, cols * merge)
    layout = {"channels": channels, "patch": patch, "temporal": temporal, "merge": merge}
    assert torch.equal(patches_to_frames(patches, grid, **layout), frames)


@pytest.mark.parametrize("size", [(32, 32), (24, 56), (80, 16), (50, 41)], ids=str)
@pytest.mark.parametrize("merge", [1, 2])
def test_patches_are_those_of_the_real_processor(size, merge):
    """Put together, they are the resized picture, once per frame of the step."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=merge,
        size={"shortest_edge": 256, "longest_edge": 9216},
        do_normalize=False,
    )
    picture = as_picture(rand(3, *size))
    made = processor(images=picture, return_tensors="pt")
    steps, h, w = made["image_grid_thw"][0].tolist()
    expected = as_pixels(picture.resize((4 * w, 4 * h), Image.Resampling.BICUBIC)).float()
    frames = patches_to_frames(
        made["pixel_values"], (steps, h, w), channels=3, patch=4, temporal=2, merge=merge
    )
    assert frames.shape == (2, 3, 4 * h, 4 * w)
    assert_close(frames, expected.expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    back = frames_to_patches(frames, patch=4, temporal=2, merge=merge)
    assert torch.equal(back, made["pixel_values"])
    expected = formulas.frames_to_patches(frames, 4, 2, merge)
    assert_close(expected.float(), made["pixel_values"], rtol=0, atol=0)
