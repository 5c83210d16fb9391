"""The measured pictures of docs/limits.md: curves and means rather than single maps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_mllm import MSEA, LogitLens
from captum_mllm.functional import upsample
from captum_mllm.metrics import Interval, insertion_deletion, paired_bootstrap
from captum_mllm.reference.models import load
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import make_scene
from captum_mllm.visualization import overlay
from studies.prompts import answer_words, default_inputs
from studies.quality_table import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RECORDS = Path(__file__).parent / "records"
SIDE = 112
WIDTH = 4.6  # inches
LENS = "LogitLens"
SEAM = 13  # of the 28 columns of two tiles, the last of the left tile
SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0)


def _plots(columns: int, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    found = list(figure.subplots(1, columns, squeeze=False).flat)
    for axes in found:
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def centred(maps: Tensor, mask: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Maps moved so that the object's centre of mass is in the middle, and where they have values.

    Args:
        maps: (n, height, width).
        mask: bool (height, width), the object.
        half: half the side of the frame that is cut out, pixels.

    Returns:
        (n, 2 half, 2 half), 0 outside the picture; and (2 half, 2 half), 1 inside it.
    """
    height, width = mask.shape
    y, x = (int(at) for at in mask.nonzero().float().mean(0).round())
    padded = torch.zeros(len(maps) + 1, height + 2 * half, width + 2 * half)
    padded[:-1, half : half + height, half : half + width] = maps
    padded[-1, half : half + height, half : half + width] = 1
    cut = padded[:, y : y + 2 * half, x : x + 2 * half]
    return cut[:-1], cut[-1]


def mean_maps(name: str, scenes: int, half: int) -> Tensor:
    """Mean over objects of the noun's lens map, of that averaged with its mirrored view, and mask.

    Args:
        name: a reference model.
        scenes: how many of the test split.
        half: as for :func:`centred`.

    Returns:
        (3, 2 half, 2 half); each map relative to its largest value, at the object's centre.
    """
    model, processor = load(name)
    method = MSEA(model, processor, scales=(1.0,), flip="horizontal")
    total, count = torch.zeros(3, 2 * half, 2 * half), torch.zeros(2 * half, 2 * half)
    for number in range(scenes):
        scene = make_scene(number)
        picture, masks = render_pil(scene, SIDE)
        views = method.views(default_inputs(processor, picture))
        trace = views.base
        for obj, tokens in answer_words(trace, scene).items():
            if not masks[obj].any():
                continue
            row = trace.map_rows[trace.targets[tokens[0]]]
            plain, turned = (upsample(own[0][row], (SIDE, SIDE)) for own in views.maps)
            maps = torch.stack([plain, (plain + turned) / 2])
            maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-9)
            own, inside = centred(torch.cat([maps, masks[obj][None].float()]), masks[obj], half)
            total, count = total + own, count + inside
    return total / count.clamp(min=1)


def wake(scenes: int = 30) -> "Figure":
    """What a raw map leaves to the right of an object and below it, on average.

    Args:
        scenes: how many of the test split.
    """
    maps = mean_maps("internvl", scenes, half := 64)
    figure, both = _plots(2, 2.5)
    names = ("logit lens", "mean with its mirrored view")
    for axes, own, name in zip(both, maps[:2], names, strict=True):
        shown = axes.imshow(own, vmin=0, vmax=1, cmap="turbo", extent=(-half, half, half, -half))
        axes.contour(
            maps[2], [0.5], colors="white", linewidths=1, extent=(-half, half, -half, half),
            origin="upper",
        )  # fmt: skip
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("pixels from the object's centre", fontsize=7)
    figure.colorbar(shown, ax=both, shrink=0.8).ax.tick_params(labelsize=7)
    return figure


def black(number: int = 7, steps: int = 16) -> "Figure":
    """Deletion with black, which tells nothing here, beside blur.

    Args:
        number: scene of the test split.
        steps: steps of the curves.
    """
    model, processor = load("qwen2vl")
    scene = make_scene(number)
    picture, _ = render_pil(scene, SIDE)
    inputs = default_inputs(processor, picture)
    result = LogitLens(model, processor).attribute(inputs)
    trace = LogitLens(model, processor).trace(inputs, target=result.output_ids)
    nouns = [tokens[0] for tokens in answer_words(trace, scene).values()]
    noise = torch.rand(14, 14, generator=torch.Generator().manual_seed(0))
    figure, both = _plots(2, 2.3)
    area = torch.linspace(0, 100, steps + 1)
    for axes, baseline in zip(both, ("black", "blur"), strict=True):
        for name, ranked in (("logit lens", result), ("random map", noise)):
            found = insertion_deletion(
                model, inputs, result.output_ids, ranked, processor=processor, tokens=nouns,
                baseline=baseline, steps=steps, perturbations_per_eval=8,
            )  # fmt: skip
            axes.plot(area, found.deletion.mean(0), marker=".", ms=4, lw=1.2, label=name)
        axes.set_title(f"deleted: {baseline}", fontsize=8)
        axes.set_xlabel("% of the area deleted", fontsize=7)
        axes.set_ylim(-0.03, 1.05)
    both[0].set_ylabel("probability of the nouns", fontsize=7)
    both[1].legend(fontsize=7, frameon=False)
    return figure


