"""The families of reference models: training computes what their own classes compute."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from captum_mllm.reference import make_scene, render_pil
from captum_mllm.reference.captions import DEFAULT_QUESTION, converse
from captum_mllm.reference.render import draw_masks
from captum_mllm.reference.scenes import SceneBatch
from studies.training.data import IGNORE, encode, make_batch, prefix_ids
from studies.training.evaluate_model import lens, prompt_inputs
from studies.training.families import Way
from studies.training.layouts import Layout, draw_layout, layout_coverage, normalize
from studies.training.models import FAMILIES, build_model, family_of
from studies.training.tokenizer import SPECIAL, build_tokenizer, pieces
from studies.training.train import answer_loss, main, save

NAMES = list(FAMILIES)
SCENES = [make_scene(i) for i in range(3)]
CASES = [
    ("llava", Layout(64, 64)),
    ("qwen2vl", Layout(64, 64)),
    ("qwen2vl", Layout(48, 80)),
    ("internvl", Layout(64, 64)),
    ("internvl", Layout(96, 48, (2, 1))),
    ("internvl", Layout(96, 96, (2, 2))),
]


def tiny(name):
    """A tiny untrained model whose weights are large enough to tell things apart."""
    model = build_model("tiny", name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noisy = parameter + torch.randn_like(parameter) * 0.1
            parameter.copy_(noisy.half().float())
    return model


def own_inputs(family, scenes, layout, processor=None):
    """What the family's processor makes of pictures drawn in a layout."""
    processor = processor or family.build_processor()
    way = Way(layout)
    return prompt_inputs(family, processor, scenes, DEFAULT_QUESTION, way)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_training_loss_is_that_of_the_models_own_forward(name, layout):
    family, model = family_of(name), tiny(name)
    processor = family.build_processor()
    batch = make_batch(0, 3, 0)
    with torch.inference_mode(), family.reading(model, processor, layout):
        inputs = own_inputs(family, batch.scenes.scenes(), layout, processor)
        before, after = family.around_ids()
        image = [model.config.image_token_id] * layout.cells(family.cell)
        head = torch.tensor([*prefix_ids(), *before, *image, *after])
        assert inputs["input_ids"][0, : len(head)].equal(head)
        ids = torch.cat([head.expand(3, -1), batch.ids], 1)
        labels = torch.cat([torch.full((3, len(head)), IGNORE), batch.labels], 1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            whole["mm_token_type_ids"] = (ids == image[0]).int()
        logits = model(**whole).logits
        wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        tiles = inputs["pixel_values"]
        drawn = normalize(draw_layout(batch.scenes, layout).mul(255).round() / 255)
        if name != "qwen2vl":
            torch.testing.assert_close(tiles, drawn.flatten(0, 1), atol=0.06, rtol=0)
            drawn = tiles.view_as(drawn)
        found = answer_loss(model, family, batch, layout, family.features(model, drawn))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [Layout(64, 64), Layout(48, 80), Layout(80, 48)])
