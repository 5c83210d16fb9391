"""A result asked by word, phrase and place, its plots on axes of one's own, and side by side."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from captum_mllm.functional import upsample
from captum_mllm.reference import make_scene, render_pil
from captum_mllm.validation import ArgumentError
from captum_mllm.visualization import compare, phrase_of, summarise, words_at
from captum_mllm.visualization.figure import Plot
from tests.oracle.pages import QUESTION, page_of


@pytest.fixture(scope="module")
def results():
    return page_of(("msea+arc", "lens")).results


@pytest.fixture(scope="module")
def result(results):
    return results["lens"]


@pytest.fixture(scope="module")
def picture():
    return render_pil(make_scene(7, "test"))[0]


def test_words_phrases_and_places(result, picture):
    assert result.words[:5] == ("this", "picture", "shows", "a", "key")
    key = result["key"]
    assert key.text == "key"
    assert torch.equal(key.grid_attr[0], phrase_of(result, 4).grid_attr[0])
    second = result["key", 1]
    assert second.words != key.words
    assert result["KEY and"].words == (4, 5)
    with pytest.raises(KeyError, match="no 'cat'"):
        result["cat"]
    assert result.at((80, 170), picture) == words_at(result, (80, 170), picture)
    row = result["key"].rows[0]
    assert torch.equal(result.image_map("key"), result.image_map(row))
    assert torch.equal(result.image_map(np.int64(row)), result.image_map(torch.tensor(row)))
    assert result.plot_image_heatmap(target_token_pos=np.int64(row))
    assert "key" in result
    assert "cat" not in result
    with pytest.raises(ValueError, match="still image"):
        result.at((80, 170), picture, frame=0)


def test_plots_by_word_on_axes_of_ones_own(result, picture):
    figure, (left, right) = plt.subplots(1, 2)
    try:
        made = result.plot_image_heatmap(target_token_pos="key", picture=picture, ax=left)
        assert made.axes is left
        assert made.figure is figure
        assert left.get_title() == "key"
        assert result.plot_token_attr(ax=right).figure is figure
        assert result.plot_seq_attr(ax=right).axes is right
        with pytest.raises(ArgumentError, match="ax belongs to a figure of yours"):
            result.plot_token_attr(show=True, ax=right)
        with pytest.raises(ArgumentError, match="ax must be matplotlib axes"):
            result.plot_token_attr(ax=figure)
    finally:
        plt.close(figure)


def test_heat_of_several_tokens_is_their_largest(result):
    phrase = result[3:5]
    _, ax = result.plot_image_heatmap(target_token_pos=(phrase.rows[0], phrase.rows[-1] + 1))
    drawn = torch.from_numpy(ax.images[0].get_array().data)
    grid = result.grids[0]
    assert torch.equal(drawn, upsample(phrase.grid_attr[0], (grid.height, grid.width)))


def test_a_plot_shows_itself_as_a_cells_last_value(result):
    made = result.plot_token_attr()
    assert isinstance(made, Plot)
    assert made._repr_png_().startswith(b"\x89PNG")
    figure, axes = made
    assert (figure, axes) == (made.figure, made.axes)


def test_methods_side_by_side_on_one_scale(results, picture):
    figure, axes = compare(results, "key", picture=picture)
    assert [ax.get_title() for ax in axes] == list(results)
    _, bare = compare(results, "key")
    ((low, top),) = {image.get_clim() for ax in bare for image in ax.images}
    largest = max(float(each.image_map("key").max()) for each in results.values())
    assert (low, top) == (0.0, pytest.approx(largest, rel=1e-6))
    assert figure.axes
    with pytest.raises(ArgumentError, match="same units"):
        compare({"a": results["lens"], "b": replace(results["lens"], units="logits")}, "key")
    with pytest.raises(ArgumentError, match="results is empty"):
        compare({}, "key")
    with pytest.raises(IndexError, match="image 1"):
        compare(results, "key", image=1)


def test_table_of_pandas(result):
    frame = result.to_frame()
    assert isinstance(frame, pd.DataFrame)
    grid = result.grids[0]
    summary = summarise(result, (grid.height, grid.width))
    assert list(frame["word"]) == list(result.words)
    assert list(frame["peak"]) == pytest.approx(
        [entry.peak.value if entry.peak else 0 for entry in summary.words]
    )
    assert list(frame["probability"]) == pytest.approx([e.probability for e in summary.words])


def test_page_of_a_result(result, picture, tmp_path):
    result.to_html(tmp_path / "a.html", picture, prompt=QUESTION, notes=["<i>note</i>"])
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "&lt;i&gt;note" in page
    assert result.method in page
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(ArgumentError, match="pictures must be one per image"):
        result.to_html(tmp_path / "b.html", [picture, picture])
    assert not (tmp_path / "b.html").exists()
