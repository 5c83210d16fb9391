"""Matplotlib plots of a result's images and videos, called by its ``plot_*`` methods."""

from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from captum_mllm.functional import upsample
from captum_mllm.geometry import maps_to_picture
from captum_mllm.validation import ArgumentError, as_index
from captum_mllm.visualization.canvas import (
    canvas_of,
    finish,
    literal,
    new_figure,
    numbers,
    token_labels,
)
from captum_mllm.visualization.overlays import CMAP, overlay
from captum_mllm.visualization.reading import phrase_of
from captum_mllm.visualization.summary import ResultLike, answer_text, checked_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

TokenKey = int | tuple[int, int] | str | tuple[str, int]
"""What names tokens of a result: a row, rows (m, n), a word or phrase, (text, which mention)."""

_PANELS = 8  # frames of a video in one figure, at most
_TICKS = 24  # labels of times along an axis, at most
_MARKERS = 60  # more points than that make one line


def draw_image_heatmap(
    result: ResultLike,
    show: bool,
    target_token_pos: TokenKey | None,
    image: int,
    picture: "Image | Sequence[Image] | None",
    frame: int | None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Any] | None":
    """The method ``plot_image_heatmap`` of a result, which explains it.

    Args:
        result: what ``attribute`` returned.
        show: as there.
        target_token_pos: as there.
        image: as there.
        picture: as there.
        frame: as there.
        ax: as there.
    """
    rows = chosen_rows(result, target_token_pos)
    if not -len(result.grids) <= image < len(result.grids):
        raise IndexError(f"image {image} is out of range: there are {len(result.grids)} images.")
    grid = result.grids[image]
    if frame is None and grid.steps:
        if ax is not None:
            raise ArgumentError(
                "ax", f"holds one picture, image {image} is a video: name a frame=."
            )
        return _plot_frames(result, show, rows, image, picture)
    if frame is not None and not grid.steps:
        raise ValueError(f"image {image} is a still image: frame= is for videos, leave it out.")
    frame = checked_frame(grid, frame)
    single: Any = picture
    if isinstance(picture, Sequence):
        single = _frame_pictures(result, image, picture)[frame or 0]
    frames = None if frame is None else [frame]
    heat = heat_of(result, rows, image, single, frames)
    heat = heat if frame is None else heat[0]
    top = _top(heat if frame is None else _largest(result, rows, image))
    fig, ax = canvas_of(ax, (6.4, 5.2), show)
    paint_heat(ax, heat, single, top)
    title = _title(result, rows)
    ax.set_title(title if frame is None else f"{title}\nframe {frame}", fontsize=10)
    fig.colorbar(scale_of(top), ax=ax, label=_heat_label(result, rows))
    return finish(fig, ax, show)


