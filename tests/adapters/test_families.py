"""The tiny models of `families` are what the tests of the adapters take them for."""

import copy
import functools
import json

import pytest
import torch

from captum_mllm.adapters.image_only import image_only_processor, load_image_only
from tests.oracle.families import NAMES, PATCH, family, patchify, video, without_mixing

QWEN = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
IMAGE_ONLY = (*QWEN, "InternVL", "SmolVLM")
COUNTS = {  # image tokens of the usual picture, the wide one, the tall one
    "Llava": (16, 16, 16),
    # The base picture of 4 x 4; then rows of the tiles, each with a newline, less the padding:
    # 8 x (8 + 1); 6 x (8 + 1), where 8 rows would be padded; 8 x (2 + 1), where 4 columns would.
    "LlavaNext": (16 + 72, 16 + 54, 16 + 24),
    "Qwen2VL": (4 * 4, 3 * 7, 5 * 3),
    "Qwen2_5_VL": (4 * 4, 3 * 7, 5 * 3),
    "Qwen3VL": (4 * 4, 3 * 7, 5 * 3),
    "InternVL": (16, (2 + 1) * 16, (3 + 1) * 16),  # tiles and a thumbnail
    "Idefics3": ((4 + 1) * 16, (2 + 1) * 16, (2 + 1) * 16),  # tiles and the whole picture
    "SmolVLM": ((4 + 1) * 16, (2 + 1) * 16, (2 + 1) * 16),
    "PaliGemma": (16, 16, 16),
    "Gemma3": (16, 16, 16),
}
cached_family = functools.cache(family)
pytestmark = pytest.mark.filterwarnings(
    # transformers 5.5's InternVL and 5.23's PaliGemma processors, see `FamilySubject.encode`.
    "ignore:__array_:DeprecationWarning"
)


@pytest.fixture(params=NAMES)
def kin(request):
    return cached_family(request.param)


def is_image(kin, inputs):
    return inputs["input_ids"][0] == kin.model.config.image_token_id


@torch.no_grad()
def states(kin, inputs, model=None):
    """Final hidden states of every position."""
    return (model or kin.model).model(**inputs).last_hidden_state[0]


def test_every_shape_of_picture_runs_and_has_its_number_of_tokens(kin):
    usual, wide, tall = COUNTS[kin.name]
    cases = [
        ([kin.picture], usual),
        ([kin.other_picture], usual),
        ([kin.wide_picture], wide),
        ([kin.tall_picture], tall),
        ([kin.picture, kin.wide_picture], usual + wide),
        ([kin.tall_picture, kin.picture, kin.wide_picture], tall + usual + wide),
    ]
    for pictures, count in cases:
        inputs = kin.encode(*pictures)
        assert all(isinstance(value, torch.Tensor) for value in inputs.values())
        assert "labels" not in inputs
        assert is_image(kin, inputs).sum() == count
        assert not is_image(kin, inputs)[0]  # something is in front of the picture
        with torch.no_grad():
            assert kin.model(**inputs).logits.isfinite().all()


def test_a_wide_picture_is_wide(kin):
    for picture, wider in ((kin.wide_picture, True), (kin.tall_picture, False)):
        assert (picture.width > picture.height) is wider
    assert kin.picture.size == kin.other_picture.size


def test_two_pictures_give_different_states(kin):
    one, other = kin.inputs, kin.encode(kin.other_picture)
    torch.testing.assert_close(one["input_ids"], other["input_ids"])
    change = (states(kin, one) - states(kin, other)).abs().amax(-1)
    assert (change[is_image(kin, one)] > 0.2).all()
    assert change[-1] > 0.01  # what is said depends on the picture


def test_answer_has_maps_and_a_word_of_the_prompt(kin):
    tokenizer, inputs = kin.processor.tokenizer, kin.inputs
    assert kin.answer.shape == (5,)
    assert set(kin.answer.tolist()).isdisjoint([*tokenizer.all_special_ids, tokenizer.unk_token_id])
    assert set(kin.answer.tolist()) & set(inputs["input_ids"][0].tolist())
    assert len(set(kin.answer.tolist())) == 4
    seen = states(kin, inputs)[is_image(kin, inputs)]
    with torch.no_grad():
        maps = torch.relu(seen @ kin.model.get_output_embeddings().weight[kin.answer].T)
    assert ((maps > 0.01).sum(0) >= 3).all()


def teacher_forced(inputs, said):
    """The inputs with an answer after them, side inputs too."""
    count = len(said)
    longer = inputs | {"input_ids": torch.cat([inputs["input_ids"], said[None]], 1)}
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], inputs[name].new_full((1, count), fill)], 1)
    return longer


