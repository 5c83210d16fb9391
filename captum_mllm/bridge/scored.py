"""What a module of scores is about: which tokens it scores, and what they are called."""

from typing import Any

from jaxtyping import Int64
from torch import Tensor, nn

from captum_mllm.labels import token_labels


class ScoredTokens(nn.Module):
    """The tokens of a prompt and its answer, and which of them are scored.

    Args:
        ids: (tokens,): prompt without padding, then the answer.
        rows: (targets,): positions of the scored tokens.
        answer: (answer,): the answer.
        tokenizer: for labels, or None.
    """

    def __init__(
        self,
        ids: Int64[Tensor, " tokens"],
        rows: Int64[Tensor, " targets"],
        answer: Int64[Tensor, " answer"],
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self._ids, self._rows, self._answer, self._tokenizer = ids, rows, answer, tokenizer

    @property
    def positions(self) -> Int64[Tensor, " targets"]:
        """Positions, in ``input_ids`` without padding + answer, of the scored tokens."""
        return self._rows.clone()

    @property
    def output_ids(self) -> Int64[Tensor, " targets"]:
        """Ids of the scored tokens: the columns of what a call returns."""
        return self._ids[self._rows]

    @property
    def answer_ids(self) -> Int64[Tensor, " answer"]:
        """Ids of the whole answer."""
        return self._answer.clone()

    @property
    def output_tokens(self) -> tuple[str, ...]:
        """Labels of the scored tokens."""
        return token_labels(self.output_ids.tolist(), self._tokenizer)

    @property
    def input_tokens(self) -> tuple[str, ...]:
        """Labels of all tokens, prompt (without padding) and answer: one per embedding."""
        return token_labels(self._ids.tolist(), self._tokenizer)
