"""Quality of the maps on the trained reference model: held-out scenes, exact masks."""

import json

import numpy as np
import pytest

from captum_mllm import LogitLens
from captum_mllm.metrics import average_precision, paired_bootstrap
from studies import compare, sets, sets_table
from studies.prompts import answer_words, default_inputs
from tests.oracle.published import MSEA

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured():
    """Scenes that the recorded comparison doesn't use."""
    return compare.compare(scenes=40, first=5000, show_progress=False)["methods"]


def test_lens_lies_on_the_named_objects(measured):
    precision = np.array(measured["LogitLens"]["average_precision"])
    assert np.isfinite(precision).mean() > 0.95  # the answers name the objects
    assert np.nanmean(precision) > 0.5  # an object covers about a tenth of the image


def test_scales_improve_the_ranking_of_pixels(measured):
    gain = paired_bootstrap(
        measured["MSEA"]["average_precision"], measured["LogitLens"]["average_precision"], seed=0
    )
    assert gain.low > 0


def test_every_method_is_far_above_chance(measured):
    for name, values in measured.items():
        assert np.nanmean(values["average_precision"]) > 0.3, name


def test_comparison_is_reproducible(measured):
    again = compare.compare(scenes=3, first=5000, show_progress=False)["methods"]
    for name, values in again.items():
        np.testing.assert_allclose(
            values["average_precision"], measured[name]["average_precision"][:3], rtol=1e-6
        )


def precision_on(name, size, scenes=range(6000, 6012)):
    """Average precision of lens, MSEA, and a map turned by 180 degrees, in the picture's pixels."""
    from captum_mllm.reference import load, make_scene, render_pil

    model, processor = load(name)
    found = {"lens": [], "msea": [], "turned": []}
    for number in scenes:
        scene = make_scene(number)
        picture, masks = render_pil(scene, size)
        inputs = default_inputs(processor, picture)
        trace = LogitLens(model, processor).trace(inputs)
        answer, words = trace.text_ids[trace.n_prompt :], answer_words(trace, scene)
        lens, msea = (
            method(model, processor).attribute(inputs, answer).to_image(0, picture)
            for method in (LogitLens, MSEA)
        )
        for kind, maps in (("lens", lens), ("msea", msea), ("turned", lens.flip(1, 2))):
            for obj, tokens in words.items():
                truth = masks[obj].expand(len(tokens), -1, -1)
                found[kind].append(np.max(average_precision(maps[list(tokens)], truth)))
    return {kind: np.mean(values) for kind, values in found.items()}


@pytest.mark.parametrize(
    ("name", "size"),
    [("qwen2vl", 112), ("qwen2vl", (112, 168)), ("internvl", 112), ("internvl", (224, 224)),
     ("internvl", (112, 224))],
)  # fmt: skip
def test_maps_of_trained_families_lie_on_the_named_objects(name, size):
    """Merged tokens, tiles and thumbnails in one frame, for pictures that are not square too."""
    precision = precision_on(name, size)
    assert precision["lens"] > 0.55
    assert precision["msea"] > precision["lens"]
    assert precision["turned"] < 0.5 * precision["lens"]


def test_record_is_of_the_shipped_weights():
    from captum_mllm.reference import model_path

    folder = compare.Path(compare.__file__).parent / "records"
    figures = json.loads((model_path() / "figures.json").read_text())
    recorded = json.loads((folder / "compare.json").read_text())
    assert recorded["weights_sha256"] == figures["sha256"]


@pytest.mark.parametrize("name", ["llava", "qwen2vl", "internvl"])
def test_the_sets_leave_room(name):
    """Function words light up somewhere, and the lens is far below what the grid allows."""
    rows = sets.evaluate(name, "plain", 40, "validation")["rows"]
    means = {
        metric: paired_bootstrap(sets_table.padded(rows, metric), seed=0).mean
        for metric in ("obj_iou", "bound_iou", "average_precision", "bound_ap", "func_iou")
    }
    assert 0.85 < means["func_iou"] < 0.97
    assert means["bound_iou"] > means["obj_iou"] + 0.15
    assert means["bound_ap"] > means["average_precision"] + 0.05


@pytest.mark.parametrize("name", ["crowded", "occluded", "twins", "small"])
def test_hard_sets_are_harder_than_plain_ones(name):
    """On the sets made to be hard the plain lens ranks pixels worse."""
    plain, hard = (
        sets_table.padded(
            sets.evaluate("llava", one, 40, "validation")["rows"], "average_precision"
        )
        for one in ("plain", name)
    )
    assert paired_bootstrap(hard, seed=0).high < paired_bootstrap(plain, seed=0).mean
