"""Multi-scale aggregation around any captum attributor on image tensors."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import Attribution
from torch import Tensor

from captum_mllm.functional import Aggregation, aggregate, resize_attributions

Size = tuple[int, int]


def attribute_at_scales(
    method: Attribution,
    inputs: Tensor | tuple[Tensor, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    scales: Sequence[float],
    aggregation: Aggregation,
    preserve: str,
) -> Any:
    """Call ``method.attribute`` on rescaled inputs and aggregate what comes back.

    Args:
        method: any captum attributor, layer attributors included.
        inputs: (N, C, H, W), or a tuple of such, all rescaled alike.
        args: further positional arguments of ``method.attribute``.
        kwargs: its keyword arguments; ``baselines`` follow the inputs (bilinear),
            ``feature_mask`` too (nearest), all others go through as they are.
        scales: factors of height and width.
        aggregation: see :func:`~captum_mllm.functional.aggregate`.
        preserve: "mass" or "density", see
            :func:`~captum_mllm.functional.resize_attributions`.

    Returns:
        What ``method.attribute`` returns at scale 1: a tensor or tuple, with the convergence
        delta if it was asked for.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"inputs must be tensors (N, C, H, W) or a tuple of such, got {got}.")
    named = _by_name(method, inputs, args, kwargs)
    wants_delta = bool(named.get("return_convergence_delta"))
    if wants_delta and aggregation != "mean":
        raise ValueError(
            f"return_convergence_delta needs aggregation='mean', got {aggregation!r}: only a mean "
            f"of attributions sums to a mean of output differences."
        )

    def at(scale: float) -> tuple[tuple[Tensor, ...], Any, bool]:
        scaled = tuple(_scaled(tensor, scale, "inputs") for tensor in tensors)
        options = dict(named)
        for name, mode in (("baselines", "bilinear"), ("feature_mask", "nearest-exact")):
            if name in options:
                options[name] = _scaled_option(options[name], tensors, scale, name, mode)
        value = method.attribute(scaled if isinstance(inputs, tuple) else scaled[0], **options)
        value, delta = value if wants_delta else (value, None)
        return (value if isinstance(value, tuple) else (value,)), delta, isinstance(value, tuple)

    kept = distinct_scales(scales, [[_size(t, scale) for t in tensors] for scale in scales])
    runs = {scale: at(scale) for scale in kept}
    first, _, is_tuple = runs[kept[0]]
    sizes = _base_sizes(first, tensors, kept[0])
    if sizes is None:  # a layer's attributions: their size is known from the base scale only
        sizes = [(a.shape[-2], a.shape[-1]) for a in (runs.get(1.0) or at(1.0))[0]]
    merged = tuple(
        aggregate(
            torch.stack([_back(runs[scale][0][n], sizes[n], preserve) for scale in kept]),
            aggregation,
        )
        for n in range(len(first))
    )
    result = merged if is_tuple else merged[0]
    if not wants_delta:
        return result
    return result, torch.stack([runs[scale][1] for scale in kept]).mean(0)


def distinct_scales(scales: Sequence[float], shapes: Sequence[Any]) -> list[float]:
    """Drop, with a warning, scales that come out at the same size as an earlier one.

    Args:
        scales: the factors.
        shapes: the size at each factor, anything comparable.
    """
    kept: list[float] = []
    seen: list[Any] = []
    for scale, shape in zip(scales, shapes, strict=True):
        if shape in seen:
            twin = kept[seen.index(shape)]
            warnings.warn(
                f"scale {scale} comes out at the same size as scale {twin} and is dropped.",
                stacklevel=2,
            )
        else:
            kept.append(scale)
            seen.append(shape)
    return kept


def _by_name(
    method: Attribution, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments but the inputs as keywords, so that baselines and masks can be found."""
    signature = inspect.signature(method.attribute)
    named: dict[str, Any] = {}
    for name, value in signature.bind(inputs, *args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    named.pop(next(iter(signature.parameters)))
    return named


def _size(tensor: Tensor, scale: float) -> Size:
    height, width = (round(side * scale) for side in tensor.shape[-2:])
    if height < 1 or width < 1:
        raise ValueError(
            f"scales: {scale} makes an input of {tuple(tensor.shape[-2:])} pixels smaller than "
            f"one pixel; use larger scales."
        )
    return height, width


def _scaled(tensor: Tensor, scale: float, name: str, mode: str = "bilinear") -> Tensor:
    """A tensor (N, C, H, W) rescaled; at scale 1 the tensor itself."""
    if scale == 1.0:
        return tensor
    size = _size(tensor, scale)
    if mode != "bilinear":
        return F.interpolate(tensor.double(), size=size, mode=mode).to(tensor.dtype)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point to be rescaled, got {tensor.dtype}.")
    resized = F.interpolate(tensor.detach(), size=size, mode=mode, align_corners=False)
    return resized.requires_grad_(tensor.requires_grad)


def _scaled_option(
    value: Any, tensors: tuple[Tensor, ...], scale: float, name: str, mode: str
) -> Any:
    """Baselines or a feature mask rescaled with the inputs; numbers and None stay."""
    if isinstance(value, tuple):
        return tuple(_scaled_option(v, tensors, scale, name, mode) for v in value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        sizes = [tuple(tensor.shape[-2:]) for tensor in tensors]
        if 2 <= value.ndim <= 4 and tuple(value.shape[-2:]) in sizes:
            as_batch = value.reshape((1,) * (4 - value.ndim) + tuple(value.shape))
            scaled = _scaled(as_batch, scale, name, mode)
            return scaled.reshape(*value.shape[:-2], *scaled.shape[-2:])
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} can't follow inputs of {sizes} pixels; its "
            f"last two axes must be those of an input."
        )
    raise TypeError(
        f"{name} must be a tensor, a number, None or a tuple of these to be rescaled, got "
        f"{type(value).__name__}."
    )


def _base_sizes(
    attributions: tuple[Tensor, ...], tensors: tuple[Tensor, ...], scale: float
) -> list[Size] | None:
    """Sizes to bring attributions to where they lie on the inputs; None for a layer's."""
    if len(attributions) != len(tensors):
        return None
    sizes = []
    for attribution, tensor in zip(attributions, tensors, strict=True):
        if attribution.ndim != 4 or tuple(attribution.shape[-2:]) != _size(tensor, scale):
            return None
        sizes.append((tensor.shape[-2], tensor.shape[-1]))
    return sizes


def _back(attribution: Tensor, size: Size, preserve: str) -> Tensor:
    """An attribution brought back to its base size; one without a spatial grid must fit as is."""
    if attribution.ndim == 4:
        return resize_attributions(attribution, size, preserve)  # type: ignore[arg-type]
    if tuple(attribution.shape[-2:]) != size:
        raise ValueError(
            f"attribution_method gives attributions of shape {tuple(attribution.shape)} that "
            f"change with the scale but are no (N, C, H, W) grid, so they can't be brought back; "
            f"choose a convolutional layer, or attribute to the input."
        )
    return attribution
