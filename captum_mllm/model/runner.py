"""Runs the model once, at its own scale: generation or the given answer, then one forward."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter, refuse_compiled
from captum_mllm.adapters.hooks import unchanged
from captum_mllm.adapters.processors import read_preprocessing
from captum_mllm.functional import (
    lens_logits,
    merge_views,
    top_k_rankings,
)
from captum_mllm.geometry import Preprocessing
from captum_mllm.model.direct import Contributions, recorded_contributions
from captum_mllm.model.discovery import discover
from captum_mllm.model.forward import (
    Captured,
    captured_forward,
    check_head,
    evaluating,
    full_logits,
)
from captum_mllm.model.generation import generate_answer
from captum_mllm.model.inputs import Sample, append_answer, read_sample
from captum_mllm.model.processor_checks import check_processor
from captum_mllm.model.rescaling import checked_pictures
from captum_mllm.model.targets import Explain, explained_columns, read_target, text_positions
from captum_mllm.model.trace import ReleasedCodeDeviations, TokenTrace
from captum_mllm.model.write_paths import WritePath, write_paths
from captum_mllm.words import token_labels, tokenizer_of


class RunOptions(TypedDict, total=False):
    """Options of ``attribute`` and ``trace``, the same for every token attribution.

    Args:
        explain: "answer" (default), "prompt", "all", or positions in ``input_ids`` + answer.
        gen_args: keyword arguments of ``generate`` in place of ours (greedy, one beam, no
            repetition penalty, 128 new tokens). Image and video ids are always barred and the
            final end-of-sequence token is not a target.
        images: the original picture(s). With a processor, they are compared with the pixels: a
            grid or size of another picture shows in no tensor's shape. Where a scale other than 1
            is wanted, they go through the processor again, instead of the pixel tensor being
            resized, which needs a processor. A model without an adapter needs them at the first
            call for some inputs: its layout is probed.
        allow_irregular: use a probed layout that is irregular too, default False: an error says
            what is irregular.
        show_progress: progress bar over the scales, default False.
    """

    explain: Explain
    gen_args: Mapping[str, Any] | None
    images: Any
    allow_irregular: bool
    show_progress: bool


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that do not exist: keyword arguments swallow a misspelt name silently.

    Args:
        options: keyword arguments of a call.

    Raises:
        TypeError: a name that :class:`RunOptions` does not have.

    Example:
        >>> check_options({"explain": "all"})
    """
    known = RunOptions.__annotations__
    if unknown := [name for name in options if name not in known]:
        raise TypeError(
            f"a token attribution does not take {', '.join(map(repr, unknown))}; its options are "
            f"{', '.join(known)}."
        )


@dataclass(frozen=True, eq=False)
class Run:
    """One prompt and its answer, with the forward at its own scale done.

    Args:
        sample: the prompt.
        answer_ids: (answer,): ids of the answer.
        trace: the evidence at scale 1.
        answer_log_probs: (answer,): log-probabilities of the answer's tokens.
        contributions: what attention wrote from each position into each text token's logit, where
            that was wanted and the model has attention to read; else None.
    """

    sample: Sample
    answer_ids: Int64[Tensor, " answer"]
    trace: TokenTrace
    answer_log_probs: Float[Tensor, " answer"]
    contributions: Contributions | None = None


