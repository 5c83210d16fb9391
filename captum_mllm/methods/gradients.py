"""Gradient baselines: Grad-CAM on an image's features, integrated gradients on its pixels."""

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
from captum_mllm.methods.registry import method
from captum_mllm.methods.request import Request, over_answer
from captum_mllm.model.baselines import baseline_images
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.validation import ArgumentError


@method("gradcam", kind="baseline", gradients=True)
def gradcam(request: Request) -> MLLMAttributionResult:
    """Grad-CAM on the image features as the language model receives them, one value per cell.

    ``relu(sum_c mean_i(d log p / d h_ic) h_ic)`` of each token's log-probability p, h the features
    of a view (tiles, overview); views are merged as the lens's are. One forward and backward per
    token, image and view. One weight per channel for the whole image was designed for
    convolutions, whose channels mean the same everywhere; features of language models need not.
    (The further features that Qwen3-VL adds after its first layers are left out.)

    Args:
        request: the request.

    Reference:
        Grad-CAM (arXiv 1610.02391) by captum's ``LayerGradCam``; the layer is our choice.
    """
    run = request.run()
    f, adapter = scored(request, run), find_adapter(request.model)
    maps: list[list[Tensor]] = [[] for _ in run.sample.grids]
    for token in _tokens(request, len(run.trace.targets), "gradcam"):
        for image, grid in enumerate(run.sample.grids):
            views = adapter.views(grid)
            cams = [_cam(f, image, view, token) for view in range(len(views))]
            maps[image].append(merge_views(cams, [view.box for view in views], grid.shape))
    return over_answer(run.trace, [torch.cat(tokens) for tokens in maps], "gradcam")


def _cam(f: TokenLogProb, image: int, view: int, token: int) -> Float[Tensor, "1 ..."]:
    """Grad-CAM of one token on one view of one image."""
    cam = LayerGradCam(f, f.layer(image, view))
    values: Any = cam.attribute(canvases_of(f), target=token, relu_attributions=True)
    return values.detach()[:, 0]


@method("integrated_gradients", kind="baseline", gradients=True)
def integrated_gradients(
    request: Request, baseline: str = "blur", batch: int = 4
) -> MLLMAttributionResult:
    """Integrated gradients of each token's log-probability, summed over each cell's pixels.

    Positive sums count: they raised the token's probability.

    Args:
        request: the request; its ``steps`` are the points of the path.
        baseline: "blur" (default), "black" or "mean", see
            :func:`~captum_mllm.model.baselines.baseline_images`.
        batch: images in one forward, default 4.

    Raises:
        ValueError: unknown ``baseline``; ``batch`` or ``steps`` below 1.

    Reference:
        Integrated gradients (arXiv 1703.01365) by captum's ``IntegratedGradients``; baseline and
        cells are our choice.
    """
    for name, value in (("batch", batch), ("steps", request.steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(name, f"must be an int >= 1, got {value!r}.")
    run = request.run()
    f = scored(request, run)
    canvases = canvases_of(f)
    start, attributor = (
        baseline_images(canvases, baseline, request.processor),
        IntegratedGradients(f),
    )
    maps: list[list[Tensor]] = [[] for _ in canvases]
    for token in _tokens(request, len(run.trace.targets), "integrated_gradients"):
        pixels = attributor.attribute(
            canvases, start, target=token, n_steps=request.steps, internal_batch_size=batch
        )
        for tokens, attribution, grid in zip(maps, pixels, run.sample.grids, strict=True):
            tokens.append(cell_sums(attribution.detach(), grid))
    maps_per_image = [torch.cat(tokens) for tokens in maps]
    return over_answer(run.trace, maps_per_image, "integrated_gradients")


def _tokens(request: Request, count: int, name: str) -> "tqdm[int]":
    return tqdm(range(count), desc=name, disable=not request.show_progress)
