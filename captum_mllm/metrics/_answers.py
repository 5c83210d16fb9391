"""The one place where metrics run a model: teacher-forced probabilities of one answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter, find_adapter
from captum_mllm.batches import batched
from captum_mllm.inputs import Sample, append_answer, read_sample, read_target
from captum_mllm.labels import tokenizer_of


def read_question(
    model: Any, inputs: Mapping[str, Any], target: Any, processor: Any
) -> tuple[Adapter, Sample, Int64[Tensor, " answer"]]:
    """The model's adapter, the checked sample and the ids of the answer.

    Args:
        model: the user's model.
        inputs: the processor's mapping for one sample.
        target: ids or a string.
        processor: the model's processor.

    Raises:
        TypeError: no target, no mapping.
        ValueError: see :func:`captum_mllm.inputs.read_sample` and ``read_target``.
    """
    if target is None:
        raise TypeError(
            "target is None, but a metric needs the answer that was explained: pass the result's "
            "output_ids."
        )
    adapter = find_adapter(model)
    sample = read_sample(inputs, adapter)
    return adapter, sample, read_target(target, sample, adapter, tokenizer_of(processor))


def chosen_tokens(tokens: Sequence[int] | None, n_answer: int) -> list[int]:
    """Positions in the answer that are scored.

    Args:
        tokens: positions, negative ones from the end; None for all.
        n_answer: number of tokens of the answer.

    Raises:
        ValueError: none, or one out of range.
    """
    if tokens is None:
        return list(range(n_answer))
    chosen = [int(token) for token in tokens]
    if not chosen or any(not -n_answer <= token < n_answer for token in chosen):
        raise ValueError(
            f"tokens must hold at least one position in the answer of {n_answer} tokens "
            f"(0..{n_answer - 1}), got {chosen}."
        )
    return [token % n_answer for token in chosen]


def answer_log_probs(
    adapter: Adapter,
    sample: Sample,
    answer: Int64[Tensor, " answer"],
    versions: Sequence[Mapping[str, Tensor]],
    tokens: Sequence[Sequence[int]],
) -> Float[Tensor, "versions tokens"]:
    """Log-probability of tokens of one answer, given versions of the images: one forward.

    Args:
        adapter: the model's adapter, already ``running()``.
        sample: the prompt.
        answer: ids of the answer, fixed.
        versions: per version, the inputs that hold its pixels.
        tokens: per version, positions in the answer; of one length.

    Returns:
        ``log p(y_t | version, prompt, y_<t)`` of the model's own logits, softmax in float32.

    Raises:
        ValueError: the LM head did not run once (a replaced part of the model), or NaN.
    """
    n, calls = len(versions), []
    full = append_answer(sample, answer, adapter)
    batch = batched(adapter, full, versions, n)
    where = torch.tensor([list(own) for own in tokens])
    rows = where + len(sample.prompt_ids) - 1  # the position that predicts the token

    def asked_rows(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(None)
        at = rows.to(args[0].device)
        return (args[0][torch.arange(n, device=at.device)[:, None], at], *args[1:])

    handle = adapter.head.register_forward_pre_hook(asked_rows)
    try:
        logits = adapter.model(**batch, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    if len(calls) != 1 or logits.shape[:2] != rows.shape:
        raise ValueError(
            f"model: its LM head ran {len(calls)} times in one forward and gave logits of shape "
            f"{tuple(logits.shape)}, expected once and {tuple(rows.shape)} rows. Is a part of the "
            f"model compiled, or replaced? Pass the plain model."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = logits.to(dtype).log_softmax(-1)
    found = found.gather(-1, answer[where.to(answer.device)].to(found.device)[..., None])[..., 0]
    if bool(found.isnan().any()):
        raise ValueError("model: its logits hold NaN; try another dtype (float32 or bfloat16).")
    return found