@pytest.mark.parametrize("picture", ["picture", "wide_picture"])
def test_teacher_forcing_equals_generation(kin, picture):
    inputs = kin.encode(getattr(kin, picture))
    length = inputs["input_ids"].shape[1]
    out = kin.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=5,
        suppress_tokens=list(range(5, 22)) + kin.processor.tokenizer.all_special_ids,
        return_dict_in_generate=True,
        output_logits=True,
    )
    said = out.sequences[0, length:]
    assert len(said) == 5
    longer = teacher_forced(inputs, said)
    if kin.name == "PaliGemma":  # there, a type of 1 is an answer's token
        longer["token_type_ids"][:, length:] = 1
    with torch.no_grad():
        logits = kin.model(**longer).logits[0, length - 1 : -1]
    torch.testing.assert_close(logits, torch.cat(out.logits), atol=1e-5, rtol=1e-5)


def a_patch_of_every_cell(kin, inputs):
    """Per cell of the picture: its place among the image tokens, and pixels with it changed."""
    pixels = inputs["pixel_values"]
    if kin.name in QWEN:  # the four patches of a cell follow each other
        for cell in range(len(pixels) // 4):
            changed = pixels.clone()
            changed[4 * cell + 1] += 1
            yield cell, changed
        return
    height, width = pixels.shape[-2:]
    side = 4  # cells along a tile, in every family here
    for tile in range(pixels.numel() // (3 * height * width)):
        for cell in range(side * side):
            row, column = divmod(cell, side)
            place = 16 * tile + cell
            if kin.name == "LlavaNext" and tile:  # 2 x 2 tiles in one grid of rows of 8 + 1
                place = 16 + ((tile - 1) // 2 * 4 + row) * 9 + (tile - 1) % 2 * 4 + column
            y, x = row * height // side, column * width // side
            changed = pixels.clone()
            changed.view(-1, 3, height, width)[tile, :, y : y + PATCH, x : x + PATCH] += 1
            yield place, changed


def test_without_mixing_a_patch_is_felt_at_its_own_cell_alone(kin):
    local = without_mixing(kin.model)
    inputs = kin.inputs if kin.name == "LlavaNext" else kin.encode(kin.wide_picture)
    positions = is_image(kin, inputs).nonzero()[:, 0]
    before, before_mixed = states(kin, inputs, local), states(kin, inputs)
    places = []
    for place, pixels in list(a_patch_of_every_cell(kin, inputs))[::3]:
        after = states(kin, {**inputs, "pixel_values": pixels}, local)
        changes = (after - before).abs().amax(-1)
        assert changes[positions[place]] > 1e-3
        changes[positions[place]] = 0
        assert changes.max() < 1e-5
        places.append(place)
    assert len(set(places)) == len(places) >= 5
    mixed = states(kin, {**inputs, "pixel_values": pixels}) - before_mixed
    assert (mixed.abs().amax(-1) > 1e-3).sum() > 1  # as they are, the models do mix


def test_without_mixing_leaves_its_model_alone_and_needs_something_to_zero(kin):
    before = {name: value.clone() for name, value in kin.model.state_dict().items()}
    local = without_mixing(kin.model)
    for name, value in kin.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    zeroed = [name for name, value in local.state_dict().items() if not value.any()]
    layers = 3 + 3 if kin.name == "Llava" else 2 + 2
    assert len([name for name in zeroed if name.endswith("weight")]) == layers
    broken = copy.deepcopy(kin.model)
    for layer in broken.get_decoder().layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(AssertionError, match="no output projection of attention"):
        without_mixing(broken)


def test_weights_follow_the_seed(kin):
    again, other = family(kin.name), family(kin.name, seed=1)
    for name, value in kin.model.state_dict().items():
        assert value.any(), name
        torch.testing.assert_close(value, again.model.state_dict()[name], rtol=0, atol=0)
        if value.is_floating_point():
            assert not value.equal(other.model.state_dict()[name]), name


def test_attention_and_dtype_can_be_chosen(kin):
    eager = family(kin.name, attn="eager")
    assert eager.model.get_decoder().config._attn_implementation == "eager"
    torch.testing.assert_close(
        states(eager, kin.inputs), states(kin, kin.inputs), atol=1e-5, rtol=1e-5
    )
    double = family(kin.name, dtype=torch.float64)
    torch.testing.assert_close(
        states(double, kin.inputs), states(kin, kin.inputs).double(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", QWEN)
def test_rows_of_pixels_are_the_image_processors(name):
    kin = cached_family(name)
    images = kin.processor.image_processor
    made = images(kin.wide_picture, return_tensors="pt")["pixel_values"]
    still = images(
        kin.wide_picture, return_tensors="pt", patch_size=1, merge_size=1, temporal_patch_size=1
    )["pixel_values"].T.reshape(3, kin.wide_picture.height, kin.wide_picture.width)
    torch.testing.assert_close(patchify(torch.stack([still, still])), made)


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("frames", [2, 4])
def test_video(name, frames):
    kin = cached_family(name)
    inputs = video(kin, frames)
    kinds = inputs["mm_token_type_ids"]
    assert (kinds == 2).sum() == inputs["video_grid_thw"].prod() // 4 == frames // 2 * 12
    assert not (kinds == 1).any()
    before = states(kin, inputs)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)
    change = (states(kin, inputs) - before).abs().amax(-1)
    assert (change[kinds[0] == 2] > 0.1).all()
    local = without_mixing(kin.model)
    before = states(kin, inputs, local)
    inputs["pixel_values_videos"][4 * 5 + 2] += 1  # a patch of the first step's sixth cell
    changed = ((states(kin, inputs, local) - before).abs().amax(-1) > 1e-4).nonzero()[:, 0]
    assert changed.tolist() == [kinds[0].nonzero()[5, 0].item()]


def test_parts_that_the_families_are_known_for_count():
    """Windows of Qwen2.5-VL's first layer; features that Qwen3-VL adds in deeper layers."""
    windowed = cached_family("Qwen2_5_VL")
    unwindowed = copy.deepcopy(windowed.model)
    unwindowed.model.visual.fullatt_block_indexes = [0, 1]
    inputs = windowed.encode(windowed.wide_picture)
    change = states(windowed, inputs, unwindowed) - states(windowed, inputs)
    assert change.abs().max() > 0.01

    deep = cached_family("Qwen3VL")
    shallow = copy.deepcopy(deep.model)
    for merger in shallow.model.visual.deepstack_merger_list:
        for parameter in merger.parameters():
            torch.nn.init.zeros_(parameter)
    change = states(deep, deep.inputs, shallow) - states(deep, deep.inputs)
    assert change.abs().max() > 0.01


TEMPLATE = "{% for m in messages %}USER: {{ m['content'] }}{% endfor %}"


def as_full_processor(folder, processor):
    """As where torchvision is: one file, which has a video processor too, `...Fast` classes."""
    processor.save_pretrained(folder)
    file = folder / "processor_config.json"
    saved = json.loads(file.read_text())
    kind = saved["image_processor"]["image_processor_type"].removesuffix("Pil")
    saved["image_processor"]["image_processor_type"] = kind
    saved["video_processor"] = {"video_processor_type": "SomeVideoProcessor", "fps": 2}
    file.write_text(json.dumps(saved))


def as_older_checkpoint(folder, processor):
    """As most checkpoints are: the parts' own files."""
    processor.save_pretrained(folder)
    file = folder / "processor_config.json"
    saved = json.loads(file.read_text())
    images = saved.pop("image_processor") | {"processor_class": saved["processor_class"]}
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil") + "Fast"
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    file.write_text(json.dumps(saved))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def as_saved(folder, processor):
    processor.save_pretrained(folder)


@pytest.mark.parametrize("save", [as_saved, as_full_processor, as_older_checkpoint])
@pytest.mark.parametrize("name", IMAGE_ONLY)
def test_image_only_processors_round_trip(name, save, tmp_path):
    kin = cached_family(name)
    processor = copy.deepcopy(kin.processor)
    processor.chat_template = TEMPLATE
    save(tmp_path, processor)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == f"{name}Processor"  # for AutoProcessor elsewhere
    loaded = load_image_only(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.chat_template == TEMPLATE
    asked = {"images": [kin.wide_picture], "text": kin.prompt, "return_tensors": "pt"}
    one, other = dict(processor(**asked)), dict(loaded(**asked))
    assert one.keys() == other.keys()
    for key, value in one.items():
        # Where torchvision is there, the loaded one resizes by it.
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5)
    assert ("mm_token_type_ids" in one) == (name in QWEN)
    talk = [{"role": "user", "content": kin.placeholder + " what is here ?"}]
    assert loaded.apply_chat_template(talk) == f"USER: {kin.placeholder} what is here ?"
    assert set(one) <= set(loaded.model_input_names)


def test_image_only_processors_say_what_they_cannot_do(tmp_path):
    kin = cached_family("Qwen3VL")
    parts = kin.processor.image_processor, kin.processor.tokenizer
    with pytest.raises(ValueError, match=r"'Llava' is not one of Qwen2VL, .* need torchvision"):
        image_only_processor("Llava", *parts)
    with pytest.raises(ValueError, match=r"install torchvision and use Qwen3VLProcessor"):
        kin.processor(text="<|video_pad|>", videos=[torch.zeros(2, 3, 16, 16)])
    with pytest.raises(FileNotFoundError, match=r"none such' is not a folder"):
        load_image_only(tmp_path / "none such")
    with pytest.raises(ValueError, match="holds no processor"):
        load_image_only(tmp_path)
    cached_family("Gemma3").processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds Gemma3Processor.*torchvision"):
        load_image_only(tmp_path)


def test_without_a_processors_name_the_models_own_type_decides(tmp_path):
    kin = cached_family("Qwen2VL")
    kin.processor.save_pretrained(tmp_path)
    for file in ("processor_config.json", "tokenizer_config.json"):
        saved = json.loads((tmp_path / file).read_text())
        saved.pop("processor_class", None)
        (tmp_path / file).write_text(json.dumps(saved))
    kin.model.config.save_pretrained(tmp_path)
    assert type(load_image_only(tmp_path)) is type(kin.processor)
