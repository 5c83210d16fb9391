"""What a check of a model found: one line per thing checked, as table, JSON or page."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

from captum_mllm.files import nan_to_none, write_atomic
from captum_mllm.validation import check_choice

if TYPE_CHECKING:
    from PIL.Image import Image

Verdict = Literal["passed", "failed", "not tried"]
VERDICTS: tuple[str, ...] = ("passed", "failed", "not tried")
_WIDTH = 100  # characters of the table


@dataclass(frozen=True)
class Finding:
    """One line of a :class:`TrustReport`.

    Args:
        name: what was checked.
        verdict: "passed", "failed", or "not tried" (also where the figures tell nothing clear).
        found: what was measured, in sentences with figures.
        advice: what to do, "" (default) where there is nothing to do.
        figures: the measured numbers by name, default none.
        seconds: how long this line took, default 0.

    Raises:
        ArgumentError: another verdict.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        check_choice("verdict", self.verdict, VERDICTS)


@dataclass(frozen=True, eq=False)
class TrustReport:
    """What :func:`captum_mllm.check` found out about one model on this machine.

    Args:
        lines: one per thing checked, in the order in which they were checked.
        about: what was checked: model, processor, picture, prompt, answer, versions.
        pictures: drawings for the page: caption -> PIL picture, default none.

    Example:
        >>> report = TrustReport((Finding("lens", "failed", "differs by 3.", "report it."),), {})
        >>> report.passed, [line.name for line in report.failed]
        (False, ['lens'])
        >>> print(report)
        failed     lens  differs by 3.
                         > report it.
        0 passed, 1 failed, 0 not tried: lens failed.
    """

    lines: tuple[Finding, ...]
    about: Mapping[str, str]
    pictures: Mapping[str, "Image"] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no line failed; a line that could not be tried is no failure."""
        return not self.failed

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The lines that failed."""
        return tuple(line for line in self.lines if line.verdict == "failed")

    def __getitem__(self, name: str) -> Finding:
        """The line of a name.

        Args:
            name: what was checked.

        Returns:
            Its line.

        Raises:
            KeyError: no such line; the message lists those that there are.
        """
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(f"{name!r}; the lines are {', '.join(line.name for line in self.lines)}")

    def __str__(self) -> str:
        longest = max((len(line.name) for line in self.lines), default=0)
        indent = " " * (11 + longest + 2)
        rows = []
        for line in self.lines:
            text = wrap(line.found, _WIDTH - len(indent)) or [""]
            if line.advice:
                text += wrap(f"> {line.advice}", _WIDTH - len(indent), subsequent_indent="  ")
            head = f"{line.verdict:<11}{line.name:<{longest}}  "
            rows += [f"{head if n == 0 else indent}{row}".rstrip() for n, row in enumerate(text)]
        return "\n".join([*rows, self.summary])

    @property
    def summary(self) -> str:
        """How many lines passed, failed or were not tried, and which failed."""
        counts = [sum(line.verdict == v for line in self.lines) for v in VERDICTS]
        text = ", ".join(f"{n} {v}" for n, v in zip(counts, VERDICTS, strict=True))
        names = ", ".join(line.name for line in self.failed)
        return f"{text}: {names} failed." if names else f"{text}."

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``about``, ``passed`` and ``lines``; the pictures are left out."""
        lines = [asdict(line) | {"figures": dict(line.figures)} for line in self.lines]
        data = {"written_by": "captum_mllm", "passed": self.passed, "about": dict(self.about)}
        return nan_to_none({**data, "lines": lines})

    def to_json(self) -> str:
        """The report as JSON text: :meth:`to_dict`, NaN as null."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=True) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file, whole or not at all.

        Args:
            path: the file; its folder must exist.
        """
        write_atomic(path, self.to_json().encode())

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one page with its pictures inside, which loads nothing else.

        Args:
            path: the file; its folder must exist.
        """
        from captum_mllm.checking.page import render_page

        text = render_page(self.to_dict(), self.summary, self.pictures)
        write_atomic(path, text.encode())
