"""A report as a folder: the page to mail, the same as JSON, and a table as plain text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_mllm.visualization.contents import Contents, contents_of
from captum_mllm.visualization.page import render_page
from captum_mllm.visualization.summary import (
    AnswerSummary,
    ResultLike,
    format_table,
    summarise,
)

if TYPE_CHECKING:
    from PIL.Image import Image


def write_report(
    folder: Path,
    results: "ResultLike | Mapping[str, ResultLike]",
    pictures: "Sequence[Image | Sequence[Image]]",
    *,
    prompt: str = "",
    notes: Sequence[str] = (),
    titles: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> Contents:
    """Write page, JSON and table into a folder.

    Files: ``index.html`` (self-contained: mail this one), ``words.json`` (what the page says, with
    its facts) and ``table.txt``. All words and pictures share one colour scale per method.

    Args:
        folder: an existing folder.
        results: what ``attribute`` returned; or name -> result of several methods that explain the
            same answer, between which the reader switches.
        pictures: the original pictures; of a video the list of its frames.
        prompt: the user's prompt.
        notes: sentences on model, method and assumptions, shown on the page.
        titles: a caption per picture, default "picture 1", ...
        facts: name -> value, for the page's foot; see :func:`~captum_mllm.visualization.describe`.

    Returns:
        What the page shows.

    Raises:
        ArgumentError: see :func:`~captum_mllm.visualization.contents_of`.
    """
    named = results if isinstance(results, Mapping) else {results.method or "method": results}
    contents = contents_of(named, pictures, prompt=prompt, titles=titles)
    first: ResultLike = next(iter(named.values()))
    _write(folder / "index.html", render_page(contents, notes=notes, facts=facts))
    _write(folder / "table.txt", answer_table(first, pictures, titles, content_only=False) + "\n")
    _write(folder / "words.json", _json(contents, notes, facts or {}))
    return contents


def answer_table(
    result: ResultLike,
    pictures: "Sequence[Image | Sequence[Image]]",
    titles: Sequence[str] = (),
    *,
    content_only: bool = True,
) -> str:
    """The words of an answer as plain text, one table per picture.

    Args:
        result: what ``attribute`` returned.
        pictures: as for :func:`write_report`.
        titles: a caption per picture, default "picture 1", ...; only used for several.
        content_only: leave function words and punctuation out, default True.

    Returns:
        Lines.
    """
    parts = []
    for number, summary in enumerate(_summaries(result, pictures)):
        title = titles[number] if number < len(titles) else f"picture {number + 1}"
        head = f"{title}\n" if len(pictures) > 1 else ""
        parts.append(f"{head}{format_table(summary, content_only=content_only)}")
    return "\n\n".join(parts)


def _summaries(
    result: ResultLike, pictures: "Sequence[Image | Sequence[Image]]"
) -> list[AnswerSummary]:
    singles: list[Any] = [p[0] if isinstance(p, Sequence) else p for p in pictures]
    return [summarise(result, (p.height, p.width), n) for n, p in enumerate(singles)]


def _json(contents: Contents, notes: Sequence[str], facts: Mapping[str, str]) -> str:
    words = []
    for n, word in enumerate(contents.words):
        entry: dict[str, Any] = {
            "word": word.text,
            "content": word.content,
            "probability": word.probability,
            "peaks": {},
        }
        for method in contents.methods:
            peak = method.peaks[n]
            entry["peaks"][method.name] = peak and {
                "picture": contents.pictures[peak[0]].title,
                "value": peak[1],
                "where": peak[2],
            }
        words.append(entry)
    head = {
        "written_by": "captum_mllm",
        "prompt": contents.prompt,
        "answer": contents.answer,
        "methods": {
            method.name: {"about": method.about, "units": method.units, "full_colour": method.top}
            for method in contents.methods
        },
        "notes": list(notes),
        "facts": dict(facts),
    }
    return json.dumps({**head, "words": words}, indent=2, ensure_ascii=True) + "\n"


def _write(path: Path, text: str) -> None:
    # Tokens, prompts and file names may hold what UTF-8 can't.
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