def test_qwens_features_are_those_of_its_tower(layout):
    family, model = family_of("qwen2vl"), tiny("qwen2vl")
    inputs = own_inputs(family, SCENES, layout)
    pixels = draw_layout(SceneBatch.of(SCENES), layout).mul(255).round() / 255
    with torch.inference_mode():
        ours = family.features(model, normalize(pixels))
        theirs = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    torch.testing.assert_close(ours.flatten(0, 1), theirs.pooler_output, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_words_have_the_same_ids_in_every_family(name):
    family = family_of(name)
    vocabulary = pieces(family.tokens)
    others = len(SPECIAL) - 1
    assert vocabulary[:others] == pieces()[:others]
    assert vocabulary[others + 1 : len(pieces())] == pieces()[others + 1 :]
    tokenizer = family.build_processor().tokenizer
    assert tokenizer.convert_tokens_to_ids(vocabulary) == list(range(len(vocabulary)))
    text = "an elephant, on the left."
    assert tokenizer(text)["input_ids"] == build_tokenizer()(text)["input_ids"]
    for key, token in family.tokens.items():
        assert getattr(tokenizer, key) == token
        assert tokenizer.convert_tokens_to_ids(token) == family.token_id(token)


@pytest.mark.parametrize("name", NAMES)
def test_training_text_is_what_the_processor_makes_of_a_conversation(name):
    family, scene = family_of(name), make_scene(3)
    processor = family.build_processor()
    talk = converse(scene, "names", second="count")
    text = processor.apply_chat_template(talk.messages(), tokenize=False)
    made = processor(text=[text], images=[render_pil(scene, 112)[0]], return_tensors="pt")
    before, after = family.around_ids()
    image = [family.token_id(next(iter(family.tokens.values())))] * 196
    wanted = [*prefix_ids(), *before, *image, *after, *encode(talk)[0]]
    assert made["input_ids"][0].tolist() == wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_of_the_native_size_keeps_its_pixels(name):
    family = family_of(name)
    pixels = draw_layout(SceneBatch.of(SCENES), Layout())
    wanted = normalize(pixels.mul(255).round() / 255)
    processor = family.build_processor()
    picture = render_pil(SCENES[0], 112)[0]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], tokenize=False
    )
    made = processor(text=[text], images=[picture], return_tensors="pt")
    if name == "qwen2vl":
        assert made["image_grid_thw"].tolist() == [[1, 28, 28]]
        first = made["pixel_values"][0].view(3, 2, 4, 4)[:, 0]
        torch.testing.assert_close(first, wanted[0, 0, :, :4, :4], atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(made["pixel_values"], wanted[0], atol=1e-4, rtol=0)


def test_internvl_cuts_larger_pictures_by_itself_as_the_ways_of_evaluation_do():
    family = family_of("internvl")
    processor = family.build_processor()
    layouts = {(224, 224): (2, 2), (112, 224): (1, 2), (224, 112): (2, 1), (112, 112): (1, 1)}
    for size, grid in layouts.items():
        layout = Layout(*size, grid)
        made = processor(
            text=["<IMG_CONTEXT>"], images=[render_pil(SCENES[0], size)[0]], return_tensors="pt"
        )
        assert len(made["pixel_values"]) == layout.tiles
        ours = own_inputs(family, SCENES[:1], layout, processor)
        torch.testing.assert_close(ours["pixel_values"], made["pixel_values"])
        ids = made["input_ids"]
        assert (ids == family.token_id("<IMG_CONTEXT>")).sum() == layout.cells(family.cell)


def test_cells_follow_the_tiles_and_the_thumbnail_comes_last():
    batch = SceneBatch.of(SCENES)
    layout = Layout(96, 64, (3, 2))
    coverage = layout_coverage(batch, layout, 8)
    assert coverage.shape == (3, 4, layout.cells(8)) == (3, 4, 7 * 16)
    masks = draw_masks(batch, (96, 64)).float()
    wanted = F.avg_pool2d(masks[:, :, 32:64, 32:], 8).flatten(2)  # row 1, column 1: tile 3
    torch.testing.assert_close(coverage[:, :, 3 * 16 : 4 * 16], wanted)
    whole = F.avg_pool2d(draw_masks(batch, (32, 32)).float(), 8).flatten(2)
    torch.testing.assert_close(coverage[:, :, -16:], whole)
    pixels = draw_layout(batch, layout)
    torch.testing.assert_close(
        pixels[:, 3], draw_layout(batch, Layout(96, 64))[:, 0, :, 32:64, 32:]
    )


def test_a_faint_thumbnail_leaves_the_tiles_alone():
    batch = SceneBatch.of(SCENES)
    plain = draw_layout(batch, Layout(96, 96, (2, 2)))
    faint = draw_layout(batch, Layout(96, 96, (2, 2), thumbnail=6))
    torch.testing.assert_close(faint[:, :-1], plain[:, :-1])
    assert faint[:, -1].std() < plain[:, -1].std()


def test_a_scene_is_stretched_to_pictures_that_are_not_square():
    batch = SceneBatch.of(SCENES)
    wide, square = draw_masks(batch, (48, 96)), draw_masks(batch, (96, 96))
    assert wide.shape == (3, 4, 48, 96)
    pooled = F.avg_pool2d(square.float(), (2, 1))
    assert ((pooled > 0.5) == wide).float().mean() > 0.99
    picture, masks = render_pil(SCENES[0], (48, 96))
    assert picture.size == (96, 48)
    assert masks.shape[1:] == (48, 96)


@pytest.mark.parametrize("name", ["qwen2vl", "internvl"])
def test_a_tiny_run_learns_saves_and_can_be_loaded(name, tmp_path):
    family = family_of(name)
    argv = ["--family", name, "--out", str(tmp_path), "--tiny", "--device", "cpu"]
    figures = main([*argv, "--rate", "0.02"])
    stage = figures["training"]["answers"]
    assert stage["last_loss"] < stage["first_loss"] - 0.1
    assert figures["evaluation"]["sha256"] == figures["sha256"]
    card = (tmp_path / "README.md").read_text()
    assert f"{family.kind}ForConditionalGeneration" in card
    assert f"--family {name}" in card
    assert json.loads((tmp_path / "figures.json").read_text()) == figures


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_the_model(name, tmp_path):
    family, model = family_of(name), tiny(name)
    save(model, family, "tiny", tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = family.load_processor(tmp_path)
    layout = Layout(96, 96, (2, 2)) if name == "internvl" else Layout(64, 64)
    found = []
    for either in (loaded.eval(), model):
        with torch.inference_mode(), family.reading(either, processor, layout):
            found.append(lens(either, own_inputs(family, SCENES, layout, processor)))
    torch.testing.assert_close(*found)
    assert found[0].shape == (3, 64, layout.cells(8))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("name", NAMES)
def test_the_layouts_of_training_hold_what_is_evaluated(name):
    family = family_of(name)
    trained = {(x.height, x.width, x.grid) for x in family.layouts}
    for way in family.ways.values():
        assert (way.layout.height, way.layout.width, way.layout.grid) in trained
    for layout in family.layouts:
        assert 0 < layout.share <= 1
        assert layout.height % (layout.grid[0] * 8) == layout.width % (layout.grid[1] * 8) == 0


def test_an_unknown_name_or_size_says_what_there_is():
    with pytest.raises(ValueError, match="internvl"):
        build_model("tiny", "gpt")
    with pytest.raises(ValueError, match="small"):
        build_model("huge", "qwen2vl")
