"""The record of :mod:`studies.classes` as tables."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

EXACT = 1e-5
COLUMNS = {
    "lens": ("lens = logits", "lens"),
    "generation": ("teacher forcing = generate", "generate"),
    "msea": ("MSEA", None),
    "direct": ("direct", "logits"),
    "arc": ("ARC(MSEA)", None),
    "token_log_prob": ("TokenLogProb", "log_prob"),
}


def outcome(found: Mapping[str, Any]) -> tuple[str, str]:
    """What became of a class's layout, over all its pictures, and why.

    Args:
        found: its entry in the record.

    Returns:
        ("exact", the layouts), or ("irregular" | "refused" | "failed" | "unavailable", reason).
    """
    for word in ("unavailable", "failed"):
        if word in found:
            return word, found[word]
    layouts = [picture["layout"] for picture in found["pictures"].values()]
    errors = [layout["error"] for layout in layouts if "error" in layout]
    if errors:
        kind, _, reason = errors[0].partition(": ")
        return (
            "refused" if kind == "LayoutError" else "failed"
        ), reason if kind == "LayoutError" else errors[0]
    notes = [note for layout in layouts for note in layout["notes"]]
    if notes:
        return "irregular", notes[0]
    if not all(layout.get("adapter", True) for layout in layouts):
        return "failed", "the adapter by hand has another layout"
    return "exact", "; ".join(layout["found"] for layout in layouts)


def painted(found: Mapping[str, Any]) -> tuple[float, float]:
    """How a class's layouts stood the painting of single cells (:mod:`studies.zoo.oracle`).

    Args:
        found: a class's entry in the record.

    Returns:
        Share of the painted cells, over all views and pictures, whose own token changed most; and
        the lowest correlation of the painted cell with the middle of the change, over views.
    """
    views = [
        view
        for picture in found.get("pictures", {}).values()
        for view in picture["layout"].get("painted", [])
    ]
    right, tried = sum(view[0] for view in views), sum(view[1] for view in views)
    return right / max(1, tried), min((view[2] for view in views), default=0.0)


def works(found: Mapping[str, Any], check: str) -> tuple[bool, str]:
    """Whether a check holds for all pictures of a class, and its worst figure or its reason.

    Args:
        found: a class's entry in the record.
        check: a key of ``COLUMNS``.
    """
    records = [picture[check] for picture in found.get("pictures", {}).values()]
    errors = [record["error"] for record in records if "error" in record]
    if errors or not records:
        return False, errors[0] if errors else "not tried"
    figure = COLUMNS[check][1]
    if check == "direct" and any(record["empty"] for record in records):
        return False, "no layer has softmax attention"
    if check == "token_log_prob" and not all(record["gradient"] for record in records):
        return False, "no gradient in the pixels"
    if figure is None:
        return True, "yes"
    worst = max(record[figure] for record in records)
    return worst <= EXACT, f"{worst:.0e}"


def as_text(record: Mapping[str, Any]) -> str:
    """The tables.

    Args:
        record: of :mod:`studies.classes`.
    """
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    kinds = record["kinds"]
    made = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    sizes = ", ".join(f"{w} x {h}" for w, h in record["pictures"].values())
    outcomes = {kind: outcome(found) for kind, found in kinds.items()}
    yield f"{len(kinds)} classes, {made}; tiny random models, pictures of {sizes} pixels."
    counts = Counter(word for word, _ in outcomes.values())
    yield "Layouts: " + ", ".join(f"{number} {word}" for word, number in counts.most_common()) + "."
    for check, (title, _) in COLUMNS.items():
        yield f"{title}: {sum(works(found, check)[0] for found in kinds.values())} classes."
    yield ""
    titles = [
        "class",
        "layouts",
        "painted: own token, correlation",
        *(title for title, _ in COLUMNS.values()),
    ]
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for kind, found in kinds.items():
        if outcomes[kind][0] == "exact":
            yield "| " + " | ".join(_row(kind, found, outcomes[kind][1])) + " |"
    yield ""
    yield "| class | outcome | reason |"
    yield "|---|---|---|"
    for kind, (word, reason) in outcomes.items():
        if word != "exact":
            yield f"| {kind} | {word} | {_cell(reason)} |"
    yield ""
    yield "| class | what does not work | reason |"
    yield "|---|---|---|"
    for kind, found in kinds.items():
        for check, (title, _) in COLUMNS.items():
            good, why = works(found, check)
            if outcomes[kind][0] == "exact" and not good:
                yield f"| {kind} | {title} | {_cell(why)} |"


def _row(kind: str, found: Mapping[str, Any], layouts: str) -> Iterator[str]:
    yield kind
    yield layouts.replace(" tokens over ", ": ").replace(" pixels", "")
    share, follows = painted(found)
    yield f"{share:.0%}, {follows:.2f}"
    for check in COLUMNS:
        good, figure = works(found, check)
        yield figure if good else "no"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
