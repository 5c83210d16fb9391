"""TeacherForced: a model for which captum's LLMAttribution computes correct values."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from captum.attr import LLMAttribution
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.devices import unwrap
from captum_mllm.adapters.hooks import unchanged, without_gradients
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.model.forward import teacher_forced_output
from captum_mllm.model.generation import generate_ids

_TOLERANCE = 1e-3  # of a log-probability; half precision: _TOLERANCE_HALF
_TOLERANCE_HALF = 5e-2


class TeacherForced(nn.Module):
    """A multimodal model that ``captum.attr.LLMAttribution`` can use in all of its modes.

    captum 0.9 with transformers 5 drops the image in its default mode, feeds the sequence twice
    (also for text alone), and extends ``input_ids`` by the answer but none of the inputs that
    accompany them. Here every forward is a whole teacher-forced one with all inputs extended.
    ``forward_in_tokens=False`` is the fast way: one forward per perturbation for the whole answer.

    Args:
        model: a transformers model of a registered family; left unchanged.

    Raises:
        ValueError: no adapter for the model.
        TypeError: a model that is already wrapped.

    Reference:
        Our reading of captum 0.9.0's ``llm_attr.py``.

    Example:
        >>> from captum.attr import FeatureAblation, LLMAttribution
        >>> from captum_mllm import TeacherForced
        >>> from captum_mllm.bridge import image_input
        >>> from captum_mllm.functional import grid_mask
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> mask = grid_mask((picture.height, picture.width), 2, 2)
        >>> inp = image_input(picture, mask, "USER: <image> what is this ? ASSISTANT:", processor)
        >>> ablation = LLMAttribution(FeatureAblation(TeacherForced(model)), processor.tokenizer)
        >>> ablation.attribute(inp, "there is a dog", forward_in_tokens=False).token_attr.shape
        torch.Size([4, 4])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if isinstance(model, TeacherForced):
            raise TypeError("model is wrapped in TeacherForced already; pass it unchanged.")
        self._adapter = find_adapter(model)
        self.model = model

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs, on which captum creates its tensors."""
        return self._adapter.device

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's ``generate``, without image and video ids, as no target may be one.

        Args:
            args: of the model's ``generate``.
            kwargs: of the model's ``generate``.

        Returns:
            Token ids (batch, tokens), prompt included.
        """
        return generate_ids(self._adapter, *args, **kwargs)

    def prepare_inputs_for_generation(self, **kwargs: Any) -> dict[str, Any]:
        """Called by captum's cached mode before a forward: nothing is cached, nothing dropped.

        Args:
            kwargs: the forward's inputs.

        Returns:
            The inputs without those of a cache.
        """
        return {k: v for k, v in kwargs.items() if k not in ("cache_position", "use_cache")}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by captum's cached mode after a forward: inputs are extended in the next one."""
        del outputs
        return model_kwargs

    @override
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The model's output over a prompt and an answer.

        Args:
            input_ids: (1, tokens): prompt, then any number of tokens of the answer.
            kwargs: the prompt's other inputs as the processor returns them; token-wise ones are
                extended to the length of ``input_ids``.

        Returns:
            The model's output, with ``logits`` (1, tokens, vocabulary).

        Raises:
            ValueError: a side input is missing, or the attention mask shows padding.
        """
        adapter = self._adapter
        inputs = {
            name: value.to(adapter.device)
            for name, value in {"input_ids": input_ids, **kwargs}.items()
            if isinstance(value, Tensor) and name != "labels"
        }
        length = input_ids.shape[1]
        if "attention_mask" in inputs and not bool(inputs["attention_mask"].all()):
            raise ValueError(
                "attention_mask holds zeros, but captum's LLMAttribution attends to padding in "
                "some of its modes: call the processor without padding, for one sample."
            )
        sides = [name for name in adapter.suffix_fill if name in inputs]
        prompt = min(inputs[name].shape[1] for name in ("input_ids", *sides))
        adapter.check_inputs(
            {k: v[:, :prompt] if k in adapter.token_wise else v for k, v in inputs.items()}
        )
        for name in sides:
            value, fill = inputs[name], adapter.suffix_fill[name]
            more = value.new_full((len(value), length - value.shape[1]), fill)
            inputs[name] = torch.cat([value, more], dim=1)
        with without_gradients():
            return teacher_forced_output(adapter, inputs)


def check_llm_attribution(
    attribution: LLMAttribution,
    inp: Any,
    target: Tensor,
    *,
    use_cached_outputs: bool = True,
    forward_in_tokens: bool = True,
) -> bool:
    """Whether a call of ``LLMAttribution.attribute`` would use correct values; warns if not.

    Runs what captum would run, for the unperturbed input and with every feature removed, and
    compares each token's log-probability with the teacher-forced one: four forwards and, in
    captum's token by token modes, two for each token.

    Args:
        attribution: captum's ``LLMAttribution`` of any perturbation method.
        inp: captum's ``ImageMaskInput`` or another of its inputs.
        target: (targets,): ids of the answer, a tensor or a list.
        use_cached_outputs: as ``attribute`` will get it, default True as there.
        forward_in_tokens: as ``attribute`` will get it, default True as there.

    Returns:
        True if the values are correct; otherwise False, after a ``UserWarning`` that says what
        captum would return and how to fix it.

    Raises:
        TypeError: ``attribution`` is not an ``LLMAttribution``; a string as target.
        ValueError: a target of another shape.

    Reference:
        Defects of captum 0.9.0 with transformers 5.

    Example:
        >>> import warnings
        >>> from captum.attr import FeatureAblation, LLMAttribution
        >>> from captum_mllm.bridge import check_llm_attribution, image_input
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inp = image_input(picture, None, "USER: <image> what is this ? ASSISTANT:", processor)
        >>> plain = LLMAttribution(FeatureAblation(model), processor.tokenizer)
        >>> with warnings.catch_warnings(record=True) as warned:
        ...     warnings.simplefilter("always")
        ...     right = check_llm_attribution(plain, inp, torch.tensor([20, 31]))
        >>> right, len(warned)
        (False, 1)
    """
    if not isinstance(attribution, LLMAttribution):
        raise TypeError(
            f"attribution must be captum's LLMAttribution, got {type(attribution).__name__}."
        )
    target = _ids(target)
    model: Any = attribution.model
    wrapped = isinstance(model, TeacherForced)
    right = model if wrapped else TeacherForced(model)
    whole = inp.to_tensor().to(right.device)
    inputs = (whole, torch.zeros_like(whole))
    options = (use_cached_outputs, None, forward_in_tokens)
    try:
        with unchanged(unwrap(right.model)), _log_probs_per_token(attribution):
            call = attribution.attr_method.forward_func
            theirs = [call(x, inp, target, *options).flatten()[1:].float().cpu() for x in inputs]
    except Exception as error:  # anything that a model raises on unsuitable inputs
        _warn_wrong_values(f"raise {type(error).__name__}: {error}", wrapped)
        return False
    ours = [_scores(right, inp.to_model_input(x), target) for x in inputs]
    half = next(right.parameters()).dtype in (torch.float16, torch.bfloat16)
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    off = [(a - b).abs() / b.abs().clamp(min=1) for a, b in zip(theirs, ours, strict=True)]
    worst = float(torch.stack(off).max())
    dead = torch.equal(*theirs) and not torch.allclose(*ours, rtol=0, atol=1e-7)
    if dead:
        _warn_wrong_values("give zeros: what is perturbed never reaches the model", wrapped)
    elif worst > tolerance:
        _warn_wrong_values(
            f"give wrong values: a token's log-probability is off by {worst:.3g}", wrapped
        )
    return not dead and worst <= tolerance


def _ids(target: Any) -> Tensor:
    """The answer's ids as a tensor."""
    if isinstance(target, str):
        raise TypeError(
            f"target must be ids, got the string {target!r}: encode it with "
            f"tokenizer.encode(target, add_special_tokens=False)."
        )
    ids = torch.as_tensor(target)
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise ValueError(f"target must be (targets,) ids, got {ids.dtype} {tuple(ids.shape)}.")
    return ids


