"""A report as a folder: the picture, an overlay per word, text heat map, table and page."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from captum_mllm.pictures import to_eight_bits
from captum_mllm.visualization.overlays import colour_stops, overlay
from captum_mllm.visualization.plots import plot_text_heatmap
from captum_mllm.visualization.summary import (
    AnswerSummary,
    ResultLike,
    answer_text,
    format_table,
    summarise,
)
from captum_mllm.visualization.text import text_heatmap_html

if TYPE_CHECKING:
    from PIL.Image import Image

FILE_SIDE = 1024
"""Longest side of the overlays written as files, at most, pixels."""

LEAST_SIDE = 384
"""Overlays of a smaller picture are enlarged to this longest side, pixels."""

PAGE_SIDE = 512
"""Longest side of the pictures inside the page, pixels."""

ALPHA = 0.65

_STYLE = """
:root{color-scheme:light dark;--fg:#1b1f24;--bg:#fff;--soft:#5c6670;--line:#d5dae0}
@media(prefers-color-scheme:dark){:root{--fg:#e8eaed;--bg:#16191d;--soft:#a3adb8;--line:#3a424c}}
body{margin:0 auto;max-width:62rem;padding:1rem;color:var(--fg);background:var(--bg);
font-family:system-ui,sans-serif;line-height:1.5}
h1{font-size:1.5rem;margin:.25rem 0}h2{font-size:1.15rem;margin:2rem 0 .25rem}
p{overflow-wrap:anywhere;margin:.3rem 0}.soft{color:var(--soft);font-size:.9rem}
.top{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start;margin-top:1rem}
.top img{width:16rem;max-width:100%;height:auto;border-radius:.4rem}
.top div{flex:1 1 16rem;min-width:0}.top .answer{font-size:1.2rem}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.75rem;
margin-top:.75rem}
figure{margin:0}figure img{width:100%;height:auto;border-radius:.4rem;display:block}
figcaption{font-size:.9rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;max-width:40rem}
th,td{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}tr.function{color:var(--soft)}
.bar{height:.8rem;border-radius:.2rem;border:1px solid var(--line);max-width:20rem;
background-color:#777}
.ends{display:flex;justify-content:space-between;max-width:20rem;margin-bottom:.75rem}
.plot{max-width:none;background:#fff;border-radius:.4rem}
"""


def write_report(
    folder: Path,
    result: ResultLike,
    picture: "Image",
    *,
    prompt: str = "",
    notes: Sequence[str] = (),
    frame: int | None = None,
) -> AnswerSummary:
    """Write picture, overlays, text heat map, table and page into a folder.

    Files: ``index.html`` (self-contained; its Content-Security-Policy forbids scripts and
    requests), ``picture.png``,
    ``word-NN-TEXT.png`` per content word, ``text-heatmap.png``, ``text-heatmap.html``,
    ``table.txt`` and ``words.json``. All overlays share one colour scale.

    Args:
        folder: an existing folder.
        result: what ``attribute`` returned, of one image or video.
        picture: the original picture; of a video, the frame.
        prompt: the user's prompt, shown on the page.
        notes: sentences on model, method and assumptions, shown on the page.
        frame: which frame of a video the picture is, as the model was given them.

    Returns:
        The answer word by word.

    Raises:
        IndexError: no such frame.
        ValueError: a video without ``frame``, or a still image with one.
    """
    grid = result.grids[0]
    if grid.steps and frame is None:
        raise ValueError(
            f"result is of a video of {grid.frames} frames, but a report shows one picture: "
            f"name its frame with frame=. result.plot_image_heatmap() and "
            f"result.plot_time_profile() show the whole video."
        )
    picture = to_eight_bits(picture).convert("RGB")
    summary = summarise(result, (picture.height, picture.width), frame=frame)
    if frame is not None:
        notes = [*notes, f"Frame {frame % grid.frames} of a video of {grid.frames} frames."]
    picture.save(folder / "picture.png")
    names = _write_overlays(folder, summary, picture)
    small = _sized(picture, PAGE_SIDE)
    overlays = [_data_url(_overlay(summary, n, small)) for n in range(len(summary.words))]
    plot = _plot_png(result)
    (folder / "text-heatmap.png").write_bytes(plot)
    page = f"<h1>Which words support which</h1>{text_heatmap_html(result, summary=summary)}"
    _write(folder / "text-heatmap.html", _document(page))
    body = "\n".join(
        [
            _head(result, _data_url(small), prompt, [*notes, *_assumptions(summary)]),
            "<h2>Word by word</h2>",
            '<p class="soft">Choose a word of the answer to see which image regions and which '
            "words (orange) support it. Blue: how strongly image regions support the word.</p>",
            text_heatmap_html(result, overlays=overlays, summary=summary),
            _gallery(summary, overlays),
            _table(summary),
            _matrix(plot),
        ]
    )
    _write(folder / "index.html", _document(body))
    _write(folder / "table.txt", format_table(summary, content_only=False) + "\n")
    _write(folder / "words.json", _json(summary, result, prompt, names))
    return summary


def scale_caption(summary: AnswerSummary) -> str:
    """The meaning of the overlays' colours, in sentences.

    Args:
        summary: an answer word by word.
    """
    return (
        f"One colour scale for all words: no heat is 0, the full colour is {summary.vmax:.3g} "
        f"(units: {summary.units}), the largest value of any word. If a word's picture stays grey, "
        f"no image region supports the word."
    )


# ---- pictures -----------------------------------------------------------------------------------


def _sized(picture: "Image", side: int) -> "Image":
    longest = max(picture.size)
    factor = min(side, max(longest, LEAST_SIDE)) / longest
    width, height = (max(1, round(edge * factor)) for edge in picture.size)
    return picture.resize((width, height))


def _overlay(summary: AnswerSummary, index: int, picture: "Image") -> "Image":
    heat = summary.map_of(index, (picture.height, picture.width))
    return overlay(picture, heat, alpha=ALPHA, vmax=summary.vmax)


def _write_overlays(folder: Path, summary: AnswerSummary, picture: "Image") -> dict[int, str]:
    """One file per content word; returns their names by index of the word."""
    base = _sized(picture, FILE_SIDE)
    names = {}
    for index, entry in enumerate(summary.words):
        if entry.word.content:
            text = re.sub(r"[^a-z0-9]+", "", entry.word.text.lower())[:24] or "word"
            names[index] = f"word-{index + 1:02d}-{text}.png"
            _overlay(summary, index, base).save(folder / names[index])
    return names


def _data_url(picture: "Image") -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _plot_png(result: ResultLike) -> bytes:
    drawn = plot_text_heatmap(result)
    stream = io.BytesIO()
    if drawn is not None:
        drawn[0].savefig(stream, format="png", dpi=110)
    return stream.getvalue()


# ---- page ---------------------------------------------------------------------------------------


def _write(path: Path, text: str) -> None:
    # Tokens and prompts may hold what UTF-8 can't.
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def _document(body: str) -> str:
    """The page; its policy lets a browser use its own styles and pictures, and nothing else."""
    colours = ",".join(colour_stops(alpha=ALPHA))
    style = f"{_STYLE}.bar{{background-image:linear-gradient(90deg,{colours})}}\n"
    # Text is escaped, so that every style element is ours.
    styles = [style, *re.findall(r"<style>(.*?)</style>", body, re.DOTALL)]
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in styles)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    policy = (
        f"default-src 'none'; img-src data:; style-src {allowed}; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="generator" content="captum_mllm">'
        "<title>Image regions and words that support each word</title>"
        f"<style>{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def _assumptions(summary: AnswerSummary) -> list[str]:
    if not summary.assumed:
        return []
    return [
        "How the processor crops and resizes pictures is not known: it is assumed that the model "
        "saw the whole picture, so heat may lie in the wrong place."
    ]


def _head(result: ResultLike, source: str, prompt: str, notes: Sequence[str]) -> str:
    answer = answer_text(result)
    scales = ", ".join(f"{scale:.3g}" for scale in result.scales)
    question = f'<p><span class="soft">Prompt:</span> {escape(prompt)}</p>' if prompt else ""
    remarks = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    return (
        '<h1>Which image regions and words support each word</h1><div class="top">'
        f'<img src="{source}" alt="the picture that the model was given"><div>{question}'
        f'<p class="answer"><span class="soft">Answer:</span> {escape(answer)}</p>'
        f'<p class="soft">Method: {escape(result.method)}; scales {scales}</p>{remarks}</div></div>'
    )


def _gallery(summary: AnswerSummary, overlays: Sequence[str]) -> str:
    figures = [
        f'<figure><img src="{overlays[n]}" alt="overlay of {escape(entry.word.text)}">'
        f"<figcaption><b>{escape(entry.word.text)}</b><br>"
        f'<span class="soft">{entry.where}</span></figcaption></figure>'
        for n, entry in enumerate(summary.words)
        if entry.word.content
    ]
    return (
        "<h2>Content words side by side</h2>"
        '<div class="bar" role="img" aria-label="colour scale"></div>'
        f'<div class="ends soft"><span>0</span><span>{summary.vmax:.3g}</span></div>'
        f'<p class="soft">{escape(scale_caption(summary))}</p>'
        f'<div class="gallery">{"".join(figures)}</div>'
    )


def _table(summary: AnswerSummary) -> str:
    rows = []
    for entry in summary.words:
        kind = "" if entry.word.content else ' class="function"'
        value = f"{entry.peak.value:.3f}" if entry.peak else "0"
        rows.append(
            f'<tr{kind}><td>{escape(entry.word.text)}</td><td class="n">{entry.probability:.3f}'
            f'</td><td class="n">{value}</td><td>{entry.where}</td></tr>'
        )
    return (
        '<h2>Table</h2><div class="scroll"><table><thead><tr><th>word</th>'
        f'<th class="n">probability</th><th class="n">peak, {escape(summary.units)}</th>'
        f"<th>where (x, y in pixels)</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">A word of several tokens has the product of their probabilities and '
        "the maximum of their maps. Function words (a fixed list) and punctuation in grey.</p>"
    )


def _matrix(plot: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(plot).decode()}"
    return (
        "<h2>Which words support which</h2>"
        '<p class="soft">Down: words of the answer. Across: words before them.</p>'
        f'<div class="scroll"><img class="plot" src="{source}" '
        'alt="matrix of attributions between words"></div>'
    )


def _json(
    summary: AnswerSummary,
    result: ResultLike,
    prompt: str,
    names: dict[int, str],
) -> str:
    words = [
        {
            "word": entry.word.text,
            "content": entry.word.content,
            "probability": entry.probability,
            "peak": entry.peak and vars(entry.peak),
            "overlay": names.get(index),
        }
        | ({} if entry.frame is None else {"frame": entry.frame})
        for index, entry in enumerate(summary.words)
    ]
    head = {
        "written_by": "captum_mllm",
        "prompt": prompt,
        "answer": answer_text(result),
        "method": result.method,
        "units": summary.units,
        "full_colour": summary.vmax,
    }
    return json.dumps({**head, "words": words}, indent=2, ensure_ascii=True) + "\n"
