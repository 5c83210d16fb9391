import base64
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from captum_mllm.files import check_folder, filled_folder
from captum_mllm.geometry import ImageGrid, Preprocessing
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.visualization import (
    colour_stops,
    contents_of,
    format_table,
    overlay,
    plot_text_heatmap,
    summarise,
    text_heatmap_html,
    write_report,
)

PROMPT = (" what", " costs", " <b>$5</b>", "\n", "?")
ANSWER = (" a", " zeb", "ra", " & dog", ".")


def hand_made(**changes):
    torch.manual_seed(0)
    maps = torch.zeros(5, 4, 4)
    maps[1, 0, 0], maps[2, 0, 1], maps[3, 3, 3] = 0.5, 0.8, 0.4
    attr = torch.rand(5, 10)
    for row in range(5):
        attr[row, 5 + row :] = 0
    fields = {
        "grid_attr": (maps,),
        "token_attr": attr,
        "input_tokens": PROMPT + ANSWER,
        "output_tokens": ANSWER,
        "output_ids": torch.arange(5),
        "output_probs": torch.tensor([0.9, 0.5, 0.5, 0.25, 1.0]),
        "units": "[0, 1]",
        "grids": (ImageGrid(4, 4, 16, 16),),
        "preprocessing": Preprocessing(shortest_edge=16, crop=(16, 16)),
        "method": "<ARC>",
    }
    return MLLMAttributionResult(**(fields | changes))


@pytest.fixture
def result():
    return hand_made()


@pytest.fixture
def wide():
    return Image.new("RGB", (80, 40), (200, 120, 40))


def opened(path):
    with Image.open(path) as picture:
        return picture.copy()


def drawn(fig):
    """The figure as pixels; drawing it also parses every text."""
    stream = io.BytesIO()
    fig.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("RGB"))


# ---- overlay ---------------------------------------------------------------------------------


def test_overlay_heats_where_the_map_is_and_nowhere_else(wide):
    heat = torch.zeros(40, 80)
    heat[10:20, 60:70] = 1
    out = np.asarray(overlay(wide, heat)).astype(int)
    cold = np.asarray(overlay(wide, torch.zeros(40, 80))).astype(int)
    differs = (out != cold).any(-1)
    assert differs[10:20, 60:70].all()
    assert differs.sum() == 100


def test_overlays_of_one_scale_stay_comparable(wide):
    weak, strong = torch.full((40, 80), 0.1), torch.full((40, 80), 1.0)
    assert overlay(wide, weak).tobytes() == overlay(wide, strong).tobytes()  # each on its own
    one, other = overlay(wide, weak, vmax=1.0), overlay(wide, strong, vmax=1.0)
    assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_overlay_takes_pictures_of_any_mode(mode):
    picture = Image.new("RGB", (6, 5)).convert(mode)
    assert overlay(picture, torch.zeros(5, 6)).mode == "RGB"


@pytest.mark.parametrize(
    ("heat", "options", "words"),
    [
        (torch.zeros(80, 40), {}, r"heat .*\(40, 80\)"),
        (torch.full((40, 80), float("nan")), {}, "heat"),
        (torch.zeros(40, 80), {"alpha": 2}, "alpha"),
        (torch.zeros(40, 80), {"cmap": "nope"}, "cmap"),
        (torch.zeros(40, 80), {"vmax": -1.0}, "vmax"),
        (torch.zeros(40, 80), {"vmax": float("nan")}, "vmax"),
    ],
)
def test_overlay_names_the_bad_argument(wide, heat, options, words):
    with pytest.raises(ValueError, match=words):
        overlay(wide, heat, **options)


def test_colour_stops_begin_transparent():
    assert colour_stops("gray", 3, alpha=0.5) == [
        "rgba(0,0,0,0.00)",
        "rgba(128,128,128,0.50)",
        "rgba(255,255,255,0.50)",
    ]


# ---- summary ---------------------------------------------------------------------------------


def test_summary_by_words(result):
    summary = summarise(result, (40, 80))
    zebra = summary.words[1]
    assert (zebra.word.text, zebra.probability) == ("zebra", 0.25)
    assert zebra.peak is not None
    # cell (0, 1) of 4 x 4 over the centre crop, x from 20 to 60
    assert (zebra.peak.x, zebra.peak.y) == (35, 5)
    assert zebra.peak.value == pytest.approx(0.8)
    assert summary.words[0].peak is None
    assert summary.vmax == pytest.approx(0.8)
    assert not summary.assumed


