"""MSEA: explanations from several input scales, aggregated."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, sqrt
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import override

from captum_mllm._captum import log_usage
from captum_mllm.attr.base import TokenAttribution
from captum_mllm.attr.logit_lens import LogitLens
from captum_mllm.attr.tensor_scales import attribute_at_scales, distinct_scales
from captum_mllm.functional import AGGREGATIONS, Aggregation, aggregate, upsample
from captum_mllm.geometry import ImageGrid
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.runner import Runner
from captum_mllm.targets import Explain
from captum_mllm.trace import TokenTrace

DEFAULT_SCALES = (1.0, 1.25, 1.5)


class MultiScaleAttribution(TokenAttribution):
    """Wraps any attributor: explains the input at several scales and aggregates the maps.

    Around a token attribution (``LogitLens(model)``) the images are rescaled to the nearest grids
    that the model accepts, each further scale costs one forward over the prefix that ends with
    the last image, maps are brought to the finest grid (bilinear) and aggregated; text
    attributions stay those of scale 1.

    Around any other captum attributor (``IntegratedGradients(classifier)``) tensors (N, C, H, W)
    or tuples of them are rescaled (bilinear), attributed, brought back to the input's size (a
    layer's to its size at scale 1) and aggregated. With ``resize="mass"`` and the mean the
    attributions sum to the mean over scales of ``f(x_s) - f(baseline_s)``, exactly: see
    :func:`~captum_mllm.functional.resize_attributions`.

    Args:
        attribution_method: a captum attributor.
        scales: factors of the input's height and width, default (1.0, 1.25, 1.5).
        aggregation: "mean" (default, the paper's), "median" or "geometric_mean".
        resize: for tensors, "mass" (default) keeps the sum of each scale's attributions,
            "density" their level (Grad-CAM and other maps that sum to nothing).
        consistency: for token attributions, also run the text on each scale's prefix cache and
            report how far the scale still predicts the same answer,
            ``exp(mean_t min(0, log p_s(y_t) - log p_1(y_t)))``; default False.

    Raises:
        TypeError: no captum attributor.
        ValueError: scales empty, repeated or not positive; unknown ``aggregation`` or ``resize``.

    Reference:
        MSEA: the idea and the mean are of arXiv 2509.22415; its scale list is not known to us,
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

    def __init__(
        self,
        attribution_method: Attribution,
        scales: Sequence[float] = DEFAULT_SCALES,
        aggregation: Aggregation = "mean",
        *,
        resize: str = "mass",
        consistency: bool = False,
    ) -> None:
        if not isinstance(attribution_method, Attribution):
            raise TypeError(
                f"attribution_method must be a captum attribution such as LogitLens(model) or "
                f"IntegratedGradients(f), got {type(attribution_method).__name__}; for a model "
                f"use MSEA(model)."
            )
        if _is_multi_scale(attribution_method):
            raise ValueError("attribution_method is multi-scale already; give it all the scales.")
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method
        self.scales = _check_scales(scales)
        if aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}."
            )
        if resize not in ("mass", "density"):
            raise ValueError(f"resize must be 'mass' or 'density', got {resize!r}.")
        self.aggregation: Aggregation = aggregation
        self.resize = resize
        self.consistency = consistency

    @override
    @log_usage(part_of_slo=True)
    def attribute(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Attribute at every scale and aggregate.

        Args:
            inputs: what the wrapped attributor takes: for token attributions the processor's
                mapping (see :meth:`TokenAttribution.attribute`), otherwise a tensor (N, C, H, W)
                or a tuple of such.
            args: as for the wrapped attributor.
            kwargs: as for the wrapped attributor; tensor ``baselines`` and ``feature_mask``
                are rescaled with the inputs, a convergence delta is the mean over the scales.

        Returns:
            What the wrapped attributor returns at scale 1.

        Raises:
            TypeError: a mapping around an attributor that traces no tokens.
            ValueError: shapes that can't be rescaled; a scale too small for a pixel or a patch.
        """
        if isinstance(self.attribution_method, TokenAttribution):
            return super().attribute(inputs, *args, **kwargs)
        if isinstance(inputs, Mapping):
            raise TypeError(
                f"inputs is a mapping, but {type(self.attribution_method).__name__} traces no "
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

    @property
    def _base(self) -> TokenAttribution:
        if isinstance(self.attribution_method, TokenAttribution):
            return self.attribution_method
        raise TypeError(
            f"attribution_method is {type(self.attribution_method).__name__}, which traces no "
            f"tokens: use MSEA(model)."
        )

    @property
    @override
    def runner(self) -> Runner:
        return self._base.runner

    @property
    @override
    def subtracts_context(self) -> bool:
        base = self.attribution_method
        return isinstance(base, TokenAttribution) and base.subtracts_context

    @property
    @override
    def ranking_depth(self) -> int | None:
        return self._base.ranking_depth

    @property
    def multiplies_by_inputs(self) -> bool:
        """As the wrapped attributor."""
        return self.attribution_method.multiplies_by_inputs

    def has_convergence_delta(self) -> bool:
        """As the wrapped attributor."""
        return self.attribution_method.has_convergence_delta()

    @override
    def read(self, trace: TokenTrace) -> MLLMAttributionResult:
        return replace(self._base.read(trace), method=self.name)

    @override
    def trace(
        self,
        inputs: Mapping[str, Any],
        target: Any = None,
        *,
        explain: Explain = "answer",
        gen_args: Mapping[str, Any] | None = None,
        top_k: int | None = None,
        images: Any = None,
        show_progress: bool = False,
    ) -> TokenTrace:
        runner = self.runner
        run = runner.run(inputs, target, explain=explain, gen_args=gen_args, top_k=top_k)
        base = run.sample.grids
        scales = _without_small(self.scales) if runner.adapter.fixed_size else self.scales
        scaled = {
            s: base if s == 1.0 else tuple(runner.adapter.scaled_grid(grid, s) for grid in base)
            for s in scales
        }
        kept = distinct_scales(scales, [scaled[s] for s in scales])
        per_scale, agreement = [], []
        for scale in tqdm(kept, desc=type(self).__name__, disable=not show_progress):
            if scaled[scale] == base:
                maps, agrees = run.trace.maps, 1.0
            else:
                maps, agrees = runner.rescaled(
                    run, scaled[scale], images=images, consistency=self.consistency
                )
            per_scale.append(maps)
            agreement.append(agrees)
        return replace(
            run.trace,
            maps=tuple(self._merge(maps) for maps in zip(*per_scale, strict=True)),
            scales=tuple(_achieved(base, scaled[scale]) for scale in kept),
            consistency=tuple(agreement) if self.consistency else None,
        )

    def _merge(self, maps: Sequence[Tensor]) -> Tensor:
        """One image's maps of all scales on the finest grid, aggregated."""
        finest = (max(m.shape[-2] for m in maps), max(m.shape[-1] for m in maps))
        return aggregate(torch.stack([upsample(m, finest) for m in maps]), self.aggregation)


class MSEA(MultiScaleAttribution):
    """Multi-scale explanation aggregation over a model's logit lens or another attribution.

    ``MSEA(model)`` is ``MultiScaleAttribution(LogitLens(model))``.

    Args:
        model_or_attribution: a transformers model, or a captum attribution.
        processor: the model's processor, default None; with an attribution, give it to that.
        layer: as for ``LogitLens``, default -1.
        scales: see :class:`MultiScaleAttribution`.
        aggregation: see :class:`MultiScaleAttribution`.
        resize: see :class:`MultiScaleAttribution`.
        consistency: see :class:`MultiScaleAttribution`.
    """

    def __init__(
        self,
        model_or_attribution: nn.Module | Attribution,
        processor: Any = None,
        *,
        layer: int = -1,
        scales: Sequence[float] = DEFAULT_SCALES,
        aggregation: Aggregation = "mean",
        resize: str = "mass",
        consistency: bool = False,
    ) -> None:
        base = model_or_attribution
        if not isinstance(base, Attribution):
            base = LogitLens(base, processor, layer)
        elif processor is not None or layer != -1:
            raise ValueError(
                f"processor and layer belong to the innermost attribution: give them to "
                f"{type(base).__name__}, not to MSEA."
            )
        super().__init__(base, scales, aggregation, resize=resize, consistency=consistency)

    @override
    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        explain: Explain = "answer",
        gen_args: Mapping[str, Any] | None = None,
        images: Any = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Explain each token of an answer at every scale and aggregate.

        Args:
            inputs: see :meth:`TokenAttribution.attribute`.
            target: see :meth:`TokenAttribution.attribute`.
            additional_forward_args: see :meth:`TokenAttribution.attribute`.
            explain: see :meth:`TokenAttribution.attribute`.
            gen_args: see :meth:`TokenAttribution.attribute`.
            images: see :meth:`TokenAttribution.attribute`.
            show_progress: see :meth:`TokenAttribution.attribute`.
            kwargs: further arguments of a captum attributor that traces no tokens.

        Returns:
            See :meth:`TokenAttribution.attribute`; around an attributor that traces no tokens, see
            :meth:`MultiScaleAttribution.attribute`.
        """
        given = {
            "target": target,
            "additional_forward_args": additional_forward_args,
            "gen_args": gen_args,
            "images": images,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if not (isinstance(explain, str) and explain == "answer"):
            kwargs["explain"] = explain
        if show_progress:
            kwargs["show_progress"] = True
        return super().attribute(inputs, **kwargs)


def _is_multi_scale(method: Any) -> bool:
    """Whether a token attribution, or one that it wraps, has scales of its own."""
    while isinstance(method, TokenAttribution):
        if isinstance(method, MultiScaleAttribution):
            return True
        method = getattr(method, "attribution_method", None)
    return False


def _check_scales(scales: Any) -> tuple[float, ...]:
    if isinstance(scales, str):
        raise TypeError(f"scales must be a sequence of numbers, got {scales!r}.")
    try:
        values = tuple(float(scale) for scale in scales)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scales must be a sequence of numbers, got {scales!r}.") from error
    if not values:
        raise ValueError("scales is empty: give at least one factor, e.g. (1.0, 1.25, 1.5).")
    if any(not isfinite(s) or s <= 0 for s in values):
        raise ValueError(f"scales must be finite numbers > 0, got {values}.")
    if len(set(values)) < len(values):
        raise ValueError(f"scales must be distinct, got {values}.")
    return values


def _without_small(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales that a model of one input size can see; scale 1 if there are none."""
    small = [scale for scale in scales if scale < 1]
    if small:
        warnings.warn(
            f"scales {small} are dropped: this model takes images of one size only, and its "
            f"windows show larger scales, no smaller ones.",
            stacklevel=3,
        )
    return tuple(scale for scale in scales if scale >= 1) or (1.0,)


def _achieved(base: Sequence[ImageGrid], scaled: Sequence[ImageGrid]) -> float:
    """Square root of the ratio of grid areas, over all images."""
    return sqrt(sum(grid.cells for grid in scaled) / sum(grid.cells for grid in base))
