"""Real processors with their video parts and torchvision's backends, around the tiny tokenizers."""

import copy
import functools
import os
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from captum_mllm import LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.processors import read_preprocessing
from captum_mllm.model import loading as cli_model
from tests.oracle.families import NAMES, PATCH, family, without_mixing
from tests.oracle.published import MSEA

QWEN = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
ROWS, COLUMNS, CELL = 3, 5, 2 * PATCH
SIZE = {"height": 32, "width": 32}
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@functools.cache
def kin_of(name):
    return family(name)


@functools.cache
def local_of(name):
    return without_mixing(kin_of(name).model)


@functools.cache
def default_images(name):
    """A family's image processor as transformers takes it where torchvision is installed."""
    own = kin_of(name).processor.image_processor
    settings = own.to_dict()
    settings.pop("image_processor_type", None)
    kind = getattr(transformers, type(own).__name__.removesuffix("Pil"))
    made = kind(**settings)
    if hasattr(own, "image_seq_length"):
        made.image_seq_length = own.image_seq_length
    return made


@functools.cache
def real(name):
    """The family's own processor; its image part, and its video part if any, are torchvision's."""
    images, own = default_images(name), kin_of(name).processor
    if name in QWEN:
        videos = {"Qwen3VL": "Qwen3VLVideoProcessor"}.get(name, "Qwen2VLVideoProcessor")
        size = {"shortest_edge": 2 * CELL**2, "longest_edge": 100 * CELL**2 * 8}
        video_part = getattr(transformers, videos)(patch_size=PATCH, size=size)
        return getattr(transformers, f"{name}Processor")(images, own.tokenizer, video_part)
    if name == "InternVL":
        videos = transformers.InternVLVideoProcessor(size=SIZE)
        return transformers.InternVLProcessor(images, own.tokenizer, videos, image_seq_length=16)
    processor = copy.copy(own)
    processor.image_processor = images
    return processor