def test_map_of_a_resized_picture_lies_where_the_peak_lies(result):
    summary = summarise(result, (40, 80))
    heat = summary.map_of(2, (20, 40))
    row, column = divmod(int(heat.argmax()), 40)
    assert heat.shape == (20, 40)
    assert row >= 15
    assert 25 <= column < 30  # the crop ends at 30 of 40


def test_unknown_geometry_is_assumed_and_said():
    assert summarise(hand_made(preprocessing=None), (40, 80)).assumed
    assert not summarise(hand_made(preprocessing=None), (16, 16)).assumed


def test_a_word_does_not_support_itself(result):
    summary = summarise(result, (16, 16))
    assert [word.text for word in summary.context[:5]] == ["what", "costs", "<b>$5</b>", "?", "a"]
    assert summary.context_attr[1, 5] == 0  # "zeb" supports "ra", the word not itself
    assert summary.context_attr[1, 4] == result.token_attr[1:3, 5].max()


def test_selected_rows_are_read_without_alignment(result):
    summary = summarise(result.select([3]), (16, 16))
    assert len(summary.context) == 8
    assert summary.context_attr[0].max() == result.token_attr[3].max()


def test_table_is_aligned(result):
    lines = format_table(summarise(result, (40, 80)), content_only=False).splitlines()
    assert [line.split()[0] for line in lines] == ["word", "-----", "a", "zebra", "&", "."]
    assert "0.250         0.800  top (35, 5)" in lines[3]
    assert lines[2].endswith("nowhere")
    ends = {re.match(r"\S+( dog)?\s+[\d.]+", line).end() for line in lines[2:]}
    assert len(ends) == 1
    assert "a " not in format_table(summarise(result, (40, 80)))[60:70]


def test_table_counts_wide_characters_twice():
    result = hand_made(output_tokens=(" 狗", " b", " c", " d", " e"))
    lines = format_table(summarise(result, (16, 16))).splitlines()
    assert lines[2].index("0.900") == lines[3].index("0.500") - 1


# ---- plots -----------------------------------------------------------------------------------


def test_plots_return_figures_that_draw_and_that_pyplot_does_not_keep(result, wide):
    backend = mpl.get_backend()
    figures = [
        result.plot_token_attr(),
        result.plot_seq_attr(),
        result.plot_image_heatmap(),
        result.plot_image_heatmap(target_token_pos=1, picture=wide),
        plot_text_heatmap(result),
    ]
    for fig, ax in figures:
        assert ax in fig.axes
        assert drawn(fig).std() > 0
        assert fig._repr_png_().startswith(b"\x89PNG")  # a notebook shows it
    assert plt.get_fignums() == []
    assert mpl.get_backend() == backend


@pytest.mark.parametrize("name", ["plot_token_attr", "plot_seq_attr", "plot_image_heatmap"])
def test_show_uses_pyplot_and_leaves_nothing(result, name, monkeypatch):
    seen = []
    monkeypatch.setattr(plt, "show", lambda: seen.append(len(plt.get_fignums())))
    assert getattr(result, name)(show=True) is None
    assert seen == [1]
    assert plt.get_fignums() == []


def test_token_plot_has_the_values_and_literal_labels(result):
    _, ax = result.plot_token_attr()
    np.testing.assert_array_equal(ax.images[0].get_array(), result.token_attr.numpy())
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels[2] == r"<b>\$5</b>"
    assert labels[3] == r"\n"
    assert [label.get_text() for label in ax.get_yticklabels()][1] == "zeb"
    assert len(ax.texts) == int((result.token_attr != 0).sum())


def test_many_tokens_stay_readable():
    tokens = tuple(f" token number {n} $x" for n in range(100))
    many = hand_made(
        token_attr=torch.rand(60, 100),
        input_tokens=tokens,
        output_tokens=tokens[:60],
        output_ids=torch.arange(60),
        output_probs=torch.rand(60),
        grid_attr=(torch.rand(60, 4, 4),),
    )
    fig, ax = many.plot_token_attr()
    assert not ax.texts
    drawn(fig)
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(a.x1 <= b.x0 + 2 for a, b in itertools.pairwise(boxes))


