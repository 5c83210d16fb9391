"""What all token attributors share: one ``attribute``, composed of a trace and its reading."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from captum.attr import Attribution
from jaxtyping import Float
from torch import Tensor

from captum_mllm._captum import log_usage
from captum_mllm.adapters.hooks import unchanged
from captum_mllm.functional import upsample
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.processor_checks import check_pixels
from captum_mllm.model.runner import Runner, RunOptions, check_options
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import LOGITS, MLLMAttributionResult
from captum_mllm.validation import ArgumentError


class TokenAttribution(Attribution):
    """Explains each token of an answer by the image's cells and by the text before it.

    Subclasses give :attr:`runner`, which runs the model, and may refine :meth:`trace` (more
    evidence) and :meth:`attribute_trace` (the result from it). While one runs, hooks sit in
    the user's model; other threads that explain with it wait.
    """

    @property
    def gives_logits(self) -> bool:
        """Whether the maps are raw logits, which scales aggregate and post-processors take."""
        return True

    @property
    def reads_context(self) -> bool:
        """Whether MSEA over it reads direct logit attribution at each scale, not the lens."""
        return False

    @property
    @abstractmethod
    def runner(self) -> Runner:
        """What runs the model."""

    @abstractmethod
    def trace(
        self,
        inputs: Mapping[str, Any],
        target: Any = None,
        *,
        top_k: int | None = None,
        **options: Unpack[RunOptions],
    ) -> TokenTrace:
        """Run the model and gather the evidence.

        Args:
            inputs: the processor's mapping.
            target: see :meth:`attribute`.
            top_k: depth of the rankings to gather, or None (default) for none.
            options: see :class:`~captum_mllm.model.runner.RunOptions`.

        Returns:
            All that :meth:`attribute_trace` needs.
        """

    @abstractmethod
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        """Compute the result from a trace, without running the model.

        Args:
            trace: from :meth:`trace`.

        Returns:
            The result that :meth:`attribute` returns.
        """

    @property
    def name(self) -> str:
        """The attributors it is composed of, e.g. "ARC(MSEA(LogitLens))"."""
        inner = getattr(self, "attribution_method", None)
        kind = type(self).__name__
        return f"{kind}({inner.name})" if isinstance(inner, TokenAttribution) else kind

    @property
    def ranking_depth(self) -> int | None:
        """Depth of the rankings that :meth:`attribute_trace` needs; None for none."""
        return None

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        **options: Unpack[RunOptions],
    ) -> Any:
        """Explain each token of the answer to one prompt.

        Args:
            inputs: the mapping that the HF processor returns for exactly one sample (left padding
                allowed), or its ``pixel_values`` as a tensor with the rest of the mapping as
                ``additional_forward_args``.
            target: the answer: None (default) generates it; a 1-D tensor or list of token ids is
                teacher-forced; a string needs a processor. With noisy copies of the pixels
                (``NoiseTunnel``) give a tuple of ids or a 2-D tensor of one row: captum repeats
                the ids of a list or 1-D tensor for each copy, which could not be told from an
                answer of repeated words and is refused.
            additional_forward_args: with a pixel tensor, the rest of the mapping; with the whole
                mapping a tensor (N, C, H, W) holds versions of the picture's canvas, as
                ``TokenLogProb(...).pixels`` gives it in every family.
            options: ``explain``, ``gen_args``, ``images`` and ``show_progress``, see
                :class:`~captum_mllm.model.runner.RunOptions`.

        Returns:
            :class:`~captum_mllm.result.MLLMAttributionResult`; for a pixel tensor (N, C, H, W) of
            N versions of one image, maps (N, targets, H, W) in pixels of the image as the model
            saw it; a tuple for a tuple of one tensor.

        Raises:
            TypeError: arguments of another kind, or an option that does not exist.
            ValueError: bad input; the message names the argument and says how to fix it.
        """
        check_options(options)
        pixels = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs
        if isinstance(pixels, Tensor):
            maps = self._attribute_pixels(pixels, target, additional_forward_args, options)
            return maps if pixels is inputs else (maps,)  # tuple in, tuple out, as captum's
        if additional_forward_args is not None:
            raise TypeError(
                "additional_forward_args goes with a pixel tensor as inputs; a mapping holds "
                "everything itself."
            )
        mapping: Any = inputs
        if isinstance(mapping, Mapping):
            check_pixels(mapping, self.runner.processor, self.runner.adapter)
        return self.attribute_trace(self.trace(mapping, target, **options))

    def _attribute_pixels(
        self, pixels: Tensor, target: Any, rest: Any, options: RunOptions
    ) -> Float[Tensor, "n targets height width"]:
        """Maps for each of N versions of one image; this is what ``NoiseTunnel`` calls."""
        if isinstance(rest, tuple) and len(rest) == 1:
            rest = rest[0]  # captum's wrappers make a tuple of it
        if not isinstance(rest, Mapping):
            raise TypeError(
                f"inputs is a pixel tensor, so additional_forward_args must be the rest of the "
                f"processor's mapping (input_ids ...); got {type(rest).__name__}."
            )
        if pixels.ndim not in (4, 5):
            raise ValueError(
                f"inputs must be pixels (N, channels, height, width), or (N, tiles, channels, "
                f"height, width) where the model takes tiles, got {tuple(pixels.shape)}; Qwen's "
                f"rows of patches go in a mapping, or as the canvas that they were cut from "
                f"(TokenLogProb(...).pixels) with the whole mapping as additional_forward_args."
            )
        if options.get("images") is not None:
            raise ValueError(
                "images= would replace the pixels that came as a tensor; pass a mapping as "
                "inputs, or leave images out."
            )
        if not len(pixels):
            raise ValueError("inputs holds no image: its first axis is empty.")
        target = _one_target(target, len(pixels))
        maps = []
        with unchanged(self.runner.adapter.model):
            for row in pixels.detach():
                mapping = self.runner.adapter.with_image_version(row, rest)
                result = self.attribute_trace(self.trace(mapping, target, **options))
                if len(result.grids) != 1:
                    raise ValueError(
                        f"inputs is a pixel tensor, but input_ids hold {len(result.grids)} images, "
                        f"whose maps don't fit one tensor; give a mapping as inputs."
                    )
                grid = result.grids[0]
                maps.append(upsample(result.grid_attr[0], (grid.height, grid.width)))
        return torch.stack(maps)


def _one_target(target: Any, n: int) -> Any:
    """The target of one version out of n, whatever captum's wrappers made of it.

    captum repeats each entry of a list or tensor for each of m copies, where n is a multiple of m,
    and leaves tuples alone. Rows of a 2-D target are whole answers, so that repeating them does no
    harm; ids of a 1-D one that come m at a time could be either.
    """
    if target is None:
        if n == 1:
            return None
        raise ArgumentError(
            "target",
            f"is None, but inputs hold {n} versions of the image whose own answers could differ: "
            f"give the token ids to explain.",
        )
    if isinstance(target, str | tuple):
        return target
    try:
        ids = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        return target  # refused with what a target may be, where it is read
    if ids.ndim == 2 and len(ids):
        if bool((ids != ids[:1]).any()):
            raise ArgumentError(
                "target",
                f"has rows that differ, {ids.tolist()}: all versions of an image explain one "
                f"answer; attribute each version on its own, or give one row.",
            )
        return ids[0]
    if ids.ndim == 1 and len(ids):
        for m in range(2, n + 1):
            copies = ids[: len(ids) // m * m].reshape(-1, m)
            if not n % m and copies.numel() == len(ids) and bool((copies == copies[:, :1]).all()):
                raise ArgumentError(
                    "target",
                    f"holds each id {m} times in a row, {ids.tolist()}, and inputs {n} versions of "
                    f"the image: captum's wrappers repeat the ids of a list or tensor for each "
                    f"copy, which an answer of repeated words looks like as well. Give a tuple of "
                    f"ids, tuple(ids), or a 2-D tensor of one row, ids[None].",
                )
    return target


def raw_result(trace: TokenTrace, method: str) -> MLLMAttributionResult:
    """The result of a trace as it is: raw logits >= 0.

    Args:
        trace: the evidence.
        method: name of the attributor.
    """
    rows = trace.map_rows[trace.targets]
    return build_result(
        trace, tuple(maps[rows] for maps in trace.maps), trace.text_scores, LOGITS, method
    )


def build_result(
    trace: TokenTrace,
    grid_attr: tuple[Tensor, ...],
    token_attr: Tensor,
    units: str,
    method: str,
    relevance: Tensor | None = None,
) -> MLLMAttributionResult:
    """Put maps and token attributions of a trace's targets into a result on the CPU, float32."""

    def out(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device="cpu", dtype=torch.float32)

    def on_frames(maps: Tensor, grid: ImageGrid) -> Tensor:
        """A step in time of a video stands for all of its frames."""
        return maps.repeat_interleave(grid.frames // grid.steps, 1) if grid.steps else maps

    targets = trace.targets
    return MLLMAttributionResult(
        grid_attr=tuple(
            on_frames(out(maps), grid) for maps, grid in zip(grid_attr, trace.grids, strict=True)
        ),
        token_attr=out(token_attr),
        input_tokens=trace.labels,
        output_tokens=tuple(trace.labels[int(t)] for t in targets),
        output_ids=trace.text_ids[targets].cpu(),
        output_probs=out(trace.probs),
        units=units,
        grids=trace.grids,
        relevance=None if relevance is None else out(relevance),
        scales=trace.scales,
        consistency=trace.consistency,
        preprocessing=trace.preprocessing,
        method=method,
    )
