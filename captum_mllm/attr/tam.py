"""TAM: the predecessor's cleaning of the lens maps (ECI, joint normalisation, rank filter)."""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.attr.base import TokenAttribution, build_result
from captum_mllm.attr.logit_lens import as_token_attribution
from captum_mllm.attr.postprocessing import PostProcessor
from captum_mllm.functional import (
    context_weights,
    eci_subtract,
    joint_min_max,
    rank_gaussian_filter,
)
from captum_mllm.functional.calibration import Calibration
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import UNIT, MLLMAttributionResult
from captum_mllm.validation import check_alpha_max, check_number


class TokenActivationMap(PostProcessor):
    """Token Activation Map (TAM): the lens map minus what earlier words explain, then filtered.

    The steps are estimated causal inference (ECI), joint normalisation of image and text, and the
    rank Gaussian filter.

    Args:
        model: a transformers model, or a token attribution that gives the raw maps
            (``TokenActivationMap(MSEA(model))``).
        processor: see :class:`LogitLens`, default None; with an attribution, give it to that.
        parity: True reproduces the released code's deviations: the first answer token gets
            the map of the first prompt token's argmax class; the context maps of these two tokens
            belong to other classes than their own; maps are truncated to 256 levels; the last
            ``template_tail`` prompt tokens are not used as context. Default False follows the
            formulas.
        layer: as for ``LogitLens``, default -1.
        rank_filter: apply the filter, default True.
        alpha_max: see :class:`RankCorrelationDenoiser`; default None (no bound), as in TAM.
        upsampling: see :class:`~captum_mllm.attr.postprocessing.PostProcessor`; default 1, as in
            TAM.
        calibration: see :class:`~captum_mllm.attr.postprocessing.PostProcessor`; default
            None, as in TAM.
        template_tail: with ``parity``, how many of the prompt's last text tokens belong to the
            chat template (the assistant header), default 0.

    Raises:
        ValueError: unsupported model; a base that already subtracts context; numbers out of
            range; ``upsampling`` or ``calibration`` with ``parity``.

    Reference:
        "Token Activation Map to Visually Explain Multimodal LLMs", arXiv 2506.23270, as its
        released code computes it.
    """

    def __init__(
        self,
        model: nn.Module | TokenAttribution,
        processor: Any = None,
        parity: bool = False,
        *,
        layer: int = -1,
        rank_filter: bool = True,
        alpha_max: float | None = None,
        template_tail: int = 0,
        upsampling: int = 1,
        calibration: Calibration | None = None,
    ) -> None:
        base = as_token_attribution(model, processor, layer, caller="TokenActivationMap")
        super().__init__(base, upsampling=upsampling, calibration=calibration)
        self.parity, self.rank_filter = parity, bool(rank_filter)
        if parity and (self.upsampling > 1 or calibration is not None):
            raise ValueError(
                "upsampling and calibration are not the released code's: leave them out, or parity."
            )
        self.alpha_max = check_alpha_max(alpha_max)
        whole = "at a whole number from 0 on"
        check_number("template_tail", template_tail, whole, lambda n: 0 <= n < inf and n == int(n))
        self.template_tail = int(template_tail)

    @override
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        cells, map_rows = trace.cells, trace.map_rows
        maps, context_maps = cells[map_rows[trace.targets]], cells[map_rows]
        is_context, is_earlier = trace.is_context, trace.is_earlier
        if self.parity:
            context_maps, is_text = self._parity_context(trace, context_maps)
            is_context, is_earlier = is_context & is_text, is_earlier & is_text
        weights = context_weights(trace.text_scores, is_context)
        cleaned = eci_subtract(maps, context_maps, weights, self.alpha_max)
        unit, scores = joint_min_max(cleaned, trace.text_scores, is_earlier)
        if self.parity:
            unit = self._parity_first_answer(trace, unit)
        maps_per_image = trace.unpack_cells(unit)
        if self.rank_filter:
            maps_per_image = tuple(rank_gaussian_filter(m) for m in maps_per_image)
        grids = self.finish(maps_per_image)
        if self.parity:
            grids = tuple((grid * 255).floor() / 255 for grid in grids)
        return build_result(trace, grids, scores, UNIT, self.name)

    def _parity_context(self, trace: TokenTrace, context_maps: Tensor) -> tuple[Tensor, Tensor]:
        """Context maps of the released code, and which columns it counts as text."""
        if trace.per_token:
            raise ValueError("parity is the released code over a logit lens; leave it out.")
        n_text = trace.n_prompt - self.template_tail
        if n_text < 1:
            raise ValueError(
                f"parity needs prompt text before the answer, but the prompt has "
                f"{trace.n_prompt} text tokens and template_tail is {self.template_tail}."
            )
        if bool((trace.targets < trace.n_prompt).any()):
            raise ValueError("parity explains answer tokens only; use explain='answer'.")
        columns = torch.arange(len(trace.text_ids), device=context_maps.device)
        is_text = (columns < n_text) | (columns >= trace.n_prompt)
        context_maps = context_maps.clone()
        context_maps[0] = trace.cells[trace.released_code_deviations.first_class]
        context_maps[trace.n_prompt] = trace.cells[trace.released_code_deviations.last_class]
        return context_maps, is_text

    def _parity_first_answer(self, trace: TokenTrace, unit: Tensor) -> Tensor:
        """The first answer token shows the first prompt token's argmax class, without ECI."""
        released_code_deviations = trace.released_code_deviations
        rows = (trace.targets == trace.n_prompt).nonzero()[:, 0]
        prompt = released_code_deviations.first_scores[None, : trace.n_prompt - self.template_tail]
        shown = trace.cells[released_code_deviations.first_class][None]
        first, _ = joint_min_max(shown, prompt, torch.ones_like(prompt, dtype=torch.bool))
        unit = unit.clone()
        unit[rows] = first
        return unit
