"""The baselines of ``methods.explain`` against the same written by hand, in every family."""

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from torch.testing import assert_close

from captum_mllm import TokenLogProb
from captum_mllm.functional import sum_cells
from captum_mllm.geometry import ImageGrid
from captum_mllm.methods import explain
from captum_mllm.methods.ablation import parts_of
from captum_mllm.methods.attention import _layer
from captum_mllm.methods.cells import box_on_grid, cell_means, cell_sums, shown_by
from captum_mllm.model.baselines import baseline_images
from tests.oracle.families import above, family
from tests.oracle.frames import by_hand, frames_by_hand, log_probs_by_hand, view_positions
from tests.oracle.layouts import frame_shape, kin_of, pictures_of, with_answer


@pytest.fixture(params=above())
def kin(request):
    return kin_of(request.param)


def picture_of(kin):
    """The usual picture where LLaVA-NeXT's wide one leaves cells half in the padding."""
    return kin.picture if kin.name == "LlavaNext" else kin.wide_picture


def merged(views, shape):
    """Mean of the frame's own cells and of the overview's, each of which covers several."""
    if len(views) == 2:
        down, across = shape[0] // views[1].shape[1], shape[1] // views[1].shape[2]
        views[1] = views[1].repeat_interleave(down, 1).repeat_interleave(across, 2)
    return torch.stack(views).mean(0)


def in_unit(maps):
    """All tokens by one largest value."""
    assert float(maps.max()) > 0
    return maps.clamp(min=0) / maps.max()


def blurred_by_hand(frame):
    """Every pixel the Gaussian mean of all others."""
    high, wide = frame.shape[-2:]
    sigma = 0.1 * min(high, wide)
    pixels, out = frame[0].double().numpy(), np.zeros((3, high, wide))
    ys, xs = np.mgrid[:high, :wide]
    for y in range(high):
        for x in range(wide):
            weights = np.exp(-((ys - y) ** 2 + (xs - x) ** 2) / (2 * sigma**2))
            out[:, y, x] = (pixels * weights).sum((1, 2)) / weights.sum()
    return torch.from_numpy(out)[None].to(frame)


def blocks_by_hand(values, shape):
    """Sum of each cell's pixels, all cells of one size: (n, h, w) -> (n, rows, cols)."""
    h, w = values.shape[-2] // shape[0], values.shape[-1] // shape[1]
    rows = [
        torch.stack([values[:, r * h : r * h + h, c * w : c * w + w].sum((1, 2))
                     for c in range(shape[1])], 1)
        for r in range(shape[0])
    ]  # fmt: skip
    return torch.stack(rows, 1)


# ---- Grad-CAM -----------------------------------------------------------------------------------


def gradcam_by_hand(kin, inputs, picture):
    """Of every view: features, weighted by their mean gradient, summed over channels, positive."""
    seen = []

    def leaf(_module, args, kwargs):
        seen.append(kwargs["inputs_embeds"].detach().requires_grad_())
        return args, {**kwargs, "inputs_embeds": seen[-1]}

    handle = kin.model.get_decoder().register_forward_pre_hook(leaf, with_kwargs=True)
    scores = log_probs_by_hand(kin, inputs, kin.answer)
    handle.remove()
    maps = []
    for score in scores:
        gradient = torch.autograd.grad(score, seen[0], retain_graph=True)[0][0]
        views = []
        for where in view_positions(kin, inputs, picture):
            weights = gradient[where].mean((0, 1))
            views.append((seen[0][0, where].detach() @ weights).clamp(min=0)[None])
        maps.append(merged(views, frame_shape(kin, picture)))
    return torch.cat(maps)


def test_gradcam(kin):
    picture = picture_of(kin)
    inputs = kin.encode(picture)
    got = explain("gradcam", kin.model, kin.processor, inputs, kin.answer)
    assert got.method == "gradcam"
    expected = in_unit(gradcam_by_hand(kin, inputs, picture))
    assert_close(got.grid_attr[0], expected, rtol=1e-3, atol=1e-4)


# ---- integrated gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["blur", "black"])
def test_integrated_gradients(kin, baseline):
    picture = picture_of(kin)
    inputs = kin.encode(picture)
    frame = frames_by_hand(kin, inputs, [picture])[0]
    if baseline == "blur":
        start = blurred_by_hand(frame)
    else:
        settings = kin.processor.image_processor
        dark = [-m / s for m, s in zip(settings.image_mean, settings.image_std, strict=True)]
        start = torch.tensor(dark)[None, :, None, None].expand_as(frame)
    method = IntegratedGradients(by_hand(kin, inputs, [picture], kin.answer))
    maps = []
    for t in range(len(kin.answer)):
        found = method.attribute(frame, start, target=t, n_steps=3).detach()
        maps.append(blocks_by_hand(found.sum(1), frame_shape(kin, picture)))
    got = explain(
        "integrated_gradients", kin.model, kin.processor, inputs, kin.answer, steps=3,
        baseline=baseline, batch=2,
    )  # fmt: skip
    assert_close(got.grid_attr[0], in_unit(torch.cat(maps)), rtol=1e-3, atol=1e-3)


