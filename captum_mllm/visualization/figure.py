"""A matplotlib figure, and a plot, that show themselves in a notebook without pyplot."""

import io
from typing import Any, NamedTuple

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure without pyplot; as the last value of a notebook's cell it is displayed."""

    def _repr_png_(self) -> bytes:
        """What IPython asks for."""
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()


class Plot(NamedTuple):
    """What a plot returns: ``figure, axes = result.plot_token_attr()``; a notebook shows it.

    Args:
        figure: the figure.
        axes: its axes; an array of them where there are several panels.
    """

    figure: Figure
    axes: Any

    def _repr_png_(self) -> bytes:
        """What IPython asks for."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png")
        return stream.getvalue()
