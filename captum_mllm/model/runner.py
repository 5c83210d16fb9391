"""Runs the model: one forward at its own scale, one prefix forward per further scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter, refuse_compiled
from captum_mllm.adapters.processors import read_preprocessing
from captum_mllm.functional import (
    join_windows,
    lens_logits,
    merge_views,
    top_k_rankings,
    window_boxes,
)
from captum_mllm.geometry import ImageGrid, Preprocessing
from captum_mllm.model.forward import Captured, captured_forward, check_head, full_logits
from captum_mllm.model.generation import generate_answer
from captum_mllm.model.inputs import Sample, append_answer, cut, read_sample, rescaled_inputs
from captum_mllm.model.scales import scaled_inputs, window_inputs
from captum_mllm.model.targets import Explain, explained_columns, read_target, text_positions
from captum_mllm.model.trace import ReleasedCodeDeviations, TokenTrace
from captum_mllm.words import token_labels, tokenizer_of


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
            text = text_positions(sample, len(answer), adapter, self.tokenizer, self.context)
            targets = explained_columns(explain, text, sample, adapter)
            full = append_answer(sample, answer, adapter)
            captured = captured_forward(
                adapter, full, sample.grids, rows=text - 1, layer=self.layer
            )
            ids = full["input_ids"][0]
            trace, log_probs = self._gather(sample, ids, text, targets, captured, top_k)
        return Run(sample, answer, trace, log_probs[len(text) - len(answer) :])

    def rescaled(
        self,
        run: Run,
        grids: Sequence[ImageGrid],
        *,
        images: Any = None,
        consistency: bool = False,
        mirrored: bool = False,
    ) -> tuple[tuple[Float[Tensor, "classes ..."], ...], float | None]:
        """Maps of the run's classes with the images on other grids: one prefix forward.

        For a model of one input size: one for each of several windows.

        Args:
            run: the run at scale 1.
            grids: the grids to reach, one per image.
            images: original pictures to start from, or None to resize the pixel tensor.
            consistency: also run the text after it.
            mirrored: show the images mirrored, and mirror the maps back.

        Returns:
            One tensor (classes, rows, cols) per image; the scale's consistency or None.

        Raises:
            ValueError: ``consistency`` with a model of one input size; pictures that are not
                those of the inputs.
        """
        adapter, sample = self.adapter, run.sample
        if adapter.fixed_size:
            if consistency:
                raise ValueError(
                    "consistency=True: this model takes images of one size only, so larger scales "
                    "are seen through windows, none of which shows the whole image: there is no "
                    "answer to compare. Leave consistency out."
                )
            return self._through_windows(run, grids, images, mirrored), None
        pixels = scaled_inputs(adapter, self.processor, sample, grids, images)
        # With consistency the text runs too; maps do not see it.
        tokens = append_answer(sample, run.answer_ids, adapter)
        if not consistency:
            tokens = cut(tokens, sample.prefix_length, adapter)
        scaled = rescaled_inputs(tokens, sample, grids, pixels, adapter)
        if mirrored:
            turned = adapter.mirrored(scaled.kwargs, scaled.grids)
            scaled = replace(scaled, kwargs={**scaled.kwargs, **turned})
        length = len(scaled.prompt_ids)
        n_rows = len(run.answer_ids) if consistency else 0
        rows = torch.arange(length - 1 - n_rows, length - 1, device=scaled.prompt_ids.device)
        with adapter.running():
            captured = captured_forward(
                adapter, scaled.kwargs, scaled.grids, rows=rows, layer=self.layer
            )
            maps = self._maps(scaled, captured.lens_hidden, run.trace.class_ids)
            if mirrored:
                maps = tuple(own.flip(-1) for own in maps)
            if not consistency:
                return maps, None
            logits = full_logits(adapter, captured.final_hidden[rows])
        log_probs = logits.log_softmax(-1).gather(1, run.answer_ids[:, None])[:, 0]
        drop = (log_probs - run.answer_log_probs).clamp(max=0)
        return maps, float(drop.mean().exp())

    def _through_windows(
        self, run: Run, grids: Sequence[ImageGrid], images: Any, mirrored: bool
    ) -> tuple[Float[Tensor, "classes ..."], ...]:
        """Maps on the grids of an enlarged image, seen through windows of the model's own size."""
        adapter, sample = self.adapter, run.sample
        pairs = list(zip(sample.grids, grids, strict=True))
        n = max(
            ceil(new / old) for g, big in pairs for old, new in zip(g.shape, big.shape, strict=True)
        )
        boxes = [window_boxes((g.rows, g.cols), (big.rows, big.cols), n) for g, big in pairs]
        seen = []
        tokens = cut(sample.kwargs, sample.prefix_length, adapter)
        for window in zip(*boxes, strict=True):
            shown = dict(tokens)  # one window is the image as it is
            if n > 1:
                shown |= window_inputs(adapter, self.processor, sample, window, images)
            if mirrored:
                shown |= adapter.mirrored(shown, sample.grids)
            with adapter.running():
                captured = captured_forward(
                    adapter,
                    shown,
                    sample.grids,
                    rows=sample.prompt_ids[:0],
                    layer=self.layer,
                )
                maps = self._maps(sample, captured.lens_hidden, run.trace.class_ids)
                seen.append(tuple(own.flip(-1) for own in maps) if mirrored else maps)
        return tuple(
            join_windows(
                list(maps), [adapter.window_canvas(g, box) for box in own], (big.rows, big.cols)
            )
            for maps, own, (g, big) in zip(zip(*seen, strict=True), boxes, pairs, strict=True)
        )

    def _maps(
        self, sample: Sample, hidden: Tensor, class_ids: Tensor
    ) -> tuple[Float[Tensor, "classes ..."], ...]:
        """Raw maps ``relu(logit_i(class))`` on each image's grid, its views merged."""
        weights = self.adapter.class_weights(class_ids)
        maps = []
        for where, grid in zip(sample.image_positions, sample.grids, strict=True):
            views = self.adapter.views(grid)
            lens = [
                lens_logits(hidden[where[view.tokens.flatten().to(where.device)]], *weights)
                .clamp(min=0)
                .unflatten(1, view.tokens.shape)
                for view in views
            ]
            maps.append(merge_views(lens, [view.box for view in views], grid.shape))
        return tuple(maps)

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
            released_code_deviations=ReleasedCodeDeviations(
                first_class=int(torch.searchsorted(class_ids, first)),
                first_scores=lens_logits(
                    captured.lens_hidden[own], *adapter.class_weights(first)
                ).clamp(min=0)[0],
                last_class=int(torch.searchsorted(class_ids, last)),
            ),
            preprocessing=self._preprocessing(),
        )
        return trace, log_probs

    def _preprocessing(self) -> Preprocessing | None:
        """The processor's settings, where to_image can undo them."""
        if not hasattr(self.processor, "image_processor"):
            return None
        try:
            return read_preprocessing(self.processor)
        except ValueError:
            return None  # to_image says so when it is called