def test_blur_is_what_integrated_gradients_start_from(model, inputs, answer):
    """And twenty steps; any number of pictures at once is the same."""
    first = explain("integrated_gradients", model, None, inputs, answer)
    given = {"baseline": "blur", "steps": 20, "batch": 7}
    second = explain("integrated_gradients", model, None, inputs, answer, **given)
    assert_close(first.grid_attr[0], second.grid_attr[0], rtol=1e-4, atol=1e-5)
    third = explain("integrated_gradients", model, None, inputs, answer, steps=3)
    assert not torch.allclose(first.grid_attr[0], third.grid_attr[0], atol=1e-4)


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, 0, -1])
def test_attention(kin, layer):
    """Of a model whose attention was eager from the start, by ``output_attentions``."""
    picture = picture_of(kin)
    inputs = kin.encode(picture)
    eager = family(kin.name, attn="eager").model
    with torch.no_grad():
        out = eager(**with_answer(kin, inputs, kin.answer), output_attentions=True)
    depth = len(out.attentions)
    weights = out.attentions[2 * depth // 3 if layer is None else layer][0].mean(0)
    start = inputs["input_ids"].shape[1]
    maps = []
    for t in range(len(kin.answer)):
        row = weights[start + t - 1]
        views = [row[where][None] for where in view_positions(kin, inputs, picture)]
        maps.append(merged(views, frame_shape(kin, picture)))
    options = {} if layer is None else {"layer": layer}
    got = explain("attention", kin.model, kin.processor, inputs, kin.answer, **options)
    assert_close(got.grid_attr[0], in_unit(torch.cat(maps)), rtol=1e-4, atol=1e-5)


def test_the_layer_of_attention():
    assert [_layer(None, depth) for depth in (2, 3, 24, 32)] == [1, 2, 16, 21]
    assert [_layer(n, 3) for n in (0, -1, 2)] == [0, 2, 2]


def test_a_model_without_attention_weights(model, inputs, answer):
    """A layer that computes attention in its own way; the family is named, nothing stays behind."""
    module = model.get_decoder().layers[2].self_attn
    handle = module.register_forward_hook(lambda _m, _a, out: (out[0], None))
    try:
        with pytest.raises(ValueError, match="how LlavaForConditionalGeneration shows"):
            explain("attention", model, None, inputs, answer)
    finally:
        handle.remove()
    assert model.get_decoder().config._attn_implementation == "sdpa"


# ---- ablation -----------------------------------------------------------------------------------


def ablated_by_hand(kin, inputs, pictures, image, parts):
    """(tokens, rows, cols): a forward with each part of one picture blurred."""
    scores = by_hand(kin, inputs, pictures, kin.answer)
    frames = frames_by_hand(kin, inputs, pictures)
    blurred = blurred_by_hand(frames[image])
    high, wide = frames[image].shape[-2:]
    drops = torch.zeros(len(kin.answer), *parts)
    with torch.no_grad():
        whole = scores(*frames)[0]
        for r in range(parts[0]):
            for c in range(parts[1]):
                rows = slice(-(-r * high // parts[0]), -(-(r + 1) * high // parts[0]))
                cols = slice(-(-c * wide // parts[1]), -(-(c + 1) * wide // parts[1]))
                changed = [frame.clone() for frame in frames]
                changed[image][..., rows, cols] = blurred[..., rows, cols]
                drops[:, r, c] = whole - scores(*changed)[0]
    return drops


def test_ablation(kin):
    picture = picture_of(kin)
    inputs, shape = kin.encode(picture), frame_shape(kin, picture)
    expected = in_unit(ablated_by_hand(kin, inputs, [picture], 0, shape))
    got = explain("ablation", kin.model, kin.processor, inputs, kin.answer)
    assert_close(got.grid_attr[0], expected, rtol=1e-3, atol=1e-3)


def test_ablation_in_larger_parts_of_two_pictures(kin):
    if kin.name == "LlavaNext":
        pictures = [kin.picture, kin.picture.transpose(0)]
    else:
        pictures = pictures_of(kin, "two")
    inputs = kin.encode(*pictures)
    maps = []
    for i, picture in enumerate(pictures):
        drops = ablated_by_hand(kin, inputs, pictures, i, (1, 2))
        shape = frame_shape(kin, picture)
        cols = torch.zeros(len(kin.answer), *shape)
        for c in range(shape[1]):  # a cell that lies in both halves takes of both
            left = min(max(shape[1] / 2 - c, 0), 1)
            cols[..., c] = left * drops[..., 0] + (1 - left) * drops[..., 1]
        maps.append(cols)
    peak = max(float(m.max()) for m in maps)
    got = explain("ablation", kin.model, kin.processor, inputs, kin.answer, grid=(1, 2))
    for own, other in zip(got.grid_attr, maps, strict=True):
        assert_close(own, other.clamp(min=0) / peak, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize(
    ("cells", "parts"),
    [((8, 8), (8, 8)), ((8, 9), (4, 5)), ((24, 24), (8, 8)), ((1, 200), (1, 50))],
)
def test_parts(cells, parts):
    assert parts_of(ImageGrid(*cells, 8, 8)) == parts
    assert parts[0] * parts[1] <= 64


# ---- pixels and cells ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 1.0, 1.0), (-0.25, 0.5, 1.5, 2.0), (0.25, 0.1, 0.5, 0.9)]
)
def test_sums_of_cells_by_fine_dust(box):
    """Every pixel as many grains, each of which falls into a cell or outside."""
    values, size, grains = torch.rand(2, 3, 5), (4, 2), 40
    expected = torch.zeros(2, *size)
    left, upper, right, lower = box
    for r in range(3 * grains):
        for c in range(5 * grains):
            y = (upper + (r + 0.5) / (3 * grains) * (lower - upper)) * size[0]
            x = (left + (c + 0.5) / (5 * grains) * (right - left)) * size[1]
            if 0 <= y < size[0] and 0 <= x < size[1]:
                own = values[:, r // grains, c // grains] / grains**2
                expected[:, int(y), int(x)] += own
    got = sum_cells(values, box, size)
    assert_close(got, expected, rtol=2e-2, atol=2e-2)
    if box == (0.0, 0.0, 1.0, 1.0):
        assert_close(got.sum((1, 2)), values.sum((1, 2)))


def test_a_frame_of_more_than_the_grid_shows():
    """LLaVA-NeXT: pixels of the whole picture, a grid over a part of it and of the padding."""
    kin = kin_of("LlavaNext")
    picture = kin.wide_picture
    inputs = kin.encode(picture)
    grid = explain("random", kin.model, None, inputs, kin.answer).grids[0]
    frame = TokenLogProb(kin.model, inputs, kin.answer).pixels
    left, upper, right, lower = grid.box
    wide, high = right - left, lower - upper
    expected = (-left / wide, -upper / high, (36 - left) / wide, (24 - upper) / high)
    assert shown_by(grid) == box_on_grid(grid.box, (24, 36)) == expected
    assert expected[1] > 0  # padding above
    ones = torch.ones_like(frame)
    sums, means = cell_sums(ones, grid)[0], cell_means(ones, grid)[0]
    assert_close(sums.sum(), ones.sum(), rtol=1e-4, atol=1e-2)
    assert float(sums[0, 0]) < float(sums[2, 2])  # a cell that is padding in part
    assert_close(means, torch.ones_like(means))


def test_steps_of_a_video():
    grid = ImageGrid(1, 2, 2, 4, steps=2, frames=4)
    values = torch.arange(4 * 3 * 2 * 4).reshape(1, 4, 3, 2, 4).float()
    sums, means = cell_sums(values, grid), cell_means(values, grid)
    for step in range(2):
        for col in range(2):
            own = values[0, 2 * step : 2 * step + 2, :, :, 2 * col : 2 * col + 2]
            assert_close(sums[0, step, 0, col], own.sum())
            assert_close(means[0, step, 0, col], own.mean())


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (
            "integrated_gradients",
            {"baseline": "white"},
            ValueError,
            "baseline must be one of black, mean, blur",
        ),
        (
            "integrated_gradients",
            {"baseline": "black"},
            ValueError,
            "processor must be the model's",
        ),
        ("integrated_gradients", {"batch": 0}, ValueError, "batch must be an int >= 1, got 0"),
        (
            "integrated_gradients",
            {"steps": True},
            ValueError,
            "steps must be an int >= 1, got True",
        ),
        (
            "ablation",
            {"baseline": None},
            ValueError,
            "baseline must be one of black, mean, blur, got None",
        ),
        ("ablation", {"grid": 3}, TypeError, r"grid must be \(rows, cols\), two ints, got 3"),
        ("ablation", {"grid": (2, 99)}, ValueError, r"cols must lie in 1\.\.16"),
        ("attention", {"layer": 3}, ValueError, r"layer must be an int in -3\.\.2, got 3"),
        ("attention", {"layer": 1.0}, ValueError, r"layer must be an int in -3\.\.2, got 1.0"),
    ],
)
def test_errors(method, options, error, message, model, inputs, answer):
    with pytest.raises(error, match=message):
        explain(method, model, None, inputs, answer, **options)


def test_values_that_are_not_finite(model, inputs, answer):
    from captum_mllm import LogitLens
    from captum_mllm.methods.request import over_answer

    trace = LogitLens(model).trace(inputs, answer)
    maps = torch.ones(len(answer), 4, 4)
    maps[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="method 'some' gave NaN or infinite"):
        over_answer(trace, [maps], "some")


def test_nothing_of_a_video_is_blurred_within_frames():
    frames = torch.rand(1, 2, 3, 6, 4)
    got = baseline_images([frames], "blur", None)[0]
    for n in range(2):
        assert_close(got[:, n], blurred_by_hand(frames[:, n]))
