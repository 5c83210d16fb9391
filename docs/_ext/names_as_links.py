"""In guide and notebooks, code that is the name of something public links to its entry.

`MSEA`, `obj_iou`, `bridge.image_input`, `TokenLogProb.layer`; a plain lower-case word (`load`,
`explain`) may mean an argument, and links only as `load()` or `methods.explain`.
"""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode


def _known(app: Sphinx) -> dict[str, tuple[str, str]]:
    """Every way to write a name -> its page and anchor; ambiguous ways are left out."""
    found: dict[str, tuple[str, str] | None] = {}
    for name, entry in app.env.get_domain("py").objects.items():
        if entry.aliased:  # a class's own module, where nobody imports it from
            continue
        parts = name.split(".")
        own = 2 if entry.objtype in ("method", "property", "attribute", "classmethod") else 1
        for length in range(own, len(parts) + 1):
            way = ".".join(parts[-length:])
            found[way] = None if way in found else (entry.docname, entry.node_id)
    return {way: place for way, place in found.items() if place}


def _link(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    if docname.startswith("docs/reference/") or not docname.startswith(("docs/", "tutorials/")):
        return
    known = _known(app)
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext()
        if isinstance(literal.parent, nodes.reference | nodes.title) or re.fullmatch(
            "[a-z]+", text
        ):
            continue
        place = known.get(text.removesuffix("()"))
        if place:
            link = make_refnode(app.builder, docname, place[0], place[1], literal.deepcopy())
            literal.replace_self(link)


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
