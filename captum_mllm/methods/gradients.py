"""Baselines from gradients: Grad-CAM on an image's features, integrated gradients on its pixels."""

from typing import Any

import torch
from captum.attr import IntegratedGradients, LayerGradCam
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from captum_mllm.adapters import find_adapter
from captum_mllm.bridge import TokenLogProb
from captum_mllm.functional import merge_views
from captum_mllm.methods.cells import canvases_of, cell_sums, scored
from captum_mllm.methods.request import Request, over_answer
from captum_mllm.model.baselines import nothing
from captum_mllm.result import MLLMAttributionResult


def gradcam(request: Request) -> MLLMAttributionResult:
    """Grad-CAM on the image's features as the language model gets them, one value per cell.

    ``relu(sum_c mean_i(d log p / d h_ic) h_ic)`` of each token's log-probability p, h the features
    of a view (tiles, overview); views are merged as the lens's are. One forward and backward per
    token, image and view. One weight per channel for the whole image was made for convolutions,
    whose channels mean the same everywhere; features of language models need not. (Qwen3-VL's
    further features, added after its first layers, are not in it.)

    Args:
        request: the question.

    Reference:
        Grad-CAM (arXiv 1610.02391) by captum's ``LayerGradCam``; the layer is our choice.
    """
    run = request.run()
    f, adapter = scored(request, run), find_adapter(request.model)
    maps: list[list[Tensor]] = [[] for _ in run.sample.grids]
    for token in _tokens(request, len(run.trace.targets), "gradcam"):
        for image, grid in enumerate(run.sample.grids):
            views = adapter.views(grid)
            seen = [_cam(f, image, view, token) for view in range(len(views))]
            maps[image].append(merge_views(seen, [view.box for view in views], grid.shape))
    return over_answer(run.trace, [torch.cat(own) for own in maps], "gradcam")


def _cam(f: TokenLogProb, image: int, view: int, token: int) -> Float[Tensor, "1 ..."]:
    """Grad-CAM of one token on one view of one image."""
    cam = LayerGradCam(f, f.layer(image, view))
    found: Any = cam.attribute(canvases_of(f), target=token, relu_attributions=True)
    return found.detach()[:, 0]


def integrated_gradients(
    request: Request, baseline: str = "blur", batch: int = 4
) -> MLLMAttributionResult:
    """Integrated gradients of each token's log-probability, summed over each cell's pixels.

    Positive sums count: they raised the token's probability.

    Args:
        request: the question; its ``steps`` are the points of the path.
        baseline: "blur" (default) or "black", see :func:`~captum_mllm.model.baselines.nothing`.
        batch: pictures that go through the model at once, default 4.

    Raises:
        ValueError: unknown ``baseline``; ``batch`` or ``steps`` below 1.

    Reference:
        Integrated gradients (arXiv 1703.01365) by captum's ``IntegratedGradients``; baseline and
        cells are our choice.
    """
    for name, value in (("batch", batch), ("steps", request.steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
    run = request.run()
    f = scored(request, run)
    frames = canvases_of(f)
    start, method = nothing(frames, baseline, request.processor), IntegratedGradients(f)
    maps: list[list[Tensor]] = [[] for _ in frames]
    for token in _tokens(request, len(run.trace.targets), "integrated_gradients"):
        found = method.attribute(
            frames, start, target=token, n_steps=request.steps, internal_batch_size=batch
        )
        for own, attribution, grid in zip(maps, found, run.sample.grids, strict=True):
            own.append(cell_sums(attribution.detach(), grid))
    return over_answer(run.trace, [torch.cat(own) for own in maps], "integrated_gradients")


def _tokens(request: Request, count: int, name: str) -> "tqdm[int]":
    return tqdm(range(count), desc=name, disable=not request.show_progress)
