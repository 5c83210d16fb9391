"""Figures with and without pyplot, and text that matplotlib draws literally."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from captum_mllm.validation import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL_CHARACTERS = 18


def new_figure(size: tuple[float, float], show: bool) -> "Figure":
    """An empty figure, registered with pyplot only if pyplot is to show it.

    Args:
        size: (width, height), inches.
        show: whether pyplot will show it.
    """
    options: dict[str, Any] = {"figsize": size, "layout": "constrained", "facecolor": "white"}
    if show:
        from matplotlib import pyplot as plt

        return plt.figure(**options)
    from captum_mllm.visualization.figure import NotebookFigure

    return NotebookFigure(**options)


def canvas_of(ax: "Axes | None", size: tuple[float, float], show: bool) -> "tuple[Figure, Axes]":
    """The figure and axes to draw on: the caller's axes, or those of a new figure.

    Args:
        ax: the caller's axes, or None.
        size: (width, height) of a new figure, inches.
        show: whether pyplot will show it.

    Raises:
        ArgumentError: ``ax`` is no matplotlib axes, or comes with ``show=True``.
    """
    if ax is None:
        fig = new_figure(size, show)
        return fig, fig.subplots()
    if not hasattr(ax, "imshow"):
        raise ArgumentError("ax", f"must be matplotlib axes, got {type(ax).__name__}.")
    if show:
        raise ArgumentError("ax", "belongs to a figure of yours: show that, and leave show out.")
    return ax.figure, ax  # type: ignore[return-value]


def finish(fig: "Figure", ax: Any, show: bool) -> "tuple[Figure, Any] | None":
    """The value that a plot returns: (figure, axes), or None once it was shown.

    Args:
        fig: the figure.
        ax: its axes.
        show: whether to show it with pyplot.
    """
    if not show:
        from captum_mllm.visualization.figure import Plot

        return Plot(fig, ax)
    from matplotlib import pyplot as plt

    plt.show()
    if not plt.isinteractive():  # an interactive window stays open until its user closes it
        plt.close(fig)
    return None


def numbers(values: Tensor) -> np.ndarray:
    """Values as a float32 array for matplotlib.

    Args:
        values: any tensor.
    """
    return values.detach().cpu().float().numpy()


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Labels of an axis of tokens, cut to a readable length.

    Args:
        tokens: labels as in ``result.output_tokens``.
    """
    shown = (token.strip(" ") or token or "\u2026" for token in tokens)  # "": see words.py
    return [literal(token, _LABEL_CHARACTERS) for token in shown]


def literal(text: str, limit: int | None = None) -> str:
    """Text as matplotlib draws it literally: no line breaks, no mathematics, not too long.

    Args:
        text: any text.
        limit: most characters to show, or None.

    Example:
        >>> print(literal("costs $5", 7))
        cost...
    """
    shown = plain(text)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[: limit - 3]}..."
    return shown.replace("$", r"\$")


def plain(text: str) -> str:
    """Text on one line: characters that can't be printed are written as Python escapes.

    Args:
        text: any text.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
