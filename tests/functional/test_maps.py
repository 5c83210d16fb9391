import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from captum_mllm.functional import (
    aggregate,
    lens_logits,
    rank_gaussian_filter,
    resize_attributions,
    upsample,
)
from tests.oracle import formulas as reference

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
EXACT = {"rtol": 0, "atol": 0}
over_seeds = pytest.mark.parametrize("seed", range(4))


unchecked = inspect.unwrap  # users run without the tests' type checks


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- lens_logits ------------------------------------------------------------------------------


@over_seeds
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (2, 9, 4)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lens_equals_twin(seed, shape, with_bias):
    positions, classes, dim = shape
    hidden, weight = randn(positions, dim, seed=seed), randn(classes, dim, seed=seed + 100)
    bias = randn(classes, seed=seed + 200) if with_bias else None
    expected = reference.lens_logits(hidden, weight, bias)
    assert_close(lens_logits(hidden, weight, bias), expected, **TIGHT)
    single = lens_logits(hidden.float(), weight.float(), None if bias is None else bias.float())
    assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lens_computes_half_precision_in_float32(dtype):
    hidden, weight = randn(6, 64).to(dtype), randn(4, 64, seed=1).to(dtype)
    bias = randn(4, seed=2).to(dtype)
    logits = lens_logits(hidden, weight, bias)
    assert logits.dtype == torch.float32
    expected = reference.lens_logits(hidden, weight, bias).float()
    assert_close(logits, expected, rtol=1e-4, atol=1e-5)  # 1e-2 off if summed in bf16


def test_lens_is_signed_and_linear_in_the_hidden_state():
    hidden, weight = randn(5, 8), randn(3, 8, seed=1)
    assert lens_logits(hidden, weight).min() < 0
    both = lens_logits(2 * hidden + hidden.flip(0), weight)
    parts = 2 * lens_logits(hidden, weight) + lens_logits(hidden, weight).flip(1)
    assert_close(both, parts, **TIGHT)


# --- rank_gaussian_filter ---------------------------------------------------------------------

GRIDS = [(1, 1), (1, 6), (6, 1), (2, 2), (2, 5), (3, 3), (5, 4), (8, 8)]


@over_seeds
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", ["dense", "relu", "signed", "nearly flat"])
def test_filter_equals_twin(seed, grid, kind):
    maps = {
        "dense": rand(*grid, seed=seed),
        "relu": randn(*grid, seed=seed).clamp(min=0),
        "signed": randn(*grid, seed=seed),  # windows of mean <= 0 give 0
        "nearly flat": 1 + 1e-3 * rand(*grid, seed=seed),
    }[kind]
    expected = reference.rank_gaussian_filter(maps)
    assert_close(rank_gaussian_filter(maps), expected, **TIGHT)
    if kind in ("dense", "relu"):
        assert_close(rank_gaussian_filter(maps.float()), expected.float(), rtol=1e-4, atol=1e-6)


