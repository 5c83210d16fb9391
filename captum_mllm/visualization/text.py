"""The text heat map as HTML: choose a word, see which words support it. No scripts, no LaTeX."""

import hashlib
import re
from collections.abc import Sequence
from html import escape

from captum_mllm.visualization.summary import (
    AnswerSummary,
    ResultLike,
    WordSummary,
    context_of,
    summarise_images,
)
from captum_mllm.words import Word

_NAMED_WORDS = 5  # so many context words are named with their numbers

_STYLE = """
.cmllm{--fg:#1b1f24;--bg:#fff;--soft:#5c6670;--line:#d5dae0;--chip:#f1f3f5;--mark:#1f5fbf;
--heat:240,130,20;--image:20,130,220;color:var(--fg);background:var(--bg);line-height:1.6;
font-family:system-ui,sans-serif;position:relative;padding:.25rem 0}
@media(prefers-color-scheme:dark){.cmllm{--fg:#e8eaed;--bg:#16191d;--soft:#a3adb8;--line:#3a424c;
--chip:#242a31;--mark:#8ab8ff;--heat:205,95,0;--image:20,110,190}}
.cmllm>input{position:absolute;opacity:0;width:1px;height:1px}
.cmllm .answer{margin:.25rem 0 .75rem;display:flex;flex-wrap:wrap;gap:.3rem}
.cmllm label{cursor:pointer;padding:.1rem .5rem;border-radius:.4rem;border:2px solid transparent;
background:linear-gradient(rgba(var(--image),var(--s)),rgba(var(--image),var(--s))),var(--chip)}
.cmllm label:hover{border-color:var(--soft)}
.cmllm .panel{display:none;grid-template-columns:minmax(0,1fr);gap:.75rem 1.25rem;
border-top:1px solid var(--line);padding-top:.75rem}
.cmllm .panel.pic{grid-template-columns:minmax(12rem,22rem) minmax(16rem,1fr)}
@media(max-width:40rem){.cmllm .panel.pic{grid-template-columns:minmax(0,1fr)}}
.cmllm .panel img{max-width:100%;height:auto;border-radius:.4rem;display:block}
.cmllm .panel h4{margin:0 0 .25rem;font-size:1.1rem;overflow-wrap:anywhere}
.cmllm .panel p{margin:.25rem 0;overflow-wrap:anywhere}
.cmllm .soft{color:var(--soft);font-size:.9rem}
.cmllm .text span{border-radius:.25rem;padding:.1rem .2rem;
background:rgba(var(--heat),var(--s))}
.cmllm .text .target{background:none;outline:2px solid var(--mark);font-weight:600}
.cmllm .text .later{color:var(--soft);background:none}
.cmllm .text .from{display:block;padding:0;background:none;color:var(--soft);font-size:.8rem;
margin-top:.35rem}
@media print{.cmllm .panel{display:grid;break-inside:avoid}}
"""


def text_heatmap_html(
    result: ResultLike,
    *,
    overlays: Sequence[str] | None = None,
    summary: AnswerSummary | None = None,
) -> str:
    """A piece of HTML in which each word of the answer shows which words support it.

    Every word of the answer is a button (a radio button without a script: mouse, touch and arrow
    keys work). Its panel shows the text before it, coloured by attribution. One scale for all
    words: the strongest attribution in the whole answer has the full colour.

    Args:
        result: what ``attribute`` returned.
        overlays: per word of the answer, the ``src`` of a picture to show in its panel.
        summary: the result read word by word, for peaks in a picture's pixels; default those of
            the image as the model saw it; of several, of the image that supports each word most.

    Returns:
        ASCII HTML with its style inside, no other resources; all text escaped. Show it in a
        notebook with ``IPython.display.HTML``, or put it in a page.

    Raises:
        ValueError: another number of overlays than words; no image and no ``summary``.
    """
    if summary is None:
        summary = summarise_images(result)
    if overlays is not None and len(overlays) != len(summary.words):
        raise ValueError(
            f"overlays must be one per word of the answer ({len(summary.words)}), got "
            f"{len(overlays)}."
        )
    context, _ = context_of(result, [entry.word for entry in summary.words])
    prompt_words = _prompt_length(context, result)
    shown = (result.input_tokens, summary.grid_maps.tolist(), summary.context_attr.tolist())
    name = "cmllm-" + hashlib.sha256(repr(shown).encode()).hexdigest()
    html = _widget(summary, prompt_words, overlays, name[:16])
    return html.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _prompt_length(context: Sequence[Word], result: ResultLike) -> int:
    """How many context words belong to the prompt."""
    start = len(result.input_tokens) - len(result.output_tokens)
    if start < 0 or result.input_tokens[start:] != result.output_tokens:
        return len(context)
    return sum(word.tokens[0] < start for word in context)


