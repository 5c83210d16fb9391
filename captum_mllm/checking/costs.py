"""Lines on what works here and what it costs: scales, flipped views, memory."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_mllm.checking.report import Finding
from captum_mllm.checking.subject import Subject
from captum_mllm.functional import rank_correlation, upsample
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.discovery import discover_scales
from captum_mllm.model.observing import counted_forwards
from captum_mllm.model.scales import FLIPS, Flip, maps_at

if TYPE_CHECKING:
    from PIL.Image import Image

SCALE = 2.0  # the larger one of MSEA's default
TRUE_FLIP = 0.5  # correlation with the flipped picture's pixels from which on a flip is right
SLOW = 20.0  # seconds at scale 1 above which a larger scale is not measured
_GIB = 2**30


@dataclass(frozen=True)
class _View:
    """A view to try: its name, scale and flip."""

    name: str
    scale: float
    flip: Flip


_VIEWS = (
    _View(f"scale {SCALE:g}", SCALE, "none"),
    _View("mirrored", 1.0, "horizontal"),
    _View("turned by 180 degrees", 1.0, "half_turn"),
)


def check_scales_and_views(subject: Subject) -> Finding:
    """Which scales and flipped views work, what each costs, and whether a flip is a true one.

    Args:
        subject: the model under check.
    """
    with counted_forwards(subject.adapter) as calls:
        start = time.perf_counter()
        run = subject.run_of(subject.picture)
        seconds = time.perf_counter() - start
    figures: dict[str, object] = {"scale 1": {"seconds": seconds, "forwards": len(calls)}}
    parts = [f"scale 1: {seconds:.2g} s, {len(calls)} forward"]
    base = run.trace.maps[0]
    wrong, refused = [], []
    for view in _VIEWS:
        if view.scale > 1 and seconds > SLOW:
            refused.append(f"{view.name} is not measured, as scale 1 is slow")
            continue
        try:
            grids = _grids(subject, view.scale)
            if not subject.adapter.can_flip(grids, FLIPS[view.flip]):
                refused.append(f"{view.name} would not lie on the same cells")
                continue
            with counted_forwards(subject.adapter) as calls:
                start = time.perf_counter()
                maps = maps_at(subject.runner, run, grids, flip=view.flip).lens[0]
                seconds = time.perf_counter() - start
        except (ValueError, NotImplementedError) as error:
            refused.append(f"{view.name} is refused: {error}")
            continue
        near = upsample(maps, (base.shape[-2], base.shape[-1])).flatten(1)
        agreement = float(rank_correlation(near, base.flatten(1)).median())
        row = {"seconds": seconds, "forwards": len(calls), "rank_correlation": agreement}
        text = f"{view.name}: {seconds:.2g} s, {len(calls)} forward(s), agrees by {agreement:.2f}"
        if view.flip != "none":
            row["flip"] = true = _flip_correlation(subject, view.flip)
            if not true >= TRUE_FLIP:
                wrong.append(f"{view.name} is not the picture flipped (pixels agree by {true:.2f})")
        figures[view.name] = row
        parts.append(text)
    found = "; ".join([*parts, *wrong, *refused]) + "."
    if wrong:
        return Finding("scales and views", "failed", found, "Use MSEA(flip='none').", figures)
    advice = "Leave out what is refused: scales=(1.0,), flip='none'." if refused else ""
    return Finding("scales and views", "passed", found, advice, figures)


def _grids(subject: Subject, scale: float) -> Sequence[ImageGrid]:
    grids = subject.sample.grids
    if scale == 1.0:
        return grids
    discover_scales(subject.adapter, subject.sample, (1.0, scale))
    return tuple(subject.adapter.scaled_grid(grid, scale) for grid in grids)


def _flip_correlation(subject: Subject, flip: Flip) -> float:
    """Correlation of the flipped pixels with what the processor makes of the flipped picture."""
    adapter, sample = subject.adapter, subject.sample
    flipped = adapter.flipped(sample.kwargs, sample.grids, FLIPS[flip])
    other = subject.encode(_turned(subject.picture, flip))
    pairs = [
        (flipped[name].float(), other[name].float())
        for name in adapter.pixel_keys
        if name in flipped and name in other
    ]
    if not pairs or any(one.shape != two.shape for one, two in pairs):
        return 0.0
    return min(_correlation(one, two) for one, two in pairs)


def _turned(picture: "Image", flip: Flip) -> "Image":
    from PIL import Image, ImageOps

    mirrored = ImageOps.mirror(picture)
    if flip == "horizontal":
        return mirrored
    return mirrored.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def _correlation(one: Tensor, two: Tensor) -> float:
    pair = torch.stack([one.flatten(), two.flatten()]).cpu()
    return float(torch.corrcoef(pair)[0, 1].nan_to_num(1.0))


def check_memory(subject: Subject) -> Finding:
    """Size of the weights, and the largest memory that was in use.

    Args:
        subject: the model under check.
    """
    model = subject.adapter.model
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors) / _GIB
    away = sum(t.numel() * t.element_size() for t in tensors if t.is_meta) / _GIB
    figures = {"weights_gib": weights, "offloaded_gib": away}
    if subject.adapter.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(subject.adapter.device) / _GIB
        where = "on the GPU"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
        where = "of this process since it began"
    figures["peak_gib"] = peak
    offloaded = f" ({away:.2f} of them offloaded)" if away else ""
    found = f"The weights take {weights:.2f} GiB{offloaded}; the peak {where} is {peak:.2f} GiB."
    return Finding("memory", "passed", found, "", figures)
