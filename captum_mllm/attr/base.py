"""What all token attributors share: one ``attribute``, composed of a trace and its reading."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from captum.attr import Attribution
from jaxtyping import Float
from torch import Tensor

from captum_mllm._captum import log_usage
from captum_mllm.functional import upsample
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.runner import Runner
from captum_mllm.model.targets import Explain
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import LOGITS, MLLMAttributionResult


class TokenAttribution(Attribution):
    """Explains each token of an answer by the image's cells and by the text before it.

    Subclasses give :attr:`runner`, which runs the model, and may refine :meth:`trace` (more
    evidence) and :meth:`attribute_trace` (what is made of it). Not thread-safe: while one runs,
    hooks sit in the user's model.
    """

    @property
    def subtracts_context(self) -> bool:
        """Whether context's interference is subtracted already: it must not be done twice."""
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
        explain: Explain = "answer",
        gen_args: Mapping[str, Any] | None = None,
        top_k: int | None = None,
        images: Any = None,
        show_progress: bool = False,
    ) -> TokenTrace:
        """Run the model and gather the evidence; arguments as in :meth:`attribute`.

        Args:
            inputs: the processor's mapping.
            target: see :meth:`attribute`.
            explain: see :meth:`attribute`.
            gen_args: see :meth:`attribute`.
            top_k: depth of the rankings to gather, or None for none.
            images: see :meth:`attribute`.
            show_progress: see :meth:`attribute`.

        Returns:
            All that :meth:`attribute_trace` needs.
        """

    @abstractmethod
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        """Make the result of a trace; runs no model.

        Args:
            trace: from :meth:`trace`.

        Returns:
            The result that :meth:`attribute` gives.
        """

    @property
    def name(self) -> str:
        """What it is made of, e.g. "ARC(MSEA(LogitLens))"; the result's ``method``."""
        inner = getattr(self, "attribution_method", None)
        own = type(self).__name__
        return f"{own}({inner.name})" if isinstance(inner, TokenAttribution) else own

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
        *,
        explain: Explain = "answer",
        gen_args: Mapping[str, Any] | None = None,
        images: Any = None,
        show_progress: bool = False,
    ) -> Any:
        """Explain each token of the answer to one prompt.

        Args:
            inputs: the mapping that the HF processor returns for exactly one sample (left padding
                allowed), or its ``pixel_values`` as a tensor with the rest of the mapping as
                ``additional_forward_args``.
            target: the answer: None (default) generates it; a 1-D tensor or list of token ids is
                teacher-forced; a string needs a processor. With noisy copies of the pixels
                (``NoiseTunnel``) a 1-D target that captum repeated per copy is understood; a
                tuple of ids is never repeated.
            additional_forward_args: with a pixel tensor, the rest of the mapping; with the whole
                mapping a tensor (N, C, H, W) holds versions of the picture's frame, as
                ``TokenLogProb(...).pixels`` gives it in every family.
            explain: "answer" (default), "prompt", "all", or positions in ``input_ids`` + answer.
            gen_args: keyword arguments of ``generate`` in place of ours (greedy, one beam, no
                repetition penalty, 128 new tokens). Image and video ids are always barred and
                the final end-of-sequence token is no target.
            images: the original picture(s); where a scale other than 1 is wanted they go through
                the processor again, instead of the pixel tensor being resized. Needs a processor.
            show_progress: progress bar over the scales, default False.

        Returns:
            :class:`~captum_mllm.result.MLLMAttributionResult`; for a pixel tensor (N, C, H, W) of
            N versions of one image, maps (N, targets, H, W) in pixels of the image as the model
            saw it; a tuple for a tuple of one tensor.

        Raises:
            TypeError: arguments of another kind.
            ValueError: bad input; the message names the argument and how to mend it.
        """
        options: dict[str, Any] = {
            "explain": explain,
            "gen_args": gen_args,
            "images": images,
            "show_progress": show_progress,
        }
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
        return self.attribute_trace(
            self.trace(mapping, target, top_k=self.ranking_depth, **options)
        )

    def _attribute_pixels(
        self, pixels: Tensor, target: Any, rest: Any, options: dict[str, Any]
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
                f"rows of patches go in a mapping, or as the frame that they were cut from "
                f"(TokenLogProb(...).pixels) with the whole mapping as additional_forward_args."
            )
        if options["images"] is not None:
            raise ValueError(
                "images= would replace the pixels that are given as a tensor; give a mapping as "
                "inputs, or leave images out."
            )
        if not len(pixels):
            raise ValueError("inputs holds no image: its first axis is empty.")
        target = _one_target(target, len(pixels))
        maps = []
        for row in pixels.detach():
            mapping = self.runner.adapter.with_image_version(row, rest)
            trace = self.trace(mapping, target, top_k=self.ranking_depth, **options)
            result = self.attribute_trace(trace)
            if len(result.grids) != 1:
                raise ValueError(
                    f"inputs is a pixel tensor, but input_ids hold {len(result.grids)} images, "
                    f"whose maps don't fit one tensor; give a mapping as inputs."
                )
            frame = result.grids[0]
            maps.append(upsample(result.grid_attr[0], (frame.height, frame.width)))
        return torch.stack(maps)


def _one_target(target: Any, n: int) -> Any:
    """The target of one sample, where captum repeated each of its ids for n copies."""
    if n == 1:
        return target[0] if isinstance(target, Tensor) and target.ndim == 2 else target
    if target is None:
        raise ValueError(
            f"target is None, but inputs hold {n} versions of the image whose own answers could "
            f"differ: give the token ids to explain."
        )
    if isinstance(target, str | tuple):
        return target
    ids = torch.as_tensor(target)
    if ids.ndim == 2:
        ids = ids.T.reshape(-1)
    if ids.numel() and ids.numel() % n == 0:
        copies = ids.reshape(-1, n)
        if bool((copies == copies[:, :1]).all()):
            return copies[:, 0]
    return target


def raw_result(trace: TokenTrace, method: str) -> MLLMAttributionResult:
    """The result of a trace as it is: raw logits >= 0.

    Args:
        trace: the evidence.
        method: name of the attributor.
    """
    rows = trace.text_class[trace.targets]
    return make_result(
        trace, tuple(maps[rows] for maps in trace.maps), trace.text_scores, LOGITS, method
    )


def make_result(
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
