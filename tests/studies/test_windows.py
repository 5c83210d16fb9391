"""The recorded study of windows: what it measures, what it writes, what it leaves alone."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from captum_mllm import LogitLens
from captum_mllm.adapters import LlavaAdapter, find_adapter, registry
from captum_mllm.functional import upsample
from captum_mllm.reference import model_path
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import make_scene
from studies import windows
from studies.prompts import default_inputs

NAMES = [
    "LogitLens (scale 1)",
    "MSEA, native scales",
    "MSEA, windows",
    "MSEA, windows (1, 1.5)",
    "8 half-cell shifts",
]


@pytest.fixture(scope="module")
def prompt(shipped):
    picture, _ = render_pil(make_scene(3, "validation"), 112)
    return dict(default_inputs(shipped[1], picture))


@pytest.fixture(scope="module")
def single(shipped, prompt):
    return LogitLens(*shipped).trace(prompt)


@pytest.fixture(scope="module")
def answer(single):
    return single.text_ids[single.n_prompt :]


def raw_maps(model, inputs, pixels, classes):
    """The lens by hand: relu(W h) at the image tokens of a 14 x 14 picture."""
    with torch.no_grad():
        hidden = model.model(**{**inputs, "pixel_values": pixels}).last_hidden_state[0]
    where = inputs["input_ids"][0] == model.config.image_token_id
    return (hidden[where] @ model.lm_head.weight[classes].T).clamp(min=0).T.unflatten(1, (14, 14))


@pytest.mark.parametrize(
    ("name", "enlarged"), [("MSEA, windows", (18, 21)), ("MSEA, windows (1, 1.5)", (21,))]
)
def test_windows_are_those_of_a_loop_by_hand(shipped, prompt, single, answer, name, enlarged):
    model, pixels = shipped[0], prompt["pixel_values"]
    scales = [raw_maps(model, prompt, pixels, single.class_ids)]
    for cells in enlarged:
        large = F.interpolate(pixels, (8 * cells, 8 * cells), mode="bicubic", antialias=True)
        total, count = torch.zeros(len(single.class_ids), cells, cells), torch.zeros(cells, cells)
        for top in (0, cells - 14):
            for left in (0, cells - 14):
                rows, cols = slice(top, top + 14), slice(left, left + 14)
                window = large[..., 8 * top : 8 * top + 112, 8 * left : 8 * left + 112]
                total[:, rows, cols] += raw_maps(model, prompt, window, single.class_ids)
                count[rows, cols] += 1
        scales.append(total / count)
    expected = torch.stack([upsample(maps, (21, 21)) for maps in scales]).mean(0)
    trace = windows.variants(*shipped)[name][1](prompt, answer)
    torch.testing.assert_close(trace.maps[0], expected, rtol=1e-4, atol=1e-4)


def test_shifts_move_the_picture_and_put_its_map_back(shipped, prompt, single, answer):
    model, pixels = shipped[0], prompt["pixel_values"]
    adapter = windows.ShiftedLlava(model, (1, -1))
    moved = adapter.rescale_pixels(prompt, single.grids)["pixel_values"]
    torch.testing.assert_close(moved[..., 4:, :-4], pixels[..., :-4, 4:], rtol=0, atol=0)
    # A flat picture without position would stay as it is; here the middle of the frame counts.
    trace = windows.shifted_trace(LogitLens(*shipped).runner, prompt, answer)
    assert trace.maps[0].shape == (len(single.class_ids), 28, 28)
    views = [upsample(single.maps[0], (28, 28))]
    for down, right in windows.HALF_CELLS[1:]:
        adapter = windows.ShiftedLlava(model, (down, right))
        shown = adapter.rescale_pixels(prompt, single.grids)["pixel_values"]
        view = upsample(raw_maps(model, prompt, shown, single.class_ids), (28, 28))
        views.append(view.roll((-down, -right), (-2, -1)))
    inner = (slice(None), slice(2, -2), slice(2, -2))
    expected = torch.stack(views).mean(0)[inner]
    torch.testing.assert_close(trace.maps[0][inner], expected, rtol=1e-4, atol=1e-4)


def test_each_variant_costs_the_forwards_that_are_recorded(shipped, prompt, answer):
    model = shipped[0]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    try:
        for name, (forwards, tracer) in windows.variants(*shipped).items():
            calls.clear()
            tracer(prompt, answer)
            assert len(calls) == forwards, name
    finally:
        handle.remove()


def test_registry_is_left_alone(shipped, prompt, answer):
    before = dict(registry._REGISTRY)
    rows = windows.variants(*shipped)
    assert list(rows) == NAMES
    rows["MSEA, windows (1, 1.5)"][1](prompt, answer)
    assert before == registry._REGISTRY
    assert type(find_adapter(shipped[0])) is LlavaAdapter
    assert not LogitLens(*shipped).runner.adapter.fixed_size


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    values = {name: {"average_precision": 0.5, "obj_iou": 0.5, "seconds": 1.0} for name in NAMES}
    asked = []

    def stops_at(last):
        def measure_scene(number, *_):
            asked.append(number)
            if number == last:
                raise KeyboardInterrupt
            return values

        return measure_scene

    progress = tmp_path / "windows.progress.json"
    monkeypatch.setattr(windows, "measure_scene", stops_at(7))
    with pytest.raises(KeyboardInterrupt):
        windows.measure(range(5, 9), progress, "weights")
    monkeypatch.setattr(windows, "measure_scene", stops_at(None))
    found = windows.measure(range(5, 9), progress, "weights")
    assert asked == [5, 6, 7, 7, 8]
    assert found["MSEA, windows"] == {
        "forwards": 9, "average_precision": [0.5] * 4, "obj_iou": [0.5] * 4, "seconds": [1.0] * 4
    }  # fmt: skip
    windows.measure(range(5, 6), progress, "other weights")
    assert asked[-1] == 5


def test_scores_without_a_named_object_are_no_numbers(single):
    flat = replace(single, maps=(torch.ones_like(single.maps[0]),))
    found = windows.scores(flat, {}, torch.ones(1, 112, 112, dtype=torch.bool))
    assert all(value != value for value in found.values())


@pytest.mark.slow
def test_a_run_of_two_scenes_writes_both_records(tmp_path, capsys):
    before = dict(registry._REGISTRY)
    windows.main(["--scenes", "2", "--out", str(tmp_path)])
    assert before == registry._REGISTRY
    assert {path.name for path in tmp_path.iterdir()} == {"windows.json", "windows.md"}
    check_records(tmp_path)
    assert "AP - native" in capsys.readouterr().out


def test_records_are_of_the_shipped_weights():
    measured = check_records(windows.Path(windows.__file__).parent / "records")
    assert len(measured["scenes"]) >= 120


def check_records(folder):
    measured = json.loads((folder / "windows.json").read_text())
    text = (folder / "windows.md").read_text()
    figures = json.loads((model_path() / "figures.json").read_text())
    assert measured["weights_sha256"] == figures["sha256"]
    assert measured["split"] == "validation"
    assert list(measured["variants"]) == NAMES
    assert measured["command"] in text
    assert windows.NOTE in text
    for row in measured["variants"].values():
        for key in (*windows.METRICS, "seconds"):
            assert len(row[key]) == len(measured["scenes"])
            row[key] = [float("nan") if value is None else value for value in row[key]]
    for metric in windows.METRICS:
        assert windows.table(measured["variants"], metric) in text
    return measured
