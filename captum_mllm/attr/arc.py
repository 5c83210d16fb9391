"""ARC: suppress interference from irrelevant context."""

from math import inf
from typing import Any, Self

import torch
from captum.attr import Attribution
from jaxtyping import Float, Int64
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.attr.base import TokenAttribution, build_result
from captum_mllm.attr.logit_lens import as_token_attribution
from captum_mllm.attr.postprocessing import PostProcessor
from captum_mllm.functional import (
    arc_subtract,
    context_weights,
    joint_min_max,
    rank_biased_overlap,
)
from captum_mllm.functional.calibration import Calibration
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import UNIT, MLLMAttributionResult
from captum_mllm.validation import ArgumentError, check_alpha_max, check_number


class RankCorrelationDenoiser(PostProcessor):
    """Post-processes token attributions by activation ranking correlation (ARC).

    The relevance of a context token is the rank-biased overlap of the top-k predictions that led
    to it and to the target. Image side: the evidence that *irrelevant* context tokens leave
    on the map is subtracted; what relevant context shares with the target is kept. Text side: the
    attribution of each context token is multiplied by its relevance (at the default strength).

    Args:
        attribution_method: a token attribution that gives raw maps (``LogitLens(model)``,
            ``MSEA(model)``); for :meth:`denoise` alone any captum attribution, or None.
        top_k: depth of the rankings, default 50 (the paper's).
        rbo_p: persistence of the rank-biased overlap in (0, 1), default 0.9.
        strength: lambda >= 0 of the subtraction, default 1; on the text side the factor is
            ``1 - strength * (1 - relevance)``, at least 0.
        alpha_max: upper bound (> 0) on the fitted factor alpha of the subtraction, default 0.25;
            None means no bound.
        upsampling: see :class:`~captum_mllm.attr.postprocessing.PostProcessor`; default 2.
        calibration: see :class:`~captum_mllm.attr.postprocessing.PostProcessor`; default 1.5.

    Raises:
        ValueError: numbers out of range; a base whose maps are normalised already.

    Reference:
        Idea: arXiv 2509.22415; formulas: our reading, in
        :func:`~captum_mllm.functional.arc_subtract`. The bound, upsampling and calibration are
        ours; their defaults were chosen on validation scenes (``make study NAME=choose``, recorded
        in docs/studies/records/choose.md), where top_k, rbo_p and strength were not varied.

    Example:
        >>> import torch
        >>> from captum_mllm import RankCorrelationDenoiser
        >>> scores = torch.tensor([[2.0, 4.0]])  # one target, two context tokens
        >>> context, target = torch.tensor([[1, 2], [8, 9]]), torch.tensor([[1, 2]])
        >>> arc = RankCorrelationDenoiser(None, top_k=2)
        >>> arc.denoise(scores, context, target_rankings=target).tolist()
        [[2.0, 0.0]]
    """

    def __init__(
        self,
        attribution_method: Attribution | None,
        top_k: int = 50,
        rbo_p: float = 0.9,
        strength: float = 1.0,
        *,
        alpha_max: float | None = 0.25,
        upsampling: int = 2,
        calibration: Calibration | None = 1.5,
    ) -> None:
        if isinstance(attribution_method, TokenAttribution):
            as_token_attribution(attribution_method, caller="ARC")
        elif attribution_method is not None and not isinstance(attribution_method, Attribution):
            raise TypeError(
                f"attribution_method must be a captum attribution such as LogitLens(model), or "
                f"None, got {type(attribution_method).__name__}; for a model use ARC(model)."
            )
        super().__init__(attribution_method, upsampling=upsampling, calibration=calibration)
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ArgumentError("top_k", f"must be an int >= 1, got {top_k!r}.")
        self.top_k = top_k
        self.rbo_p = check_number("rbo_p", rbo_p, "strictly between 0 and 1", lambda p: 0 < p < 1)
        self.strength = check_number("strength", strength, "in 0 .. inf", lambda s: 0 <= s < inf)
        self.alpha_max = check_alpha_max(alpha_max)

    @classmethod
    def paper(cls, *args: Any, **options: Any) -> Self:
        """The plain published idea: alpha unbounded, no finer grid, no calibration.

        How the relevance enters the subtraction is our reading, and ``rbo_p`` is our guess.

        Args:
            args: as for the class itself.
            options: as for the class itself; they override the published settings.

        Returns:
            The attributor.

        Example:
            >>> from captum_mllm import RankCorrelationDenoiser
            >>> RankCorrelationDenoiser.paper(None, top_k=10).alpha_max is None
            True
        """
        return cls(*args, **{"alpha_max": None, "upsampling": 1, "calibration": None, **options})

    @property
    @override
    def ranking_depth(self) -> int | None:
        return self.top_k

    @override
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        if trace.rankings is None:
            raise ValueError("trace holds no rankings; make it with trace(..., top_k=...).")
        cells, rows = trace.cells, trace.map_rows
        rankings = trace.rankings
        relevance = self._relevance(rankings[trace.targets], rankings).to(cells)
        relevance = torch.where(trace.is_earlier, relevance, 0.0)
        weights = context_weights(trace.text_scores, trace.is_context)
        cleaned = arc_subtract(
            cells[rows[trace.targets]],
            cells[rows],
            weights,
            relevance,
            self.strength,
            self.alpha_max,
        )
        unit, scores = joint_min_max(cleaned, trace.text_scores, trace.is_earlier)
        maps = self.finish(trace.unpack_cells(unit))
        kept = scores * self._kept(relevance)
        return build_result(trace, maps, kept, UNIT, self.name, relevance)

    def denoise(
        self,
        maps_or_scores: Float[Tensor, "targets ..."],
        rankings: Int64[Tensor, "tokens k"],
        *,
        target_rankings: Int64[Tensor, "targets k"] | None = None,
        context_maps: Float[Tensor, "tokens ..."] | None = None,
        context_scores: Float[Tensor, "targets tokens"] | None = None,
    ) -> Float[Tensor, "targets ..."]:
        """Apply ARC to attributions that were computed elsewhere.

        Args:
            maps_or_scores: text attributions (targets, tokens), e.g. ``token_attr`` of captum's
                ``LLMAttributionResult``; or maps >= 0 (targets, rows, cols).
            rankings: top-k ids of the prediction that led to each context token (tokens, k).
            target_rankings: the same for each target; None (default) means that the targets are
                the last of the tokens, and that a token is context of the later ones only.
            context_maps: with maps, the map of each context token (tokens, rows, cols).
            context_scores: with maps, how strongly each context token predicts each target
                (targets, tokens), >= 0; give 0 to tokens with the target's own id.

        Returns:
            Cleaned attributions of the shape of ``maps_or_scores``, in its units.

        Raises:
            ValueError: shapes that don't fit, rankings shorter than ``top_k`` or with repeated
                ids, maps without their context.
        """
        causal = target_rankings is None
        targets = self._check_rankings(maps_or_scores, rankings, target_rankings)
        n = len(targets)
        relevance = self._relevance(targets, rankings).to(maps_or_scores)
        is_context = torch.ones_like(relevance, dtype=torch.bool)
        if causal:
            is_context = is_context.tril(len(rankings) - n - 1)
        if maps_or_scores.ndim == 2:
            if maps_or_scores.shape != relevance.shape:
                raise ValueError(
                    f"maps_or_scores of shape {tuple(maps_or_scores.shape)} must be (targets, "
                    f"tokens) = {tuple(relevance.shape)}, one column per row of rankings."
                )
            return torch.where(is_context, maps_or_scores * self._kept(relevance), 0.0)
        if context_maps is None or context_scores is None:
            raise ValueError(
                "maps_or_scores are maps, which need context_maps= (tokens, rows, cols) and "
                "context_scores= (targets, tokens)."
            )
        if (
            context_maps.shape != (len(rankings), *maps_or_scores.shape[1:])
            or context_scores.shape != relevance.shape
        ):
            raise ValueError(
                f"context_maps must be {(len(rankings), *maps_or_scores.shape[1:])} and "
                f"context_scores {tuple(relevance.shape)}, got {tuple(context_maps.shape)} and "
                f"{tuple(context_scores.shape)}."
            )
        return arc_subtract(
            maps_or_scores.flatten(1),
            context_maps.flatten(1),
            context_weights(context_scores, is_context),
            relevance,
            self.strength,
            self.alpha_max,
        ).reshape(maps_or_scores.shape)

    def _check_rankings(
        self, maps_or_scores: Any, rankings: Any, target_rankings: Any
    ) -> Int64[Tensor, "targets k"]:
        """The targets' rankings, after a check of kind and shape of all three."""
        if not isinstance(maps_or_scores, Tensor) or not maps_or_scores.is_floating_point():
            got = getattr(maps_or_scores, "dtype", type(maps_or_scores).__name__)
            raise ValueError(f"maps_or_scores must be a floating point tensor, got {got}.")
        n = len(maps_or_scores)
        tensors = {"rankings": rankings, "target_rankings": target_rankings}
        for name, value in tensors.items():
            if value is None and name == "target_rankings":
                continue
            if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] < self.top_k:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{name} must be a tensor (tokens, k) with k >= top_k = {self.top_k}, got "
                    f"{got}; make the denoiser with a smaller top_k."
                )
        if target_rankings is None and len(rankings) < n:
            raise ValueError(
                f"rankings hold {len(rankings)} rows, but maps_or_scores {n} targets: without "
                f"target_rankings= the targets are the last rows of rankings."
            )
        targets = rankings[len(rankings) - n :] if target_rankings is None else target_rankings
        if len(targets) != n:
            raise ValueError(
                f"target_rankings hold {len(targets)} rows for {n} targets in maps_or_scores."
            )
        return targets

    def _relevance(
        self, targets: Int64[Tensor, "targets k"], tokens: Int64[Tensor, "tokens k"]
    ) -> Float[Tensor, "targets tokens"]:
        k = self.top_k
        return rank_biased_overlap(targets[:, :k], tokens[:, :k], self.rbo_p)

    def _kept(self, relevance: Tensor) -> Tensor:
        """Share of a context token's attribution that stays on the text side."""
        return (1 - self.strength * (1 - relevance)).clamp(min=0)


