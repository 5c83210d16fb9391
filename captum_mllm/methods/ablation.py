"""The baseline by perturbation: how much each token loses without each part of the image."""

from math import ceil
from typing import Any

from captum.attr import FeatureAblation

from captum_mllm.adapters.hooks import without_gradients
from captum_mllm.functional import grid_mask
from captum_mllm.geometry import ImageGrid
from captum_mllm.methods.cells import canvases_of, cell_means, scored
from captum_mllm.methods.registry import method
from captum_mllm.methods.request import Request, over_answer
from captum_mllm.model.baselines import baseline_images
from captum_mllm.result import MLLMAttributionResult

MOST = 64  # parts per image


@method("ablation", kind="baseline")
def ablation(
    request: Request, grid: tuple[int, int] | None = None, baseline: str = "blur"
) -> MLLMAttributionResult:
    """How much each token's log-probability drops when a part of the image is blanked out.

    One forward per part, for all tokens at once. Only drops count. captum keeps the attribution
    of every pixel: (tokens, channels, height, width) per image, 4 bytes each.

    Args:
        request: the request.
        grid: (rows, cols) of the parts that each image is cut into; default None: the model's
            own cells, joined until at most 64 parts are left.
        baseline: "blur" (default), "black" or "mean", see
            :func:`~captum_mllm.model.baselines.baseline_images`.

    Raises:
        TypeError: ``grid`` is not a pair of numbers.
        ValueError: more parts than pixels; unknown ``baseline``.

    Reference:
        Occlusion of parts (arXiv 1311.2901) by captum's ``FeatureAblation``; parts and baseline
        are our choice.
    """
    if grid is not None and not _is_pair(grid):
        raise TypeError(f"grid must be (rows, cols), two ints, got {grid!r}.")
    run = request.run()
    f = scored(request, run)
    canvases = canvases_of(f)
    masks, parts = [], 0
    for canvas, cells in zip(canvases, run.sample.grids, strict=True):
        mask = grid_mask((canvas.shape[-2], canvas.shape[-1]), *(grid or parts_of(cells))) + parts
        parts = int(mask.max()) + 1  # no two images share a feature
        masks.append(mask.reshape(*[1] * (canvas.ndim - 2), *mask.shape).to(canvas.device))
    with without_gradients():
        pixels = FeatureAblation(f).attribute(
            canvases,
            baseline_images(canvases, baseline, request.processor),
            feature_mask=tuple(masks),
            show_progress=request.show_progress,
        )
    maps = [cell_means(p, cells) for p, cells in zip(pixels, run.sample.grids, strict=True)]
    return over_answer(run.trace, maps, "ablation")


def parts_of(grid: ImageGrid) -> tuple[int, int]:
    """Rows and columns of the parts: the model's cells, joined k x k to at most 64 parts.

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
