"""The product of a multi-scale logit lens and direct logit attribution."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, Unpack

from torch import nn
from typing_extensions import override

from captum_mllm.adapters import find_adapter
from captum_mllm.attr.base import TokenAttribution, raw_result
from captum_mllm.attr.logit_lens import check_context
from captum_mllm.functional import product_of_experts, upsample
from captum_mllm.model.runner import Runner, RunOptions
from captum_mllm.model.scales import FLIPS, Flip, GatheredViews, ViewPlan, gather_views
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.validation import check_choice, check_number, check_scales


class DirectLens(TokenAttribution):
    r"""Multi-scale logit lens times direct logit attribution: where a token was read.

    The lens (:class:`~captum_mllm.MSEA`) says where a token can be read and how strongly, direct
    logit attribution (:class:`~captum_mllm.DirectLogitAttribution`, over plain views of the same
    scales) which of these places this mention of it read. Their product is taken in the log domain
    (:func:`~captum_mllm.functional.product_of_experts`); a map's peak is that of the lens, so
    function words stay dark. Text attributions are those of the lens.

    Costs one forward over prompt and answer per plain scale and, where views are flipped, one over
    the prefix per flipped one: four at the defaults. A model of one input size (LLaVA-NeXT,
    Gemma 3) shows larger scales through windows, in which the question can't be answered: there
    the direct attribution is that of scale 1.

    Args:
        model: a transformers model of a registered family; left unchanged.
        processor: see :class:`~captum_mllm.LogitLens`, default None.
        scales: see :class:`~captum_mllm.MSEA`, default (1.0, 2.0); of both parts.
        flip: see :class:`~captum_mllm.MSEA`, default "half_turn"; of the lens only.
        scale_weights: see :class:`~captum_mllm.MSEA`, default "adaptive"; of the lens only.
        beta: weight > 0 of the direct attribution in the product, default 1.
        context: see :class:`~captum_mllm.LogitLens`, default "after_image".

    Raises:
        ValueError: see :class:`~captum_mllm.MSEA` and
            :class:`~captum_mllm.DirectLogitAttribution`; ``beta`` out of range.

    Reference:
        The product, its floor and its use on image positions are ours; the parts are named in the
        classes above.

    Example:
        >>> from captum_mllm import ARC, DirectLens
        >>> from captum_mllm.reference import load
        >>> model, processor = load()
        >>> ARC(DirectLens(model, processor)).name
        'ARC(DirectLens)'
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        scales: Sequence[float] = (1.0, 2.0),
        flip: Flip = "half_turn",
        scale_weights: str = "adaptive",
        beta: float = 1.0,
        context: str = "after_image",
    ) -> None:
        adapter = find_adapter(model)
        super().__init__(model)
        self._runner = Runner(adapter, processor, -1, check_context(context, processor))
        self.scales = check_scales(scales)
        self.flip: Any = check_choice("flip", flip, tuple(FLIPS))
        self.scale_weights = check_choice("scale_weights", scale_weights, ("equal", "adaptive"))
        self.beta = check_number("beta", beta, "in 0 .. inf, not 0", lambda b: 0 < b < inf)

    @property
    @override
    def runner(self) -> Runner:
        return self._runner

    @override
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        return raw_result(trace, self.name)

    @override
    def trace(
        self,
        inputs: Mapping[str, Any],
        target: Any = None,
        *,
        top_k: int | None = None,
        **options: Unpack[RunOptions],
    ) -> TokenTrace:
        plan = ViewPlan(lens=self.scales, flip=self.flip, direct=self.scales)
        name = type(self).__name__
        views = gather_views(self.runner, inputs, target, plan, top_k=top_k, label=name, **options)
        return product_trace(views, self.scale_weights, self.beta)


def product_trace(views: GatheredViews, scale_weights: str, beta: float) -> TokenTrace:
    """The product of both kinds of maps, each merged over its scales.

    Args:
        views: from :func:`~captum_mllm.model.scales.gather_views`.
        scale_weights: see :class:`DirectLens`.
        beta: see :class:`DirectLens`.

    Returns:
        The lens's trace with one map per text token; the lens's own where there is no direct
        attribution.
    """
    lens = views.lens.merged("mean", scale_weights)
    if views.direct is None:
        return lens
    direct = views.direct.merged("mean", "equal")
    sizes = [(m.shape[-2], m.shape[-1]) for m in lens.maps]
    brought = [upsample(m, size) for m, size in zip(direct.maps, sizes, strict=True)]
    cells = product_of_experts(lens.cells[lens.map_rows], TokenTrace.pack_cells(brought), beta)
    return replace(lens, maps=lens.unpack_cells(cells), per_token=True)
