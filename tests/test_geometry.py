"""Where the canvas lies in the picture: against the real processors, and through to_image."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from captum_mllm import ImageGeometry, LogitLens
from captum_mllm.adapters.processors import read_preprocessing
from captum_mllm.functional import find_layout, join_tiles, patches_to_frames
from captum_mllm.geometry import ImageGrid, Preprocessing, maps_to_picture
from captum_mllm.result import MLLMAttributionResult
from tests.oracle import tiny
from tests.oracle.published import ARC, MSEA

SIZES = [(120, 360), (360, 120), (200, 200), (97, 251), (251, 97), (333, 334), (61, 47)]
NORM = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0], "do_rescale": False}


def processors(side=112):
    square = {"height": side, "width": side}
    edge = {"shortest_edge": side}
    return {
        "crop": CLIPImageProcessor(size=edge, crop_size=square, **NORM),
        "loose crop": CLIPImageProcessor(size={"shortest_edge": 140}, crop_size=square, **NORM),
        "padding crop": CLIPImageProcessor(size={"shortest_edge": 62}, crop_size=square, **NORM),
        "wide crop": CLIPImageProcessor(size=edge, crop_size={"height": 56, "width": 168}, **NORM),
        "stretch": CLIPImageProcessor(size=square, do_center_crop=False, **NORM),
        "stretch wide": CLIPImageProcessor(
            size={"height": 56, "width": 168}, do_center_crop=False, **NORM
        ),
        "stretch, crop": CLIPImageProcessor(
            size={"height": 140, "width": 180}, crop_size=square, **NORM
        ),
        "shortest edge": CLIPImageProcessor(size=edge, do_center_crop=False, **NORM),
        "crop only": CLIPImageProcessor(do_resize=False, crop_size=square, **NORM),
        "pad, crop": LlavaImageProcessorPil(do_pad=True, size=edge, crop_size=square, **NORM),
        "pad": LlavaImageProcessorPil(do_pad=True, size=square, do_center_crop=False, **NORM),
        "no pad": LlavaImageProcessorPil(do_pad=False, size=edge, crop_size=square, **NORM),
        "stretch, SigLIP": SiglipImageProcessorPil(size=square, **NORM),
        "stretch, Gemma 3": Gemma3ImageProcessorPil(size=square, **NORM),
    }


NAMES = list(processors())


@pytest.fixture(scope="module")
def by_name():
    return processors()


def seen(processor, array):
    """What the model would see of a picture (height, width, 3), without normalisation."""
    return processor(images=Image.fromarray(array), return_tensors="pt")["pixel_values"][0]


def ramp(height, width):
    """Red grows along x, green along y, blue marks the picture itself."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[..., 0] = np.linspace(0, 250, width).round()[None, :]
    picture[..., 1] = np.linspace(0, 250, height).round()[:, None]
    picture[..., 2] = 255
    return picture


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_geometry_is_what_the_processor_does(by_name, name, size):
    """Coordinates read off a ramp picture are those of the box, within rounding of a pixel."""
    processor, (height, width) = by_name[name], size
    rule = read_preprocessing(processor)
    pixels = seen(processor, ramp(height, width))
    assert pixels.shape[1:] == rule.canvas(height, width)
    rule.check(height, width, ImageGrid(1, 1, *rule.canvas(height, width)))
    assert_ramp_lies_in(pixels, rule.geometry(height, width).box, size)


def assert_ramp_lies_in(pixels, box, size):
    """Where a ramp picture of that size lies on the canvas, read off its colours (0 to 250)."""
    (height, width), (left, upper, right, lower) = size, box
    rows, cols = pixels.shape[1:]
    x = left + (torch.arange(cols) + 0.5) * (right - left) / cols
    y = upper + (torch.arange(rows) + 0.5) * (lower - upper) / rows
    step_x, step_y = (right - left) / cols, (lower - upper) / rows
    # Away from the picture's edge, where resampling mixes in what lies outside.
    inside_x = (x > 2 * step_x + 2) & (x < width - 2 * step_x - 2)
    inside_y = (y > 2 * step_y + 2) & (y < height - 2 * step_y - 2)
    inside = inside_y[:, None] & inside_x[None, :]
    assert inside.any()
    assert float(pixels[2][inside].min()) >= 250
    seen_x = (pixels[0] / 250 * (width - 1) + 0.5)[inside]
    seen_y = (pixels[1] / 250 * (height - 1) + 0.5)[inside]
    expected_x = x[None, :].expand(rows, cols)[inside]
    expected_y = y[:, None].expand(rows, cols)[inside]
    # A level is up to width / 250 pixels wide.
    assert float((seen_x - expected_x).abs().max()) < 0.51 * step_x + width / 250 + 0.1
    assert float((seen_y - expected_y).abs().max()) < 0.51 * step_y + height / 250 + 0.1
    assert abs(float((seen_x - expected_x).mean())) < 0.25 * step_x + 0.3
    assert abs(float((seen_y - expected_y).mean())) < 0.25 * step_y + 0.3


