"""Repainting finds where tokens lie, whatever the tower does to them; pictures' boxes in pixels."""

import pytest
import torch
from PIL import Image

from captum_mllm.checking.layout import check_layout, repaint, responses
from captum_mllm.checking.subject import NotTriedError, Subject
from tests.oracle.families import NAMES
from tests.oracle.layouts import kin_of, pictures_of

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def subject(kin, picture, **changed):
    processor = changed.get("processor", kin.processor)
    return Subject(kin.model, processor, picture, kin.other_picture, kin.prompt, False)


@pytest.mark.parametrize("case", ["usual", "wide", "tall"])
@pytest.mark.parametrize("name", NAMES)
def test_true_layouts_pass(name, case):
    """With attention, which spreads what was repainted over all tokens of these random towers."""
    kin = kin_of(name)
    (picture,) = pictures_of(kin, case)
    found = check_layout(subject(kin, picture))
    assert found.verdict == "passed", found.found
    assert found.figures["hits"] >= 0.5


def test_every_tile_is_tried():
    kin = kin_of("InternVL")
    asked = subject(kin, kin.tall_picture)  # three tiles, one above the other
    found = check_layout(asked)
    assert "in 3 x 1 tiles and 1 overview" in found.found
    assert found.figures["cells"] == 12
    assert "Layout" in asked.pictures


def test_a_processor_whose_way_with_pictures_is_not_known():
    kin = kin_of("Gemma3")
    crops = kin.processor.image_processor.do_pan_and_scan
    kin.processor.image_processor.do_pan_and_scan = True
    try:
        with pytest.raises(NotTriedError, match=r"What the processor does|more than one image"):
            check_layout(subject(kin, kin.picture))
    finally:
        kin.processor.image_processor.do_pan_and_scan = crops


def test_repainting_keeps_to_the_box():
    picture = Image.new("RGB", (10, 6), (200, 10, 130))
    painted = repaint(picture, (2.5, 1.0, 6.5, 4.0))
    assert painted.getpixel((3, 1)) == (0, 255, 0)
    changed = {
        (x, y) for x in range(10) for y in range(6) if painted.getpixel((x, y)) == (0, 255, 0)
    }
    assert changed == {(x, y) for x in (3, 4, 5) for y in (1, 2, 3)}
    assert picture.getpixel((3, 1)) == (200, 10, 130)


def test_repainting_a_box_of_less_than_a_pixel():
    painted = repaint(Image.new("RGB", (4, 4)), (1.2, 1.2, 1.6, 1.6))
    assert [painted.getpixel((x, 1)) for x in range(3)] == [(0,) * 3, (255,) * 3, (0,) * 3]


@pytest.mark.parametrize("box", [(-4.0, 0.0, 1.0, 2.0), (8.0, 0.0, 9.0, 2.0)])
def test_padding_is_not_repainted(box):
    assert repaint(Image.new("RGB", (4, 4)), box) is None


def test_a_token_that_changes_with_everything_does_not_count():
    changes = torch.tensor([[9.0, 5.0, 1.0], [9.0, 1.0, 5.0], [9.0, 1.0, 1.0]])
    assert responses(changes)[:2].argmax(1).tolist() == [1, 2]