def draw_time_profile(
    result: ResultLike,
    show: bool,
    target_token_pos: TokenKey | None,
    image: int,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes] | None":
    """The method ``plot_time_profile`` of a result, which explains it.

    Args:
        result: what ``attribute`` returned.
        show: as there.
        target_token_pos: as there.
        image: as there.
        ax: as there.
    """
    rows = chosen_rows(result, target_token_pos)
    chosen = result.select(rows)
    profile = chosen.time_profile(image)  # raises on still images
    grid = result.grids[image]
    names = step_labels(grid.steps, grid.frames)
    values = numbers(profile[:, :: grid.frames // grid.steps])
    label = literal(f"attribution ({result.units})") + "\nmean over the frame"
    width = float(np.clip(0.35 * grid.steps + 2.6, 6.4, 12))
    if len(rows) == 1:
        fig, ax = canvas_of(ax, (width, 3.6), show)
        marker = "o" if grid.steps <= _MARKERS else ""
        ax.plot(np.arange(grid.steps), values[0], marker=marker, color="#4772b3")
        ax.set_ylim(min(0.0, 1.05 * float(values.min())), 1.08 * float(values.max()) or 1.0)
        ax.set_ylabel(label, fontsize=9)
        ax.set_title(_title(result, rows), fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    else:
        high = float(np.clip(0.26 * len(rows) + 1.4, 2.8, 40))
        fig, ax = canvas_of(ax, (width, high), show)
        top = float(values.max()) or 1.0
        drawn = ax.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        ax.set_yticks(np.arange(len(rows)), labels=token_labels(chosen.output_tokens), fontsize=8)
        fig.colorbar(drawn, ax=ax, fraction=0.03, pad=0.02).set_label(label, fontsize=8)
    every = -(-grid.steps // _TICKS)
    ax.set_xticks(np.arange(0, grid.steps, every), labels=names[::every], fontsize=8)
    if grid.steps > 8:
        ax.tick_params(axis="x", rotation=90)
    ax.set_xlabel("frames of the video")
    return finish(fig, ax, show)


def chosen_rows(result: ResultLike, position: TokenKey | None) -> list[int]:
    """The rows of ``output_tokens`` that ``target_token_pos`` names.

    Args:
        result: what ``attribute`` returned.
        position: a row, (m, n) for rows m to n - 1, a word or phrase, or None for all.
    """
    count = len(result.output_tokens)
    if position is None:
        return list(range(count))
    if isinstance(position, str) or (isinstance(position, tuple) and isinstance(position[0], str)):
        return list(phrase_of(result, position).rows)  # type: ignore[arg-type]
    if (row := as_index(position)) is not None:
        return [row]  # select checks it
    first, end = position  # type: ignore[misc]
    rows = list(range(*slice(first, end).indices(count)))
    if not rows or end > count:
        raise ValueError(
            f"target_token_pos {position} must name rows m to n - 1 with m < n <= {count}."
        )
    return rows


def step_labels(steps: int, frames: int) -> list[str]:
    """The frames that each time step of the model's grid covers.

    Args:
        steps: number of time steps.
        frames: frames of the video.

    Example:
        >>> step_labels(2, 4)
        ['0-1', '2-3']
    """
    each = frames // steps
    if each == 1:
        return [str(step) for step in range(steps)]
    return [f"{step * each}-{(step + 1) * each - 1}" for step in range(steps)]


def _plot_frames(
    result: ResultLike,
    show: bool,
    rows: Sequence[int],
    image: int,
    picture: "Image | Sequence[Image] | None",
) -> "tuple[Figure, Any] | None":
    """Frames of a video side by side: one per step, as all frames of a step share its values."""
    grid = result.grids[image]
    pictures: Any = None if picture is None else _frame_pictures(result, image, picture)
    each = grid.frames // grid.steps
    count = min(_PANELS, grid.steps)
    steps = np.linspace(0, grid.steps - 1, count).round().astype(int).tolist()
    drawn = [step * each for step in steps]
    heat = heat_of(result, rows, image, pictures and pictures[0], drawn)
    top = _top(_largest(result, rows, image))
    across = min(count, 4)
    down = -(-count // across)
    shape = grid.height / grid.width
    high = float(np.clip(2.3 * shape, 1.2, 4.0))
    fig = new_figure((2.4 * across + 1.2, (high + 0.35) * down + 0.7), show)
    panels = np.atleast_1d(fig.subplots(down, across)).ravel()
    names = step_labels(grid.steps, grid.frames)
    for n, (step, frame) in enumerate(zip(steps, drawn, strict=True)):
        ax = panels[n]
        paint_heat(ax, heat[n], pictures and pictures[frame], top)
        ax.set_title(f"frame {names[step]}" if each == 1 else f"frames {names[step]}", fontsize=9)
    for ax in panels[count:]:
        ax.remove()
    fig.suptitle(_title(result, rows), fontsize=10)
    axes = panels[:count]
    fig.colorbar(scale_of(top), ax=list(axes), label=_heat_label(result, rows))
    return finish(fig, axes, show)


def _frame_pictures(result: ResultLike, image: int, pictures: Any) -> "Sequence[Image]":
    frames = result.grids[image].frames
    if not frames:
        raise ValueError(f"image {image} is a still image: picture must be one PIL picture.")
    if not isinstance(pictures, Sequence):
        raise ValueError(
            f"picture is a single one, but image {image} is a video of {frames} frames: say which "
            f"it is with frame=, or give all the frames that the model was given as a list."
        )
    # Processors fill the last step with copies of the last frame.
    least = frames - frames // result.grids[image].steps + 1
    if not least <= len(pictures) <= frames or len({picture.size for picture in pictures}) != 1:
        raise ValueError(
            f"picture must be {frames} pictures of one size, as many as the frames that the model "
            f"was given (the last one may be left out where it is a copy), got "
            f"{[picture.size for picture in pictures]}."
        )
    return [*pictures, *[pictures[-1]] * (frames - len(pictures))]


def heat_of(
    result: ResultLike,
    rows: Sequence[int],
    image: int,
    picture: "Image | None",
    frames: Sequence[int] | None = None,
) -> Tensor:
    """Largest of the rows' maps in pixels of the picture, (height, width) or with frames first.

    It is taken on the grid, where maps are small.

    Args:
        result: what ``attribute`` returned.
        rows: of ``output_tokens``.
        image: which image.
        picture: the original picture; None for the image as the model saw it.
        frames: of a video, which.
    """
    grid = result.grids[image]
    maps = _largest(result, rows, image)[None]
    if frames is not None:
        maps = maps[0, list(frames)]
    known = result.preprocessing is not None or grid.box is not None
    as_seen = picture is None or picture.size == (grid.width, grid.height)
    if picture is None or (as_seen and not known):
        heat = upsample(maps, (grid.height, grid.width))
    else:
        size = (picture.height, picture.width)
        heat = maps_to_picture(maps, result.geometry(image, size), size)
    return heat if frames is not None else heat[0]


def _largest(result: ResultLike, rows: Sequence[int], image: int) -> Tensor:
    return result.select(rows).grid_attr[image].amax(0)


def _top(values: Tensor) -> float:
    """The value of the full colour."""
    return max(float(values.max()), 0.0) or 1.0


def paint_heat(ax: "Axes", heat: Tensor, picture: "Image | None", top: float) -> None:
    """Draw a map, over its picture if there is one.

    Args:
        ax: axes to draw on.
        heat: the map in pixels.
        picture: of the same size, or None.
        top: value of the full colour.
    """
    if picture is None:
        ax.imshow(numbers(heat), cmap=CMAP, vmin=0, vmax=top)
    else:
        ax.imshow(np.asarray(overlay(picture, heat, vmax=top)))
    ax.axis("off")


def _title(result: ResultLike, rows: Sequence[int]) -> str:
    return literal(shorten(answer_text(result.select(rows)), 80, placeholder=" ..."))


def _heat_label(result: ResultLike, rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return literal(f"attribution ({result.units})")
    return literal(f"attribution ({result.units} each)") + f"\nlargest of {len(rows)} tokens"


def scale_of(top: float) -> Any:
    """What a colour bar from 0 to the full colour is made of.

    Args:
        top: value of the full colour.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, top), CMAP)