def disc(height, width, centre, radius):
    y, x = np.mgrid[:height, :width]
    return (y + 0.5 - centre[0]) ** 2 + (x + 0.5 - centre[1]) ** 2 <= radius**2


def result_of(grid_map, canvas, preprocessing):
    rows, cols = grid_map.shape
    one = torch.zeros(1, 1)
    return MLLMAttributionResult(
        grid_attr=(grid_map[None].float(),),
        token_attr=one,
        input_tokens=("a",),
        output_tokens=("a",),
        output_ids=torch.tensor([5]),
        output_probs=torch.ones(1),
        units="logits",
        grids=(ImageGrid(rows, cols, *canvas),),
        preprocessing=preprocessing,
    )


def disc_result(processor, mask, preprocessing, cell=4):
    """The disc as the model saw it, averaged over the cells of its grid."""
    white = mask.astype(np.uint8)[..., None].repeat(3, 2) * 255
    pixels = seen(processor, white)[0] / 255
    cells = torch.nn.functional.avg_pool2d(pixels[None, None], cell)[0, 0]
    return result_of(cells, tuple(pixels.shape), preprocessing)


def centroid(weights):
    weights = torch.as_tensor(weights).double()
    rows, cols = (torch.arange(n, dtype=torch.float64) + 0.5 for n in weights.shape)
    y, x = rows @ weights.sum(1) / weights.sum(), cols @ weights.sum(0) / weights.sum()
    return float(y), float(x)


DISCS = {
    "3:1": ((120, 360), (48.0, 212.0)),
    "1:3": ((360, 120), (148.0, 72.0)),
    "odd": ((151, 413), (80.5, 251.0)),
}


@pytest.mark.parametrize("shape", DISCS)
@pytest.mark.parametrize("name", NAMES)
def test_a_disc_lands_on_itself(by_name, name, shape):
    size, centre = DISCS[shape]
    processor, radius = by_name[name], 22
    if name == "wide crop" and shape == "1:3":
        centre = (176.0, 72.0)
    if name == "crop only":
        centre, radius = (size[0] / 2 + 7, size[1] / 2 - 5), 16
    mask = disc(*size, centre, radius)
    result = disc_result(processor, mask, read_preprocessing(processor))
    placed = result.to_image(0, size)[0]
    assert placed.shape == size
    found = centroid(placed)
    assert found == pytest.approx(centre, abs=2.0)
    hit = (placed > 0.5 * placed.max()).numpy()
    union = (hit | mask).sum()
    assert (hit & mask).sum() / union > 0.7
    # Stretching the map over the whole picture would put it elsewhere (unless that is right).
    if "stretch" not in name and shape != "odd" and name != "shortest edge":
        stretched = result.to_image(0, size, geometry=ImageGeometry.stretched(*size))[0]
        assert centroid(stretched) != pytest.approx(centre, abs=4.0)


def test_nothing_outside_what_the_model_saw(by_name):
    size = (120, 360)
    placed = result_of(
        torch.ones(28, 28), (112, 112), read_preprocessing(by_name["crop"])
    ).to_image(0, size)[0]
    torch.testing.assert_close(placed[:, 120:240], torch.ones(120, 120))
    assert not placed[:, :120].any()
    assert not placed[:, 240:].any()


def test_size_as_a_picture(by_name):
    result = result_of(torch.rand(28, 28), (112, 112), read_preprocessing(by_name["crop"]))
    picture = Image.new("RGB", (360, 120))
    assert torch.equal(result.to_image(0, picture), result.to_image(0, (120, 360)))
    assert result.to_image(-1, [120, 360]).shape == (1, 120, 360)


