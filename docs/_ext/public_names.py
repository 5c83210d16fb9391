"""``.. public:: package`` with one name per line: a table of the names, then each in full.

How a name is documented (class, function, data) is looked up, so that a page is a list of names.
The comment of a constant is the string below its assignment, wherever the package imports it from.
"""

import ast
import importlib
import inspect
import itertools
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext import autosummary
from sphinx.util.docutils import SphinxDirective


@cache
def _assignments(module: str) -> tuple[dict[str, str], dict[str, str]]:
    """A module's constants with their strings, and the names that it imports with their modules."""
    found, imported = {}, {}
    body = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text()).body
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.ImportFrom) and statement.module:
            imported |= {alias.name: statement.module for alias in statement.names}
        match statement:
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                match after:
                    case ast.Expr(ast.Constant(str(text))):
                        found[name] = inspect.cleandoc(text)
    return found, imported


def comment(module: str, name: str) -> str:
    """The string below a constant's assignment, or "".

    Args:
        module: where it is public.
        name: the constant's.
    """
    found, imported = _assignments(module)
    if name in found:
        return found[name]
    lazy = getattr(importlib.import_module(module), "_HOME", {}).get(name)
    home = imported.get(name) or (lazy and f"{module}.{lazy}")
    return comment(home, name) if home else ""


class Public(SphinxDirective):
    """The directive."""

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the table and the entries as if they stood in the page."""
        module = self.arguments[0]
        names = [line.strip() for line in self.content if line.strip()]
        entries = [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
        entries += [*(f"   {name}" for name in names), ""]
        for name in names:
            value = getattr(importlib.import_module(module), name)
            entries += [f".. auto{_kind(value)}:: {module}.{name}", *_options(value), ""]
        lines = StringList(entries, source=self.get_source_info()[0])
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=False)


def _kind(value: Any) -> str:
    if inspect.isclass(value):
        return "class"
    return "function" if inspect.isroutine(value) else "data"


def _options(value: Any) -> list[str]:
    short = isinstance(value, str | int | float) or len(repr(value)) <= 120
    return [] if _kind(value) != "data" or short else ["   :no-value:"]


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "data":
        lines[:] = [*comment(*name.rsplit(".", 1)).splitlines(), ""]
    if what in ("attribute", "data", "property"):
        # Napoleon takes what a first line has before a colon for a type: an empty comment has none.
        lines[:0] = ["..", ""]


def _summary(doc: Any, settings: Any) -> str:
    """The first paragraph: a formula in it may hold a full stop, which autosummary cuts at."""
    text = itertools.dropwhile(lambda line: line.strip() in ("", ".."), doc)
    lines = list(itertools.takewhile(str.strip, text))
    return " ".join(line.strip() for line in lines)


def setup(app: Sphinx) -> dict:
    autosummary.extract_summary = _summary
    app.add_directive("public", Public)
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
