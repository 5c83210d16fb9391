"""``.. cli-options::``: the commands and options of ``captum-mllm``, read from its parser."""

import argparse
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def commands() -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of each command."""
    from captum_mllm.cli.main import build_parser

    actions = build_parser()._actions
    (commands,) = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(commands.choices)


class CliOptions(SphinxDirective):
    """The directive."""

    def run(self) -> list[nodes.Node]:
        """A section per command: its description and a definition per option."""
        return [_section(name, parser) for name, parser in commands().items()]


def _section(name: str, parser: argparse.ArgumentParser) -> nodes.section:
    section = nodes.section(ids=[f"captum-mllm-{name}"], names=[f"captum-mllm {name}"])
    section += nodes.title("", "", nodes.literal("", f"captum-mllm {name}"))
    section += nodes.paragraph("", parser.description or "")
    options = nodes.definition_list()
    for action in parser._actions:
        flags = _flags(action)
        anchor = f"{name}{action.option_strings[-1]}" if action.option_strings else name
        term = nodes.term("", "", nodes.literal("", flags), ids=[anchor])
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        if action.required:
            text += " (required)"
        body = nodes.definition("", nodes.paragraph("", "", *_words(text)))
        options += nodes.definition_list_item("", term, body)
    section += options
    return section


def _words(text: str) -> list[nodes.Node]:
    """The text with its flags as code."""
    parts = re.split(r"(--[a-z][\w-]*)", text)
    return [nodes.literal("", p) if p.startswith("--") else nodes.Text(p) for p in parts if p]


def _flags(action: argparse.Action) -> str:
    value = argparse.HelpFormatter("")._format_args(action, _metavar(action)).strip()
    return " ".join([", ".join(action.option_strings), value] if value else action.option_strings)


def _metavar(action: argparse.Action) -> str:
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def setup(app: Sphinx) -> dict:
    app.add_directive("cli-options", CliOptions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