@dataclass(frozen=True, eq=False)
class Runner:
    """Gathers the evidence of one sample at its own scale.

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
        top_k: int | None = None,
        direct: bool = False,
        **options: Unpack[RunOptions],
    ) -> Run:
        """Generate or check the answer, then one teacher-forced forward over everything.

        Args:
            inputs: the processor's mapping.
            target: None, ids or a string.
            top_k: depth of the rankings, or None (default) for none.
            direct: also record what attention wrote into each text token's logit, default False.
            options: see :class:`RunOptions`; ``images`` matters at other scales only.
        """
        adapter = self.adapter
        check_options(options)
        refuse_compiled(adapter.model)
        check_processor(self.processor, adapter)
        explain, gen_args = options.get("explain", "answer"), options.get("gen_args")
        if top_k is not None and not 1 <= top_k <= adapter.vocabulary:
            raise ValueError(
                f"top_k must lie in 1..{adapter.vocabulary} (the vocabulary), got {top_k}."
            )
        with unchanged(adapter.model):
            discover(
                adapter,
                self.processor,
                inputs,
                options.get("images"),
                allow_irregular=options.get("allow_irregular", False),
            )
            sample = read_sample(inputs, adapter)
            self._check_pictures(sample, options.get("images"))
            return self._run(sample, target, explain, gen_args, top_k, direct)

    def _run(
        self,
        sample: Sample,
        target: Any,
        explain: Explain,
        gen_args: Mapping[str, Any] | None,
        top_k: int | None,
        direct: bool,
    ) -> Run:
        adapter = self.adapter
        with evaluating(adapter):
            if target is None:
                answer = generate_answer(sample, adapter, gen_args)
            else:
                answer = read_target(target, sample, adapter, self.tokenizer)
            text = text_positions(sample, len(answer), adapter, self.tokenizer, self.context)
            targets = explained_columns(explain, text, sample, adapter)
            full = append_answer(sample, answer, adapter)
            ids = full["input_ids"][0]
            paths = self._paths() if direct else ()
            with (
                recorded_contributions(adapter, paths, text - 1, ids[text])
                if any(paths)
                else nullcontext([None])
            ) as written:
                captured = captured_forward(
                    adapter, full, sample.grids, rows=text - 1, layer=self.layer
                )
            trace, log_probs = self._gather(sample, ids, text, targets, captured, top_k)
        return Run(sample, answer, trace, log_probs[len(text) - len(answer) :], written[0])

    def _check_pictures(self, sample: Sample, images: Any) -> None:
        """Compare the pictures with the pixels, where both are there: nothing else can tell."""
        of_stills = not any(grid.steps for grid in sample.grids)
        known = hasattr(self.processor, "image_processor") and not self.adapter.from_pictures
        if images is not None and known and of_stills:
            checked_pictures(self.adapter, self.processor, sample, images)

    def _paths(self) -> tuple[WritePath | None, ...]:
        """How each layer's attention writes; says so where some or all have none to read."""
        paths = write_paths(self.adapter)
        if lacking := paths.count(None):
            rest = (
                "contribute nothing to direct logit attribution"
                if lacking < len(paths)
                else "leave nothing to direct logit attribution: the logit lens is used in its "
                "place"
            )
            warnings.warn(
                f"{lacking} of {len(paths)} layers of {type(self.adapter.model).__name__} have no "
                f"softmax attention that goes through transformers' attention interface, and "
                f"{rest}.",
                stacklevel=2,
            )
        return paths

    def lens_maps(
        self,
        sample: Sample,
        hidden: Float[Tensor, "positions dim"],
        class_ids: Int64[Tensor, " classes"],
    ) -> tuple[Float[Tensor, "classes ..."], ...]:
        """Raw maps ``relu(logit_i(class))`` on each image's grid, its tiles and overview merged.

        Args:
            sample: where the images' tokens are.
            hidden: hidden states after the final norm.
            class_ids: token ids.

        Returns:
            Per image (classes, rows, cols), per video (classes, steps, rows, cols).
        """
        weights = self.adapter.class_weights(class_ids)
        maps = []
        for where, grid in zip(sample.image_positions, sample.grids, strict=True):
            views = self.adapter.views(grid)
            states = [hidden[where[view.tokens.flatten().to(where.device)]] for view in views]
            lens = [
                self._scores(at, weights).unflatten(1, view.tokens.shape)
                for at, view in zip(states, views, strict=True)
            ]
            maps.append(merge_views(lens, [view.box for view in views], grid.shape))
        return tuple(maps)

    def _scores(
        self, hidden: Float[Tensor, "positions dim"], weights: Any
    ) -> Float[Tensor, "classes positions"]:
        """Positive logits of classes at some positions, as the model would give them."""
        return self.adapter.finish_logits(lens_logits(hidden, *weights)).clamp(min=0)

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
        pos = torch.where(in_prompt, text, text - 1)  # pos(j)
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
        scores = self._scores(captured.lens_hidden[pos], target_weights)
        columns = torch.arange(len(text), device=text.device)
        scores = torch.where(columns[None, :] < targets[:, None], scores, 0.0).to(scores.dtype)
        trace = TokenTrace(
            class_ids=class_ids,
            maps=self.lens_maps(sample, captured.lens_hidden, class_ids),
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
                first_scores=self._scores(captured.lens_hidden[pos], adapter.class_weights(first))[
                    0
                ],
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
