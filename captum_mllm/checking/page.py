"""The report as one page: text escaped, pictures inside, nothing loaded from elsewhere."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from captum_mllm.checking.report import Finding, TrustReport
from captum_mllm.files import nan_to_none

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 640
"""Longest side of a picture in the page, at most, pixels."""

_HERE = Path(__file__).parent
_MARKS = {"passed": "good", "failed": "bad", "not tried": "none"}


def render_page(report: TrustReport) -> str:
    """The report as HTML.

    Every text of the user (model, prompt, answer, messages) is escaped, the page has no script,
    and its Content-Security-Policy lets it load nothing but its own pictures and style.

    Args:
        report: of a check.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    style = (_HERE / "page.css").read_text()
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(autoescape=True)
    template = environment.from_string((_HERE / "page.html.jinja").read_text())
    lines = [
        {
            **vars(line),
            "mark": _MARKS[line.verdict],
            "figures": json.dumps(nan_to_none(dict(line.figures)), indent=1)
            if line.figures
            else "",
        }
        for line in report.lines
    ]
    pictures = [(caption, _data_url(picture)) for caption, picture in report.pictures.items()]
    return template.render(
        about=dict(report.about),
        passed=report.passed,
        summary=report.summary,
        lines=lines,
        pictures=pictures,
        layout_drawn="Layout" in report.pictures,
        style=Markup(style),  # ours: the page's own file
        style_hash=Markup(hashed),
    )


def _figures(line: Finding) -> str:
    return json.dumps(nan_to_none(dict(line.figures)), indent=1) if line.figures else ""


def _data_url(picture: "Image") -> str:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
