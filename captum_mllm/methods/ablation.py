"""The baseline by perturbation: what each part of the picture is worth to each token."""

from math import ceil
from typing import Any

import torch
from captum.attr import FeatureAblation

from captum_mllm.functional import grid_mask
from captum_mllm.geometry import ImageGrid
from captum_mllm.methods.cells import canvases_of, cell_means, scored
from captum_mllm.methods.request import Request, over_answer
from captum_mllm.model.baselines import nothing
from captum_mllm.result import MLLMAttributionResult

MOST = 64  # parts per image


def ablation(
    request: Request, grid: tuple[int, int] | None = None, baseline: str = "blur"
) -> MLLMAttributionResult:
    """How much each token's log-probability drops where a part of the picture shows nothing.

    One forward per part, for all tokens at once. Only drops count. captum keeps the attribution
    of every pixel: (tokens, channels, height, width) per image, 4 bytes each.

    Args:
        request: the question.
        grid: (rows, cols) of the parts that each picture is cut into; default None: the model's
            own cells, so many joined that at most 64 parts are left.
        baseline: "blur" (default) or "black", see :func:`~captum_mllm.model.baselines.nothing`.

    Raises:
        TypeError: ``grid`` is no pair of numbers.
        ValueError: more parts than pixels; unknown ``baseline``.

    Reference:
        Occlusion of parts (arXiv 1311.2901) by captum's ``FeatureAblation``; parts and baseline
        are our choice.
    """
    if grid is not None and not _is_pair(grid):
        raise TypeError(f"grid must be (rows, cols), two ints, got {grid!r}.")
    run = request.run()
    f = scored(request, run)
    frames = canvases_of(f)
    masks, parts = [], 0
    for frame, own in zip(frames, run.sample.grids, strict=True):
        mask = grid_mask((frame.shape[-2], frame.shape[-1]), *(grid or parts_of(own))) + parts
        parts = int(mask.max()) + 1  # each image has features of its own
        masks.append(mask.reshape(*[1] * (frame.ndim - 2), *mask.shape).to(frame.device))
    with torch.no_grad():
        found = FeatureAblation(f).attribute(
            frames,
            nothing(frames, baseline, request.processor),
            feature_mask=tuple(masks),
            show_progress=request.show_progress,
        )
    maps = [cell_means(own, grid) for own, grid in zip(found, run.sample.grids, strict=True)]
    return over_answer(run.trace, maps, "ablation")


def parts_of(grid: ImageGrid) -> tuple[int, int]:
    """Rows and columns of the parts: the model's cells, k x k joined to one, at most 64 in all.

    Args:
        grid: the image's.

    Example:
        >>> parts_of(ImageGrid(24, 24, 336, 336)), parts_of(ImageGrid(4, 6, 8, 12))
        ((8, 8), (4, 6))
    """
    joined = 1
    while ceil(grid.rows / joined) * ceil(grid.cols / joined) > MOST:
        joined += 1
    return ceil(grid.rows / joined), ceil(grid.cols / joined)


def _is_pair(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
