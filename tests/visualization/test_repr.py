"""A result shows itself: a few lines as text, the text heat map in a notebook."""

from dataclasses import replace

import pytest
import torch

from captum_mllm.geometry import ImageGrid, Preprocessing
from captum_mllm.result import MLLMAttributionResult
from tests.visualization.test_visualization import Page, hand_made, of_video

HOSTILE = (
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "</style>&amp;",
    "\n\r\t\0\x1b[31m",
    "\u202eright to left",
    "\ud800",
    "$\\frac{1}{2}$",
    "狗" * 40,
)


def many(tokens=200, images=7):
    """Many tokens and images, all strings as long and odd as they come."""
    words = tuple(f" {HOSTILE[n % len(HOSTILE)]}" for n in range(tokens))
    return MLLMAttributionResult(
        grid_attr=tuple(torch.rand(tokens, 4, 4) for _ in range(images)),
        token_attr=torch.rand(tokens, tokens + 5),
        input_tokens=(" a",) * 5 + words,
        output_tokens=words,
        output_ids=torch.arange(tokens),
        output_probs=torch.rand(tokens),
        relevance=torch.rand(tokens, tokens + 5),
        scales=(1.2345678,) * 9,
        consistency=(0.98765,) * 9,
        units="\n" * 99,
        method="ARC(MSEA(LogitLens))" * 20,
        grids=tuple(ImageGrid(4, 4, 16, 16) for _ in range(images)),
    )


def test_repr_says_what_there_is_and_what_to_call(capsys):
    result = hand_made(relevance=torch.rand(5, 10), scales=(1.0, 2.0), consistency=(1.0, 0.9876))
    print(result)
    assert capsys.readouterr().out == f"{result!r}\n"
    assert repr(result).splitlines() == [
        "MLLMAttributionResult of <ARC>, units: [0, 1]",
        "  5 tokens explained: 'a zebra & dog.'",
        "  10 text tokens; 1 image: 4 x 4 cells",
        "  scales 1, 2; consistency 1, 0.988; with relevance",
        "  next: .plot_image_heatmap(picture=picture), .plot_token_attr(), .save(path)",
    ]


def test_repr_of_what_is_not_there():
    lines = repr(hand_made(preprocessing=None)).splitlines()
    assert lines[3] == "  scale 1; without relevance"
    assert ".plot_image_heatmap()," in lines[4]  # the place in the picture is not known
    lines = repr(of_video()).splitlines()
    assert lines[2].endswith("1 image: video of 6 frames, 2 x 4 cells each")
    assert ".plot_time_profile()" in lines[4]
    one = repr(hand_made().select([3])).splitlines()
    assert one[1] == "  1 token explained: '& dog'"
    assert repr(hand_made(grid_attr=(), grids=())).splitlines()[2] == "  10 text tokens; 0 images"
    assert "0 tokens explained: ''" in repr(hand_made().select([]))


@pytest.mark.parametrize(("tokens", "images"), [(200, 1), (200, 7), (1, 100), (1000, 0)])
def test_repr_stays_short(tokens, images):
    result = many(tokens, images)
    video = ImageGrid(16, 16, 448, 448, steps=64, frames=12800)
    videos = replace(
        result,
        grids=(video,) * images,
        grid_attr=(torch.zeros(tokens, 2, 100, 100),) * images if tokens == 1 else result.grid_attr,
    )
    for each in (result, videos):
        text = repr(each)
        assert len(text) < 600
        assert len(text.splitlines()) <= 8
        assert all(character.isprintable() for line in text.split("\n") for character in line)


def test_notebooks_show_the_text_heat_map():
    result = hand_made()
    page = Page(result._repr_html_())
    assert [choice["aria-label"] for choice in page.all("input")] == ["a", "zebra", "& dog", "."]
    assert "<ARC>; units: [0, 1]. Choose a word." in "".join(page.texts)
    assert "supported by: " in "".join(page.texts)


def test_notebooks_show_hostile_text_as_text():
    html = many(40, 3)._repr_html_()
    assert html.isascii()
    page = Page(html)
    assert not page.all("script")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "<script>alert(1)</script>" in page.texts
    assert "http" not in html


def test_notebooks_show_a_word_on_the_image_that_supports_it_most():
    left, right = torch.zeros(5, 4, 4), torch.zeros(5, 2, 2)
    left[1, 0, 0], right[3, 1, 1], left[3, 0, 0] = 0.5, 0.8, 0.4
    grids = (ImageGrid(4, 4, 16, 16), ImageGrid(2, 2, 8, 8))
    text = "".join(Page(hand_made(grid_attr=(left, right), grids=grids)._repr_html_()).texts)
    assert "strongest image support: image 0, top left (2, 2), peak 0.5" in text
    assert "strongest image support: image 1, bottom right (6, 6), peak 0.8" in text
    assert "no image region supports it" in text


def test_notebooks_show_videos_and_images_together():
    video = of_video()
    result = hand_made(
        grid_attr=(hand_made().grid_attr[0] * 0.1, *video.grid_attr),
        grids=(hand_made().grids[0], *video.grids),
    )
    for each in (video, result):
        assert "frame 4: bottom right (28, 12), peak 0.8" in each._repr_html_()


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": None},
        {"preprocessing": Preprocessing(shortest_edge=99, crop=(7, 7))},  # of other canvases
        {"grids": (ImageGrid(4, 4, 16, 16, picture=(90, 7), box=(0.0, 0.0, 7.0, 90.0)),)},
        {"grid_attr": (torch.zeros(5, 4, 4),), "token_attr": torch.zeros(5, 10)},
        {"token_attr": torch.full((5, 10), float("nan"))},
        {"grid_attr": (torch.full((5, 4, 4), float("nan")),)},
    ],
)
def test_notebooks_show_the_heat_map_also_where_little_is_known(changes):
    assert len(Page(hand_made(**changes)._repr_html_()).all("input")) == 4


def test_notebooks_show_why_there_is_no_heat_map():
    for result in (
        hand_made(grid_attr=(), grids=()),
        hand_made(output_tokens=("<b>",) * 9),  # more labels than rows
    ):
        page = Page(result._repr_html_())
        assert [tag for tag, _ in page.tags] == ["pre"]
        assert "The text heat map is missing: " in page.texts[0]
        assert "MLLMAttributionResult of <ARC>" in page.texts[0]
    assert "no image" in hand_made(grid_attr=(), grids=())._repr_html_()


def test_notebooks_show_a_result_without_rows():
    assert Page(hand_made().select([])._repr_html_()).all("input") == []
