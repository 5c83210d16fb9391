"""One contract for every family, held through the public attributors alone.

What is expected comes from `contract_tools`: the layout facts of each family, and full forwards
written by hand. No adapter is asked.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch.testing import assert_close

from captum_mllm import ImageGeometry, LogitLens, MLLMAttributionResult, TokenActivationMap
from tests.oracle.families import NAMES, video
from tests.oracle.layouts import (
    ANY_SIZE,
    CASES,
    MANY,
    ONE_SIZE,
    QWEN,
    TILED,
    by_hand,
    frame_shape,
    kin_of,
    local_of,
    mixed,
    painted,
    pictures_of,
    video_by_hand,
    visual_ids,
    windows_by_hand,
)
from tests.oracle.model_state import check_same, state
from tests.oracle.published import ARC, MSEA

pytestmark = pytest.mark.filterwarnings(
    # transformers 5.5's InternVL and 5.23's PaliGemma processors, see `FamilySubject.encode`.
    "ignore:__array_:DeprecationWarning"
)
STILL = 1e-6  # what counts as no change of a map whose values are around 1


@pytest.fixture(params=NAMES)
def kin(request):
    return kin_of(request.param)


def lens(kin, model=None):
    return LogitLens(model or kin.model, kin.processor)


def changes(before, after):
    """Per image the largest change over the targets at each cell."""
    pairs = zip(before.grid_attr, after.grid_attr, strict=True)
    return [(new - old).abs().amax(0) for old, new in pairs]


# ---- 1. where a change of one cell shows --------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_painted_cell_shows_in_its_place_and_nowhere_else(kin, case):
    pictures = pictures_of(kin, case)
    inputs, local = kin.encode(*pictures), lens(kin, local_of(kin.name))
    before = local.attribute(inputs, MANY)
    shapes = [frame_shape(kin, picture) for picture in pictures]
    assert [tuple(maps.shape[1:]) for maps in before.grid_attr] == shapes
    seen = [torch.zeros(shape, dtype=torch.bool) for shape in shapes]
    every = 7 if case == "two" else 5 if max(shapes[0]) > 6 and case == "usual" else 3
    for label, changed, image, mask in painted(kin, inputs, pictures, every):
        found = changes(before, local.attribute(changed, MANY))
        seen[image] |= mask
        for n, own in enumerate(found):
            expected = mask if n == image else torch.zeros_like(own, dtype=torch.bool)
            assert torch.equal(own > STILL, expected), (label, image, n)
    assert all(int(mask.sum()) >= mask.numel() // 8 for mask in seen)


def gradient(size, spot=None, level=250):
    """A picture of a faint slope, which tells tiles apart, with a bright spot (box) on it."""
    x, y = np.meshgrid(np.arange(size[0]) / size[0], np.arange(size[1]) / size[1])
    levels = np.stack([60 + 40 * x, 60 + 40 * y, 80 + 0 * x], -1)
    picture = Image.fromarray(levels.astype(np.uint8))
    if spot:
        picture.paste((level, level, level), tuple(round(edge) for edge in spot))
    return picture


@pytest.mark.parametrize("case", ["usual", "wide", "tall"])
def test_a_bright_square_in_a_picture_shows_most_in_its_cell(kin, case):
    """Through the processor: what it does to a picture is part of the way."""
    if kin.name in ("Llava", "LlavaNext") and case != "usual":
        pytest.skip("crops or pads: there the disc's test knows the place")
    (picture,) = pictures_of(kin, case)
    width, height = picture.size
    local = lens(kin, local_of(kin.name))
    before = local.attribute(kin.encode(gradient(picture.size)), MANY)
    rows, cols = frame_shape(kin, picture)
    for row, col in [(0, 0), (1, cols - 1), (rows - 2, 1), (rows - 1, cols - 2)]:
        high, wide = height / rows, width / cols
        spot = (col * wide, row * high, (col + 1) * wide, (row + 1) * high)
        after = local.attribute(kin.encode(gradient(picture.size, spot)), MANY)
        change = (after.grid_attr[0] - before.grid_attr[0]).abs().sum(0)
        assert divmod(int(change.argmax()), cols) == (row, col)


# ---- 2. the answer ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["wide", "two"])
def test_without_a_target_the_greedy_answer_is_explained(kin, case):
    inputs = kin.encode(*pictures_of(kin, case))
    length = inputs["input_ids"].shape[1]
    out = kin.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=6,
        suppress_tokens=visual_ids(kin),
        return_dict_in_generate=True,
        output_logits=True,
    )
    said, logits = out.sequences[0, length:], torch.cat(out.logits)
    if said[-1] == kin.model.generation_config.eos_token_id:
        said = said[:-1]
    result = lens(kin).attribute(inputs, gen_args={"max_new_tokens": 6})
    assert result.output_ids.tolist() == said.tolist()
    probs = logits.softmax(-1).gather(1, out.sequences[0, length:, None])[: len(said), 0]
    assert_close(result.output_probs, probs, atol=1e-5, rtol=1e-5)
    given = lens(kin).attribute(inputs, said)
    assert_close(given.grid_attr, result.grid_attr, rtol=0, atol=0)
    assert_close(given.token_attr, result.token_attr, rtol=0, atol=0)


# ---- 3. which image -----------------------------------------------------------------------------


def test_another_picture_has_another_map(kin):
    one, other = (
        lens(kin).attribute(kin.encode(p), kin.answer) for p in (kin.picture, kin.other_picture)
    )
    assert (changes(one, other)[0] > 1e-3).sum() >= one.grids[0].cells / 2


def test_two_pictures_are_not_confused(kin):
    """The second never shows in the first's map, but where the prompt sees itself whole."""
    one, other = kin.picture, kin.other_picture
    three = kin.wide_picture
    method = lens(kin)
    before = method.attribute(kin.encode(one, three), kin.answer)
    first = changes(before, method.attribute(kin.encode(other, three), kin.answer))
    second = changes(before, method.attribute(kin.encode(one, three.rotate(180)), kin.answer))
    assert first[0].max() > 0.01
    assert first[1].max() > 1e-3  # the second sees the first
    assert second[1].max() > 0.01
    if kin.name == "PaliGemma":
        assert second[0].max() > 1e-3
    else:
        assert second[0].max() < 1e-5


