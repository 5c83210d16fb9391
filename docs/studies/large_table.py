"""The tables of :mod:`studies.large`."""

from collections.abc import Mapping
from typing import Any

PLAIN, LEAN, GENERATE = "plain forward", "lean forward", "generate"
METHODS = (PLAIN, LEAN, "LogitLens", "MSEA", "MSEA+ARC", GENERATE)
NOTE = (
    "Image tokens: of the forward at scale 1, then of the one forward over the prefix (all up to "
    "the image's end) that each further scale takes. Times: medians from call to result, the "
    "methods taking turns after a round to warm up. Memory: the highest allocation that torch saw "
    "above parameters and buffers. After x, as a multiple of the plain forward's in the same "
    "case. Plain forward: `model(**inputs)` at scale 1 as a user calls it, with all logits and a "
    "cache; lean forward: without cache, logits of the answer alone. LogitLens, MSEA, MSEA+ARC: "
    "`attribute` for all answer tokens, whose ids are given. Generate: the answer's length, "
    "greedy, once. The weights and the answer are random, so most answer tokens differ (a real "
    "answer has fewer classes)."
)


def table(record: Mapping[str, Any]) -> str:
    """Markdown: times, then on a GPU memory, a row a case; what failed with its reason.

    Args:
        record: what ``large.json`` holds.
    """
    wanted = [("Milliseconds", "median_seconds", "time_ratio", 1e3, ".0f")]
    if record["gpu"]:
        gib = 1 / 2**30
        wanted += [("GiB above the weights", "above_weights_bytes", "above_ratio", gib, ".2f")]
        wanted += [("GiB in all", "peak_bytes", "peak_ratio", gib, ".1f")]
    heads = ["model", "image tokens at each scale (sum)", *METHODS]
    blocks = []
    for title, value, ratio, unit, form in wanted:
        lines = [f"**{title}**\n", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        for family in record["families"].values():
            if "error" in family:
                lines.append(
                    f"| {family['title']} | failed: {family['error']} |{' |' * len(METHODS)}"
                )
            for case in family["cases"]:
                each = ", ".join(f"{n:,}" for n in case["image_tokens"])
                cells = [family["title"], f"{each} ({sum(case['image_tokens']):,})"]
                if "error" in case:
                    cells += [f"failed: {case['error']}", *[""] * (len(METHODS) - 1)]
                else:
                    rows = [case["methods"][name] for name in METHODS]
                    cells += [f"{row[value] * unit:{form}} (x {row[ratio]:.2f})" for row in rows]
                lines.append(f"| {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_text(record: Mapping[str, Any]) -> str:
    """The whole Markdown record.

    Args:
        record: what ``large.json`` holds.
    """
    sizes = (
        f"{family['title']} ({family['parameters'] / 1e9:.2f} billion parameters, "
        f"{family['weight_bytes'] / 2**30:.1f} GiB)"
        for family in record["families"].values()
        if "parameters" in family
    )
    return (
        f"`{record['command']}` on {record['device']}: {'; '.join(sizes)}; {record['dtype']}, "
        f"attention {record['attention']}, torch {record['torch']}, transformers "
        f"{record['transformers']}; {record['repeats']} rounds, answers of "
        f"{record['answer_tokens']} tokens, prompts of {record['text_tokens']} text tokens.\n\n"
        f"{NOTE}\n\n{table(record)}\n"
    )