def test_image_heatmap_chooses_tokens(result):
    def values(position):
        _, ax = result.plot_image_heatmap(target_token_pos=position)
        return torch.from_numpy(np.asarray(ax.images[0].get_array()))

    torch.testing.assert_close(values(2), result.image_map(2))
    torch.testing.assert_close(values(-2), result.image_map(3))
    torch.testing.assert_close(values((1, 3)), result.image_map(1) + result.image_map(2))
    torch.testing.assert_close(values(None), result.image_attr[0].sum(0))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target_token_pos": 9}, IndexError),
        ({"target_token_pos": (3, 3)}, ValueError),
        ({"target_token_pos": (3, 9)}, ValueError),
        ({"image": 1}, IndexError),
    ],
)
def test_image_heatmap_refuses(result, options, error):
    with pytest.raises(error):
        result.plot_image_heatmap(**options)


def test_zero_maps_and_signed_attributions_draw(wide):
    nothing = hand_made(grid_attr=(torch.zeros(5, 4, 4),), token_attr=torch.zeros(5, 10))
    for fig, _ in (
        nothing.plot_token_attr(),
        nothing.plot_seq_attr(),
        nothing.plot_image_heatmap(picture=wide),
    ):
        drawn(fig)
    fig, ax = replace(nothing, token_attr=-torch.rand(5, 10)).plot_token_attr()
    assert ax.images[0].get_clim()[0] < 0
    drawn(fig)


# ---- HTML ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what the tests ask about and checks that tags nest."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, html):
        super().__init__()
        self.stack, self.tags, self.texts = [], [], []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_text_heatmap_has_every_word_once_as_a_choice(result):
    html = text_heatmap_html(result)
    page = Page(html)
    choices = page.all("input")
    assert [c["aria-label"] for c in choices] == ["a", "zebra", "& dog", "."]
    assert [c["aria-label"] for c in choices if "checked" in c] == ["zebra"]
    assert {label["for"] for label in page.all("label")} == {c["id"] for c in choices}
    for choice in choices:
        assert f"#{choice['id']}:checked~" in html


def test_text_heatmap_is_escaped_ascii_and_alone(result):
    html = text_heatmap_html(replace(result, input_tokens=("狗", *PROMPT[1:], *ANSWER)))
    assert html.isascii()
    page = Page(html)
    assert not page.all("b")
    assert not page.all("script")
    assert "<b>$5</b>" in page.texts
    assert "狗" in page.texts
    assert "http" not in html


def test_text_heatmap_colours_the_strongest_word_most(result):
    attr = torch.zeros(5, 10)
    attr[3, 1], attr[3, 0] = 2.0, 1.0
    page = Page(text_heatmap_html(replace(result, token_attr=attr)))
    spans = {s["title"]: s["class"] for s in page.all("span") if "title" in s}
    assert spans == {"0": "s0", "2": "s75", "1": "s38"}  # per cent of the full colour


def test_two_heatmaps_on_one_page_do_not_share_ids(result):
    ids = [c["id"] for c in Page(text_heatmap_html(result)).all("input")]
    other = hand_made(token_attr=result.token_attr * 0.5)
    assert set(ids).isdisjoint(c["id"] for c in Page(text_heatmap_html(other)).all("input"))


def test_text_heatmap_wants_an_overlay_per_word(result):
    with pytest.raises(ValueError, match="overlays"):
        text_heatmap_html(result, overlays=["x.png"])


# ---- report ----------------------------------------------------------------------------------