def test_maps_are_in_the_order_of_the_pictures(kin):
    local = lens(kin, local_of(kin.name))
    pictures = [kin.tall_picture, kin.picture, kin.wide_picture]
    alone = [local.attribute(kin.encode(p), MANY).grid_attr[0] for p in pictures]
    assert (alone[0].shape != alone[1].shape) or (alone[0] - alone[1]).abs().max() > 0.1
    for order in ((0, 1, 2), (2, 0, 1), (1, 0)):
        together = local.attribute(kin.encode(*(pictures[n] for n in order)), MANY)
        assert len(together.grid_attr) == len(order)
        for n, maps in zip(order, together.grid_attr, strict=True):
            assert_close(maps, alone[n], atol=1e-5, rtol=1e-5)


# ---- 4. scales ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_scale_one_is_the_lens_bit_for_bit(kin, case):
    inputs = kin.encode(*pictures_of(kin, case))
    one = lens(kin).attribute(inputs, kin.answer)
    msea = MSEA(kin.model, kin.processor, scales=(1.0,)).attribute(inputs, kin.answer)
    assert_close(msea.grid_attr, one.grid_attr, rtol=0, atol=0)
    assert_close(msea.token_attr, one.token_attr, rtol=0, atol=0)
    assert msea.scales == (1.0,)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ANY_SIZE)
