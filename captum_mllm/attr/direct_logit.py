"""Direct logit attribution: what the prediction of each token read from the image."""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn
from typing_extensions import override

from captum_mllm.adapters import find_adapter
from captum_mllm.attr.base import TokenAttribution, raw_result
from captum_mllm.attr.logit_lens import check_context
from captum_mllm.model.direct import Contributions
from captum_mllm.model.runner import Runner, RunOptions
from captum_mllm.model.scales import direct_trace
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import MLLMAttributionResult


class DirectLogitAttribution(TokenAttribution):
    r"""Direct logit attribution: what attention wrote from each position into a token's logit.

    For token y predicted at position q,
    ``A_t(i) = sum over layers and heads of max(0, a_lh[q, i] * d . (O_lh v_lhi))``: the attention
    weight on position i times what the head writes from it, projected on the direction d of y's
    logit (the LM head's row, centred over the vocabulary, led back through the final norm with its
    scale frozen). A logit lens shows where a token *can be read*; this shows what *this* mention of
    it read: two objects of one kind get different maps, and "two" as an answer to "how many" points
    at what was counted. Only direct paths count: what earlier tokens read and later ones copied is
    found on the text side.

    One teacher-forced forward; the model's own attention kernel computes the output, and of the
    rows asked for attention is computed again in float32, layer by layer. Layers without softmax
    attention contribute nothing, with a warning; a model without any gets the logit lens.

    Args:
        model: a transformers model of a registered family; left unchanged.
        processor: see :class:`~captum_mllm.LogitLens`, default None.
        context: see :class:`~captum_mllm.LogitLens`, default "after_image".

    Raises:
        ValueError: unsupported or compiled model, unknown ``context``; on use, attention that
            writes into the residual stream in an unknown way (the message says which layer).

    Reference:
        Direct logit attribution and OV circuits: Elhage et al., "A mathematical framework for
        transformer circuits", 2021, for text models. Positive head contributions and the use on
        image positions with grids, tiles and videos are ours.

    Example:
        >>> from captum_mllm import DirectLogitAttribution
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> direct = DirectLogitAttribution(model, processor)
        >>> attr = direct.attribute(inputs, target="there is a dog")
        >>> attr.output_tokens, tuple(attr.grid_attr[0].shape)
        ((' there', ' is', ' a', ' dog'), (4, 14, 14))
        >>> parts = direct.contributions(inputs, target="there is a dog")
        >>> parts.signed.shape[0], parts.rest.shape  # one row per token of the answer
        (4, torch.Size([4]))
    """

    def __init__(
        self, model: nn.Module, processor: Any = None, *, context: str = "after_image"
    ) -> None:
        adapter = find_adapter(model)
        super().__init__(model)
        self._runner = Runner(adapter, processor, -1, check_context(context, processor))

    @property
    @override
    def runner(self) -> Runner:
        return self._runner

    @property
    @override
    def reads_context(self) -> bool:
        return True

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
        run = self.runner.run(inputs, target, top_k=top_k, direct=True, **options)
        return direct_trace(self.runner, run)

    def contributions(
        self, inputs: Mapping[str, Any], target: Any = None, **options: Unpack[RunOptions]
    ) -> Contributions:
        """The signed decomposition of each target's logit, over all positions of the sequence.

        Args:
            inputs: see :meth:`attribute`.
            target: see :meth:`attribute`.
            options: see :meth:`attribute`.

        Returns:
            ``signed`` and ``positive`` (targets, positions of prompt and answer without padding),
            ``logits`` (targets,), and ``rest``: ``signed.sum(1) + rest == logits``. Tensors are on
            the model's device.

        Raises:
            ValueError: a model without softmax attention to read.
        """
        run = self.runner.run(inputs, target, direct=True, **options)
        if run.contributions is None:
            raise ValueError(
                "model: no layer has softmax attention to read, so its logits can't be split by "
                "position; LogitLens needs none."
            )
        return run.contributions.select(run.trace.targets)
