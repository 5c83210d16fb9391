"""Labels of answers in captum's results, where captum's own way stops with an error."""

from typing import Any

from captum_mllm.labels import token_labels, tokenizer_of


class ExactLabels:
    """A tokenizer for ``LLMAttribution`` that labels an answer's ids one by one.

    captum decodes the answer and encodes the text anew to find each token's piece of it; ids that
    don't survive that (a generated image marker, half a character) give an ``IndexError`` or labels
    of other tokens. Everything but that goes to the real tokenizer.

    Args:
        processor: the model's processor or tokenizer.

    Raises:
        TypeError: neither of them.

    Reference:
        captum 0.9.0, ``_convert_ids_to_pretty_tokens``.

    Example:
        >>> from captum_mllm.bridge import ExactLabels
        >>> from captum_mllm.reference import load
        >>> tokenizer = ExactLabels(load()[1])
        >>> tokenizer.encode("a dog", add_special_tokens=False) == tokenizer("a dog",
        ...     add_special_tokens=False)["input_ids"]
        True
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = tokenizer_of(processor)
        if tokenizer is None:
            raise TypeError("processor must be the model's processor or tokenizer, got None.")
        self._tokenizer = tokenizer
        self._last: tuple[str, dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any, *args: Any, **kwargs: Any) -> str:
        """The ids' labels in a row, which the next call cuts up again; one id as it always is.

        Args:
            ids: one token id, or several.
            args: of the tokenizer's ``decode``.
            kwargs: of the tokenizer's ``decode``.

        Returns:
            The text; of several ids their labels, one after the other.
        """
        flat = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(flat, list) or args or kwargs:
            return self._tokenizer.decode(ids, *args, **kwargs)
        offsets, text = [], ""
        for label in token_labels(flat, self._tokenizer):
            offsets.append((len(text), len(text) + len(label)))
            text += label
        self._last = (text, {"input_ids": flat, "offset_mapping": offsets})
        return text

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer; for the text that :meth:`decode` gave last, exactly its ids."""
        if kwargs.get("return_offsets_mapping") and self._last and self._last[0] == text:
            return self._last[1]
        return self._tokenizer(text, *args, **kwargs)
