"""Which tokens are text, which of them are explained, and the answer as token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from captum_mllm.adapters import Adapter, find_adapter
from captum_mllm.model.inputs import Sample, read_sample, refuse_meta
from captum_mllm.words import tokenizer_of

Explain = str | Sequence[int] | Tensor


_BIDIRECTIONAL = (
    "this model's prompt sees itself whole (prefix LM): none of its tokens is predicted from "
    "those before it. Use explain='answer'."
)


def text_positions(
    sample: Sample, n_answer: int, adapter: Adapter, tokenizer: Any, context: str
) -> Int64[Tensor, " tokens"]:
    """Positions of the prompt's text and of the answer, which are the columns of a trace.

    The sequence's first token was predicted from nothing, so it is none of them; nor are special
    tokens and what stands within an image's block (names of tiles, times of a video).

    Args:
        sample: the prompt.
        n_answer: number of answer tokens.
        adapter: the model's adapter.
        tokenizer: tells further special tokens, or None.
        context: "after_image" or "all": which prompt text counts.
    """
    ids = sample.prompt_ids
    special = set(adapter.special_ids)
    special.update(getattr(tokenizer, "all_special_ids", []))
    start = sample.prefix_length if context == "after_image" else 1
    prompt = [p for p in sample.text_positions if p >= start and int(ids[p]) not in special]
    if adapter.bidirectional_prompt:
        prompt = []  # it predicts nothing: each of its tokens sees those after it
    answer = range(len(ids), len(ids) + n_answer)
    return torch.tensor([*prompt, *answer], dtype=torch.int64, device=ids.device)


def explained_columns(
    explain: Explain, text: Tensor, sample: Sample, adapter: Adapter
) -> Int64[Tensor, " targets"]:
    """Columns that are explained.

    Args:
        explain: "answer", "prompt", "all", or positions in ``input_ids`` + answer.
        text: (text tokens,): positions of the columns.
        sample: the prompt.
        adapter: the model's adapter.

    Returns:
        (targets,): columns, in the order requested.

    Raises:
        ValueError: an unknown word, or positions that are not text tokens.
        TypeError: neither a word nor positions.
    """
    columns = torch.arange(len(text), device=text.device)
    if isinstance(explain, str):
        in_prompt = text < len(sample.prompt_ids)
        choices = {"answer": columns[~in_prompt], "prompt": columns[in_prompt], "all": columns}
        if explain not in choices:
            raise ValueError(
                f"explain must be 'answer', 'prompt', 'all' or positions, got {explain!r}."
            )
        if adapter.bidirectional_prompt and explain != "answer":
            raise ValueError(f"explain={explain!r} asks for prompt tokens, but {_BIDIRECTIONAL}")
        if not len(choices[explain]):
            raise ValueError("explain='prompt', but the prompt has no text tokens to explain.")
        return choices[explain]
    try:
        positions = torch.as_tensor(explain, device=text.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"explain must be 'answer', 'prompt', 'all' or positions, got {explain!r}."
        ) from error
    whole = not positions.is_floating_point() and positions.dtype != torch.bool
    if positions.ndim != 1 or not positions.numel() or not whole:
        raise ValueError(f"explain must hold at least one position (1-D ints), got {explain!r}.")
    at = {int(p) + sample.padding: column for column, p in enumerate(text)}
    unknown = [int(p) for p in positions if int(p) not in at]
    if (
        unknown
        and adapter.bidirectional_prompt
        and min(unknown) < len(sample.prompt_ids) + sample.padding
    ):
        raise ValueError(f"explain holds prompt positions {unknown}, but {_BIDIRECTIONAL}")
    if unknown:
        raise ValueError(
            f"explain holds positions {unknown} that are not text tokens; text tokens stand at "
            f"{sorted(at)} of input_ids + answer. Tokens before the image count with "
            f"context='all'; special tokens and image tokens can't be explained."
        )
    return torch.tensor([at[int(p)] for p in positions], dtype=torch.int64, device=text.device)


def read_target(
    target: Any, sample: Sample, adapter: Adapter, tokenizer: Any = None
) -> Int64[Tensor, " answer"]:
    """Check the user's answer: ids, or a string where there is a tokenizer.

    Args:
        target: 1-D tensor or sequence of ids, or a string.
        sample: the prompt (for its device).
        adapter: the model's adapter.
        tokenizer: turns a string into ids.

    Raises:
        TypeError: neither ids nor a string.
        ValueError: empty, out of the vocabulary, holds an image token, or a string without
            a tokenizer.
    """
    if isinstance(target, str):
        if tokenizer is None:
            raise ValueError(
                "target is a string, which needs a processor: make the attributor with one, e.g. "
                "MSEA(model, processor), or give token ids."
            )
        target = tokenizer(target, add_special_tokens=False)["input_ids"]
    try:
        ids = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"target must be a 1-D tensor or list of token ids, a string or None; got "
            f"{type(target).__name__}."
        ) from error
    refuse_meta({"target": ids})
    if ids.numel() == 0:
        raise ValueError("target is empty: give at least one token id, or None to generate.")
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(
            f"target must be a 1-D tensor or list of token ids, got shape {tuple(ids.shape)} of "
            f"{ids.dtype}."
        )
    ids = ids.to(device=sample.prompt_ids.device, dtype=torch.int64)
    if bool(((ids < 0) | (ids >= adapter.vocabulary)).any()):
        raise ValueError(
            f"target holds ids outside 0..{adapter.vocabulary - 1} (the vocabulary): "
            f"{ids[(ids < 0) | (ids >= adapter.vocabulary)].tolist()}."
        )
    if bool(torch.isin(ids, torch.tensor(adapter.visual_ids, device=ids.device)).any()):
        raise ValueError(
            f"target holds an image token (one of ids {list(adapter.visual_ids)}); only text can "
            f"be a target. Was the prompt left in the generated ids? Cut it off."
        )
    return ids


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
        TypeError: ``target`` is None, or ``inputs`` is not a mapping.
        ValueError: see :func:`captum_mllm.model.inputs.read_sample` and ``read_target``.
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
