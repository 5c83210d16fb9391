"""Pages that stand elsewhere in the repository get a title; the site's root leads to the index."""

import posixpath
import re
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx


def _title(app: Sphinx, docname: str, source: list[str]) -> None:
    path = PurePosixPath(docname)
    if path.parent.name == "records":
        source[0] = f"# Record: {path.name}\n\n{source[0]}"


def _back_links(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Of code to its entry: viewcode takes one public package for all names of a module."""
    if not page.startswith("_modules/"):
        return
    known = app.env.get_domain("py").objects

    def mend(link: re.Match) -> str:
        name = link[2]
        if name not in known:
            tail = name.removeprefix("captum_mllm.")
            docname = posixpath.normpath(posixpath.join(posixpath.dirname(page), link[1]))
            name = next(
                n for n, o in known.items() if n.endswith(f".{tail}") and o.docname == docname
            )
        return f'href="{link[1]}.html#{name}"'

    context["body"] = re.sub(r'href="([^"]*)\.html#(captum_mllm\.[^"]*)"', mend, context["body"])


def _without_builtins(app: Sphinx, env: object) -> list[str]:
    """Viewcode lists modules that it has no page for."""
    modules = getattr(env, "_viewcode_modules", {})
    for name in [name for name, entry in modules.items() if not entry]:
        del modules[name]
    return []


def _front_door(app: Sphinx, error: Exception | None) -> None:
    if app.builder.format == "html" and not error:
        page = f"{app.config.root_doc}.html"
        Path(app.outdir, "index.html").write_text(
            f'<!doctype html><meta charset="utf-8"><title>{app.config.project}</title>'
            f'<meta http-equiv="refresh" content="0; url={page}"><a href="{page}">The manual</a>\n'
        )


def setup(app: Sphinx) -> dict:
    app.connect("source-read", _title)
    app.connect("env-updated", _without_builtins)
    app.connect("html-page-context", _back_links)
    app.connect("build-finished", _front_door)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