def test_the_lens_is_the_full_forwards(name, case):
    kin = kin_of(name)
    pictures = pictures_of(kin, case)
    inputs = kin.encode(*pictures)
    result = lens(kin).attribute(inputs, kin.answer)
    maps, log_probs = by_hand(kin, inputs, pictures, kin.answer, 1.0)
    assert_close(list(result.grid_attr), maps, atol=1e-5, rtol=1e-5)
    assert_close(result.output_probs, log_probs.exp(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.75, 1.5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ANY_SIZE)
def test_another_scales_prefix_is_the_full_forwards(name, case, scale):
    kin = kin_of(name)
    pictures = pictures_of(kin, case)
    inputs = kin.encode(*pictures)
    method = MSEA(kin.model, kin.processor, scales=(scale,), consistency=True)
    maps, log_probs = by_hand(kin, inputs, pictures, kin.answer, scale)
    result = method.attribute(inputs, kin.answer)
    assert_close(list(result.grid_attr), maps, atol=2e-5, rtol=1e-4)
    _, base = by_hand(kin, inputs, pictures, kin.answer, 1.0)
    agreement = float((log_probs - base).clamp(max=0).mean().exp())
    assert result.consistency == pytest.approx((agreement,), rel=1e-4)
    assert 0.01 < agreement < 1
    plain = MSEA(kin.model, kin.processor, scales=(scale,)).attribute(inputs, kin.answer)
    assert_close(list(plain.grid_attr), maps, atol=2e-5, rtol=1e-4)


# ---- 5. the user's model ------------------------------------------------------------------------


def plain_attributes(model):
    """Values of the modules' own attributes, which `state` only names."""
    kinds = (bool, int, float, str, torch.Tensor, type(None))
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, kinds):
                found[f"{name}.{key}"] = value
    return found


def check_plain(before, model):
    after = plain_attributes(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name


@pytest.mark.parametrize("place", [None, "tower", "norm"])
def test_the_model_is_as_it_was(kin, place):
    model, inputs = copy.deepcopy(kin.model), kin.encode(kin.wide_picture)
    model.train()
    if kin.name in QWEN:
        model.model.rope_deltas = torch.tensor([[-7]])  # of the user's last prompt
    handle = None
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    if place:
        module = {"tower": model.get_encoder(modality="image"), "norm": model.get_decoder().norm}
        handle = module[place].register_forward_hook(stop)
    before, plain = state(model), plain_attributes(model)
    method = MSEA(model, kin.processor, scales=(1.0, 1.5))
    if place:
        with pytest.raises(KeyboardInterrupt):
            method.attribute(inputs, kin.answer)
    else:
        method.attribute(inputs, kin.answer)
        LogitLens(model, kin.processor).attribute(inputs, gen_args={"max_new_tokens": 2})
    check_same(before, model)
    check_plain(plain, model)
    if handle:
        handle.remove()
    if place == "tower":
        got = method.attribute(inputs, kin.answer)
        fresh = MSEA(kin.model, kin.processor, scales=(1.0, 1.5)).attribute(inputs, kin.answer)
        assert_close(got.grid_attr, fresh.grid_attr, rtol=0, atol=0)


# ---- 6. inputs that would give wrong maps -------------------------------------------------------


def at_placeholder(kin, inputs, repeat):
    """The inputs with the first placeholder dropped (0) or doubled (2)."""
    ids = inputs["input_ids"][0]
    where = int((ids == kin.model.config.image_token_id).nonzero()[0])
    order = torch.arange(len(ids))
    order = torch.cat([order[:where], order[where : where + 1].repeat(repeat), order[where + 1 :]])
    token_wise = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: v[:, order] if name in token_wise else v for name, v in inputs.items()}


@pytest.mark.parametrize("repeat", [0, 2])
@pytest.mark.parametrize("case", ["usual", "wide", "two"])
def test_another_number_of_placeholders_is_refused(kin, case, repeat):
    inputs = at_placeholder(kin, kin.encode(*pictures_of(kin, case)), repeat)
    with pytest.raises(ValueError, match=r"input_ids hold .*image tokens.*pixel_values"):
        lens(kin).attribute(inputs, kin.answer)


