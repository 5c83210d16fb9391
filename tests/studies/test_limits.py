"""The pictures of docs/limits.md: all are there, small, and made by what the page names."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from studies import limits, limits_plots

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_shows_every_picture_and_no_other():
    shown = re.findall(r"\]\(images/([\w.]+)\)", (DOCS / "limits.md").read_text())
    assert sorted(shown) == sorted(limits.PICTURES)


def test_pictures_are_small_and_fit_a_phone():
    sizes = [(DOCS / "images" / name).stat().st_size for name in limits.PICTURES]
    assert max(sizes) < 60_000
    assert sum(sizes) < 500_000
    for name in limits.PICTURES:
        with Image.open(DOCS / "images" / name) as picture:
            assert 600 < picture.width < 760


@pytest.mark.parametrize("name", ["twins.jpg", "seeds.png", "faithfulness.png", "mirrored.png"])
def test_a_picture_is_drawn_anew(name, tmp_path):
    limits.save(limits.PICTURES[name](), tmp_path / name)
    with Image.open(tmp_path / name) as new, Image.open(DOCS / "images" / name) as old:
        assert new.format == old.format
        assert new.size == pytest.approx(old.size, abs=8)  # fonts differ
        assert len(set(new.convert("L").resize((40, 40)).tobytes())) > 20


def test_twins_have_one_raw_map(shipped):
    """What the page says of them: bit for bit for the lens."""
    from captum_mllm import LogitLens
    from captum_mllm.reference import make_example, render_pil
    from studies.prompts import default_inputs

    picture, _ = render_pil(make_example("twins", 16).scene, limits.SIDE)
    result = LogitLens(*shipped).attribute(default_inputs(shipped[1], picture))
    first, second = limits.mentions(result, "bus")
    maps = result.grid_attr[0]
    assert torch.equal(maps[first.tokens[0]], maps[second.tokens[0]])


def test_centred_moves_the_object_to_the_middle():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1, 6] = True
    own, inside = limits_plots.centred(mask[None].float(), mask, 4)
    assert own.nonzero().tolist() == [[0, 4, 4]]
    assert inside.sum() == 5 * 6  # rows -3 .. 4 and columns 2 .. 9, as far as they are there