def film(frames):
    """Noise, (frames, height, width, channels), a whole number of cells high and wide."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (frames, ROWS * CELL, COLUMNS * CELL, 3), dtype=np.uint8)


def encode(name, frames, pictures=(), fps=2.0):
    """What the real processor makes of a film, after pictures, whose frames are all taken."""
    kin, processor = kin_of(name), real(name)
    shown = kin.placeholder.replace("<|image_pad|>", "<|video_pad|>")
    shown = processor.video_token if name == "InternVL" else shown
    shown = " ".join([*[kin.placeholder] * len(pictures), shown])
    told = {"fps": fps, "total_num_frames": len(frames), "duration": len(frames) / fps}
    told["frames_indices"] = list(range(len(frames)))
    return dict(
        processor(
            text=kin.prompt.replace(kin.placeholder, shown),
            images=list(pictures) or None,
            videos=[list(frames)],
            video_metadata=[told],
            do_sample_frames=False,
            return_tensors="pt",
        )
    )


def runs_of(ids, placeholder):
    """Begins and ends of the unbroken runs of placeholders."""
    found, at = [], 0
    for inside, run in groupby((ids[0] == placeholder).tolist()):
        length = len(list(run))
        if inside:
            found.append((at, at + length))
        at += length
    return found


@pytest.mark.parametrize("name", [*QWEN, "InternVL"])
def test_processors_are_the_real_ones(name):
    processor = real(name)
    assert type(processor) is getattr(transformers, f"{name}Processor")
    assert "VideoProcessor" in type(processor.video_processor).__name__
    assert not type(processor.image_processor).__name__.endswith("Pil")


@pytest.mark.parametrize("count", [5, 8])
@pytest.mark.parametrize("name", QWEN)
def test_video_is_explained_step_by_step(name, count):
    kin = kin_of(name)
    inputs = encode(name, film(count))
    steps = (count + 1) // 2  # the last frame is repeated where their number is odd
    assert inputs["video_grid_thw"].tolist() == [[steps, 2 * ROWS, 2 * COLUMNS]]
    runs = runs_of(inputs["input_ids"], kin.model.config.video_token_id)
    assert sum(end - begin for begin, end in runs) == steps * ROWS * COLUMNS
    (grid,) = find_adapter(kin.model).grids(inputs)
    assert tuple(end - begin for begin, end in runs) == find_adapter(kin.model).runs(grid)
    assert (inputs["mm_token_type_ids"] == 2).sum() == steps * ROWS * COLUMNS
    if name == "Qwen2_5_VL":
        assert torch.as_tensor(inputs["second_per_grid_ts"]).tolist() == [1.0]

    lens = LogitLens(kin.model, real(name)).attribute(inputs, kin.answer)
    assert lens.grid_attr[0].shape == (5, 2 * steps, ROWS, COLUMNS)
    assert lens.grid_attr[0].any()
    assert lens.time_profile().shape == (5, 2 * steps)
    assert lens.to_image(0, (30, 50)).shape == (5, 2 * steps, 30, 50)
    result = MSEA(kin.model).attribute(inputs, kin.answer)
    assert len(result.scales) == 3
    assert result.grid_attr[0].shape == (5, 2 * steps, round(1.5 * ROWS), round(1.5 * COLUMNS))
    assert result.grid_attr[0].isfinite().all()


def test_steps_of_qwen3_stand_behind_their_times():
    inputs = encode("Qwen3VL", film(8))
    ids, tokenizer = inputs["input_ids"], kin_of("Qwen3VL").processor.tokenizer
    runs = runs_of(ids, kin_of("Qwen3VL").model.config.video_token_id)
    between = [tokenizer.decode(ids[0, a[1] : b[0]]) for a, b in pairwise(runs)]
    assert between == [
        f"<|vision_end|> {time} seconds> <|vision_start|>"
        for time in ("<1.2", "<2.2", "<unk>")  # the tiny vocabulary knows no later time
    ]
    # There may be another pair around all steps: it is text like any other.
    before = tokenizer.decode(ids[0, : runs[0][0]])
    assert before.split()[-3:] == ["<0.2", "seconds>", "<|vision_start|>"]


@pytest.mark.parametrize(("count", "frame"), [(5, 0), (5, 3), (5, 4), (8, 6)])
@pytest.mark.parametrize("name", QWEN)
def test_painted_cell_of_a_frame_changes_its_step_alone(name, count, frame):
    targets = torch.arange(30, 60)
    lens = LogitLens(local_of(name), real(name))
    frames = film(count)
    before = lens.attribute(encode(name, frames), targets).grid_attr[0]
    row, column = 1, 3
    frames[frame, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] ^= 255
    after = lens.attribute(encode(name, frames), targets).grid_attr[0]
    changed = ((after - before).abs().amax(0) > 1e-4).nonzero().tolist()
    step = frame // 2
    assert changed == [[2 * step, row, column], [2 * step + 1, row, column]]


@pytest.mark.parametrize("name", QWEN)
def test_picture_and_video_in_one_prompt(name):
    if name == "Qwen2_5_VL" and transformers.__version__.startswith("5.5."):
        pytest.skip("transformers 5.5 itself fails: the picture uses up second_per_grid_ts")
    kin = kin_of(name)
    inputs = encode(name, film(8), [kin.wide_picture])
    result = LogitLens(kin.model, real(name)).attribute(inputs, kin.answer)
    alone = kin.encode(kin.wide_picture)
    (grid,) = find_adapter(kin.model).grids(alone)
    assert result.grids[0] == grid
    assert result.grid_attr[1].shape == (5, 8, ROWS, COLUMNS)
    changed = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    other = LogitLens(kin.model, real(name)).attribute(changed, kin.answer)
    assert torch.equal(result.grid_attr[0], other.grid_attr[0])  # the picture comes first
    assert not torch.equal(result.grid_attr[1], other.grid_attr[1])
    assert len(MSEA(kin.model).attribute(inputs, kin.answer).grid_attr) == 2


@pytest.mark.parametrize("count", [5, 8])
def test_frames_of_internvl_are_images(count):
    kin = kin_of("InternVL")
    inputs = encode("InternVL", film(count))
    assert inputs["pixel_values"].shape == (count, 3, 32, 32)
    assert "pixel_values_videos" not in inputs
    targets = torch.arange(30, 60)
    lens = LogitLens(local_of("InternVL"), real("InternVL"))
    before = lens.attribute(inputs, targets)
    assert [tuple(maps.shape) for maps in before.grid_attr] == [(30, 4, 4)] * count
    assert not any(grid.steps for grid in before.grids)
    frames = film(count)
    frames[3] ^= 255
    after = lens.attribute(encode("InternVL", frames), targets)
    pairs = zip(before.grid_attr, after.grid_attr, strict=True)
    changed = [float((a - b).abs().max()) > 1e-4 for a, b in pairs]
    assert changed == [n == 3 for n in range(count)]
    result = MSEA(kin.model).attribute(inputs, kin.answer)
    assert [tuple(maps.shape) for maps in result.grid_attr] == [(5, 6, 6)] * count


# ---- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["picture", "wide_picture", "tall_picture"])
@pytest.mark.parametrize("name", NAMES)
def test_default_backends_give_the_same_grids_and_geometry(name, shape):
    kin, processor = kin_of(name), real(name)
    images, own = processor.image_processor, kin.processor.image_processor
    picture = getattr(kin, shape)
    inputs = dict(processor(images=[picture], text=kin.prompt, return_tensors="pt"))
    expected = kin.encode(picture)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    adapter = find_adapter(kin.model)
    assert adapter.grids(inputs) == adapter.grids(expected)
    error = (inputs["pixel_values"] - expected["pixel_values"]).abs().mean()
    assert error < 0.1 * expected["pixel_values"].std()

    if name != "LlavaNext":  # its box is told by the inputs
        assert read_preprocessing(images) == read_preprocessing(own)
    lens = LogitLens(kin.model, processor).attribute(inputs, kin.answer)
    on_picture = lens.to_image(0, picture)
    assert on_picture.shape == (5, picture.height, picture.width)
    theirs = LogitLens(kin.model, kin.processor).attribute(expected, kin.answer)
    assert lens.geometry(0, picture.size[::-1]) == theirs.geometry(0, picture.size[::-1])


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_made_anew_with_the_default_backends(name):
    kin, processor = kin_of(name), real(name)
    inputs = dict(processor(images=[kin.wide_picture], text=kin.prompt, return_tensors="pt"))
    method = MSEA(kin.model, processor)
    anew = method.attribute(inputs, kin.answer, images=kin.wide_picture)
    resized = method.attribute(inputs, kin.answer)
    assert anew.scales == resized.scales
    assert anew.grid_attr[0].shape == resized.grid_attr[0].shape
    with pytest.raises(ValueError, match=r"are they other|pictures that inputs were made of"):
        method.attribute(inputs, kin.answer, images=kin.other_picture)


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*QWEN, "InternVL"])
def test_saved_processors_load_whole_here(name, tmp_path):
    kin_of(name).model.save_pretrained(tmp_path)
    real(name).save_pretrained(tmp_path)
    _, processor, note = cli_model.load_model(str(tmp_path), "auto", "cpu")
    assert type(processor) is type(real(name))
    assert not note


def test_saved_processor_reads_pictures_where_torchvision_is_absent(tmp_path):
    kin = kin_of("Qwen3VL")
    kin.model.save_pretrained(tmp_path)
    real("Qwen3VL").save_pretrained(tmp_path)
    kin.picture.save(tmp_path / "picture.png")
    arguments = ["--model", str(tmp_path), "--image", str(tmp_path / "picture.png"), "--prompt"]
    arguments += ["what is here ?", "--target", "a dog", "--method", "lens", "--out"]
    done = subprocess.run(
        [sys.executable, "-m", "captum_mllm", "explain", *arguments, str(tmp_path / "out")],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "loaded without its video part" in done.stderr
