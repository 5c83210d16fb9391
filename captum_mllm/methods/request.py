"""What a method is asked, and the form of the result of a method without a text side."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_mllm.attr import LogitLens
from captum_mllm.attr.base import build_result
from captum_mllm.model.runner import Run
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import UNIT, MLLMAttributionResult


@dataclass(eq=False)
class SharedTraces:
    """Traces of one answer that several methods share, so that each of them is made once.

    Args:
        traces: settings of the attributor that made it -> the trace and the seconds it took.
        saved: seconds of the traces that were reused, added up.
    """

    traces: dict[str, tuple[TokenTrace, float]] = field(default_factory=dict)
    saved: float = 0.0

    def get(self, settings: str, depth: int | None, run: Callable[[], TokenTrace]) -> TokenTrace:
        """The trace of an attributor, made if it is not there yet.

        Args:
            settings: all that the trace depends on, except the depth of its rankings.
            depth: the depth of the rankings that are needed, or None if none are.
            run: makes the trace.
        """
        if settings in self.traces:
            trace, seconds = self.traces[settings]
            rankings = trace.rankings
            if depth is None or (rankings is not None and rankings.shape[1] == depth):
                self.saved += seconds
                return trace
        start = time.perf_counter()
        trace = run()
        self.traces[settings] = trace, time.perf_counter() - start
        return trace


@dataclass(frozen=True, eq=False)
class Request:
    """What a method is asked; fields as the arguments of :func:`captum_mllm.methods.explain`.

    ``shared`` holds the traces that several requests about one answer share; None for none.
    """

    model: nn.Module
    processor: Any
    inputs: Mapping[str, Any]
    target: Any
    masks: Mapping[int, Any] | None = None
    seed: int = 0
    steps: int = 20
    gen_args: Mapping[str, Any] | None = None
    show_progress: bool = False
    shared: SharedTraces | None = None

    def run(self) -> Run:
        """One plain forward: the answer, its tokens' probabilities, the images' grids."""
        runner = LogitLens(self.model, self.processor).runner
        return runner.run(
            self.inputs, self.target, explain="answer", gen_args=self.gen_args, top_k=None
        )


def over_answer(
    trace: TokenTrace, maps: Sequence[Tensor], method: str, peak: float | None = None
) -> MLLMAttributionResult:
    """The result of a method without a text side, in [0, 1] over the whole answer.

    Negative values are cut to 0, the rest is divided by the largest value over all tokens, images
    and cells. So tokens stay comparable: a token with weak evidence has a dark map.

    Args:
        trace: gives the tokens and grids; its maps are not used.
        maps: per image (targets, rows, cols), per video (targets, steps, rows, cols).
        method: its name.
        peak: what the values are divided by, default None: their largest.

    Returns:
        The result; ``token_attr`` is 0, since the method says nothing about the text.

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
