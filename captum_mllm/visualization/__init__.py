"""Pictures of a result: overlays, text heat maps, plots and a report page.

Nothing here needs a display, LaTeX or a network. Matplotlib is imported on first use and its
backend is never switched.
"""

from captum_mllm.visualization.heatmaps import plot_image_heatmap, plot_time_profile
from captum_mllm.visualization.overlays import colour_stops, overlay
from captum_mllm.visualization.plots import plot_seq_attr, plot_text_heatmap, plot_token_attr
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
    "plot_image_heatmap",
    "plot_seq_attr",
    "plot_text_heatmap",
    "plot_time_profile",
    "plot_token_attr",
    "summarise",
    "text_heatmap_html",
    "write_report",
]
