"""The model's own answer: greedy decoding, whatever settings come with the checkpoint."""

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.hooks import without_gradients
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.model.forward import evaluating
from captum_mllm.model.inputs import Sample

MAX_NEW_TOKENS = 128


def generate_answer(
    sample: Sample,
    adapter: Adapter,
    gen_args: Mapping[str, Any] | None = None,
    *,
    may_be_empty: bool = False,
) -> Int64[Tensor, " answer"]:
    """The model's own answer: plain greedy decoding unless ``gen_args`` says otherwise.

    Of the checkpoint's own generation settings only the ids of special and of suppressed tokens
    count: a repetition penalty or a banned word there would make another answer than the greedy
    one.

    Args:
        sample: the prompt.
        adapter: the model's adapter.
        gen_args: keyword arguments of ``generate`` that replace ours.
        may_be_empty: whether nothing but the end of sequence is an answer too, default False.

    Returns:
        Ids of the answer without the final end-of-sequence token.

    Raises:
        TypeError: ``gen_args`` is not a mapping, or its generation_config is not one.
        ValueError: several sequences, inputs of the model among ``gen_args``, or nothing but
            the end of sequence.
    """
    return _generate(sample, adapter, gen_args, may_be_empty)[0]


def generated_steps(
    sample: Sample, adapter: Adapter, gen_args: Mapping[str, Any] | None = None
) -> tuple[Int64[Tensor, " answer"], Float[Tensor, "answer vocabulary"]]:
    """The model's own answer, and the logits of each step that made it.

    Args:
        sample: the prompt.
        adapter: the model's adapter.
        gen_args: see :func:`generate_answer`.

    Returns:
        Ids of the answer without the final end-of-sequence token, and the model's raw logits of
        those steps, float32, on the CPU.

    Raises:
        ValueError: see :func:`generate_answer`.
    """
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    answer, output = _generate(sample, adapter, {**(gen_args or {}), **wanted}, False)
    logits = torch.cat([step.detach().float().cpu() for step in output.logits[: len(answer)]])
    return answer, logits


def _generate(
    sample: Sample, adapter: Adapter, gen_args: Mapping[str, Any] | None, may_be_empty: bool
) -> tuple[Int64[Tensor, " answer"], Any]:
    """The answer, and all that ``generate`` returned."""
    settings = _checked(gen_args, sample)
    config, others = _settings(adapter, settings)
    with _only_special_ids(adapter.model), warnings.catch_warnings():
        # Of an offloaded model: 5.5 compares with model.device, which is "meta" then.
        warnings.filterwarnings("ignore", r"You are calling \.generate\(\) with the .input_ids")
        output = adapter.model.generate(**sample.kwargs, generation_config=config, **others)
    sequences = getattr(output, "sequences", output)
    if sequences.shape[0] != 1:
        raise _several_sequences(sequences.shape[0])
    answer = sequences[0, sample.prompt_ids.shape[0] :]
    # generate takes the model's own where the user's generation_config names none.
    ends = config.eos_token_id
    ends = adapter.model.generation_config.eos_token_id if ends is None else ends
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if len(answer) and int(answer[-1]) in ends:
        answer = answer[:-1]
    if len(answer) == 0 and not may_be_empty:
        raise ValueError(
            "target is None and the model generated nothing but the end of sequence: check the "
            "prompt (chat template?), or give a target."
        )
    return answer, output


def generate_ids(adapter: Adapter, *args: Any, **kwargs: Any) -> Tensor:
    """What the model's own ``generate`` returns, with image and video ids barred.

    Args:
        adapter: the model's adapter.
        args: of the model's ``generate``.
        kwargs: of the model's ``generate``.

    Returns:
        Token ids (batch, tokens), prompt included.
    """
    kwargs.setdefault("suppress_tokens", list(adapter.visual_ids))
    with without_gradients(), evaluating(adapter, gradients=True):
        return adapter.model.generate(*args, **kwargs)


def _checked(gen_args: Any, sample: Sample) -> dict[str, Any]:
    if gen_args is not None and not isinstance(gen_args, Mapping):
        raise TypeError(
            f"gen_args must be a mapping of keyword arguments of generate, got "
            f"{type(gen_args).__name__}."
        )
    settings = dict(gen_args or {})
    config = settings.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(
            f"gen_args: generation_config must be a transformers GenerationConfig, got "
            f"{type(config).__name__}."
        )
    twice = sorted(set(settings) & set(sample.kwargs))
    if twice:
        raise ValueError(
            f"gen_args holds {twice}, which belong to inputs: gen_args takes settings of generate "
            f"such as max_new_tokens."
        )
    count = settings.get("num_return_sequences") or getattr(config, "num_return_sequences", 1) or 1
    if count != 1:
        raise _several_sequences(count)
    return settings


def _several_sequences(count: int) -> ValueError:
    return ValueError(
        f"gen_args make {count} sequences, but one answer is explained at a time: set "
        f"num_return_sequences=1, or pass each answer as target."
    )


def _settings(
    adapter: Adapter, settings: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Our greedy settings with the user's on top, and what else ``generate`` takes."""
    config = deepcopy(settings.pop("generation_config", None)) or GenerationConfig(
        **_special_ids(adapter.model),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        suppress_tokens=adapter.model.generation_config.suppress_tokens,
    )
    if "max_length" in settings:
        config.max_new_tokens = None
    others = {name: value for name, value in settings.items() if not hasattr(config, name)}
    config.update(**{name: value for name, value in settings.items() if name not in others})
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), *adapter.visual_ids})
    return config, others


def _special_ids(model: Any) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(model.generation_config, name) for name in names}


@uninterrupted
def _only_special_ids(model: Any) -> Iterator[None]:
    """While it lasts, generate can't fill gaps from the checkpoint's own generation settings."""
    before = model.generation_config
    model.generation_config = GenerationConfig(**_special_ids(model))
    try:
        yield
    finally:
        model.generation_config = before