def test_maps_to_picture_equals_a_loop():
    maps = torch.rand(2, 3, 4, dtype=torch.float64)
    geometry = ImageGeometry((2.0, -1.0, 8.0, 5.0))
    got = maps_to_picture(maps, geometry, (6, 10))
    for y in range(6):
        for x in range(10):
            v, u = (y + 0.5 + 1) / 6, (x + 0.5 - 2) / 6
            if not (0 <= v <= 1 and 0 <= u <= 1):
                assert not got[:, y, x].any()
                continue
            gy, gx = min(max(v * 3 - 0.5, 0), 2), min(max(u * 4 - 0.5, 0), 3)
            y0, x0 = int(gy), int(gx)
            y1, x1 = min(y0 + 1, 2), min(x0 + 1, 3)
            fy, fx = gy - y0, gx - x0
            expected = (
                (1 - fy) * ((1 - fx) * maps[:, y0, x0] + fx * maps[:, y0, x1])
                + fy * ((1 - fx) * maps[:, y1, x0] + fx * maps[:, y1, x1])
            )  # fmt: skip
            torch.testing.assert_close(got[:, y, x], expected)


# ---- through the attributors ----------------------------------------------------------------


def test_the_attributors_processor_tells_the_geometry(subject):
    bare = LogitLens(subject.model).attribute(subject.inputs, subject.answer)
    for make in (LogitLens, MSEA, ARC):
        named = make(subject.model, subject.processor).attribute(subject.inputs, subject.answer)
        placed = named.to_image(0, subject.picture)
        assert placed.shape == (len(subject.answer), subject.picture.height, subject.picture.width)
    late = bare.to_image(0, subject.picture, processor=subject.processor)
    lens = LogitLens(subject.model, subject.processor)
    named = lens.attribute(subject.inputs, subject.answer)
    assert torch.equal(late, named.to_image(0, subject.picture))


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(120, 40), (40, 120)], ids=str)
def test_per_call_overrides_need_a_geometry(model, answer, crop, size):
    processor = tiny.tiny_processor(center_crop=crop)
    picture = tiny.random_picture(0, size)
    prompt = "USER: <image> what is here"
    wide = processor(
        images=picture, text=prompt, return_tensors="pt", do_center_crop=False,
        size={"height": 16, "width": 48},
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"pixel_values are 16 x 48 pixels, but .* make 16 x 16"):
        result = LogitLens(model, processor).attribute(wide, answer)
    with pytest.raises(ValueError, match=r"(?s)size .*canvas of.*\(16, 48\).*geometry="):
        result.to_image(0, picture)
    geometry = ImageGeometry.stretched(picture.height, picture.width)
    placed = result.to_image(0, picture, geometry=geometry)
    assert placed.shape == (5, size[1], size[0])
    assert float(placed.min(0).values.max()) > 0


def test_without_processor_both_ways_out_are_named(model, inputs, answer):
    result = LogitLens(model).attribute(inputs, answer)
    with pytest.raises(ValueError, match=r"(?s)needs a processor.*processor=.*geometry="):
        result.to_image(0, (40, 40))


@pytest.mark.parametrize("size", [(0, 5), (5,), (1, 2, 3), (5, -1)], ids=str)
def test_sizes_that_are_none(model, inputs, answer, size):
    result = LogitLens(model).attribute(inputs, answer)
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        result.to_image(0, size, geometry=ImageGeometry.stretched(4, 4))


def test_no_such_image(model, processor, inputs, answer):
    result = LogitLens(model, processor).attribute(inputs, answer)
    for image in (1, -2):
        with pytest.raises(IndexError, match=r"image .* out of range: there are 1 images"):
            result.to_image(image, (40, 40))


@pytest.mark.parametrize(
    "box",
    [
        (0.0, 0.0, 0.0, 1.0),
        (0.0, 0.0, 1.0, 0.0),
        (2.0, 0.0, 1.0, 1.0),
        (0.0, 0.0, float("nan"), 1.0),
        (0.0, 0.0, float("inf"), 1.0),
    ],
    ids=str,
)
def test_empty_boxes(box):
    with pytest.raises(ValueError, match=r"geometry box must be \(left, upper, right, lower\)"):
        ImageGeometry(box)


@pytest.mark.parametrize("size", [None, {}, {"shortest_edge": 5}, {"height": 5}], ids=str)
def test_crops_that_cannot_be_undone(size):
    processor = CLIPImageProcessor()
    processor.crop_size = size
    with pytest.raises(ValueError, match=r"crops to .*, which to_image can't undo.*geometry="):
        read_preprocessing(processor)


