"""The table of models in docs/families says nothing that no test shows."""

import re
from pathlib import Path

from tests.adapters import test_contract, test_devices
from tests.oracle import families

PAGE = Path(__file__).parents[2] / "docs" / "families" / "index.md"
SHOWN_BY = {  # column -> tests that show its "yes", for every family that claims it
    "image": [
        test_contract.test_a_painted_cell_shows_in_its_place_and_nowhere_else,
        test_contract.test_a_disc_lands_on_itself,
    ],
    "several images": [test_contract.test_two_pictures_are_not_confused],
    "video": [
        test_contract.test_a_painted_cell_of_a_video_shows_in_the_frames_of_its_step,
        test_contract.test_a_videos_maps_are_the_full_forwards,
    ],
    "scales": [test_contract.test_another_scales_prefix_is_the_full_forwards],
    "windows": [test_contract.test_models_of_one_size_see_larger_scales_through_windows],
    "devices": [
        test_devices.test_offloaded_families,
        test_devices.test_half_precision,
        test_devices.test_attention_implementations,
        test_devices.test_lora_like_merged_in_every_family,
        test_devices.test_families_on_a_gpu,
    ],
}


def table():
    """Rows of the table: family -> column -> cell."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    start = next(n for n, line in enumerate(lines) if "transformers class" in line)
    columns = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = {}
    for line in lines[start + 2 :]:
        name = re.match(r"\| `(\w+)ForConditionalGeneration`", line)
        if name is None:
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name[1]] = dict(zip(columns, cells, strict=True))
    return rows


def families_of(test):
    """The families that a test runs over."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize" and mark.args[0] == "name":
            return tuple(getattr(name, "values", [name])[0] for name in mark.args[1])
    code = test.__code__
    assert "kin" in code.co_varnames[: code.co_argcount], f"{test.__name__} runs over no families"
    return families.NAMES  # the fixture's


def test_all_families_are_in_the_table():
    assert tuple(table()) == families.NAMES


def test_every_yes_is_a_test():
    problems = []
    for name, row in table().items():
        for column in ("image", "several images", "video", "scales", "devices"):
            claim = row[column]
            if claim != "no" and not claim.startswith("yes"):
                problems.append(f"{name}, {column}: {claim!r}")
            for test in SHOWN_BY["windows" if claim == "yes: windows" else column]:
                if (name in families_of(test)) != claim.startswith("yes"):
                    problems.append(f"{name}, {column}: {claim!r}, but {test.__name__}")
    assert problems == []
