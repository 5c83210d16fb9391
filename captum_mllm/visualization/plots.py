"""Matplotlib plots of a result's text, called by its ``plot_*`` methods.

With ``show=False`` a figure is independent of pyplot, which neither keeps it nor shows it a second
time, so that a loop over many results does not accumulate figures; save it with ``fig.savefig``,
show it in a notebook with ``fig`` as the cell's last line. With ``show=True`` pyplot shows it with
the backend that the user has set.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from captum_mllm.visualization.canvas import canvas_of, finish, literal, numbers, token_labels
from captum_mllm.visualization.summary import ResultLike, answer_words, context_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_TEXTS = 300  # more numbers than that are illegible
_CELL_COLUMNS = 24


def draw_token_attr(
    result: ResultLike, show: bool, ax: "Axes | None" = None
) -> "tuple[Figure, Axes] | None":
    """The method ``plot_token_attr`` of a result, which explains it.

    Args:
        result: what ``attribute`` returned.
        show: as there.
        ax: as there.
    """
    return _matrix(
        result.token_attr,
        result.output_tokens,
        result.input_tokens,
        f"attribution of text tokens ({result.units})",
        show,
        ax,
    )


def plot_text_heatmap(
    result: ResultLike, show: bool = False, *, ax: "Axes | None" = None
) -> "tuple[Figure, Axes] | None":
    """Heat map by words: which words (across) support each word of the answer (down).

    Args:
        result: what ``attribute`` returned.
        show: show the plot and return None; default False returns (figure, axes).
        ax: axes to draw on, default those of a new figure.

    Returns:
        (figure, axes), or None if shown. A word's value is the largest over both words' tokens.
    """
    words = answer_words(result)
    context, attr = context_of(result, words)
    return _matrix(
        attr,
        [word.text for word in words],
        [word.text for word in context],
        f"attribution of words ({result.units})",
        show,
        ax,
    )


def draw_seq_attr(
    result: ResultLike, show: bool, ax: "Axes | None" = None
) -> "tuple[Figure, Axes] | None":
    """The method ``plot_seq_attr`` of a result, which explains it.

    Args:
        result: what ``attribute`` returned.
        show: as there.
        ax: as there.
    """
    values = numbers(result.seq_attr)
    width = float(np.clip(0.3 * len(values) + 1.5, 6.4, 40))
    fig, ax = canvas_of(ax, (width, 4.0), show)
    colours = np.where(values < 0, "#d0365b", "#4772b3")
    ax.bar(np.arange(len(values)), values, color=colours.tolist())
    ax.set_xticks(np.arange(len(values)), labels=token_labels(result.input_tokens))
    ax.tick_params(axis="x", rotation=90 if len(values) > 12 else 45, labelsize=8)
    ax.set_xlim(-0.8, max(len(values), 1) - 0.2)
    ax.set_ylabel(literal(f"attribution, summed over the answer ({result.units} each)"))
    ax.spines[["top", "right"]].set_visible(False)
    return finish(fig, ax, show)


def _matrix(
    attr: Tensor,
    down: Sequence[str],
    across: Sequence[str],
    name: str,
    show: bool,
    ax: "Axes | None",
) -> "tuple[Figure, Axes] | None":
    values = numbers(attr)
    rows, cols = values.shape
    small = rows * cols <= _CELL_TEXTS and cols <= _CELL_COLUMNS
    across_inch, down_inch = (0.5, 0.34) if small else (0.2, 0.2)
    width = float(np.clip(across_inch * cols + 2.6, 6.4, 40))
    height = float(np.clip(down_inch * rows + 1.6, 2.8, 40))
    fig, ax = canvas_of(ax, (width, height), show)
    top = float(np.abs(values).max(initial=0.0)) or 1.0
    low, cmap = (-top, "RdBu_r") if values.min(initial=0.0) < 0 else (0.0, "Blues")
    picture = ax.imshow(values, cmap=cmap, vmin=low, vmax=top, aspect="auto")
    size = 8 if small else 7
    ax.set_xticks(np.arange(cols), labels=token_labels(across))
    ax.set_yticks(np.arange(rows), labels=token_labels(down))
    ax.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, labelsize=size)
    for label in ax.get_xticklabels():
        label.set(rotation=60 if small else 90, ha="left" if small else "center")
        label.set_rotation_mode("anchor" if small else "default")
    if small:
        _write_cells(ax, values, top)
    fig.colorbar(picture, ax=ax, label=literal(name), fraction=0.03, pad=0.02)
    return finish(fig, ax, show)


def _write_cells(ax: "Axes", values: np.ndarray, top: float) -> None:
    for (row, col), value in np.ndenumerate(values):
        if value != 0:
            colour = "white" if abs(value) > 0.6 * top else "black"
            ax.text(col, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
