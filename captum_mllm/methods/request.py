"""What a method is request, the answer it is asked about, and the unit of what it replies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_mllm.attr import LogitLens
from captum_mllm.attr.base import build_result
from captum_mllm.model.runner import Run
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import UNIT, MLLMAttributionResult


@dataclass(frozen=True, eq=False)
class Request:
    """One question to a method; fields as the arguments of :func:`captum_mllm.methods.explain`."""

    model: nn.Module
    processor: Any
    inputs: Mapping[str, Any]
    target: Any
    masks: Mapping[int, Any] | None = None
    seed: int = 0
    steps: int = 20
    show_progress: bool = False

    def run(self) -> Run:
        """One plain forward: the answer, its tokens' probabilities, the images' grids."""
        runner = LogitLens(self.model, self.processor).runner
        return runner.run(self.inputs, self.target, explain="answer", gen_args=None, top_k=None)


def over_answer(
    trace: TokenTrace, maps: Sequence[Tensor], method: str, peak: float | None = None
) -> MLLMAttributionResult:
    """The result of a method without a text side, in [0, 1] over the whole answer.

    Negative values are cut to 0, the rest is divided by the largest value over all tokens, images
    and cells. So tokens stay comparable: one whose evidence is weak has a dark map.

    Args:
        trace: tells tokens and grids; its maps are not used.
        maps: per image (targets, rows, cols), per video (targets, steps, rows, cols).
        method: its name.
        peak: what the values are divided by, default None: their largest.

    Returns:
        The result; ``token_attr`` is 0, for nothing was request of the text.

    Raises:
        ValueError: maps that are not finite.

    Reference:
        Ours.
    """
    if any(not bool(torch.isfinite(grid).all()) for grid in maps):
        raise ValueError(
            f"method {method!r} gave NaN or infinite values on this model; try another dtype "
            f"(float32 or bfloat16)."
        )
    positive = [grid.detach().float().clamp(min=0) for grid in maps]
    if peak is None:
        peak = max(float(grid.max()) for grid in positive)
    unit = tuple(grid / peak if peak > 0 else grid for grid in positive)
    return build_result(trace, unit, torch.zeros_like(trace.text_scores), UNIT, method)