def consistency(scenes: int = 6, names: Sequence[str] = ("llava", "qwen2vl", "biased")) -> "Figure":
    """How far the answer stays the same at other scales.

    Args:
        scenes: how many of the test split.
        names: reference models.
    """
    figure, (axes,) = _plots(1, 2.4)
    for name in names:
        model, processor = load(name)
        method = MSEA(model, processor, scales=SCALES, consistency=True, flip="none")
        found: list[Any] = []
        for number in range(scenes):
            picture, _ = render_pil(make_scene(number), SIDE)
            views = method.views(default_inputs(processor, picture))
            found.append(views.consistency)
        mean = torch.tensor(found).mean(0)
        axes.plot(views.scales, mean, marker="o", ms=3.5, lw=1.2, label=name)
    axes.axvspan(80 / SIDE, 168 / SIDE, color="0.92", zorder=0)
    axes.text(1.1, 0.08, "sizes in training", fontsize=7, ha="center")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("scale", fontsize=7)
    axes.set_ylabel("consistency", fontsize=7)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def seams(scenes: int = 12) -> "Figure":
    """Where tiles meet, maps jump: the word that jumps most, and the mean over all.

    Args:
        scenes: how many of the test split.
    """
    model, processor = load("internvl")
    lens = LogitLens(model, processor)
    jumps: list[Tensor] = []
    worst: Any = None
    for number in range(scenes):
        scene = make_scene(number)
        picture, _ = render_pil(scene, 2 * SIDE)
        trace = lens.trace(default_inputs(processor, picture))
        result = lens.attribute_trace(trace)
        for obj, tokens in answer_words(trace, scene).items():
            own = result.grid_attr[0][tokens[0]]
            jumps.append((own.diff(dim=1).abs() / own.max().clamp(min=1e-9)).mean(0))
            if worst is None or jumps[-1][SEAM] > worst[0]:
                pixels = result.to_image(0, picture)[tokens[0]]
                worst = jumps[-1][SEAM], scene.categories[obj], overlay(picture, pixels)
    figure, (left, right) = _plots(2, 2.4)
    left.imshow(worst[2])
    left.set_title(f'"{worst[1]}", cut into 2 x 2 tiles', fontsize=8)
    left.axvline(SIDE, color="white", lw=0.8, ls=":")
    left.axhline(SIDE, color="white", lw=0.8, ls=":")
    left.set_axis_off()
    colours = ["C3" if n == SEAM else "C0" for n in range(len(jumps[0]))]
    right.bar(range(1, len(jumps[0]) + 1), torch.stack(jumps).mean(0), color=colours)
    right.set_xlabel("between columns n and n + 1 of 28", fontsize=7)
    right.set_ylabel("mean jump / the map's largest value", fontsize=7)
    right.set_title("red: where tiles meet", fontsize=8)
    return figure


def _dots(axes: "Axes", names: Sequence[str], found: Sequence[Interval]) -> None:
    """Means with their intervals, one a line, the first on top."""
    for row, own in enumerate(found):
        axes.plot([own.low, own.high], [row, row], color="C0", lw=1.4)
        axes.plot([own.mean], [row], "o", color="C0", ms=4)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()


def seeds() -> "Figure":
    """One recipe, three seeds: the gain over the lens changes its sign (``records/seeds.json``)."""
    runs = json.loads((RECORDS / "seeds.json").read_text())["runs"]
    figure, both = _plots(2, 1.7)
    for axes, method in zip(both, ("MSEA", "MSEA+ARC"), strict=True):
        found = []
        for run in runs:
            own, base = (run["methods"][name]["average_precision"] for name in (method, LENS))
            found.append(paired_bootstrap(own, base, seed=0))
        _dots(axes, [f"seed {run['seed']}" for run in runs], found)
        axes.axvline(0, color="0.6", lw=0.8)
        axes.set_xlim(-0.13, 0.13)
        axes.set_xticks([-0.1, 0.0, 0.1])
        axes.set_title(f"{method}, published settings", fontsize=8)
        axes.set_xlabel("gain in AP over the lens", fontsize=7)
    return figure


FAITHFUL = {  # row of the record -> how it is shown
    "mask": "the object's mask",
    "attention": "attention",
    "LogitLens, published": "logit lens",
    "TAM, chosen": "TAM, tuned",
    "MSEA, chosen": "MSEA",
    "MSEA+ARC, chosen": "MSEA+ARC",
    "TAM, published": "TAM, published",
    "centre": "centre prior",
    "randomised_model": "random weights",
    "random": "random map",
}


def faithfulness() -> "Figure":
    """Localisation tells methods apart that deletion does not (``records/quality.json``)."""
    record = json.loads((RECORDS / "quality.json").read_text())["measured"]["faithfulness"]
    own = record["llava"]["plain"]
    figure, (left, right) = _plots(2, 2.7)
    shown = list(FAITHFUL.values())
    _dots(left, shown, [interval(own, name, "average_precision") for name in FAITHFUL])
    left.set_xlabel("AP: does it lie on the object?", fontsize=7)
    _dots(right, shown, [interval(own, name, "difference, blur") for name in FAITHFUL])
    right.set_xlabel("insertion - deletion, blur", fontsize=7)
    right.set_yticklabels([])
    return figure