class ARC(RankCorrelationDenoiser):
    """Activation ranking correlation over a model's logit lens or over another attribution.

    ``ARC(model)`` is ``RankCorrelationDenoiser(LogitLens(model))``.

    Args:
        model_or_attribution: a transformers model, or a token attribution such as
            ``MSEA(model)``.
        processor: see :class:`LogitLens`, default None; with an attribution, give it to that.
        layer: as for ``LogitLens``, default -1.
        top_k: see :class:`RankCorrelationDenoiser`; default 50.
        rbo_p: see :class:`RankCorrelationDenoiser`; default 0.9.
        strength: see :class:`RankCorrelationDenoiser`; default 1.
        alpha_max: see :class:`RankCorrelationDenoiser`; default 0.25.
        upsampling: see :class:`RankCorrelationDenoiser`; default 2.
        calibration: see :class:`RankCorrelationDenoiser`; default 1.5.

    Raises:
        TypeError: neither a model nor a token attribution.
        ValueError: see :class:`RankCorrelationDenoiser`; ``processor`` or ``layer`` next to an
            attribution.
    """

    def __init__(
        self,
        model_or_attribution: nn.Module | TokenAttribution,
        processor: Any = None,
        *,
        layer: int = -1,
        top_k: int = 50,
        rbo_p: float = 0.9,
        strength: float = 1.0,
        alpha_max: float | None = 0.25,
        upsampling: int = 2,
        calibration: Calibration | None = 1.5,
    ) -> None:
        super().__init__(
            as_token_attribution(model_or_attribution, processor, layer, caller="ARC"),
            top_k,
            rbo_p,
            strength,
            alpha_max=alpha_max,
            upsampling=upsampling,
            calibration=calibration,
        )
