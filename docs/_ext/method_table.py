"""``.. method-table::``: the methods by name, each with what it does, read from its record."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class MethodTable(SphinxDirective):
    """The directive."""

    def run(self) -> list[nodes.Node]:
        """A definition per method: name and kind, what it does, its options."""
        from captum_mllm.methods import METHODS

        entries = nodes.definition_list()
        for method in METHODS.values():
            term = nodes.term(
                "", "", nodes.literal("", method.name), nodes.Text(f" ({method.kind})")
            )
            names = sorted(method.options or ())
            text = f"{method.about}." + (f" Options: {', '.join(names)}." if names else "")
            body = nodes.definition("", nodes.paragraph("", text))
            entries += nodes.definition_list_item("", term, body)
        return [entries]


def setup(app: Sphinx) -> dict:
    app.add_directive("method-table", MethodTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
