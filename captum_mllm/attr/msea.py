"""MSEA: multi-scale explanation aggregation of a token attribution."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, Unpack

from captum.attr import Attribution
from torch import nn
from typing_extensions import override

from captum_mllm.attr.base import TokenAttribution
from captum_mllm.attr.logit_lens import LogitLens
from captum_mllm.functional import AGGREGATIONS, Aggregation
from captum_mllm.model.runner import Runner, RunOptions
from captum_mllm.model.scales import FLIPS, Flip, ViewPlan, gather_views
from captum_mllm.model.trace import TokenTrace
from captum_mllm.model.views import SCALE_WEIGHTS, ScaleViews
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.validation import check_choice, check_scales


class MSEA(TokenAttribution):
    """Multi-scale explanation aggregation: maps at several input scales, aggregated.

    For each scale, the images are resized to the nearest grid that the model accepts. Each view
    beyond the first costs one forward pass over the prefix that ends with the last image (over
    direct logit attribution, which reads what the answer read, over prompt and answer). The maps
    are then brought to the finest grid (bilinear) and aggregated. Text attributions remain those
    of scale 1. Over an attribution, its ``runner`` and ``attribute_trace`` are used.

    Args:
        model_or_attribution: a transformers model, or a token attribution that gives logits
            (``LogitLens(model)``).
        processor: see :class:`LogitLens`, default None; with an attribution, give it to that.
        layer: as for ``LogitLens``, default -1.
        scales: factors of the images' height and width, default (1.0, 2.0). ``(1.0,)`` with
            ``flip="none"`` gives the maps of the base bit for bit, whatever the aggregation; with
            flipped views there are two maps of scale 1.0 to aggregate.
        aggregation: "mean" (default, the paper's) or "median".
        scale_weights: "adaptive" (default): a scale whose map orders the cells differently from
            scale 1's counts less, token by token
            (:func:`~captum_mllm.functional.adaptive_weights`; with ``consistency``, so does a scale
            that predicts the answer less well); or "equal". The median takes no weights:
            ``scale_weights`` is unused then.
        flip: also run each scale's image flipped, and flip the map back: "horizontal" (default:
            mirrored left to right), "half_turn" (turned by 180 degrees) or "none". The model reads
            the cells in order, which leaves artefacts to the right of an object; in a flipped
            view they fall to its left, so averaging weakens them. Doubles the number of forward
            passes. Set it to "none" if the model has to read text in the picture, because
            flipped text is unreadable. Direct logit attribution is read from plain views only:
            ``flip`` is unused over it.
        consistency: also run the text after each scale's prefix, and report how well the scale
            still predicts the same answer, ``exp(mean_t min(0, log p_s(y_t) - log p_1(y_t)))``;
            default False.

    Raises:
        TypeError: neither a transformers model nor a token attribution.
        ValueError: an attribution that does not give logits or has scales of its own; no adapter
            for the model; ``processor`` or ``layer`` next to an attribution; scales empty, repeated
            or not positive; an unknown ``aggregation`` or ``scale_weights``.

    Reference:
        The idea and the mean are the paper's (arXiv 2509.22415); its list of scales is not known
        to us. Weights and flipped views are ours, all other details are our reading. The defaults
        were chosen on validation scenes (``make study NAME=choose``, recorded in
        docs/studies/records/choose.md): the scales are the cheapest within .01 of the best.
        Adaptive and equal weights tie there; adaptive ones keep scales from harming a model that
        was trained on one size, and cost models trained on many sizes up to .008 of F1-IoU.

    Example:
        >>> from captum_mllm import MSEA
        >>> from captum_mllm.reference import load
        >>> model, processor = load()
        >>> MSEA(model, processor, scales=(1.0, 1.5), flip="none").name
        'MSEA(LogitLens)'
    """

    def __init__(
        self,
        model_or_attribution: nn.Module | TokenAttribution,
        processor: Any = None,
        *,
        layer: int = -1,
        scales: Sequence[float] = (1.0, 2.0),
        aggregation: Aggregation = "mean",
        scale_weights: str = "adaptive",
        flip: Flip = "horizontal",
        consistency: bool = False,
    ) -> None:
        base = _logits_of_one_scale(model_or_attribution, processor, layer)
        super().__init__(base.forward_func)
        self.attribution_method = base
        self.scales = check_scales(scales)
        self.aggregation: Any = check_choice("aggregation", aggregation, AGGREGATIONS)
        self.scale_weights = check_choice("scale_weights", scale_weights, SCALE_WEIGHTS)
        if aggregation == "median":
            self.scale_weights = "equal"
        self.flip: Any = check_choice("flip", flip, tuple(FLIPS))
        self.consistency = bool(consistency)

    @classmethod
    def paper(cls, *args: Any, **options: Any) -> Self:
        """The plain published idea: the mean over scales 1, 1.25 and 1.5, without flipped views.

        The list of scales is our guess: the paper's is not known to us.

        Args:
            args: as for the class itself.
            options: as for the class itself; they override the published settings.

        Returns:
            The attributor.

        Example:
            >>> from captum_mllm import MSEA
            >>> from captum_mllm.reference import load
            >>> MSEA.paper(load()[0]).scales
            (1.0, 1.25, 1.5)
        """
        published = {"scales": (1.0, 1.25, 1.5), "scale_weights": "equal", "flip": "none"}
        return cls(*args, **{**published, **options})

    @property
    @override
    def runner(self) -> Runner:
        return self.attribution_method.runner

    @property
    @override
    def ranking_depth(self) -> int | None:
        return self.attribution_method.ranking_depth

    @override
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        return replace(self.attribution_method.attribute_trace(trace), method=self.name)

    @override
    def trace(
        self,
        inputs: Mapping[str, Any],
        target: Any = None,
        *,
        top_k: int | None = None,
        **options: Unpack[RunOptions],
    ) -> TokenTrace:
        views = self.views(inputs, target, top_k=top_k, **options)
        return views.merged(self.aggregation, self.scale_weights)

    def views(
        self,
        inputs: Mapping[str, Any],
        target: Any = None,
        *,
        top_k: int | None = None,
        **options: Unpack[RunOptions],
    ) -> ScaleViews:
        """The maps at every scale, before they are aggregated; arguments as of :meth:`trace`.

        Args:
            inputs: see :meth:`trace`.
            target: see :meth:`trace`.
            top_k: see :meth:`trace`.
            options: see :meth:`trace`.

        Returns:
            The maps of every view; its ``merged`` makes them one trace.
        """
        plan = ViewPlan(lens=self.scales, flip=self.flip, consistency=self.consistency)
        if self.attribution_method.reads_context:
            plan = ViewPlan(direct=self.scales, consistency=self.consistency)
        name = type(self).__name__
        views = gather_views(self.runner, inputs, target, plan, top_k=top_k, label=name, **options)
        return views.lens if views.direct is None else views.direct


def _logits_of_one_scale(base: Any, processor: Any, layer: int) -> TokenAttribution:
    """The token attribution that MSEA runs at each scale, or an error that says what to write."""
    if not isinstance(base, Attribution):
        return LogitLens(base, processor, layer)
    name = type(base).__name__
    if processor is not None or layer != -1:
        raise ValueError(
            f"processor and layer belong to the innermost attribution: give them to {name}, not "
            f"to MSEA."
        )
    if not isinstance(base, TokenAttribution):
        raise TypeError(
            f"model_or_attribution: {name} does not trace tokens, which MSEA needs; for tensors "
            f"write MultiScaleAttribution({name}(...))."
        )
    if not base.gives_logits:
        raise ValueError(
            f"model_or_attribution: {name} gives maps in [0, 1], and MSEA aggregates logits. "
            f"Aggregate first: write {name}(MSEA(...))."
        )
    if hasattr(base, "scales"):
        raise ValueError(
            "model_or_attribution is multi-scale already; give it all the scales at once."
        )
    return base
