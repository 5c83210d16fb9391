"""Which tokens are text, and which of them are explained."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.inputs import Sample

Explain = str | Sequence[int] | Tensor

_SEES_AHEAD = (
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
    if adapter.prompt_sees_ahead:
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
        (targets,): columns, in the order asked for.

    Raises:
        ValueError: an unknown word, or positions that are no text tokens.
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
        if adapter.prompt_sees_ahead and explain != "answer":
            raise ValueError(f"explain={explain!r} asks for prompt tokens, but {_SEES_AHEAD}")
        if not len(choices[explain]):
            raise ValueError("explain='prompt', but the prompt has no text tokens to explain.")
        return choices[explain]
    try:
        wanted = torch.as_tensor(explain, device=text.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"explain must be 'answer', 'prompt', 'all' or positions, got {explain!r}."
        ) from error
    whole = not wanted.is_floating_point() and wanted.dtype != torch.bool
    if wanted.ndim != 1 or not wanted.numel() or not whole:
        raise ValueError(f"explain must hold at least one position (1-D ints), got {explain!r}.")
    at = {int(p) + sample.padding: column for column, p in enumerate(text)}
    unknown = [int(p) for p in wanted if int(p) not in at]
    if (
        unknown
        and adapter.prompt_sees_ahead
        and min(unknown) < len(sample.prompt_ids) + sample.padding
    ):
        raise ValueError(f"explain holds prompt positions {unknown}, but {_SEES_AHEAD}")
    if unknown:
        raise ValueError(
            f"explain holds positions {unknown} that are no text tokens; text tokens stand at "
            f"{sorted(at)} of input_ids + answer. Tokens before the image count with "
            f"context='all'; special tokens and image tokens can't be explained."
        )
    return torch.tensor([at[int(p)] for p in wanted], dtype=torch.int64, device=text.device)
