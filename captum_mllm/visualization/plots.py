"""Matplotlib plots of a result, called by its ``plot_*`` methods.

With ``show=False`` a figure stands by itself: pyplot neither keeps it nor shows it a second time,
so a loop over many results piles nothing up; save it with ``fig.savefig``, show it in a notebook
with ``fig`` as the cell's last line. With ``show=True`` pyplot shows it with the backend that the
user has set.
"""

from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from captum_mllm.visualization.overlays import CMAP, overlay
from captum_mllm.visualization.summary import answer_text, answer_words, context_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from captum_mllm.result import MLLMAttributionResult

_LABEL_CHARACTERS = 18
_CELL_TEXTS = 300  # more numbers than that are no longer read
_CELL_COLUMNS = 24


def plot_token_attr(
    result: "MLLMAttributionResult", show: bool = False
) -> "tuple[Figure, Axes] | None":
    """Heat map of ``token_attr``: explained tokens down, text tokens across.

    Args:
        result: what ``attribute`` returned.
        show: show the plot and return None; default False returns (figure, axes).

    Returns:
        (figure, axes), or None. Values are written into the cells while they are few.
    """
    return _matrix(
        result.token_attr,
        result.output_tokens,
        result.input_tokens,
        f"attribution of text tokens ({result.units})",
        show,
    )


def plot_text_heatmap(
    result: "MLLMAttributionResult", show: bool = False
) -> "tuple[Figure, Axes] | None":
    """The same by words: which words (across) led to each word of the answer (down).

    Args:
        result: what ``attribute`` returned.
        show: show the plot and return None; default False returns (figure, axes).

    Returns:
        (figure, axes), or None. A word's value is the largest over both words' tokens.
    """
    words = answer_words(result)
    context, attr = context_of(result, words)
    return _matrix(
        attr,
        [word.text for word in words],
        [word.text for word in context],
        f"attribution of words ({result.units})",
        show,
    )


def plot_seq_attr(
    result: "MLLMAttributionResult", show: bool = False
) -> "tuple[Figure, Axes] | None":
    """Bars of ``seq_attr``, one per text token.

    Args:
        result: what ``attribute`` returned.
        show: show the plot and return None; default False returns (figure, axes).

    Returns:
        (figure, axes), or None.
    """
    values = _numbers(result.seq_attr)
    width = float(np.clip(0.3 * len(values) + 1.5, 6.4, 40))
    fig, ax = _figure((width, 4.0), show)
    colours = np.where(values < 0, "#d0365b", "#4772b3")
    ax.bar(np.arange(len(values)), values, color=colours.tolist())
    ax.set_xticks(np.arange(len(values)), labels=_labels(result.input_tokens))
    ax.tick_params(axis="x", rotation=90 if len(values) > 12 else 45, labelsize=8)
    ax.set_xlim(-0.8, max(len(values), 1) - 0.2)
    ax.set_ylabel(_safe(f"attribution, summed over the answer ({result.units} each)"))
    ax.spines[["top", "right"]].set_visible(False)
    return _finish(fig, ax, show)


def plot_image_heatmap(
    result: "MLLMAttributionResult",
    show: bool = False,
    target_token_pos: int | tuple[int, int] | None = None,
    image: int = 0,
    picture: "Image | None" = None,
) -> "tuple[Figure, Axes] | None":
    """Heat map of one image, over the picture if it is given.

    Args:
        result: what ``attribute`` returned.
        show: show the plot and return None; default False returns (figure, axes).
        target_token_pos: row of ``output_tokens``; (m, n) for the sum of rows m to n - 1; None
            (default) for the sum of all.
        image: which image, default the first.
        picture: PIL picture to draw on: the original picture; where the geometry is not known,
            one of the size of the image as the model saw it.

    Returns:
        (figure, axes), or None.

    Raises:
        IndexError: no such token or image.
        ValueError: an empty range of tokens; a picture whose geometry is not known.
    """
    rows = _rows(result, target_token_pos)
    if not -len(result.grids) <= image < len(result.grids):
        raise IndexError(f"image {image} is out of range: there are {len(result.grids)} images.")
    chosen = result.select(rows)
    grid = result.grids[image]
    as_seen = picture is None or picture.size == (grid.width, grid.height)
    if picture is None or (as_seen and result.preprocessing is None):
        heat = chosen.image_attr[image].sum(0)
    else:
        heat = chosen.to_image(image, picture).sum(0)
    top = max(float(heat.max()), 0.0) or 1.0
    fig, ax = _figure((6.4, 5.2), show)
    if picture is not None:
        ax.imshow(np.asarray(overlay(picture, heat, vmax=top)))
        scale = _scale(top)
    else:
        scale = ax.imshow(_numbers(heat), cmap=CMAP, vmin=0, vmax=top)
    ax.axis("off")
    ax.set_title(_title(result, rows), fontsize=10)
    fig.colorbar(scale, ax=ax, label=_safe(_heat_label(result, rows)))
    return _finish(fig, ax, show)