def test_filter_of_a_spike_computed_by_hand():
    # The window of the spike holds eight 0 and one 1: mean 1/9, variance 1/9 - 1/81 = 8/81,
    # sigma^2 = 8/81 * 81 = 8. The 1 has rank 8: exp(-16/16) over sum_r exp(-(r-4)^2 / 16).
    spike = torch.zeros(5, 5, dtype=torch.float64)
    spike[2, 2] = 1.0
    e = torch.tensor([-16.0, -9, -4, -1, 0, -1, -4, -9, -16], dtype=torch.float64) / 16
    value = torch.exp(e[8]) / torch.exp(e).sum()
    filtered = rank_gaussian_filter(spike)
    assert_close(filtered[1:4, 1:4], value.expand(3, 3), **TIGHT)
    # Elsewhere the window either misses the spike or is one of the nine above.
    assert filtered.sum() == pytest.approx(9 * value.item())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("level", [0.0, 1e-30, 0.1, 3.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_keeps_a_constant_bit_for_bit(grid, level, dtype):
    flat = torch.full(grid, level, dtype=dtype)
    assert_close(rank_gaussian_filter(flat), flat, **EXACT)


def test_filter_of_a_map_with_flat_and_zero_regions_equals_twin():
    maps = torch.zeros(8, 8, dtype=torch.float64)
    maps[:, 4:] = 2.0
    filtered = rank_gaussian_filter(maps)
    assert_close(filtered, reference.rank_gaussian_filter(maps), **TIGHT)
    assert_close(filtered[:, :3], torch.zeros(8, 3, dtype=torch.float64), **EXACT)
    assert_close(filtered[:, 5:], torch.full((8, 3), 2.0, dtype=torch.float64), **EXACT)


@over_seeds
@pytest.mark.parametrize("axis", [0, 1])
def test_filter_commutes_with_flips_and_transposition(seed, axis):
    maps = randn(6, 5, seed=seed).clamp(min=0)
    filtered = rank_gaussian_filter(maps)
    assert_close(rank_gaussian_filter(maps.flip(axis)), filtered.flip(axis), **TIGHT)
    assert_close(rank_gaussian_filter(maps.T), filtered.T, **TIGHT)


@over_seeds
def test_filter_of_a_window_does_not_see_the_order_of_its_cells(seed):
    window = rand(9, seed=seed)
    shuffled = window[torch.randperm(9, generator=torch.Generator().manual_seed(seed))]
    centre = rank_gaussian_filter(window.reshape(3, 3))[1, 1]
    assert_close(rank_gaussian_filter(shuffled.reshape(3, 3))[1, 1], centre, **TIGHT)


def test_filter_sorts_every_window_of_zeros_and_ones():
    # What compares and swaps in a fixed order sorts everything if it sorts all of these.
    bits = (torch.arange(512)[:, None] >> torch.arange(9)) & 1
    centre = rank_gaussian_filter(bits.double().reshape(512, 3, 3))[:, 1, 1]
    for ones in range(10):
        alike = centre[bits.sum(1) == ones]
        expected = reference.rank_gaussian_filter((torch.arange(9) < ones).double().reshape(3, 3))
        assert_close(alike, expected[1, 1].expand_as(alike), **TIGHT)


@pytest.mark.parametrize("c", [1e-30, 1e-20, 1e-3, 1.0, 1e3, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_is_positively_homogeneous(c, dtype):
    maps = randn(7, 7, dtype=dtype).clamp(min=0)
    filtered = rank_gaussian_filter(c * maps)
    assert filtered.isfinite().all()
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    assert_close(filtered / c, rank_gaussian_filter(maps), rtol=rtol, atol=rtol * 1e-3)


def test_filter_of_values_60_orders_of_magnitude_apart_is_finite():
    maps = torch.where(rand(9, 9) < 0.5, 1e-30, 1e30).float()
    filtered = rank_gaussian_filter(maps)
    assert filtered.isfinite().all()
    expected = reference.rank_gaussian_filter(maps.double())
    assert_close(filtered, expected.float(), rtol=1e-4, atol=0)


def test_filter_stays_within_each_window():
    maps = randn(6, 6).clamp(min=0)
    padded = F.pad(maps[None, None], (1, 1, 1, 1), mode="reflect")
    high = F.max_pool2d(padded, 3, stride=1)[0, 0]
    low = -F.max_pool2d(-padded, 3, stride=1)[0, 0]
    filtered = rank_gaussian_filter(maps)
    assert ((filtered >= low - 1e-12) & (filtered <= high + 1e-12)).all()


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (0,)], ids=str)
def test_filter_of_a_batch_equals_one_by_one(lead):
    maps = rand(*lead, 5, 4)
    filtered = rank_gaussian_filter(maps)
    assert filtered.shape == maps.shape
    for ours, single in zip(filtered.reshape(-1, 5, 4), maps.reshape(-1, 5, 4), strict=True):
        assert_close(ours, rank_gaussian_filter(single), **TIGHT)


# --- aggregate --------------------------------------------------------------------------------


@over_seeds
@pytest.mark.parametrize("n_scales", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("how", "weighted"),
    [
        ("mean", False),
        ("mean", True),
        ("median", False),
    ],
)
def test_aggregate_equals_twin(seed, n_scales, how, weighted):
    stack = randn(n_scales, 2, 3, 4, seed=seed).clamp(min=0)
    weights = rand(n_scales, seed=seed + 50) + 0.1 if weighted else None
    expected = reference.aggregate(stack, how, weights)
    assert_close(aggregate(stack, how, weights), expected, **TIGHT)
    single = aggregate(stack.float(), how, None if weights is None else weights.float())
    assert_close(single, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "median"])
def test_aggregate_of_a_single_scale_is_that_scale_bit_for_bit(how):
    stack = rand(1, 5, 5, dtype=torch.float32)
    assert torch.equal(aggregate(stack, how), stack[0])


@pytest.mark.parametrize("how", ["mean", "median"])
def test_aggregate_does_not_see_the_order_of_scales_and_keeps_agreement(how):
    stack = rand(5, 3, 3)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(aggregate(stack[order], how), aggregate(stack, how), **TIGHT)
    same = stack[:1].expand(4, 3, 3)
    assert_close(aggregate(same, how), stack[0], **TIGHT)
    assert_close(aggregate(7 * stack, how), 7 * aggregate(stack, how), **TIGHT)


def test_aggregate_values_by_hand():
    stack = torch.tensor([[1.0], [2.0], [6.0], [108.0]], dtype=torch.float64)
    assert aggregate(stack, "mean").item() == 29.25
    assert aggregate(stack, "median").item() == 4.0
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    assert aggregate(stack, "mean", weights).item() == 5.0


@pytest.mark.parametrize("how", ["mean"])
def test_aggregate_sees_only_the_ratios_of_weights(how):
    stack, weights = rand(3, 4), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert_close(aggregate(stack, how, 9 * weights), aggregate(stack, how, weights), **TIGHT)
    ones = torch.ones(3, dtype=torch.float64)
    assert_close(aggregate(stack, how, ones), aggregate(stack, how), **TIGHT)


@pytest.mark.parametrize("how", ["mean"])
def test_aggregate_weight_0_drops_a_scale_even_where_it_is_0(how):
    stack = torch.tensor([[0.0, 5.0], [2.0, 3.0]])
    dropped = aggregate(stack, how, torch.tensor([0.0, 1.0]))
    assert_close(dropped, torch.tensor([2.0, 3.0]))


def test_aggregate_keeps_the_type_of_the_maps():
    stack = rand(3, 4, dtype=torch.float32)
    weights = torch.ones(3, dtype=torch.float64)
    assert aggregate(stack, "mean", weights).dtype == torch.float32


@pytest.mark.parametrize(
    ("how", "weights", "message"),
    [
        ("max", None, "aggregation must be one of mean, median, got 'max'"),
        ("median", [1.0, 1.0], "takes no weights"),
        ("mean", [1.0], r"one value per scale \(2\), or .* got \(1,\)"),
        ("mean", [1.0, -1.0], ">= 0 and not all 0"),
        ("mean", [0.0, 0.0], ">= 0 and not all 0"),
    ],
)
def test_aggregate_errors_say_what_is_wrong(how, weights, message):
    stack = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(ValueError, match=message):
        unchecked(aggregate)(stack, how, None if weights is None else torch.tensor(weights))


# --- upsample ---------------------------------------------------------------------------------

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
def test_upsample_equals_twin(old, new, seed):
    maps = randn(2, *old, seed=seed)
    expected = reference.upsample(maps, new)
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


# --- resize_attributions ----------------------------------------------------------------------


@over_sizes
@over_seeds
@pytest.mark.parametrize("preserve", ["mass", "density"])
def test_resize_equals_twin(old, new, seed, preserve):
    attributions = randn(2, 2, *old, seed=seed)
    expected = reference.resize_attributions(attributions, new, preserve)
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
