"""Runs the model: one forward at its own scale, one prefix forward per further scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter, refuse_compiled
from captum_mllm.capture import Captured, captured_forward, check_head, full_logits
from captum_mllm.functional import lens_logits, top_k_rankings
from captum_mllm.generation import generate_answer
from captum_mllm.geometry import ImageGrid, Preprocessing
from captum_mllm.inputs import (
    Sample,
    append_answer,
    read_sample,
    read_target,
    rescale_prefix,
)
from captum_mllm.labels import token_labels, tokenizer_of
from captum_mllm.trace import ReleasedQuirks, TokenTrace

Explain = str | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """One prompt and its answer, with the forward at its own scale done.

    Args:
        sample: the prompt.
        answer_ids: (answer,): ids of the answer.
        trace: the evidence at scale 1.
        answer_log_probs: (answer,): log-probabilities of the answer's tokens.
    """

    sample: Sample
    answer_ids: Int64[Tensor, " answer"]
    trace: TokenTrace
    answer_log_probs: Float[Tensor, " answer"]


@dataclass(frozen=True, eq=False)
class Runner:
    """Gathers the evidence of one sample; the only place that runs the user's model.

    Args:
        adapter: the model's adapter.
        processor: the model's processor, or None.
        layer: LM layer of the lens; -1 is the last.
        context: "after_image" or "all": which prompt text counts.
    """

    adapter: Adapter
    processor: Any = None
    layer: int = -1
    context: str = "after_image"

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or None."""
        return tokenizer_of(self.processor)

    def run(
        self,
        inputs: Mapping[str, Any],
        target: Any,
        *,
        explain: Explain,
        gen_args: Mapping[str, Any] | None,
        top_k: int | None,
    ) -> Run:
        """Generate or check the answer, then one teacher-forced forward over everything.

        Args:
            inputs: the processor's mapping.
            target: None, ids or a string.
            explain: which tokens are explained.
            gen_args: keyword arguments of ``generate``.
            top_k: depth of the rankings, or None.
        """
        adapter = self.adapter
        refuse_compiled(adapter.model)
        if top_k is not None and not 1 <= top_k <= adapter.vocabulary:
            raise ValueError(
                f"top_k must lie in 1..{adapter.vocabulary} (the vocabulary), got {top_k}."
            )
        sample = read_sample(inputs, adapter)
        with adapter.running():
            if target is None:
                answer = generate_answer(sample, adapter, gen_args)
            else:
                answer = read_target(target, sample, adapter, self.tokenizer)
            text = self._text_positions(sample, len(answer))
            targets = _explained(explain, text, sample)
            full = append_answer(sample, answer, adapter)
            captured = captured_forward(
                adapter, full, sample.grids, rows=text - 1, layer=self.layer
            )
        trace, log_probs = self._gather(
            sample, full["input_ids"][0], text, targets, captured, top_k
        )
        return Run(sample, answer, trace, log_probs[len(text) - len(answer) :])

    def rescaled(
        self,
        run: Run,
        grids: Sequence[ImageGrid],
        *,
        images: Any = None,
        consistency: bool = False,
    ) -> tuple[tuple[Float[Tensor, "classes _ _"], ...], float | None]:
        """Maps of the run's classes with the images on other grids: one prefix forward.

        Args:
            run: the run at scale 1.
            grids: the grids to reach, one per image.
            images: original pictures to start from, or None to resize the pixel tensor.
            consistency: also run the text on that prefix's cache.

        Returns:
            One tensor (classes, rows, cols) per image; the scale's consistency or None.
        """
        adapter, sample = self.adapter, run.sample
        pixels = self._pixels(sample, grids, images)
        prefix = rescale_prefix(sample, grids, pixels, adapter)
        length = prefix.prefix_length
        with adapter.running():
            captured = captured_forward(
                adapter,
                prefix.kwargs,
                prefix.grids,
                rows=prefix.prompt_ids[:0],
                layer=self.layer,
                keep_cache=consistency,
            )
            maps = self._maps(prefix, captured.lens_hidden, run.trace.class_ids)
            if not consistency:
                return maps, None
            log_probs = self._text_on_cache(run, captured, length)
        drop = (log_probs - run.answer_log_probs).clamp(max=0)
        return maps, float(drop.mean().exp())

    def _text_on_cache(self, run: Run, prefix: Captured, length: int) -> Float[Tensor, " answer"]:
        """Log-probabilities of the answer, its text run on a rescaled prefix's cache."""
        sample, device = run.sample, run.answer_ids.device
        rest = torch.cat([sample.prompt_ids[sample.prefix_length :], run.answer_ids])
        inputs = {
            "input_ids": rest[None],
            "attention_mask": torch.ones(1, length + len(rest), dtype=torch.int64, device=device),
        }
        text = captured_forward(
            self.adapter, inputs, (), rows=rest[:0], layer=self.layer, cache=prefix.cache
        )
        # Row k predicts rest[k]; the prefix's last position predicts the first.
        hidden = torch.cat([prefix.final_hidden[-1:], text.final_hidden])
        rows = torch.arange(len(rest) - len(run.answer_ids), len(rest), device=device)
        return self._log_probs(hidden, rows, run.answer_ids)

    def _pixels(self, sample: Sample, grids: Sequence[ImageGrid], images: Any) -> dict[str, Tensor]:
        if images is None:
            return self.adapter.rescale_pixels(sample.kwargs, grids)
        pictures = list(images) if isinstance(images, list | tuple) else [images]
        if any(isinstance(picture, str | bytes) for picture in pictures):
            raise TypeError(
                "images= takes PIL pictures, not paths: open them, PIL.Image.open(path)."
            )
        settings = getattr(self.processor, "image_processor", None)
        if settings is None:
            raise ValueError("images= needs a processor: make the attributor with one.")
        if len(pictures) != len(grids):
            raise ValueError(f"images= holds {len(pictures)} pictures, inputs have {len(grids)}.")
        plain = dict(settings(images=pictures, return_tensors="pt"))
        made = self.adapter.pixels_from_pictures(pictures, self.processor, grids)
        for pixels, wanted in ((plain, sample.grids), (made, tuple(grids))):
            found = self.adapter.grids(pixels)
            if found != wanted:
                raise ValueError(
                    f"images= through the processor give frames of "
                    f"{[(g.height, g.width) for g in found]} pixels instead of "
                    f"{[(g.height, g.width) for g in wanted]}: was the processor called with other "
                    f"settings for inputs? Leave images out to resize the pixel tensor."
                )
        like = sample.kwargs["pixel_values"]
        return {name: value.to(like) for name, value in made.items()}

    def _maps(
        self, sample: Sample, hidden: Tensor, class_ids: Tensor
    ) -> tuple[Float[Tensor, "classes _ _"], ...]:
        """Raw maps ``relu(logit_i(class))`` on each image's grid."""
        weights = self.adapter.class_weights(class_ids)
        where = sample.grid_positions(self.adapter)
        return tuple(
            lens_logits(hidden[cells], *weights).clamp(min=0).unflatten(1, (grid.rows, grid.cols))
            for cells, grid in zip(where, sample.grids, strict=True)
        )

    def _log_probs(self, hidden: Tensor, rows: Tensor, ids: Tensor) -> Float[Tensor, " tokens"]:
        """Log-probability of each id, predicted at its row."""
        logits = full_logits(self.adapter, hidden[rows])
        return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def _gather(
        self,
        sample: Sample,
        ids: Int64[Tensor, " sequence"],
        text: Int64[Tensor, " tokens"],
        targets: Int64[Tensor, " targets"],
        captured: Captured,
        top_k: int | None,
    ) -> tuple[TokenTrace, Float[Tensor, " tokens"]]:
        """The trace of a captured forward, and the log-probability of every text token."""
        adapter, text_ids, n_given = self.adapter, ids[text], len(sample.prompt_ids)
        in_prompt = text < n_given
        own = torch.where(in_prompt, text, text - 1)  # pos(j)
        logits = full_logits(adapter, captured.final_hidden[text - 1])
        if not torch.isfinite(logits).all():
            raise ValueError(
                "model: its logits hold NaN or infinite values; check the weights of the LM head."
            )
        log_probs = logits.log_softmax(-1).gather(1, text_ids[:, None])[:, 0]

        # Two more classes for TAM's parity: what the first text token predicts, the last id.
        first = full_logits(adapter, captured.final_hidden[text[:1]]).argmax(-1)
        last = ids[n_given - 1 : n_given]
        class_ids = torch.cat([text_ids, first, last]).unique()
        check_head(adapter, captured.final_hidden[text - 1], captured.logits, class_ids)

        target_weights = adapter.class_weights(text_ids[targets])
        scores = lens_logits(captured.lens_hidden[own], *target_weights).clamp(min=0)
        columns = torch.arange(len(text), device=text.device)
        scores = torch.where(columns[None, :] < targets[:, None], scores, 0.0).to(scores.dtype)
        trace = TokenTrace(
            class_ids=class_ids,
            maps=self._maps(sample, captured.lens_hidden, class_ids),
            text_ids=text_ids,
            text_positions=text + sample.padding,
            targets=targets,
            text_scores=scores,
            probs=log_probs[targets].exp(),
            rankings=None if top_k is None else top_k_rankings(logits, top_k),
            grids=sample.grids,
            labels=token_labels(text_ids.tolist(), self.tokenizer),
            n_prompt=int(in_prompt.sum()),
            quirks=ReleasedQuirks(
                first_class=int(torch.searchsorted(class_ids, first)),
                first_scores=lens_logits(
                    captured.lens_hidden[own], *adapter.class_weights(first)
                ).clamp(min=0)[0],
                last_class=int(torch.searchsorted(class_ids, last)),
            ),
            preprocessing=self._preprocessing(),
        )
        return trace, log_probs

    def _text_positions(self, sample: Sample, n_answer: int) -> Int64[Tensor, " tokens"]:
        """Positions of the prompt's text and of the answer (without the sequence's first)."""
        ids = sample.prompt_ids
        special = set(self.adapter.special_ids)
        special.update(getattr(self.tokenizer, "all_special_ids", []))
        start = sample.prefix_length if self.context == "after_image" else 0
        prompt = [p for p in range(max(start, 1), len(ids)) if int(ids[p]) not in special]
        answer = range(len(ids), len(ids) + n_answer)
        return torch.tensor([*prompt, *answer], dtype=torch.int64, device=ids.device)

    def _preprocessing(self) -> Preprocessing | None:
        """The processor's settings, where to_image can undo them."""
        if not hasattr(self.processor, "image_processor"):
            return None
        try:
            return Preprocessing.of(self.processor)
        except ValueError:
            return None  # to_image says so when it is called


def _explained(explain: Explain, text: Tensor, sample: Sample) -> Int64[Tensor, " targets"]:
    """Columns that are explained.

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
        if not len(choices[explain]):
            raise ValueError("explain='prompt', but the prompt has no text tokens to explain.")
        return choices[explain]
    try:
        wanted = torch.as_tensor(explain, device=text.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"explain must be 'answer', 'prompt', 'all' or positions, got {explain!r}."
        ) from error
    if wanted.ndim != 1 or not wanted.numel() or wanted.is_floating_point():
        raise ValueError(f"explain must hold at least one position (1-D ints), got {explain!r}.")
    at = {int(p) + sample.padding: column for column, p in enumerate(text)}
    unknown = [int(p) for p in wanted if int(p) not in at]
    if unknown:
        raise ValueError(
            f"explain holds positions {unknown} that are no text tokens; text tokens stand at "
            f"{sorted(at)} of input_ids + answer. Tokens before the image count with "
            f"context='all'; special tokens and image tokens can't be explained."
        )
    return torch.tensor([at[int(p)] for p in wanted], dtype=torch.int64, device=text.device)