@pytest.mark.parametrize("name", [*QWEN, "PaliGemma", "Gemma3"])
def test_missing_or_wrong_token_types_are_refused(name):
    kin = kin_of(name)
    key = "mm_token_type_ids" if name in QWEN else "token_type_ids"
    inputs = kin.encode(kin.wide_picture)
    without = {k: v for k, v in inputs.items() if k != key}
    for method in (lens(kin), MSEA(kin.model), ARC(kin.model), TokenActivationMap(kin.model)):
        with pytest.raises(ValueError, match=key):
            method.attribute(without, kin.answer)
        with pytest.raises(ValueError, match=key):
            method.attribute(without)
    wrong = [inputs[key].clone(), inputs[key].clone(), 1 - inputs[key]]
    wrong[0][0, -1] = 1
    wrong[1][0, 0] = 1
    if name != "PaliGemma":
        wrong += [inputs[key].roll(1), torch.zeros_like(inputs[key])]
    for values in wrong:
        with pytest.raises(ValueError, match=key):
            lens(kin).attribute({**inputs, key: values}, kin.answer)
    with pytest.raises(ValueError, match=key):
        lens(kin).attribute({**inputs, key: inputs[key][:, :-1]}, kin.answer)


@pytest.mark.parametrize("name", QWEN)
def test_wrong_grids_of_patches_are_refused(name):
    kin = kin_of(name)
    inputs = kin.encode(kin.wide_picture)  # 1, 6, 14 patches
    bad = [[[1, 14, 7]], [[1, 6, 12]], [[2, 6, 14]], [[1, 3, 28]], [[1, 6, 7], [1, 6, 7]], [1, 6]]
    for shapes in bad:
        with pytest.raises(ValueError, match="image_grid_thw"):
            lens(kin).attribute({**inputs, "image_grid_thw": torch.tensor(shapes)}, kin.answer)
    without = {k: v for k, v in inputs.items() if k != "image_grid_thw"}
    with pytest.raises(ValueError, match="image_grid_thw"):
        lens(kin).attribute(without, kin.answer)


def test_wrong_sizes_of_pictures_are_refused():
    kin = kin_of("LlavaNext")
    inputs = kin.encode(kin.wide_picture)
    for sizes in ([[36, 24]], [[12, 36]], [[24, 36], [24, 36]], [24, 36]):
        with pytest.raises(ValueError, match=r"image_sizes|image tokens"):
            lens(kin).attribute({**inputs, "image_sizes": torch.tensor(sizes)}, kin.answer)
    del inputs["image_sizes"]
    with pytest.raises(ValueError, match="image_sizes"):
        lens(kin).attribute(inputs, kin.answer)