def test_processors_that_cannot_be_undone():
    with pytest.raises(ValueError, match=r"which to_image can't undo.*geometry="):
        read_preprocessing(
            CLIPImageProcessor(size={"shortest_edge": 10, "longest_edge": 20}, do_center_crop=False)
        )
    with pytest.raises(ValueError, match=r"must have an image processor, got object"):
        read_preprocessing(object())


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_json(by_name, name):
    import json

    rule = read_preprocessing(by_name[name])
    assert Preprocessing.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


# ---- families that show the whole picture ---------------------------------------------------

QWEN = {
    "Qwen's own sizes": {},
    "tiny": {"patch_size": 4, "size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}},
    "wide range": {"patch_size": 7, "size": {"shortest_edge": 1, "longest_edge": 10**9}},
}


def canvas_of(processor, size):
    """The canvas that Qwen's processor makes of a picture (height, width), as a grid."""
    cell = processor.patch_size * processor.merge_size
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    height, width = smart_resize(*size, cell, least, most)
    return ImageGrid(height // cell, width // cell, height, width)


def fits(rule, size, grid):
    try:
        rule.check(*size, grid)
    except ValueError:
        return False
    return True


def random_sizes(count):
    """Sizes from 1 to 5000 pixels, evenly in their logarithm, of the aspects that Qwen takes."""
    generator = torch.Generator().manual_seed(0)
    sides = (5000 ** torch.rand(count, 2, generator=generator)).int().tolist()
    return [(h, w) for h, w in sides if max(h, w) <= 200 * min(h, w)]


@pytest.mark.parametrize("settings", QWEN.values(), ids=QWEN)
def test_check_takes_every_size_that_qwen_resizes(settings):
    processor = Qwen2VLImageProcessorPil(**settings)
    rule = read_preprocessing(processor)
    sizes = random_sizes(3000)
    assert len(sizes) > 2000
    assert [size for size in sizes if not fits(rule, size, canvas_of(processor, size))] == []


@pytest.mark.parametrize("settings", QWEN.values(), ids=QWEN)
def test_check_refuses_width_for_height(settings):
    """Where the two sides differ by a factor of 2, if the canvas has cells enough to tell."""
    processor = Qwen2VLImageProcessorPil(**settings)
    rule = read_preprocessing(processor)
    told = 0
    for height, width in random_sizes(3000):
        grid = canvas_of(processor, (height, width))
        if max(height, width) >= 2 * min(height, width) and max(grid.shape) > 2:
            told += 1
            assert not fits(rule, (width, height), grid), (height, width, grid)
    assert told > 1000


@pytest.mark.parametrize("size", [(32, 32), (50, 41), (24, 56), (200, 120), (30, 200)], ids=str)
def test_qwens_canvas_is_the_whole_picture_in_the_real_processor(size):
    processor = Qwen2VLImageProcessorPil(**QWEN["tiny"], do_normalize=False)
    made = processor(images=Image.fromarray(ramp(*size)), return_tensors="pt", do_rescale=False)
    grid = canvas_of(processor, size)
    shape = (1, 2 * grid.rows, 2 * grid.cols)
    assert made["image_grid_thw"].tolist() == [list(shape)]
    frames = patches_to_frames(
        made["pixel_values"].float(), shape, channels=3, patch=4, temporal=2, merge=2
    )
    rule = read_preprocessing(processor)
    assert rule == Preprocessing(whole=True, keeps_aspect=8)
    assert_ramp_lies_in(frames[0].float(), rule.geometry(*size).box, size)


@pytest.mark.parametrize("size", [(120, 360), (360, 120), (97, 251), (64, 64)], ids=str)
@pytest.mark.parametrize("name", ["GotOcr2", "Idefics3", "SmolVLM"])
def test_tiles_put_together_are_the_whole_picture(name, size):
    sizes = {"size": {"longest_edge": 192}, "max_image_size": {"longest_edge": 64}, **NORM}
    processor = {
        "GotOcr2": lambda: GotOcr2ImageProcessorPil(
            size={"height": 64, "width": 64}, crop_to_patches=True, max_patches=6, **NORM
        ),
        "Idefics3": lambda: Idefics3ImageProcessorPil(**sizes),
        "SmolVLM": lambda: SmolVLMImageProcessorPil(**sizes),
    }[name]()
    tiles = processor(images=Image.fromarray(ramp(*size)), return_tensors="pt")["pixel_values"]
    tiles = (tiles[0] if tiles.ndim == 5 else tiles).float()
    canvas = tiles[0]
    if len(tiles) > 1:
        layout, certain = find_layout(tiles[:-1], tiles[-1])
        assert certain
        canvas = join_tiles(tiles[:-1], layout)
    rule = read_preprocessing(processor)
    assert rule == Preprocessing(whole=True)
    box = rule.geometry(*size).box
    assert_ramp_lies_in(canvas, box, size)
    assert_ramp_lies_in(tiles[-1], box, size)  # the overview
    rule.check(*size, ImageGrid(1, 1, *canvas.shape[1:]))  # tiles allow any aspect


@pytest.mark.parametrize("cls", [SiglipImageProcessorPil, Gemma3ImageProcessorPil])
def test_one_canvas_of_a_fixed_size(cls):
    rule = read_preprocessing(cls(size={"height": 32, "width": 48}))
    assert rule == Preprocessing(resize=(32, 48))
    rule.check(10, 500, ImageGrid(4, 4, 32, 48))
    with pytest.raises(ValueError, match=r"(?s)gives a canvas of \(32, 48\).*saw \(48, 32\)"):
        rule.check(10, 500, ImageGrid(4, 4, 48, 32))


def test_crops_of_pan_and_scan_are_not_the_whole_picture():
    square = {"height": 32, "width": 32}
    with pytest.raises(ValueError, match=r"do_pan_and_scan.*geometry="):
        read_preprocessing(Gemma3ImageProcessorPil(size=square, do_pan_and_scan=True))


def test_llava_next_tells_the_box_itself():
    with pytest.raises(ValueError, match=r"(?s)image_sizes.*geometry="):
        read_preprocessing(LlavaNextImageProcessorPil())


def test_a_box_in_the_grid_that_sticks_out_of_the_picture():
    """A canvas that begins 6 pixels above the picture and ends 4 below it; of rows 8 px high."""
    box = (0.0, -6.0, 40.0, 34.0)
    grid = ImageGrid(5, 4, 20, 16, picture=(30, 40), box=box)
    cells = torch.arange(20.0).reshape(5, 4)
    one = torch.zeros(1, 1)
    result = MLLMAttributionResult(
        grid_attr=(cells[None],),
        token_attr=one,
        input_tokens=("a",),
        output_tokens=("a",),
        output_ids=torch.tensor([5]),
        output_probs=torch.ones(1),
        units="logits",
        grids=(grid,),
    )
    assert result.geometry(0, (30, 40)) == ImageGeometry(box)
    placed = result.to_image(0, (30, 40))[0]
    whole = maps_to_picture(cells[None], ImageGeometry((0.0, 0.0, 40.0, 40.0)), (40, 40))[0]
    torch.testing.assert_close(placed, whole[6:36])
    with pytest.raises(ValueError, match=r"\(height, width\) = \(30, 40\), got \(40, 30\)"):
        result.to_image(0, (40, 30))


# ---- grids and videos -----------------------------------------------------------------------

GRIDS = {
    "still": ImageGrid(3, 4, 12, 16),
    "tiles": ImageGrid(6, 4, 24, 16, tiles=(3, 2)),
    "video": ImageGrid(3, 4, 24, 32, steps=5, frames=10),
    "box": ImageGrid(3, 4, 12, 16, picture=(30, 40), box=(0.0, -6.0, 40.0, 34.0)),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_grids_survive_json(grid):
    import json

    again = ImageGrid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert again == grid
    assert hash(again) == hash(grid)  # tuples, not lists


@pytest.mark.parametrize(
    ("name", "shape", "cells"),
    [("still", (3, 4), 12), ("tiles", (6, 4), 24), ("video", (5, 3, 4), 60), ("box", (3, 4), 12)],
)
def test_shape_and_cells_of_grids(name, shape, cells):
    assert (GRIDS[name].shape, GRIDS[name].cells) == (shape, cells)


@pytest.mark.parametrize("lead", [(2, 5), (3, 1), (2, 3, 4)], ids=str)
def test_maps_to_picture_of_a_video_equals_frame_by_frame(lead):
    maps = torch.rand(*lead, 3, 4, dtype=torch.float64)
    geometry = ImageGeometry((2.0, -1.0, 8.0, 5.0))
    placed = maps_to_picture(maps, geometry, (6, 10))
    assert placed.shape == (*lead, 6, 10)
    for ours, one in zip(placed.reshape(-1, 6, 10), maps.reshape(-1, 3, 4), strict=True):
        torch.testing.assert_close(ours, maps_to_picture(one[None], geometry, (6, 10))[0])
