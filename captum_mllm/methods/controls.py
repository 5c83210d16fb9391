"""Controls: maps that know nothing, and one that knows all; a method must lie between them."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.discovery import carry_over
from captum_mllm.adapters.hooks import one_thread, without_gradients
from captum_mllm.functional import Box, resample_cells
from captum_mllm.geometry import ImageGeometry
from captum_mllm.methods.cells import box_on_grid
from captum_mllm.methods.registry import METHODS, check_options, method, run_method
from captum_mllm.methods.request import Request, over_answer
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.validation import ArgumentError, check_number


@method("random", kind="control")
def random(request: Request) -> MLLMAttributionResult:
    """Uniform noise, drawn independently for every token and cell.

    Reference:
        Ours.
    """
    trace = request.run().trace
    draw = torch.Generator().manual_seed(request.seed)
    maps = [torch.rand((len(trace.targets), *g.shape), generator=draw) for g in trace.grids]
    return over_answer(trace, maps, "random")


@method("centre", kind="control")
def centre(request: Request, sigma: float = 0.25) -> MLLMAttributionResult:
    """A Gaussian at the centre of the image, the same for every token.

    Photographs show their objects near the centre, so that a map which knows nothing of the image
    still scores well.

    Args:
        request: the request.
        sigma: standard deviation, in sides of the canvas, default 0.25.

    Reference:
        Ours; the centre bias of photographs is well known from saliency benchmarks.
    """
    sigma = check_number("sigma", sigma, "greater than 0", lambda s: 0 < s < float("inf"))
    trace = request.run().trace
    maps = [
        centre_map(g.rows, g.cols, sigma).expand(len(trace.targets), *g.shape) for g in trace.grids
    ]
    return over_answer(trace, maps, "centre")


def centre_map(rows: int, cols: int, sigma: float) -> Float[Tensor, "rows cols"]:
    """``exp(-(x^2 + y^2) / (2 sigma^2))`` at the cells' centres, on a canvas of 1 by 1.

    Args:
        rows: cells along the height.
        cols: cells along the width.
        sigma: standard deviation, in sides of the canvas.

    Reference:
        Ours.

    Example:
        >>> [round(value, 3) for value in centre_map(1, 3, 0.25)[0].tolist()]
        [0.411, 1.0, 0.411]
    """
    y = (torch.arange(rows) + 0.5) / rows - 0.5
    x = (torch.arange(cols) + 0.5) / cols - 0.5
    return (-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * sigma**2)).exp()


@method("randomised_model", kind="control")
def randomised_model(request: Request, of: str = "lens", **options: Any) -> MLLMAttributionResult:
    """Another method on a copy of the model with shuffled weights.

    Whatever structure is left in the maps does not come from what the model learnt.

    Args:
        request: the request; without a target it is about the answer of the model itself.
        of: name of the method, default "lens".
        options: of that method.

    Raises:
        ValueError: ``of`` is this control itself, or not a method.
    """
    others = [name for name in METHODS if METHODS[name].run is not randomised_model]
    if of not in others:
        raise ArgumentError("of", f"must be one of {', '.join(others)}, got {of!r}.")
    check_options(of, options)
    if METHODS[of].needs == "masks" and request.masks is None:
        raise ArgumentError("of", f"can't be {of!r} without masks=.")
    if isinstance(request.model, nn.Module):
        _check_shufflable(request.model)  # before the model runs, which takes long where offloaded
    answer = request.run().answer_ids
    model = shuffled_copy(request.model, request.seed)
    result = run_method(of, replace(request, model=model, target=answer, shared=None), **options)
    return replace(result, method=f"randomised_model({result.method})")


@method("mask", kind="control", needs="masks")
def mask(request: Request, geometry: ImageGeometry | None = None) -> MLLMAttributionResult:
    """The annotated masks at the grid's resolution: the share of each cell that they cover.

    Its score tells how well a map on that grid can do (not a strict limit: cells fitted to one
    metric could score slightly higher). Where the model saw only a part of the picture, the map
    covers that part. Tokens without a mask have a map of zeros. Shares are not divided by their
    largest.

    Args:
        request: the request with its ``masks``.
        geometry: the box of the picture that the model saw; needed without a processor.

    Raises:
        TypeError: masks of another kind.
        ValueError: masks of tokens that don't exist; a picture whose geometry is unknown.

    Reference:
        Ours.
    """
    trace, masks = request.run().trace, request.masks
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks must map positions in the answer to masks, got {type(masks).__name__}."
        )
    count = len(trace.targets)
    if wrong := [t for t in masks if not isinstance(t, int) or not 0 <= t < count]:
        raise ValueError(f"masks must be of positions 0..{count - 1} in the answer, got {wrong}.")
    maps = [torch.zeros(count, *grid.shape) for grid in trace.grids]
    result = over_answer(trace, maps, "mask", peak=1.0)
    for token, of_token in masks.items():
        for i, mask in enumerate(_per_image(of_token, len(maps), token)):
            if mask is not None:
                box = result.geometry(i, (mask.shape[0], mask.shape[1]), geometry=geometry).box
                maps[i][token] = mask_shares(mask, box, (trace.grids[i].rows, trace.grids[i].cols))
    return over_answer(trace, maps, "mask", peak=1.0)


def mask_shares(
    mask: Bool[Tensor, "height width"], box: Box, size: tuple[int, int]
) -> Float[Tensor, "rows cols"]:
    """Share of each cell that a mask of the picture covers, of the cell's part in the picture.

    Args:
        mask: bool, in pixels of the picture.
        box: the part of the picture that the cells show, (left, upper, right, lower) in pixels.
        size: (rows, cols) of the cells.

    Returns:
        (rows, cols) in [0, 1]; 0 for a cell outside the picture.

    Reference:
        Ours.

    Example:
        >>> mask = torch.tensor([[True, False, False, False]])
        >>> mask_shares(mask, (0.0, 0.0, 4.0, 1.0), (1, 2)).tolist()
        [[0.5, 0.0]]
    """
    where = box_on_grid(box, (mask.shape[0], mask.shape[1]))
    return resample_cells(mask[None].double(), where, size)[0].float()


def _per_image(masks: Any, images: int, token: int) -> list[Tensor | None]:
    """One bool mask, or None, for each image."""
    per_image = list(masks) if isinstance(masks, tuple | list) else [masks]
    if len(per_image) != images:
        raise ValueError(
            f"masks[{token}] must hold one mask (or None) for each of {images} images, got "
            f"{len(per_image)}."
        )
    tensors: list[Tensor | None] = []
    for mask in per_image:
        tensor = None if mask is None else torch.as_tensor(mask)
        if tensor is not None and (tensor.dtype != torch.bool or tensor.ndim != 2):
            raise TypeError(
                f"masks[{token}] must be bool (height, width) of the picture, got "
                f"{tensor.dtype} {tuple(tensor.shape)}."
            )
        tensors.append(tensor)
    return tensors


def shuffled_copy(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a model with the entries of each of its parameters permuted at random.

    So every tensor keeps the distribution of its values and loses what it learnt; tied weights
    stay tied. Buffers are left unchanged. Memory: the model once more, and 12 bytes per entry of
    its largest parameter while it runs.

    Args:
        model: left as it is.
        seed: of the permutations, which are drawn on each parameter's own device (another kind of
            device draws others).

    Raises:
        ValueError: offloaded or quantised weights, which can't be permuted.

    Reference:
        Model parameter randomisation test (arXiv 1810.03292); permutation in place of newly drawn
        weights is ours.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> other = shuffled_copy(layer, seed=0)
        >>> torch.equal(other.weight.sort().values, layer.weight.sort().values)
        True
    """
    other = _shufflable_copy(model)
    shuffle_weights(other.parameters(), seed)
    return other