def _widget(
    summary: AnswerSummary, prompt_words: int, overlays: Sequence[str] | None, name: str
) -> str:
    words = summary.words
    first = max(range(len(words)), key=lambda n: _interest(words[n]), default=0)
    inputs, labels, panels, rules = [], [], [], []
    for n, entry in enumerate(words):
        key = f"{name}-{n}"
        checked = " checked" if n == first else ""
        text = escape(entry.word.text)
        inputs.append(f'<input type="radio" name="{name}" id="{key}" aria-label="{text}"{checked}>')
        share = _share(entry.peak.value if entry.peak else 0.0, summary.vmax)
        labels.append(f'<label for="{key}" class="{_shade(share)}">{text}</label>')
        panels.append(_panel(summary, n, prompt_words, overlays[n] if overlays else None))
        rules.append(
            f"#{key}:checked~.p{n}{{display:grid}}"
            f"#{key}:checked~.answer label[for={key}]{{border-color:var(--mark)}}"
            f"#{key}:focus-visible~.answer label[for={key}]{{outline:2px solid var(--mark)}}"
        )
    body = f'{"".join(inputs)}<div class="answer">{"".join(labels)}</div>{"".join(panels)}'
    # Text is escaped, so that only our own attributes look like this.
    rules += [
        f".cmllm .s{percent}{{--s:{int(percent) / 100:.2f}}}"
        for percent in sorted(set(re.findall(r'class="s(\d+)"', body)), key=int)
    ]
    style = f"<style>{_STYLE}{''.join(rules)}</style>"
    return f'<div class="cmllm" id="{name}">{style}{body}</div>'


def _interest(entry: WordSummary) -> tuple[bool, float]:
    """What to show first: the content word with the strongest image support."""
    return entry.word.content, entry.peak.value if entry.peak else 0.0


def _panel(summary: AnswerSummary, n: int, prompt_words: int, overlay: str | None) -> str:
    entry = summary.words[n]
    text = escape(entry.word.text)
    picture, kind = "", "panel"
    if overlay is not None:
        alt = f"which image regions support &quot;{text}&quot;"
        picture = f'<img src="{escape(overlay)}" alt="{alt}">'
        kind = "panel pic"
    return (
        f'<div class="{kind} p{n}">{picture}<div><h4>{text}</h4><p>{_facts(entry)}</p>'
        f'<p class="soft">{_supported_by(summary, n)}</p>'
        f'<p class="text">{_coloured(summary, n, prompt_words)}</p></div></div>'
    )


def _facts(entry: WordSummary) -> str:
    support = "no image region supports it"
    if entry.peak is not None:
        support = f"strongest image support: {entry.where}, peak {entry.peak.value:.3g}"
    return f"probability {entry.probability:.3f}; {support}"


def _supported_by(summary: AnswerSummary, n: int) -> str:
    row = summary.context_attr[n]
    order = row.argsort(descending=True, stable=True)[:_NAMED_WORDS].tolist()
    named = [
        f"{escape(summary.context[index].text)} {float(row[index]):.3g}"
        for index in order
        if row[index] > 0
    ]
    return f"supported by: {', '.join(named)}" if named else "no earlier word supports it"


def _coloured(summary: AnswerSummary, n: int, prompt_words: int) -> str:
    top = float(summary.context_attr.max()) if summary.context_attr.numel() else 0.0
    target = prompt_words + n if prompt_words < len(summary.context) else len(summary.context)
    spans = []
    for index, word in enumerate(summary.context):
        if index == 0 and prompt_words:
            spans.append('<span class="from">prompt</span>')
        if index == prompt_words:
            spans.append('<span class="from">answer</span>')
        text = escape(word.text)
        if index == target:
            spans.append(f'<span class="target">{text}</span>')
        elif index > target:
            spans.append(f'<span class="later">{text}</span>')
        else:
            value = float(summary.context_attr[n, index])
            share = _share(value, top)
            spans.append(f'<span class="{_shade(share)}" title="{value:.3g}">{text}</span>')
    return " ".join(spans)


def _shade(share: float) -> str:
    """The class of an opacity: attributes with a style would need a laxer security policy."""
    return f"s{round(100 * share)}"


def _share(value: float, top: float) -> float:
    """Opacity of a value: never so strong that the text on it becomes illegible."""
    return 0.75 * max(0.0, min(1.0, value / top)) if top > 0 else 0.0
