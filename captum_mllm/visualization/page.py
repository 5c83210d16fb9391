"""Contents as one HTML page: nothing loaded from elsewhere, every text escaped."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_mllm.visualization.atlas import Atlas, grey_png
from captum_mllm.visualization.contents import NEAR_ZERO, UNSURE, Contents

if TYPE_CHECKING:
    from PIL.Image import Image

COLOUR_MAPS = ("viridis", "cividis", "inferno", "turbo")
"""Colour maps that a reader can choose from. The first three, and so the default, are told apart
with any colour vision and in grey."""

PICTURE_SIDE = 1000
"""Longest side of a picture in the page, at most, pixels."""

_STOPS = 17
_FADE = 0.35  # share of the scale over which the heat fades in
_HERE = Path(__file__).parent


def render_page(
    contents: Contents, *, notes: Sequence[str] = (), facts: Mapping[str, str] | None = None
) -> str:
    """The page as HTML.

    It has all it needs inside: a Content-Security-Policy lets it load nothing, and run no script
    but its own. Without scripts it shows the text, a table, and the content words side by side.

    Args:
        contents: from :func:`~captum_mllm.visualization.contents_of`.
        notes: sentences for its head.
        facts: name -> value, for its foot; default none.

    Returns:
        HTML, to be written as UTF-8.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=False)
    template = environment.from_string((_HERE / "page.html.jinja").read_text(encoding="utf-8"))
    assumed = [_ASSUMED] if any(picture.assumed for picture in contents.pictures) else []
    data = contents.to_dict()
    for method in data["methods"]:
        for atlas in method["atlases"]:
            del atlas["source"]  # it stands in the page once, as a picture
    return template.render(
        page=contents,
        data={**data, "near_zero": NEAR_ZERO},
        notes=[*notes, *contents.notes, *assumed],
        facts=dict(facts or {}),
        near_zero=NEAR_ZERO,
        unsure=UNSURE,
        sources=[_jpeg(picture.image) for picture in contents.pictures],
        gallery=_gallery(contents),
        colour_maps={name: _tables(name) for name in COLOUR_MAPS},
        default_map=COLOUR_MAPS[0],
        fade=" ".join(f"{min(1.0, level / _FADE):.3f}" for level in np.linspace(0, 1, 65)),
        ramp=grey_png(np.arange(256, dtype=np.uint8)[None]),
        style=Markup(style),  # ours, as the script: the page's own files
        script=Markup(script),
        style_hash=Markup(_sha256(style)),
        script_hash=Markup(_sha256(script)),
    )


_ASSUMED = (
    "How the processor crops and resizes pictures is not known: it is assumed that the model saw "
    "the whole picture, so heat may lie in the wrong place."
)


def _gallery(contents: Contents) -> list[dict[str, Any]]:
    """The content words, each on the picture that supports it most."""
    method, tiles = contents.methods[0], []
    for n, (word, peak) in enumerate(zip(contents.words, method.peaks, strict=True)):
        if not word.content:
            continue
        number = peak[0] if peak else 0
        atlas = method.atlases[number]
        tiles.append(
            {
                "word": word.text,
                "number": number,
                "picture": contents.pictures[number],
                "place": _place(atlas, n) if peak else "",
                "where": peak[2] if peak else "no region",
            }
        )
    return tiles


def _place(atlas: Atlas, word: int) -> str:
    """Where a word's map stands in its atlas, as an SVG viewBox."""
    across, down = divmod(word, atlas.down)
    x, y = across * (atlas.cols + 2) + 1, down * (atlas.rows + 2) + 1
    return f"{x} {y} {atlas.cols} {atlas.rows}"


def _tables(name: str) -> dict[str, str]:
    """A colour map as the tables of an SVG filter."""
    import matplotlib

    colours = matplotlib.colormaps[name](np.linspace(0, 1, _STOPS))[:, :3].T
    names = ("red", "green", "blue")
    return {
        key: " ".join(f"{level:.3f}" for level in row)
        for key, row in zip(names, colours, strict=True)
    }


def _jpeg(picture: "Image") -> str:
    small = picture.copy()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