@uninterrupted
def _log_probs_per_token(attribution: LLMAttribution) -> Iterator[None]:
    """Within it captum's forward gives every token's log-probability after their sum.

    The product of several tokens' probabilities leaves nothing to compare.
    """
    before = attribution.attr_target, attribution.include_per_token_attr
    attribution.attr_target, attribution.include_per_token_attr = "log_prob", True
    try:
        yield
    finally:
        attribution.attr_target, attribution.include_per_token_attr = before


def _scores(forced: TeacherForced, inputs: Any, target: Tensor) -> Tensor:
    """The log-probability of each token of the answer in one teacher-forced forward."""
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    ids = inputs.pop("input_ids").to(forced.device)
    inputs.pop("attention_mask", None)
    target = target.to(forced.device)
    logits = forced(torch.cat([ids, target[None]], 1), **inputs).logits[0, ids.shape[1] - 1 : -1]
    scores = logits.float().log_softmax(-1).gather(1, target[:, None].to(logits.device))
    return scores[:, 0].cpu()


def _warn_wrong_values(what: str, wrapped: bool) -> None:
    fix = (
        "Is the input of one sample, without padding, and does the target fit the vocabulary?"
        if wrapped
        else "Wrap the model: LLMAttribution(FeatureAblation(captum_mllm.TeacherForced(model)), "
        "tokenizer), and call attribute(..., forward_in_tokens=False)."
    )
    warnings.warn(f"captum's LLMAttribution would {what}. {fix}", stacklevel=3)
