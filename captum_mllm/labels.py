"""Readable labels of tokens, with or without a tokenizer."""

from collections.abc import Iterable
from typing import Any

_SPACE_MARKS = ("▁", "Ġ")


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer itself; None for None.

    Args:
        processor: a transformers processor or tokenizer, or None.

    Raises:
        TypeError: something else, such as an image processor alone.
    """
    if processor is None:
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(
            f"processor must be the model's processor (AutoProcessor.from_pretrained(...)) or "
            f"tokenizer, got {type(processor).__name__}."
        )
    return tokenizer


def token_labels(ids: Iterable[int], tokenizer: Any = None) -> tuple[str, ...]:
    """One label per token id; a leading space marks the start of a word.

    Args:
        ids: token ids.
        tokenizer: a transformers tokenizer, or None.

    Returns:
        Labels such as ``" dog"``; ``"<id 123>"`` without a tokenizer.

    Example:
        >>> token_labels([5, 123])
        ('<id 5>', '<id 123>')
    """
    return tuple(_label(int(i), tokenizer) for i in ids)


def _label(token_id: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return f"<id {token_id}>"
    token = tokenizer.convert_ids_to_tokens(token_id)
    if not token:
        return f"<id {token_id}>"
    starts_word = token.startswith(_SPACE_MARKS)
    text = tokenizer.convert_tokens_to_string([token])
    if "\ufffd" in text:  # a byte of a longer character: the raw token tells more
        return token
    return f" {text.strip(' ')}" if starts_word else text or token