def test_report_writes_page_table_and_json(result, wide, tmp_path):
    contents = write_report(
        tmp_path, result, [wide], prompt="<i>what</i>?", notes=["A note."], facts={"model": "m<b>"}
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.html", "table.txt", "words.json"]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "&lt;i&gt;what&lt;/i&gt;?" in page
    assert "A note." in page
    assert "m&lt;b&gt;" in page
    assert contents.methods[0].top == pytest.approx(0.8)
    summary = summarise(result, (40, 80))
    data = json.loads((tmp_path / "words.json").read_text())
    assert data["facts"] == {"model": "m<b>"}
    assert data["notes"] == ["A note."]
    (method,) = data["methods"]
    for entry, word in zip(summary.words, data["words"], strict=True):
        assert word["word"] == entry.word.text
        assert word["probability"] == pytest.approx(entry.probability)
        peak = word["peaks"][method]
        assert (peak is None) == (entry.peak is None or entry.peak.value < 0.02 * summary.vmax)
        if peak is not None:
            assert peak["value"] == pytest.approx(entry.peak.value)
            assert peak["where"] == entry.where
    assert (tmp_path / "table.txt").read_text() == format_table(summary, content_only=False) + "\n"


def test_report_of_a_large_picture_is_bounded(result, tmp_path):
    write_report(tmp_path, result, [Image.new("RGB", (3000, 1500))])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    data = re.search(r'id="picture-0" href="data:image/jpeg;base64,([^"]*)"', page)[1]
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.size == (1000, 500)
    assert 'viewBox="0 0 3000 1500"' in page  # where things are is said in the picture's own pixels


def test_report_says_what_is_assumed(wide, tmp_path):
    write_report(tmp_path, hand_made(preprocessing=None), [wide])
    assert "it is assumed that the model saw the whole picture" in (
        tmp_path / "index.html"
    ).read_text(encoding="utf-8")


def test_folder_appears_whole_or_not_at_all(tmp_path):
    def fill(folder):
        with filled_folder(folder) as partial:
            (partial / "one.txt").write_text("1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fill(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_second_report_replaces_the_first_and_nothing_else(result, wide, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.png").write_bytes(b"mine")
    for answer in (ANSWER, (" a", " cat", " cat", " cat", ".")):
        with filled_folder(out) as folder:
            tokens = (*result.input_tokens[: -len(answer)], *answer)
            write_report(folder, replace(result, output_tokens=answer, input_tokens=tokens), [wide])
    names = {path.name for path in out.iterdir()}
    assert names == {"mine.png", "index.html", "table.txt", "words.json"}
    assert "zebra" not in (out / "index.html").read_text(encoding="utf-8")


def test_files_that_are_not_ours_are_replaced_by_force_only(tmp_path):
    def fill(**options):
        with filled_folder(tmp_path, **options) as folder:
            (folder / "table.txt").write_text("a")
            (folder / "words.json").write_text('{"written_by": "captum_mllm"}')

    (tmp_path / "table.txt").write_bytes(b"mine")
    (tmp_path / "words.json").write_text('{"written_by": "someone else"}')
    with pytest.raises(FileExistsError, match=r"holds table.txt, words.json, which no report"):
        fill()
    assert (tmp_path / "table.txt").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2
    fill(force=True)
    fill()  # now the earlier one is ours
    assert (tmp_path / "table.txt").read_text() == "a"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileExistsError, match="file"):
            check_folder(folder)


# ---- videos ----------------------------------------------------------------------------------


