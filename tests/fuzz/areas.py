"""The areas, and how many cases each gets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.fuzz import annotations, benchmarks, inputs, label_images, results
from tests.fuzz.harness import BAD, GOOD, Case, Tally


@dataclass(frozen=True)
class Area:
    """What is damaged.

    Args:
        draw_case: makes a case.
        few: cases of `make test`.
        many: cases of `make check`.
    """

    draw_case: Callable[[st.DataObject], Case]
    few: int
    many: int


AREAS: Mapping[str, Area] = {
    "result files": Area(results.draw_case, 150, 3_000),
    "COCO annotations": Area(annotations.draw_case, 150, 3_000),
    "label maps": Area(label_images.draw_case, 150, 3_000),
    "benchmark folders": Area(benchmarks.draw_case, 10, 200),
    "inputs": Area(inputs.draw_case, 80, 2_000),
}


def table(tallies: Mapping[str, Tally]) -> str:
    """Markdown: a row per area, a column per outcome."""
    kinds = (*GOOD, *BAD)
    lines = [f"| area | cases | {' | '.join(kinds)} |", "| --- " * (len(kinds) + 2) + "|"]
    for name, tally in tallies.items():
        counts = " | ".join(f"{tally.counts[kind]:,}" for kind in kinds)
        lines.append(f"| {name} | {tally.counts.total():,} | {counts} |")
    return "\n".join(lines)
