"""Formulas as MathML, which browsers draw themselves: no script and no network.

docutils translates the LaTeX; what it can't translate is a warning, and so an error of the build.
"""

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_log = logging.getLogger(__name__)


def _mathml(node: nodes.Element, block: bool) -> str:
    code = node.astext().strip()
    try:
        return latex2mathml.tex2mathml(code, as_block=block)
    except (MathError, AttributeError) as error:  # the second where & or \\\\ stand in a line
        _log.warning("formula %r: %s", code, error, location=node)
        return f"<code>{node.astext()}</code>"


def _inline(self, node):
    self.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _block(self, node):
    number = ""
    if node.get("number"):
        number = f'<span class="eqno">({node["number"]})</span>'
    ids = "".join(f'<span id="{name}"></span>' for name in node["ids"])
    self.body.append(f'<div class="math">{ids}{_mathml(node, block=True)}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
