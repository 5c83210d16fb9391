"""Overlays, text heat maps and a report page of a result; its plots are its ``plot_*`` methods.

Nothing here needs a display, LaTeX or a network. Matplotlib is imported on first use and its
backend is never switched.
"""

from captum_mllm.visualization.compare import compare, to_frame
from captum_mllm.visualization.contents import Contents, contents_of
from captum_mllm.visualization.overlays import colour_stops, overlay
from captum_mllm.visualization.page import render_page
from captum_mllm.visualization.plots import plot_text_heatmap
from captum_mllm.visualization.provenance import Provenance, describe
from captum_mllm.visualization.reading import Phrase, PlaceSupport, find_words, phrase_of, words_at
from captum_mllm.visualization.report import answer_table, write_report
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
    "Contents",
    "Phrase",
    "PlaceSupport",
    "Provenance",
    "WordSummary",
    "answer_table",
    "answer_text",
    "colour_stops",
    "compare",
    "contents_of",
    "describe",
    "find_words",
    "format_table",
    "overlay",
    "phrase_of",
    "plot_text_heatmap",
    "render_page",
    "summarise",
    "text_heatmap_html",
    "to_frame",
    "words_at",
    "write_report",
]
