"""The report as one page: text escaped, pictures inside, nothing loaded from elsewhere."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_mllm.pictures import to_eight_bits

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 640
"""Longest side of a picture in the page, at most, pixels."""

_HERE = Path(__file__).parent
_MARKS = {"passed": "good", "failed": "bad", "not tried": "none"}


def render_page(data: Mapping[str, Any], summary: str, pictures: Mapping[str, "Image"]) -> str:
    """The report as HTML.

    Every text of the user (model, prompt, answer, messages) is escaped, the page has no script,
    and its Content-Security-Policy lets it load nothing but its own pictures and style.

    Args:
        data: the report's ``to_dict``.
        summary: its summary, one sentence.
        pictures: caption -> picture.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    style = (_HERE / "page.css").read_text()
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(autoescape=True)
    template = environment.from_string((_HERE / "page.html.jinja").read_text())
    lines = [
        {**line, "mark": _MARKS[line["verdict"]], "figures": _figures(line["figures"])}
        for line in data["lines"]
    ]
    return template.render(
        about=data["about"],
        passed=data["passed"],
        summary=summary,
        lines=lines,
        pictures=[(caption, _data_url(picture)) for caption, picture in pictures.items()],
        layout_drawn="Layout" in pictures,
        style=Markup(style),  # ours: the page's own file
        style_hash=Markup(hashed),
    )


def _figures(figures: Mapping[str, Any]) -> str:
    return json.dumps(figures, indent=1) if figures else ""


def _data_url(picture: "Image") -> str:
    small = to_eight_bits(picture).convert("RGB")
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