@pytest.mark.parametrize("name", [*TILED, "Gemma3", "LlavaNext"])
def test_tiles_that_are_not_square_are_refused(name):
    """16 x 64 pixels have as many patches as 32 x 32: models scramble them in silence."""
    kin = kin_of(name)
    inputs = kin.encode(kin.wide_picture)
    pixels = inputs["pixel_values"]
    side = pixels.shape[-1]
    flat = pixels.reshape(*pixels.shape[:-2], side // 2, side * 2)
    changed = {**inputs, "pixel_values": flat}
    if "pixel_attention_mask" in inputs:
        mask = inputs["pixel_attention_mask"]
        changed["pixel_attention_mask"] = mask.reshape(*mask.shape[:-2], side // 2, side * 2)
    with pytest.raises(ValueError, match="pixel_values"):
        lens(kin).attribute(changed, kin.answer)


def test_a_prompt_that_sees_itself_has_nothing_to_explain():
    kin = kin_of("PaliGemma")
    length = kin.inputs["input_ids"].shape[1]
    for method in (lens(kin), ARC(kin.model, kin.processor), MSEA(kin.model, kin.processor)):
        for explain in ("prompt", "all", [length - 1], [length, length - 2]):
            with pytest.raises(ValueError, match="explain"):
                method.attribute(kin.inputs, kin.answer, explain=explain)
        result = method.attribute(kin.inputs, kin.answer)
        assert len(result.input_tokens) == len(kin.answer)
        assert result.input_tokens == result.output_tokens
        assert result.token_attr.shape == (len(kin.answer), len(kin.answer))


def test_tiles_of_a_blank_picture_are_guessed_with_a_warning():
    kin = kin_of("InternVL")  # the others' prompts tell how tiles lie
    size = (64, 64)
    inputs = kin.encode(Image.new("RGB", size, (90, 120, 30)))
    with pytest.warns(UserWarning, match="pixel_values don't tell how the 4 tiles"):
        result = lens(kin).attribute(inputs, kin.answer)
    assert result.grid_attr[0].shape == (5, 8, 8)
    assert result.grid_attr[0].isfinite().all()


# ---- 7. the original picture --------------------------------------------------------------------


def shown_part(kin, size):
    """(left, upper, width, height) of what the processor lets the model see of a picture."""
    width, height = size
    if kin.name == "Llava":  # the shorter side is brought to the model's, the middle cut out
        side = min(size)
        return (width - side) / 2, (height - side) / 2, side, side
    return 0, 0, width, height


DISCS = [(size, 1.0) for size in ("usual", "wide", "tall", "large", "odd", "high")]


@pytest.mark.parametrize(("size", "scale"), [*DISCS, ("wide", 1.5), ("high", 1.5)])
def test_a_disc_lands_on_itself(kin, size, scale):
    """Its centre of mass, through the processor, the model and `to_image`, within a cell."""
    wide = kin.wide_picture.size
    extra = {"large": (3 * wide[0], 3 * wide[1]), "odd": (90, 50), "high": (47, 113)}
    size = extra[size] if size in extra else pictures_of(kin, size)[0].size
    local = local_of(kin.name)
    method = MSEA(local, kin.processor, scales=(scale,)) if scale != 1 else lens(kin, local)
    left, upper, width, height = shown_part(kin, size)
    plain = gradient(size)
    before = method.attribute(kin.encode(plain), MANY)
    rows, cols = before.grids[0].rows, before.grids[0].cols
    radius = 0.6 * max(width / cols, height / rows)
    for x, y in ((0.72, 0.28), (0.3, 0.66)):
        x, y = left + x * width, upper + y * height
        picture = plain.copy()
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(picture).ellipse(box, fill=(250, 240, 230))
        after = method.attribute(kin.encode(picture), MANY)
        change = (after.grid_attr[0] - before.grid_attr[0]).abs().sum(0, keepdim=True)
        (change,) = dataclasses.replace(after, grid_attr=(change,)).to_image(0, picture)
        assert change.shape == (size[1], size[0])
        total = change.sum()
        at_x = float((change.sum(0) * (torch.arange(size[0]) + 0.5)).sum() / total)
        at_y = float((change.sum(1) * (torch.arange(size[1]) + 0.5)).sum() / total)
        assert abs(at_x - x) < width / cols, (at_x, x)
        assert abs(at_y - y) < height / rows, (at_y, y)


# ---- 8. videos ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWEN)
def test_a_painted_cell_of_a_video_shows_in_the_frames_of_its_step(name):
    kin = kin_of(name)
    inputs, local = video(kin, 6), lens(kin, local_of(name))
    before = local.attribute(inputs, MANY)
    assert before.grid_attr[0].shape == (len(MANY), 6, 3, 4)
    assert before.image_attr[0].shape == (len(MANY), 6, 24, 32)
    assert before.image_map(1).shape == (6, 24, 32)
    assert before.to_image(0, (24, 32), geometry=ImageGeometry.stretched(24, 32)).shape == (
        len(MANY), 6, 24, 32,
    )  # fmt: skip
    assert_close(before.time_profile(0), before.grid_attr[0].mean((2, 3)))
    for cell in range(0, 36, 5):
        step, row, col = cell // 12, cell % 12 // 4, cell % 4
        pixels = inputs["pixel_values_videos"].clone()
        pixels[4 * cell : 4 * cell + 4] += 0.7
        after = local.attribute({**inputs, "pixel_values_videos": pixels}, MANY)
        expected = torch.zeros(6, 3, 4, dtype=torch.bool)
        expected[2 * step : 2 * step + 2, row, col] = True
        assert torch.equal(changes(before, after)[0] > STILL, expected)
        moved = (after.time_profile() - before.time_profile()).abs().amax(0) > STILL
        assert moved.nonzero()[:, 0].tolist() == [2 * step, 2 * step + 1]


@pytest.mark.parametrize("name", QWEN)
def test_a_videos_maps_are_the_full_forwards(name):
    kin = kin_of(name)
    inputs = video(kin)
    own = video_by_hand(kin, inputs, kin.answer, 1.0)
    result = lens(kin).attribute(inputs, kin.answer)
    assert_close(result.grid_attr[0], own.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
    method = MSEA(kin.model, kin.processor, scales=(1.5,))
    larger = video_by_hand(kin, inputs, kin.answer, 1.5)
    result = method.attribute(inputs, kin.answer)
    assert_close(result.grid_attr[0], larger.repeat_interleave(2, 1), atol=2e-5, rtol=1e-4)
    both = MSEA(kin.model, kin.processor, scales=(1.0, 1.5)).attribute(inputs, kin.answer)
    mean = (F.interpolate(own, larger.shape[-2:], mode="bilinear") + larger) / 2
    assert_close(both.grid_attr[0], mean.repeat_interleave(2, 1), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="video"):
        method.attribute(inputs, kin.answer, images=[kin.picture])


@pytest.mark.parametrize("name", QWEN)
def test_images_come_before_videos_whatever_the_prompts_order(name):
    kin = kin_of(name)
    local, still = lens(kin, local_of(name)), kin.wide_picture
    image = local.attribute(kin.encode(still), MANY).grid_attr[0]
    clip = local.attribute(video(kin), MANY).grid_attr[0]
    for order in ("iv", "vi"):
        inputs = mixed(kin, order, image=still)
        result = local.attribute(inputs, MANY)
        assert [tuple(m.shape[1:]) for m in result.grid_attr] == [(3, 7), (4, 3, 4)]
        assert_close(result.grid_attr, (image, clip), atol=1e-5, rtol=1e-5)
        assert result.time_profile(1).shape == (len(MANY), 4)
        with pytest.raises(ValueError, match="still image"):
            result.time_profile(0)
        pair = MSEA(kin.model, kin.processor).attribute(inputs, kin.answer)
        assert [tuple(m.shape[1:]) for m in pair.grid_attr] == [(4, 10), (4, 4, 6)]
        assert len(pair.scales) == 3


def test_wrong_videos_are_refused():
    for name in QWEN:
        kin = kin_of(name)
        inputs, method = video(kin), lens(kin)
        without = {k: v for k, v in inputs.items() if k != "video_grid_thw"}
        with pytest.raises(ValueError, match="video_grid_thw"):
            method.attribute(without, kin.answer)
        wrong = {**inputs, "video_grid_thw": torch.tensor([[1, 6, 8]])}
        with pytest.raises(ValueError, match="video_grid_thw"):
            method.attribute(wrong, kin.answer)
        types = inputs["mm_token_type_ids"]
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            method.attribute({**inputs, "mm_token_type_ids": types.clamp(max=1)}, kin.answer)
        ids = inputs["input_ids"]
        shown = (types[0] == 2).nonzero()[:, 0]
        keep = torch.ones(ids.shape[1], dtype=torch.bool)
        keep[shown[-1]] = False
        token_wise = ("input_ids", "attention_mask", "mm_token_type_ids")
        fewer = {n: v[:, keep] if n in token_wise else v for n, v in inputs.items()}
        with pytest.raises(ValueError, match="input_ids"):
            method.attribute(fewer, kin.answer)


# ---- 9. how the model runs ----------------------------------------------------------------------


def inputs_of_all_kinds(kin):
    yield kin.encode(kin.wide_picture, kin.tall_picture)
    if kin.name in QWEN:
        yield video(kin)


def test_eager_attention_gives_the_same_maps(kin):
    eager = kin_of(kin.name, attn="eager").model
    for inputs in inputs_of_all_kinds(kin):
        one, other = (
            MSEA(model, kin.processor, scales=(1.0, 1.5)).attribute(inputs, kin.answer)
            for model in (kin.model, eager)
        )
        assert_close(one.grid_attr, other.grid_attr, atol=1e-4, rtol=1e-4)
        assert_close(one.token_attr, other.token_attr, atol=1e-4, rtol=1e-4)


def test_bfloat16_gives_much_the_same_maps(kin):
    half = kin_of(kin.name, dtype=torch.bfloat16).model
    for inputs in inputs_of_all_kinds(kin):
        rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        one, other = (
            MSEA(model, kin.processor, scales=(1.0, 1.5)).attribute(given, kin.answer)
            for model, given in ((kin.model, inputs), (half, rounded))
        )
        for maps, coarse in zip(one.grid_attr, other.grid_attr, strict=True):
            assert coarse.dtype == torch.float32
            assert correlation(maps, coarse) > 0.95


def correlation(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


# ---- 10. several scales -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ANY_SIZE)
def test_the_default_scales_are_averaged(name, case):
    kin = kin_of(name)
    pictures = pictures_of(kin, case)
    inputs = kin.encode(*pictures)
    result = MSEA(kin.model, kin.processor).attribute(inputs, kin.answer)
    runs = [by_hand(kin, inputs, pictures, kin.answer, s)[0] for s in (1.0, 1.25, 1.5)]
    for maps, own in zip(result.grid_attr, zip(*runs, strict=True), strict=True):
        finest = tuple(max(m.shape[axis] for m in own) for axis in (1, 2))
        brought = [F.interpolate(m[None], finest, mode="bilinear")[0] for m in own]
        assert_close(maps, torch.stack(brought).mean(0), atol=2e-5, rtol=1e-4)
    assert result.scales[0] == 1.0
    assert result.scales[2] == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize(
    ("case", "scale"),
    [("usual", 1.25), ("usual", 2.0), ("wide", 1.5), ("tall", 1.5), ("two", 1.5)],
)
@pytest.mark.parametrize("name", ONE_SIZE)
def test_models_of_one_size_see_larger_scales_through_windows(name, case, scale):
    kin = kin_of(name)
    pictures = pictures_of(kin, case)
    inputs = kin.encode(*pictures)
    own = windows_by_hand(kin, lens(kin), inputs, pictures, scale)
    result = MSEA(kin.model, kin.processor, scales=(1.0, scale)).attribute(inputs, kin.answer)
    base = lens(kin).attribute(inputs, kin.answer)
    for maps, one, large in zip(result.grid_attr, base.grid_attr, own, strict=True):
        brought = F.interpolate(one[None], large.shape[-2:], mode="bilinear")[0]
        assert_close(maps, (brought + large) / 2, atol=2e-5, rtol=1e-4)
    assert result.scales == pytest.approx((1.0, scale), rel=0.1)


@pytest.mark.parametrize("name", ONE_SIZE)
def test_models_of_one_size_drop_smaller_scales_and_have_no_consistency(name):
    kin = kin_of(name)
    with pytest.warns(UserWarning, match=r"scales \[0\.5\] are dropped: this model"):
        result = MSEA(kin.model, kin.processor, scales=(1.0, 0.5)).attribute(kin.inputs, kin.answer)
    one = lens(kin).attribute(kin.inputs, kin.answer)
    assert_close(result.grid_attr, one.grid_attr, rtol=0, atol=0)
    with pytest.raises(ValueError, match="consistency=True"):
        MSEA(kin.model, kin.processor, consistency=True).attribute(kin.inputs, kin.answer)
    result = MSEA(kin.model, kin.processor).attribute(
        kin.encode(kin.wide_picture, kin.tall_picture), kin.answer
    )
    assert len(result.scales) == 3


def soft(size, spot):
    """A large picture without sharp edges: there is no more in it than in a smaller one."""
    return gradient(size, spot).filter(ImageFilter.GaussianBlur(min(size) / 7))


def test_original_pictures_differ_little_from_the_pixels(kin):
    width, height = kin.wide_picture.size
    size = (3 * width, 3 * height)
    spots = [(0.2, 0.1, 0.5, 0.6), (0.5, 0.5, 0.9, 0.8)]
    boxes = [tuple(f * side for f, side in zip(spot, 2 * size, strict=True)) for spot in spots]
    pictures = [soft(size, box) for box in boxes]
    method = MSEA(kin.model, kin.processor, scales=(1.5,))
    inputs = kin.encode(*pictures)
    anew = method.attribute(inputs, kin.answer, images=pictures)
    pixels = method.attribute(inputs, kin.answer)
    for one, other in zip(anew.grid_attr, pixels.grid_attr, strict=True):
        assert not torch.equal(one, other)
        assert correlation(one, other) > 0.9
    with pytest.raises(ValueError, match="images="):
        method.attribute(inputs, kin.answer, images=pictures[::-1])
    with pytest.raises(ValueError, match="images="):
        method.attribute(inputs, kin.answer, images=[pictures[0], kin.wide_picture])
    with pytest.raises(ValueError, match="images="):
        method.attribute(inputs, kin.answer, images=pictures[0])


@pytest.mark.parametrize("name", ["Llava", "PaliGemma", *QWEN])
def test_original_pictures_go_through_the_processors_own_steps(name):
    """Where the processor itself can be told the size that a scale asks for."""
    kin = kin_of(name)
    width, height = kin.wide_picture.size
    picture = kin.wide_picture.resize((3 * width, 3 * height), Image.Resampling.NEAREST)
    images, inputs = kin.processor.image_processor, kin.encode(picture)
    if name in QWEN:  # 3 x 7 cells times 1.5, to even numbers
        picture, inputs = kin.wide_picture, kin.encode(kin.wide_picture)
        large = picture.resize((8 * 10, 8 * 4), images.resample)
        pixels = images(large, do_resize=False, return_tensors="pt")["pixel_values"]
    else:
        side = {"height": 24, "width": 24}
        sizes = {"size": side}
        if name == "Llava":
            sizes = {"size": {"shortest_edge": 24}, "crop_size": side}
        pixels = images(picture, return_tensors="pt", **sizes)["pixel_values"]
    maps, _ = by_hand(kin, inputs, [picture], kin.answer, 1.5, pixels)
    method = MSEA(kin.model, kin.processor, scales=(1.5,))
    result = method.attribute(inputs, kin.answer, images=picture)
    assert_close(list(result.grid_attr), maps, atol=1e-4, rtol=1e-4)


# ---- 11, 12. every method, and its file ---------------------------------------------------------

METHODS = {
    "ARC": lambda kin: ARC(kin.model, kin.processor),
    "ARC(MSEA)": lambda kin: ARC(MSEA(kin.model, kin.processor)),
    "TAM": lambda kin: TokenActivationMap(kin.model, kin.processor),
}


def test_every_method_on_pictures_and_videos_and_its_file(kin, tmp_path):
    many = [kin.encode(kin.wide_picture, kin.tall_picture)]
    if kin.name in QWEN:
        many += [video(kin), mixed(kin, "vi", image=kin.wide_picture)]
    for inputs in many:
        for make in METHODS.values():
            result = make(kin).attribute(inputs, kin.answer)
            assert result.units == "[0, 1]"
            for maps in (*result.grid_attr, result.token_attr):
                assert maps.isfinite().all()
                assert maps.min() >= 0
                assert maps.max() <= 1
            assert all(maps.max() > 0.01 for maps in result.grid_attr)
            assert result.output_tokens == result.input_tokens[-len(kin.answer) :]
            check_round_trip(result, tmp_path / "result.safetensors")


def check_round_trip(result, path):
    result.save(path)
    loaded = MLLMAttributionResult.load(path)
    for field in dataclasses.fields(result):
        one, other = getattr(result, field.name), getattr(loaded, field.name)
        if isinstance(one, torch.Tensor) or field.name == "grid_attr":
            assert_close(one, other, rtol=0, atol=0)
        else:
            assert one == other, field.name
    assert_close(loaded.image_attr, result.image_attr)