def _rows(result: "MLLMAttributionResult", position: int | tuple[int, int] | None) -> list[int]:
    count = len(result.output_tokens)
    if position is None:
        return list(range(count))
    if isinstance(position, int):
        return [position]  # select checks it
    first, end = position
    rows = list(range(*slice(first, end).indices(count)))
    if not rows or end > count:
        raise ValueError(
            f"target_token_pos {position} must name rows m to n - 1 with m < n <= {count}."
        )
    return rows


def _title(result: "MLLMAttributionResult", rows: Sequence[int]) -> str:
    return _safe(shorten(answer_text(result.select(rows)), 80, placeholder=" ..."))


def _heat_label(result: "MLLMAttributionResult", rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"attribution ({result.units})"
    return f"attribution, sum of {len(rows)} tokens ({result.units} each)"


def _scale(top: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, top), CMAP)


def _matrix(
    attr: Tensor, down: Sequence[str], across: Sequence[str], name: str, show: bool
) -> "tuple[Figure, Axes] | None":
    values = _numbers(attr)
    rows, cols = values.shape
    small = rows * cols <= _CELL_TEXTS and cols <= _CELL_COLUMNS
    across_inch, down_inch = (0.5, 0.34) if small else (0.2, 0.2)
    width = float(np.clip(across_inch * cols + 2.6, 6.4, 40))
    height = float(np.clip(down_inch * rows + 1.6, 2.8, 40))
    fig, ax = _figure((width, height), show)
    top = float(np.abs(values).max(initial=0.0)) or 1.0
    low, cmap = (-top, "RdBu_r") if values.min(initial=0.0) < 0 else (0.0, "Blues")
    picture = ax.imshow(values, cmap=cmap, vmin=low, vmax=top, aspect="auto")
    size = 8 if small else 7
    ax.set_xticks(np.arange(cols), labels=_labels(across))
    ax.set_yticks(np.arange(rows), labels=_labels(down))
    ax.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, labelsize=size)
    for label in ax.get_xticklabels():
        label.set(rotation=60 if small else 90, ha="left" if small else "center")
        label.set_rotation_mode("anchor" if small else "default")
    if small:
        _write_cells(ax, values, top)
    fig.colorbar(picture, ax=ax, label=_safe(name), fraction=0.03, pad=0.02)
    return _finish(fig, ax, show)


def _write_cells(ax: "Axes", values: np.ndarray, top: float) -> None:
    for (row, col), value in np.ndenumerate(values):
        if value != 0:
            colour = "white" if abs(value) > 0.6 * top else "black"
            ax.text(col, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)


def _figure(size: tuple[float, float], show: bool) -> "tuple[Figure, Axes]":
    if show:
        from matplotlib import pyplot as plt

        fig = plt.figure(figsize=size, layout="constrained", facecolor="white")
    else:
        from captum_mllm.visualization.figure import NotebookFigure

        fig = NotebookFigure(figsize=size, layout="constrained", facecolor="white")
    return fig, fig.subplots()


def _finish(fig: "Figure", ax: "Axes", show: bool) -> "tuple[Figure, Axes] | None":
    if not show:
        return fig, ax
    from matplotlib import pyplot as plt

    plt.show()
    if not plt.isinteractive():  # an interactive window stays open until its user closes it
        plt.close(fig)
    return None


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().cpu().float().numpy()


def _labels(tokens: Sequence[str]) -> list[str]:
    return [_safe(token.strip(" ") or token, _LABEL_CHARACTERS) for token in tokens]


def _safe(text: str, limit: int | None = None) -> str:
    """Text as matplotlib draws it literally: no line breaks, no mathematics, not too long."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if limit is not None and len(plain) > limit:
        plain = f"{plain[: limit - 3]}..."
    return plain.replace("$", r"\$")
