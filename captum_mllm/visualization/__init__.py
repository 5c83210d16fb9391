"""Overlays, text heat maps and a report page of a result; its plots are its ``plot_*`` methods.

Nothing here needs a display, LaTeX or a network. Matplotlib is imported on first use and its
backend is never switched.
"""

from captum_mllm.visualization.overlays import colour_stops, overlay
from captum_mllm.visualization.plots import plot_text_heatmap
from captum_mllm.visualization.report import write_report
from captum_mllm.visualization.summary import (
    AnswerSummary,
    WordSummary,
    answer_text,
    format_table,
    summarise,
)
from captum_mllm.visualization.text import text_heatmap_html

__all__ = [
    "AnswerSummary",
    "WordSummary",
    "answer_text",
    "colour_stops",
    "format_table",
    "overlay",
    "plot_text_heatmap",
    "summarise",
    "text_heatmap_html",
    "write_report",
]
