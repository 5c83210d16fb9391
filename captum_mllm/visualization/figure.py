"""A matplotlib figure that shows itself in a notebook without pyplot."""

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure without pyplot; as the last value of a notebook's cell it is displayed."""

    def _repr_png_(self) -> bytes:
        """What IPython asks for."""
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()
