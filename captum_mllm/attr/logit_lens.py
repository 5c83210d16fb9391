"""The base: a logit lens on the image positions."""

from collections.abc import Mapping
from typing import Any, Unpack

from captum.attr import Attribution
from torch import nn
from typing_extensions import override

from captum_mllm.adapters import find_adapter
from captum_mllm.attr.base import TokenAttribution, raw_result
from captum_mllm.model.runner import Runner, RunOptions
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.validation import ArgumentError, check_choice
from captum_mllm.words import tokenizer_of


class LogitLens(TokenAttribution):
    r"""Logit lens: how strongly each image position predicts each token of the answer.

    ``A_t(i) = relu(W[y_t] . h_i + b[y_t])`` at each image position i, where h is the hidden state
    after the final norm and W, b is the LM head. Image positions never see the answer, so one
    forward pass yields the maps of all its tokens. A raw map depends only on the image, the text
    before it (for prefix LMs, the whole prompt) and the token id: two mentions of "dog" have the
    same map.

    Args:
        model: a transformers model of a registered family; left unchanged.
        processor: its processor; gives labels, string targets, special tokens and the geometry
            for ``to_image``. Default None: everything else works without it.
        layer: LM layer whose output goes through the final norm and the head, default -1 (the
            last: the model's own logits). The layer's output is read before
            Qwen3-VL adds further image features to it; those count from the next layer on.
            Rankings and probabilities are always the model's own.
        context: which prompt text counts: "after_image" (default, the non-special tokens after
            the last image) or "all" (those before it too). The very first token of the sequence
            was predicted from nothing and is never context; nor is any prompt token of a prefix LM
            (PaliGemma), none of which was predicted.

    Raises:
        ValueError: unsupported or compiled model, no such layer, unknown ``context``.

    Reference:
        Logit lens on visual tokens: the base of TAM (arXiv 2506.23270) and of the paper
        (arXiv 2509.22415).

    Example:
        >>> from captum_mllm import LogitLens
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> attr = LogitLens(model, processor).attribute(inputs, target="there is a dog")
        >>> attr.output_tokens, tuple(attr.grid_attr[0].shape)
        ((' there', ' is', ' a', ' dog'), (4, 14, 14))
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        layer: int = -1,
        *,
        context: str = "after_image",
    ) -> None:
        adapter = find_adapter(model)
        super().__init__(model)
        depth = len(adapter.layers)
        if not isinstance(layer, int) or isinstance(layer, bool) or not -depth <= layer < depth:
            raise ArgumentError("layer", f"must be an int in {-depth}..{depth - 1}, got {layer!r}.")
        layer = -1 if layer % depth == depth - 1 else layer % depth
        self._runner = Runner(adapter, processor, layer, check_context(context, processor))

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
        return self.runner.run(inputs, target, top_k=top_k, **options).trace


def check_context(context: str, processor: Any) -> str:
    """The checked ``context`` of a token attribution, and whether its processor has a tokenizer.

    Args:
        context: see :class:`LogitLens`.
        processor: see :class:`LogitLens`.

    Raises:
        ValueError: unknown ``context``, or no tokenizer.
    """
    tokenizer_of(processor)  # raises where there is none
    return check_choice("context", context, ("after_image", "all"))


def as_token_attribution(
    model_or_attribution: Any, processor: Any = None, layer: int = -1, *, caller: str
) -> TokenAttribution:
    """The token attribution that gives logits: the argument itself, or ``LogitLens`` over a model.

    Args:
        model_or_attribution: a transformers model or a token attribution.
        processor: the model's processor; with an attribution it must be None.
        layer: layer of the lens; with an attribution it must be -1.
        caller: the attributor that needs it, for the message.

    Raises:
        TypeError: neither a model nor a token attribution.
        ValueError: an attribution whose maps are normalised already, or a ``processor`` or
            ``layer`` next to an attribution.
    """
    if not isinstance(model_or_attribution, TokenAttribution):
        if isinstance(model_or_attribution, Attribution):
            raise TypeError(
                f"model_or_attribution: {caller} needs maps per token, and "
                f"{type(model_or_attribution).__name__} gives none. Pass the model, "
                f"LogitLens(model) or MSEA(model)."
            )
        return LogitLens(model_or_attribution, processor, layer)
    name = type(model_or_attribution).__name__
    if processor is not None or layer != -1:
        raise ValueError(
            f"processor and layer belong to the innermost attribution: give them to {name}, not "
            f"to {caller}."
        )
    if not model_or_attribution.gives_logits:
        raise ValueError(
            f"model_or_attribution: {caller} needs logits, but {name} gives maps in [0, 1], from "
            f"which interference may be subtracted already; use one of the two."
        )
    return model_or_attribution