def _shufflable_copy(model: nn.Module) -> nn.Module:
    _check_shufflable(model)
    with one_thread(model):  # another that runs it meanwhile has hooks in it
        other = copy.deepcopy(model)
    carry_over(model, other)
    return other


def _check_shufflable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            what = "offloaded (its values are on disk or elsewhere until they are used)"
            advice = (
                "Load the model without offload where there is memory for it twice, on the CPU if "
                "need be: from_pretrained(..., device_map='cpu')"
            )
        elif not parameter.is_floating_point():
            what, advice = f"of {parameter.dtype}", "Load the model unquantised"
        else:
            continue
        raise ArgumentError(
            "model",
            f"can't be copied with permuted weights: its parameter {name!r} is {what}. {advice}; "
            f"or take a control that needs no copy: 'random' or 'centre'.",
        )


def shuffle_weights(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Permute the entries of each parameter at random, in place.

    Args:
        parameters: of a copy; never those of a user's model.
        seed: of the permutations, which are drawn on each parameter's own device.

    Reference:
        See :func:`shuffled_copy`.

    Example:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> shuffle_weights(layer.parameters(), seed=1)
        >>> torch.equal(layer.weight.sort().values, before.sort().values)
        True
    """
    draws: dict[torch.device, torch.Generator] = {}
    with without_gradients():
        for parameter in parameters:
            device = parameter.device
            draw = draws.setdefault(device, torch.Generator(device).manual_seed(seed))
            order = torch.randperm(parameter.numel(), generator=draw, device=device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def cascading_copies(model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """One copy of a model, randomised from its output down to its pixels.

    Each step permutes the weights of further parts: the head and the norm before it, the last
    quarter of the language model's layers, its last half, all of them, and all the rest. Memory as
    for :func:`shuffled_copy`.

    Args:
        model: left as it is.
        seed: of the permutations.

    Yields:
        What has been randomised, and the copy; the same one each time, changed further.

    Raises:
        ValueError: offloaded or quantised weights, which can't be permuted.

    Reference:
        Cascading parameter randomisation (arXiv 1810.03292); permutation in place of newly drawn
        weights, and the steps, are ours.

    Example:
        >>> from captum_mllm.reference import load
        >>> model, _ = load()
        >>> [name for name, _ in cascading_copies(model, seed=0)][:2]
        ['head', 'last quarter of the layers']
    """
    other = _shufflable_copy(model)
    adapter, names = find_adapter(model), {id(m): n for n, m in model.named_modules()}
    head, norm, *layers = (
        other.get_submodule(names[id(part)])
        for part in (adapter.head, adapter.final_norm, *adapter.layers)
    )
    quarter, half = max(len(layers) // 4, 1), max(len(layers) // 2, 1)
    done: set[int] = set()
    for name, parts in (
        ("head", [head, norm]),
        ("last quarter of the layers", layers[-quarter:]),
        ("last half of the layers", layers[-half:]),
        ("all layers", layers),
        ("everything", [other]),
    ):
        found = {id(p): p for part in parts for p in part.parameters() if id(p) not in done}
        shuffle_weights(found.values(), seed + len(done))
        done |= found.keys()
        yield name, other