def of_video(steps=3, each=2, **changes):
    """Tokens that one cell each supports; " zeb" and "ra" at different times."""
    maps = torch.zeros(5, steps, 2, 4)
    maps[1, 0, 0, 0], maps[2, steps - 1, 1, 3], maps[3, steps // 2, 0, 3] = 0.5, 0.8, 0.4
    grid = ImageGrid(2, 4, 16, 32, steps=steps, frames=steps * each)
    maps = maps.repeat_interleave(each, 1)
    fields = {"grid_attr": (maps,), "grids": (grid,), "preprocessing": Preprocessing(whole=True)}
    return hand_made(**(fields | changes))


def frame_pictures(count, size=(64, 32)):
    return [Image.new("RGB", size, (20 * n, 100, 100)) for n in range(count)]


def shown(ax):
    return torch.from_numpy(np.asarray(ax.images[0].get_array()))


@pytest.mark.parametrize(("position", "row"), [(2, 2), (-3, 2), (3, 3)])
@pytest.mark.parametrize("frame", [0, 3, 5, -1])
def test_one_frame_of_a_video(position, row, frame):
    result = of_video()
    fig, ax = result.plot_image_heatmap(target_token_pos=position, frame=frame)
    torch.testing.assert_close(shown(ax), result.image_map(row)[frame])
    assert ax.get_title().splitlines()[-1] == f"frame {frame % 6}"
    # The scale is the video's, whatever the frame.
    assert ax.images[0].get_clim() == (0, pytest.approx(float(result.grid_attr[0][row].max())))
    drawn(fig)


def test_frames_of_a_video_side_by_side():
    result = of_video()
    fig, axes = result.plot_image_heatmap()
    assert [ax.get_title() for ax in axes] == ["frames 0-1", "frames 2-3", "frames 4-5"]
    whole = result.image_attr[0].sum(0)
    for n, ax in enumerate(axes):
        torch.testing.assert_close(shown(ax), whole[2 * n])
        assert ax.images[0].get_clim() == (0, pytest.approx(0.8))
    drawn(fig)


@pytest.mark.parametrize(
    ("steps", "each", "titles"),
    [
        (1, 2, ["frames 0-1"]),
        (5, 1, [f"frame {n}" for n in range(5)]),
        (15, 2, [f"frames {2 * n}-{2 * n + 1}" for n in (0, 2, 4, 6, 8, 10, 12, 14)]),
    ],
)
def test_at_most_8_frames_from_the_first_to_the_last(steps, each, titles):
    maps = torch.rand(5, steps, 2, 4).repeat_interleave(each, 1)
    fig, axes = of_video(steps, each, grid_attr=(maps,)).plot_image_heatmap()
    assert [ax.get_title() for ax in axes] == titles
    assert len(fig.axes) == len(titles) + 1  # and the colour bar
    drawn(fig)


def test_pictures_of_a_video_lie_under_their_own_frames():
    result, pictures = of_video(), frame_pictures(6)
    _, axes = result.plot_image_heatmap(picture=pictures, target_token_pos=2)
    heat, vmax = result.to_image(0, (32, 64))[2], float(result.grid_attr[0][2].max())
    for n, ax in enumerate(axes):
        expected = np.asarray(overlay(pictures[2 * n], heat[2 * n], vmax=vmax))
        np.testing.assert_array_equal(shown(ax).numpy(), expected)
    for given in (pictures, pictures[5]):
        _, ax = result.plot_image_heatmap(picture=given, target_token_pos=2, frame=5)
        expected = np.asarray(overlay(pictures[5], heat[5], vmax=vmax))
        np.testing.assert_array_equal(shown(ax).numpy(), expected)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"frame": 6}, IndexError, "frame 6 .* 6 frames"),
        ({"frame": -7}, IndexError, "frame -7"),
        ({"picture": frame_pictures(1)[0]}, ValueError, "single one.*frame="),
        ({"picture": frame_pictures(2)}, ValueError, "must be 6 pictures"),
        ({"picture": frame_pictures(5) + frame_pictures(1, (9, 9))}, ValueError, "of one size"),
        ({"frame": 1, "picture": frame_pictures(7)}, ValueError, "must be 6 pictures"),
    ],
)
def test_frames_that_are_none(options, error, words):
    with pytest.raises(error, match=words):
        of_video().plot_image_heatmap(**options)


def test_a_still_image_has_no_frames(result, wide, tmp_path):
    for refused in (
        lambda: result.plot_image_heatmap(frame=0),
        lambda: result.plot_image_heatmap(picture=[wide]),
        lambda: result.plot_time_profile(),
        lambda: summarise(result, (40, 80), frame=0),
    ):
        with pytest.raises(ValueError, match="image 0 is a still image"):
            refused()


def test_a_picture_of_the_frames_size_is_placed_by_a_box_that_is_known():
    """A frame that shows more than the picture, though both have the same size."""
    grid = ImageGrid(4, 4, 16, 16, picture=(16, 16), box=(0.0, -8.0, 16.0, 24.0))
    result = hand_made(grids=(grid,), preprocessing=None)
    picture = Image.new("RGB", (16, 16))
    _, ax = result.plot_image_heatmap(picture=picture, target_token_pos=3)
    heat = result.to_image(0, picture)[3]
    expected = overlay(picture, heat, vmax=float(heat.max()) or 1.0)
    np.testing.assert_array_equal(shown(ax).numpy(), np.asarray(expected))


def test_time_profile_has_a_row_per_token_and_a_column_per_step():
    result = of_video()
    fig, ax = result.plot_time_profile()
    torch.testing.assert_close(shown(ax), result.time_profile()[:, ::2])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "zeb", "ra", "& dog", "."]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0-1", "2-3", "4-5"]
    drawn(fig)
    _, ax = result.plot_time_profile(target_token_pos=(1, 3))
    torch.testing.assert_close(shown(ax), result.time_profile()[1:3, ::2])


def test_time_profile_of_one_token_is_a_line():
    result = of_video(each=1)
    fig, ax = result.plot_time_profile(target_token_pos=2)
    (line,) = ax.lines
    assert line.get_ydata() == pytest.approx([0, 0, 0.1])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]
    assert ax.get_title() == "ra"
    drawn(fig)


def test_time_profile_of_a_long_video_has_labels_that_do_not_touch():
    steps = 150
    maps = torch.rand(5, steps, 2, 4).repeat_interleave(2, 1)
    long = of_video(steps, grid_attr=(maps,))
    for position in (None, 0):
        fig, ax = long.plot_time_profile(target_token_pos=position)
        drawn(fig)
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert 10 < len(boxes) <= 24
        assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("position", [None, 0])
