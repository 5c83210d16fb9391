"""One contract for every family, held through the public attributors alone.

What is expected comes from `contract_tools`: the layout facts of each family, and full forwards
written by hand. No adapter is asked.
"""

import copy

import pytest
import torch
from contract_tools import (
    ANY_SIZE,
    CASES,
    MANY,
    QWEN,
    TILED,
    by_hand,
    frame_shape,
    kin_of,
    local_of,
    painted,
    pictures_of,
    visual_ids,
)
from families import NAMES
from PIL import Image
from test_attr_hygiene import check_same, state
from torch.testing import assert_close

from captum_mllm import ARC, MSEA, LogitLens, TokenActivationMap

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
    every = 7 if case == "two" else 5 if kin.name == "LlavaNext" else 3
    for label, changed, image, mask in painted(kin, inputs, pictures, every):
        found = changes(before, local.attribute(changed, MANY))
        seen[image] |= mask
        for n, own in enumerate(found):
            expected = mask if n == image else torch.zeros_like(own, dtype=torch.bool)
            assert torch.equal(own > STILL, expected), (label, image, n)
    assert all(int(mask.sum()) >= mask.numel() // 8 for mask in seen)


def gradient(size, spot=None, level=250):
    """A picture of a faint slope, which tells tiles apart, with a bright spot (box) on it."""
    picture = Image.new("RGB", size)
    picture.putdata(
        [
            (60 + 40 * x // size[0], 60 + 40 * y // size[1], 80)
            for y in range(size[1])
            for x in range(size[0])
        ]
    )
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


@pytest.mark.parametrize("name", TILED)
def test_tiles_of_a_blank_picture_are_guessed_with_a_warning(name):
    kin = kin_of(name)
    size = (64, 64)
    inputs = kin.encode(Image.new("RGB", size, (90, 120, 30)))
    with pytest.warns(UserWarning, match="pixel_values don't tell how the 4 tiles"):
        result = lens(kin).attribute(inputs, kin.answer)
    assert result.grid_attr[0].shape == (5, 8, 8)
    assert result.grid_attr[0].isfinite().all()
