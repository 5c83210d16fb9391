"""MSEA: explanations from several input scales, aggregated."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from captum.attr import Attribution
from tqdm import tqdm
from typing_extensions import override

from captum_mllm._captum import log_usage
from captum_mllm.attr.base import TokenAttribution
from captum_mllm.attr.presets import PRESET, FromPreset, preset_values
from captum_mllm.attr.tensor_scales import attribute_at_scales, distinct_scales
from captum_mllm.functional import AGGREGATIONS, SCALE_NORMS, Aggregation, ScaleNorm
from captum_mllm.model.runner import Runner
from captum_mllm.model.scales import SCALE_WEIGHTS, ScaleViews, achieved_scale
from captum_mllm.model.targets import Explain
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import MLLMAttributionResult

_CHOICES = {
    "aggregation": AGGREGATIONS,
    "scale_norm": SCALE_NORMS,
    "scale_weights": SCALE_WEIGHTS,
}


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
        scales: factors of the input's height and width.
        aggregation: "mean" (the paper's), "median" or "geometric_mean".
        scale_norm: for token attributions, "none", "max" or "std": each scale's maps are brought
            to the level of scale 1's (:func:`~captum_mllm.functional.match_levels`).
        scale_weights: for token attributions, "equal", or "adaptive": a scale whose map orders
            the cells otherwise than scale 1's counts less, token by token
            (:func:`~captum_mllm.functional.adaptive_weights`; with ``consistency`` also one at
            which the answer would be another).
        mirrored: for token attributions, see the image mirrored (left to right) at each scale too,
            and mirror the map back: what reading the cells in order leaves to the right of an
            object then falls to its left half of the time. Twice the forwards. Leave it out where
            the picture is read: mirrored writing is none.
        resize: for tensors, "mass" (default) keeps the sum of each scale's attributions,
            "density" their level (Grad-CAM and other maps that sum to nothing).
        consistency: for token attributions, also run the text on each scale's prefix cache and
            report how far the scale still predicts the same answer,
            ``exp(mean_t min(0, log p_s(y_t) - log p_1(y_t)))``; default False.
        preset: "measured" (default: as chosen on validation scenes) or "paper" (the plain
            published idea): gives every option that is left out its value
            (:data:`captum_mllm.PRESETS`). For other attributors than token attributions the
            published idea alone is there: scales and aggregation of "paper".

    Raises:
        TypeError: no captum attributor.
        ValueError: scales empty, repeated or not positive; unknown ``aggregation``, ``scale_norm``,
            ``scale_weights``, ``resize`` or ``preset``; options for token attributions around
            another attributor; "adaptive" with the median, which takes no weights.

    Reference:
        MSEA: the idea and the mean are of arXiv 2509.22415; its scale list is not known to us,
        normalisation, weights and mirrored views are ours, all other details are our reading.

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
        scales: Sequence[float] | FromPreset = PRESET,
        aggregation: Aggregation | FromPreset = PRESET,
        *,
        scale_norm: ScaleNorm | FromPreset = PRESET,
        scale_weights: str | FromPreset = PRESET,
        mirrored: bool | FromPreset = PRESET,
        resize: str = "mass",
        consistency: bool = False,
        preset: str = "measured",
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
        traces = isinstance(attribution_method, TokenAttribution)
        per_token = {"scale_norm": scale_norm, "scale_weights": scale_weights, "mirrored": mirrored}
        named = [name for name, value in per_token.items() if value is not PRESET]
        if named and not traces:
            raise ValueError(
                f"{named[0]} is for token attributions, and {type(attribution_method).__name__} "
                f"is none: leave it out, or use MSEA(model)."
            )
        values = preset_values(preset, scales=scales, aggregation=aggregation, **per_token)
        if not traces:
            values |= preset_values("paper", scales=scales, aggregation=aggregation)
        self.scales = _check_scales(values["scales"])
        for name, known in _CHOICES.items():
            if values[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {values[name]!r}.")
        self.aggregation: Aggregation = values["aggregation"]
        self.scale_norm: ScaleNorm = values["scale_norm"]
        self.scale_weights: str = values["scale_weights"]
        self.mirrored = bool(values["mirrored"])
        if self.aggregation == "median" and scale_weights is PRESET:
            self.scale_weights = "equal"  # the median takes no weights
        if traces and self.aggregation == "median" and self.scale_weights == "adaptive":
            raise ValueError(
                "scale_weights 'adaptive' needs an aggregation that takes weights, and 'median' "
                "takes none: use 'mean', or scale_weights='equal'."
            )
        if resize not in ("mass", "density"):
            raise ValueError(f"resize must be 'mass' or 'density', got {resize!r}.")
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
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        return replace(self._base.attribute_trace(trace), method=self.name)

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
        return self.views(
            inputs,
            target,
            explain=explain,
            gen_args=gen_args,
            top_k=top_k,
            images=images,
            show_progress=show_progress,
        ).merged(self.aggregation, self.scale_norm, self.scale_weights)

    def views(
        self,
        inputs: Mapping[str, Any],
        target: Any = None,
        *,
        explain: Explain = "answer",
        gen_args: Mapping[str, Any] | None = None,
        top_k: int | None = None,
        images: Any = None,
        show_progress: bool = False,
    ) -> ScaleViews:
        """The maps at every scale, before they are aggregated; arguments as in :meth:`trace`.

        Args:
            inputs: see :meth:`trace`.
            target: see :meth:`trace`.
            explain: see :meth:`trace`.
            gen_args: see :meth:`trace`.
            top_k: see :meth:`trace`.
            images: see :meth:`trace`.
            show_progress: see :meth:`trace`.

        Returns:
            The maps of every view; its ``merged`` makes them one trace.
        """
        runner = self.runner
        run = runner.run(inputs, target, explain=explain, gen_args=gen_args, top_k=top_k)
        base = run.sample.grids
        scales = _without_small(self.scales) if runner.adapter.fixed_size else self.scales
        scaled = {
            s: base if s == 1.0 else tuple(runner.adapter.scaled_grid(grid, s) for grid in base)
            for s in scales
        }
        kept = distinct_scales(scales, [scaled[s] for s in scales])
        wanted = [
            (s, flip) for s in kept for flip in ((False, True) if self.mirrored else (False,))
        ]
        views, agreement = [], []
        for scale, flip in tqdm(wanted, desc=type(self).__name__, disable=not show_progress):
            if scaled[scale] == base and not flip:
                maps, agrees = run.trace.maps, 1.0
            else:
                maps, agrees = runner.rescaled(
                    run,
                    scaled[scale],
                    images=images,
                    consistency=self.consistency and not flip,
                    mirrored=flip,
                )
            views.append(maps)
            # Mirrored, "left" is rightly "right": a view counts as its scale does.
            agreement.append(agreement[-1] if flip else agrees)
        return ScaleViews(
            run.trace,
            tuple(views),
            tuple(achieved_scale(base, scaled[scale]) for scale, _ in wanted),
            tuple(flip for _, flip in wanted),
            tuple(agreement) if self.consistency else None,
        )


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
