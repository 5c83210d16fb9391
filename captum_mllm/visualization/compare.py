"""Several results of one answer side by side, and one as a table of pandas."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_mllm.validation import ArgumentError
from captum_mllm.visualization.canvas import finish, literal, new_figure
from captum_mllm.visualization.heatmaps import TokenKey, chosen_rows, heat_of, paint_heat, scale_of
from captum_mllm.visualization.summary import ResultLike, summarise_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_ACROSS = 4


def compare(
    results: Mapping[str, ResultLike],
    word: TokenKey,
    *,
    picture: "Image | None" = None,
    image: int = 0,
    show: bool = False,
) -> "tuple[Figure, Any] | None":
    """Maps of one word or phrase by several methods, side by side on one colour scale.

    Args:
        results: a title -> result, all in the same units (those of
            :func:`captum_mllm.methods.explain` are).
        word: the word or phrase, as text, or ``(text, mention)``; or rows, as ``target_token_pos``
            of ``result.plot_image_heatmap``.
        picture: the original picture to draw on, default None: maps alone.
        image: which image, default the first.
        show: show the plot and return None; default False returns (figure, axes).

    Returns:
        (figure, an array of axes), or None if shown. The full colour is the largest value of all
        maps shown.

    Raises:
        ArgumentError: no result, different units, a video.
        KeyError: no such word in one of the results.

    Example:
        >>> from captum_mllm import ARC, LogitLens
        >>> from captum_mllm.attr import JointNormalization
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image> what is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> lens = JointNormalization(LogitLens(model, processor))
        >>> results = {"lens": lens, "ARC": ARC(model, processor)}
        >>> maps = {k: v.attribute(inputs, target="there is a dog") for k, v in results.items()}
        >>> figure, axes = compare(maps, "dog", picture=picture)
        >>> [each.get_title() for each in axes]
        ['lens', 'ARC']
    """
    if not results:
        raise ArgumentError("results", "is empty: give at least one result by its title.")
    units = {result.units for result in results.values()}
    if len(units) > 1:
        raise ArgumentError(
            "results",
            f"must be in the same units to share a colour scale, got {', '.join(sorted(units))}; "
            f"wrap attributors of logits in JointNormalization.",
        )
    heats = []
    for name, result in results.items():
        if not -len(result.grids) <= image < len(result.grids):
            raise IndexError(f"image {image} is out of range in {name!r}.")
        if result.grids[image].steps:
            raise ArgumentError("image", f"{image} is a video; plot its frames one by one.")
        heats.append(heat_of(result, chosen_rows(result, word), image, picture))
    top = max(0.0, *(float(heat.max()) for heat in heats)) or 1.0
    across = min(len(heats), _ACROSS)
    down = -(-len(heats) // across)
    fig = new_figure((3.0 * across + 0.8, 3.2 * down), show)
    panels = np.atleast_1d(fig.subplots(down, across)).ravel()
    for ax, name, heat in zip(panels, results, heats, strict=False):
        paint_heat(ax, heat, picture, top)
        ax.set_title(literal(name, 40), fontsize=10)
    for ax in panels[len(heats) :]:
        ax.remove()
    axes = panels[: len(heats)]
    label = literal(f"attribution ({units.pop()})")
    fig.colorbar(scale_of(top), ax=list(axes), label=label)
    return finish(fig, axes, show)


def to_frame(result: ResultLike) -> Any:
    """A result as a table of pandas: one row per word of the answer.

    Args:
        result: what ``attribute`` returned.

    Returns:
        A ``pandas.DataFrame`` with the columns word, content, tokens, probability, image (the one
        that supports the word most), peak, x, y, region (of the image as the model saw it).

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("to_frame needs pandas: pip install pandas") from error
    rows = []
    for entry in summarise_images(result).words:
        peak = entry.peak
        rows.append(
            {
                "word": entry.word.text,
                "content": entry.word.content,
                "tokens": entry.word.tokens,
                "probability": entry.probability,
                "image": entry.image or 0,
                "peak": peak.value if peak else 0.0,
                "x": peak.x if peak else None,
                "y": peak.y if peak else None,
                "region": peak.region if peak else None,
            }
        )
    return pd.DataFrame(rows)
