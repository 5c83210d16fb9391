"""Tables of `studies.choose`."""

from typing import Any

METRICS = ("f1_iou", "obj_iou", "func_iou", "average_precision")


def heading(record: dict[str, Any]) -> str:
    """What was run, on what, by which rule.

    Args:
        record: of `studies.choose`.
    """
    return (
        f"`make study NAME=choose`: {record['examples']} examples of the validation "
        f"split of each of the sets {', '.join(record['sets'])}, reference answers teacher-forced, "
        f"trainings {', '.join(record['weights'])}; means over words, then over sets and "
        f"trainings. One option after another is chosen by F1-IoU, then AP, the others held; "
        f"within {record['tie']} of the best ({record['worth']} for scales and mirrored views, "
        f"which cost forwards) the first listed is taken; scale weights are judged by their mean "
        f"over all ranges of scales. Small models of synthetic scenes."
    )


def table(record: dict[str, Any]) -> str:
    """Markdown: what each round tried, and the figures of published and chosen settings.

    Args:
        record: of `studies.choose`.
    """
    lines = [
        "| method | setting | F1-IoU | Obj-IoU | Func-IoU | AP |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method in record["methods"]:
        for label in ("start", "chosen"):
            m = method[f"{label}_means"]
            cells = " | ".join(f"{m[name]:.3f}" for name in METRICS)
            kind = "as published" if label == "start" else "chosen"
            lines.append(f"| {method['name']} | {kind} | {cells} |")
    for method in record["methods"]:
        lines += ["", f"**{method['name']}**: {_shown(method['chosen'])}", ""]
        lines += ["| option | tried | F1-IoU | Obj-IoU | AP | taken |", "|" + " --- |" * 6]
        for one in method["rounds"]:
            for row in one["tried"]:
                cells = f"{row['f1_iou']:.4f} | {row['obj_iou']:.3f} | "
                cells += f"{row['average_precision']:.3f}"
                taken = "x" if row["options"] == one["taken"] else ""
                lines.append(f"| {one['option']} | {_shown(row['options'])} | {cells} | {taken} |")
    return "\n".join(lines)


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in options.items())


def _value(value: Any) -> str:
    return "/".join(f"{v:g}" for v in value) if isinstance(value, tuple | list) else str(value)
