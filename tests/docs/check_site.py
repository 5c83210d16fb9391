"""Every internal link of the built manual leads somewhere, and no page fetches anything.

Usage: check_site.py DIR (what ``make docs`` built).
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src"}
FETCHED = {"img", "script", "source", "link"}


class Page(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values[name] for name in ("id", "name") if values.get(name)}
        if values.get(LINKS.get(tag, "")):
            self.links.append((tag, values[LINKS[tag]] or ""))


def problems(site: Path) -> list[str]:
    """One line per link that leads nowhere."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    return [
        f"{path.relative_to(site)}: {link}: {wrong}"
        for path, page in pages.items()
        for tag, link in page.links
        if (wrong := _wrong(site, pages, path, tag, link))
    ]


def _wrong(site: Path, pages: dict[Path, Page], path: Path, tag: str, link: str) -> str:
    parts = urlsplit(link)
    if parts.scheme == "data" or parts.scheme == "mailto":
        return ""
    if parts.scheme or parts.netloc:
        return "is fetched from another site" if tag in FETCHED else ""
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site) or not target.exists():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].ids:
        return "no such anchor"
    return ""


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]).resolve())
    if found:
        sys.exit("\n".join(found))
    print(f"{sys.argv[1]}: all internal links lead somewhere")
