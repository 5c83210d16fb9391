"""A map laid over its picture.

``captum.attr.visualization.visualize_image_attr`` (``method="blended_heat_map"``) draws one map:
it rescales every map by its own maximum and fails on one that is 0 everywhere. Words of an answer
must stay comparable, so here the caller sets one scale for all of them.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.pictures import to_eight_bits

if TYPE_CHECKING:
    from PIL.Image import Image

CMAP = "turbo"
"""Default colour map: many hues, so that the middle of the scale is distinguishable too."""

_FADE = 0.35
"""Share of the scale over which the heat fades in from transparent."""


def overlay(
    picture: "Image",
    heat: Float[Tensor, "height width"],
    alpha: float = 0.65,
    cmap: str = CMAP,
    vmax: float | None = None,
) -> "Image":
    """Lay a map over a picture; where the map is 0 the (greyed) picture shows through.

    Args:
        picture: the picture.
        heat: the map in pixels of the picture, values >= 0; negative values count as 0.
        alpha: opacity of the heat in [0, 1], default 0.65.
        cmap: name of a matplotlib colour map, default "turbo".
        vmax: value of the full colour; default the map's own maximum. Give one value for all
            maps that are to be compared.

    Returns:
        A new RGB picture of the same size.

    Raises:
        ValueError: the map's shape is not the picture's, or it holds NaN or infinity; alpha or
            vmax out of range; no such colour map.

    Example:
        >>> from PIL import Image
        >>> picture = Image.new("RGB", (4, 2), "white")
        >>> overlay(picture, torch.zeros(2, 4)).getpixel((0, 0))
        (255, 255, 255)
    """
    from PIL import Image

    if tuple(heat.shape) != (picture.height, picture.width):
        raise ValueError(
            f"heat must have the picture's shape (height, width) = "
            f"{(picture.height, picture.width)}, got {tuple(heat.shape)}."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    level = _levels(heat, vmax)
    colours = _colour_map(cmap)(level)[..., :3]
    opacity = alpha * np.clip(level / _FADE, 0, 1)[..., None]
    base = np.asarray(to_eight_bits(picture).convert("RGB"), dtype=np.float64) / 255
    grey = base @ np.array([0.299, 0.587, 0.114])
    base = (
        0.45 * base + 0.55 * grey[..., None]
    )  # so that heat stands out from the picture's colours
    blended = base * (1 - opacity) + colours * opacity
    return Image.fromarray((blended * 255).round().astype(np.uint8), "RGB")


def _levels(heat: Tensor, vmax: float | None) -> np.ndarray:
    values = heat.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(values).all():
        raise ValueError("heat holds NaN or infinite values.")
    top = float(values.max(initial=0.0)) if vmax is None else vmax
    if not math.isfinite(top) or (vmax is not None and top < 0):
        raise ValueError(f"vmax must be finite and >= 0, got {vmax}.")
    if top <= 0:
        return np.zeros_like(values)
    return np.clip(values / top, 0, 1)


def _colour_map(name: str) -> Any:
    import matplotlib

    if name not in matplotlib.colormaps:
        raise ValueError(
            f"cmap {name!r} is unknown; matplotlib.colormaps lists them, e.g. 'turbo', 'magma'."
        )
    return matplotlib.colormaps[name]


def colour_stops(cmap: str = CMAP, stops: int = 9, alpha: float = 1.0) -> list[str]:
    """Colours along a scale, as CSS writes them, from 0 to the full colour.

    Args:
        cmap: name of a matplotlib colour map.
        stops: how many.
        alpha: opacity of the full colour; lower values fade as in :func:`overlay`.

    Returns:
        ``stops`` colours as "rgba(red,green,blue,opacity)".

    Example:
        >>> colour_stops("gray", 2)
        ['rgba(0,0,0,0.00)', 'rgba(255,255,255,1.00)']
    """
    palette = _colour_map(cmap)
    colours = []
    for level in np.linspace(0, 1, stops):
        red, green, blue, _ = (round(255 * part) for part in palette(float(level)))
        colours.append(f"rgba({red},{green},{blue},{alpha * min(1.0, level / _FADE):.2f})")
    return colours