def test_a_video_of_zeros_draws(position):
    nothing = of_video(grid_attr=(torch.zeros(5, 6, 2, 4),))
    for fig, _ in (
        nothing.plot_image_heatmap(target_token_pos=position),
        nothing.plot_image_heatmap(target_token_pos=position, frame=1),
        nothing.plot_time_profile(target_token_pos=position),
    ):
        drawn(fig)


def test_show_of_a_video_leaves_nothing(monkeypatch):
    seen = []
    monkeypatch.setattr(plt, "show", lambda: seen.append(len(plt.get_fignums())))
    result = of_video()
    assert result.plot_image_heatmap(show=True) is None
    assert result.plot_image_heatmap(show=True, frame=1) is None
    assert result.plot_time_profile(show=True) is None
    assert seen == [1, 1, 1]
    assert plt.get_fignums() == []


def test_labels_of_a_video_fit_into_the_figure():
    """The colour bar's label is the longest text next to a low figure."""
    for fig, _ in (of_video(2).plot_image_heatmap(), of_video().plot_time_profile()):
        drawn(fig)
        label = fig.axes[-1].yaxis.label.get_window_extent()
        assert label.y0 >= 0
        assert label.y1 <= fig.bbox.y1


def test_summary_of_a_video_takes_the_frame_that_supports_each_word_most():
    summary = summarise(of_video(), (32, 64))
    frames = [(entry.word.text, entry.frame, entry.peak and entry.peak.value) for entry in
              summary.words]  # fmt: skip
    assert frames == [
        ("a", 0, None),
        ("zebra", 4, pytest.approx(0.8)),
        ("& dog", 2, pytest.approx(0.4)),
        (".", 0, None),
    ]
    assert summary.words[1].where == "frame 4: bottom right (56, 24)"
    assert summary.map_of(1, (32, 64)).argmax() >= 16 * 64  # in the lower half
    assert "frame 4: bottom right (56, 24)" in format_table(summary)
    assert "frame 4: bottom right (28, 12)" in text_heatmap_html(of_video())  # as the model saw


def test_summary_of_one_frame():
    summary = summarise(of_video(), (32, 64), frame=-6)
    assert [entry.frame for entry in summary.words] == [0] * 4
    assert summary.words[1].where == "frame 0: top left (8, 8)"
    assert summary.words[2].where == "nowhere"
    assert summary.vmax == pytest.approx(0.5)
    with pytest.raises(IndexError, match="6 frames"):
        summarise(of_video(), (32, 64), frame=6)


def test_report_of_a_video_shows_its_frames_on_one_scale(tmp_path):
    result, frames = of_video(), frame_pictures(6)
    with pytest.raises(ValueError, match="pictures 0 must be the video's 6 frames"):
        write_report(tmp_path, result, [frames[0]])
    assert list(tmp_path.iterdir()) == []
    contents = write_report(tmp_path, result, [frames])
    assert contents_of({"v": result}, frames).pictures[0].title == contents.pictures[0].title
    steps = result.grids[0].steps
    titles = [f"picture 1, frame {step * 6 // steps}" for step in range(steps)]
    assert [picture.title for picture in contents.pictures] == titles
    assert contents.methods[0].top == pytest.approx(float(result.grid_attr[0].max()))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(title in page for title in titles)
    assert contents.notes == (
        f"{steps} of 6 frames are shown; the table and the full colour are of all of them.",
    )


def test_frames_that_a_page_leaves_out_still_count():
    grid = ImageGrid(2, 2, 32, 32, steps=12, frames=24)
    maps = torch.zeros(5, 24, 2, 2)
    maps[3, 2:4, 0, 0], maps[3, 22:, 1, 1], maps[0, 0, 0, 0] = 1.0, 0.2, 0.1
    result = hand_made(grid_attr=(maps,), grids=(grid,), preprocessing=None)
    contents = contents_of({"v": result}, frame_pictures(24))
    (method,) = contents.methods
    assert len(contents.pictures) == 8
    assert method.top == 1.0
    shown, value, where = method.peaks[2]
    assert value == 1.0
    assert where.startswith("frame 2: top left")
    assert contents.pictures[shown].title == "picture 1, frame 22"  # the best of those shown
    assert contents.notes[0].startswith("8 of 24 frames are shown")
