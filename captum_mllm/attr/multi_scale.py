"""Multi-scale aggregation around any captum attributor on image tensors."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import Attribution
from torch import Tensor

from captum_mllm._captum import log_usage
from captum_mllm.attr.base import TokenAttribution
from captum_mllm.attr.msea import MSEA
from captum_mllm.functional import AGGREGATIONS, Aggregation, aggregate, resize_attributions
from captum_mllm.model.scales import distinct_scales
from captum_mllm.validation import check_choice, check_scales

Size = tuple[int, int]
_SCALES = (1.0, 1.25, 1.5)  # of tensors: the published idea
_RESIZES = ("mass", "density")


class MultiScaleAttribution(Attribution):
    """Wraps any captum attributor: explains tensors at several scales and aggregates.

    Tensors (N, C, H, W) or tuples of them are rescaled (bilinear), attributed, brought back to the
    input's size (a layer's attributions to their size at scale 1) and aggregated. With
    ``resize="mass"`` and the mean, the attributions sum to the mean over scales of
    ``f(x_s) - f(baseline_s)``, exactly: see :func:`~captum_mllm.functional.resize_attributions`.

    Over a token attribution, ``MultiScaleAttribution(LogitLens(model), scales, aggregation)`` is
    ``MSEA(LogitLens(model), scales=scales, aggregation=aggregation)``: the call returns the
    :class:`MSEA`, which has the options for tokens; its defaults (adaptive weights, mirrored views)
    apply.

    Args:
        attribution_method: a captum attributor.
        scales: see :class:`MSEA`; default None: (1.0, 1.25, 1.5) for tensors, and MSEA's default
            over a token attribution.
        aggregation: see :class:`MSEA`; default "mean".
        resize: "mass" (default) preserves the sum of each scale's attributions; "density" preserves
            their values, for Grad-CAM and other maps whose sum has no meaning. For tensors only.

    Raises:
        TypeError: not a captum attributor.
        ValueError: scales empty, repeated or not positive; an unknown ``aggregation`` or
            ``resize``; ``resize`` over a token attribution; a multi-scale attributor inside.

    Reference:
        MSEA (arXiv 2509.22415) for the idea and the mean; its list of scales is not known to us,
        all other details are our reading.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_mllm import MultiScaleAttribution
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> x = torch.rand(2, 3, 12, 12, requires_grad=True)
        >>> MultiScaleAttribution(Saliency(net)).attribute(x, target=3).shape
        torch.Size([2, 3, 12, 12])
    """

    def __new__(
        cls,
        attribution_method: Attribution,
        scales: Sequence[float] | None = None,
        aggregation: Aggregation = "mean",
        *,
        resize: str = "mass",
    ) -> Any:
        """Dispatch once: a token attribution gets the :class:`MSEA` over it."""
        if not isinstance(attribution_method, TokenAttribution):
            return super().__new__(cls)
        if resize != "mass":
            raise ValueError(
                f"resize={resize!r} is for tensors, and {type(attribution_method).__name__} is a "
                f"token attribution, whose maps are brought to the finest grid: leave it out."
            )
        options: dict[str, Any] = {} if scales is None else {"scales": scales}
        return MSEA(attribution_method, aggregation=aggregation, **options)

    def __getnewargs__(self) -> tuple[Attribution]:
        """What ``copy`` and ``pickle`` hand to ``__new__``."""
        return (self.attribution_method,)

    def __init__(
        self,
        attribution_method: Attribution,
        scales: Sequence[float] | None = None,
        aggregation: Aggregation = "mean",
        *,
        resize: str = "mass",
    ) -> None:
        if not isinstance(attribution_method, Attribution):
            raise TypeError(
                f"attribution_method must be a captum attribution such as LogitLens(model) or "
                f"IntegratedGradients(f), got {type(attribution_method).__name__}; for a model "
                f"use MSEA(model)."
            )
        if isinstance(attribution_method, MultiScaleAttribution):
            raise ValueError(
                "attribution_method is multi-scale already; give it all the scales at once."
            )
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method
        self.scales = check_scales(_SCALES if scales is None else scales)
        self.aggregation: Any = check_choice("aggregation", aggregation, AGGREGATIONS)
        self.resize = check_choice("resize", resize, _RESIZES)

    @property
    def multiplies_by_inputs(self) -> bool:
        """As the wrapped attributor."""
        return self.attribution_method.multiplies_by_inputs

    def has_convergence_delta(self) -> bool:
        """As the wrapped attributor."""
        return self.attribution_method.has_convergence_delta()

    @log_usage(part_of_slo=True)
    def attribute(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Attribute at every scale and aggregate.

        Args:
            inputs: a tensor (N, C, H, W) or a tuple of such.
            args: as for the wrapped attributor.
            kwargs: as for the wrapped attributor; tensor ``baselines`` and ``feature_mask``
                are rescaled with the inputs, a convergence delta is the mean over the scales.

        Returns:
            What the wrapped attributor returns at scale 1.

        Raises:
            TypeError: a mapping, which only token attributions take.
            ValueError: shapes that can't be rescaled; a scale too small for a pixel.
        """
        if isinstance(inputs, Mapping):
            raise TypeError(
                f"inputs is a mapping, but {type(self.attribution_method).__name__} does not trace "
                f"tokens: use MSEA(model), or give a tensor (N, C, H, W)."
            )
        return attribute_at_scales(
            self.attribution_method,
            inputs,
            args,
            kwargs,
            scales=self.scales,
            aggregation=self.aggregation,
            preserve=self.resize,
        )


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
        delta if it was requested.
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
            f"change with the scale but are not an (N, C, H, W) grid, so they can't be brought "
            f"back; choose a convolutional layer, or attribute to the input."
        )
    return attribution
