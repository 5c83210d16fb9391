"""How a result shows itself: a few lines as text, the text heat map in a notebook."""

from collections.abc import Sequence
from html import escape

from torch import Tensor

from captum_mllm.geometry import ImageGrid
from captum_mllm.visualization.canvas import plain
from captum_mllm.visualization.summary import ResultLike, answer_text
from captum_mllm.visualization.text import text_heatmap_html

_CHARACTERS = 60  # of a text, at most
_ITEMS = 3  # of a list, at most


def result_text(result: ResultLike) -> str:
    """The lines of ``repr(result)``: what there is, and which calls to make next.

    Args:
        result: what ``attribute`` returned.

    Returns:
        Five lines, less than 600 characters whatever the result holds.
    """
    grids = [_grid(*pair) for pair in zip(result.grids, result.grid_attr, strict=False)]
    facts = [f"scale{'s' * (len(result.scales) != 1)} {_numbers(result.scales)}"]
    if result.consistency is not None:
        facts.append(f"consistency {_numbers(result.consistency)}")
    facts.append("without relevance" if result.relevance is None else "with relevance")
    lines = [
        f"MLLMAttributionResult of {_cut(plain(result.method)) or 'an unnamed method'}, "
        f"units: {_cut(plain(result.units))}",
        f"{_count(len(result.output_tokens), 'token')} explained: "
        f"{_cut(repr(answer_text(result)))}",
        f"{_count(len(result.input_tokens), 'text token')}; {_count(len(grids), 'image')}"
        f"{': ' * bool(grids)}{_listed(grids)}",
        "; ".join(facts),
        f"next: {', '.join(f'.{call}' for call in _next_calls(result))}",
    ]
    return "\n  ".join(lines)


def result_html(result: ResultLike) -> str:
    """The HTML that a notebook shows for a result: its text heat map, or why there is none.

    Args:
        result: what ``attribute`` returned.

    Returns:
        ASCII HTML; all text escaped.
    """
    try:
        widget = text_heatmap_html(result)
    except (ValueError, IndexError, RuntimeError) as error:
        reason = f"The text heat map is missing: {error}\n{result_text(result)}"
        return f"<pre>{_escaped(reason)}</pre>"
    caption = (
        f"{result.method}; units: {result.units}. Choose a word. Orange: words that support it. "
        f"Blue: how strongly image regions support a word."
    )
    return f"<p><small>{_escaped(caption)}</small></p>{widget}"


def _next_calls(result: ResultLike) -> list[str]:
    """The calls that show more of a result."""
    calls = ["plot_token_attr()", "save(path)"]
    if any(grid.steps for grid in result.grids):
        calls.insert(0, "plot_time_profile()")
    if result.grids:
        first = result.grids[0]
        placed = result.preprocessing is not None or first.box is not None
        options = ["picture=picture"] if placed and not first.steps else []
        options += ["image=1"] if len(result.grids) > 1 else []
        calls.insert(0, f"plot_image_heatmap({', '.join(options)})")
    return calls


def _escaped(text: str) -> str:
    return escape(text).encode("ascii", "xmlcharrefreplace").decode("ascii")


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 3]}..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(items: Sequence[str]) -> str:
    """The first items of a list, and how many more there are."""
    more = len(items) - _ITEMS
    return ", ".join([*items[:_ITEMS], *([f"{more} more"] if more > 0 else [])])


def _numbers(values: Sequence[float]) -> str:
    return _listed([f"{value:.3g}" for value in values])


def _grid(grid: ImageGrid, maps: Tensor) -> str:
    cells = f"{maps.shape[-2]} x {maps.shape[-1]} cells"
    return f"video of {grid.frames} frames, {cells} each" if grid.steps else cells
