"""One picture of a benchmark: its question, its answer, and what a method's maps of it score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_mllm.attr import LogitLens
from captum_mllm.benchmark.settings import PERTURBATION, Settings
from captum_mllm.data.coco import CocoSample
from captum_mllm.methods import METHODS, explain
from captum_mllm.metrics import (
    MASK_METRICS,
    CategoryTable,
    insertion_deletion,
    match_categories,
    score_words,
)
from captum_mllm.model.loading import prepare_inputs
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.words import group_words, marks_spaces


@dataclass(frozen=True, eq=False)
class Request:
    """What all methods are asked about one picture.

    Args:
        number: of the picture in the data.
        inputs: the processor's mapping, on the model's device.
        answer: (tokens,) ids of the answer that is explained.
        text: the answer.
        table: the categories that its words may name.
        masks: per annotated category, everything of it, bool (height, width).
        labels: per token of the answer the category that its word names, or None.
    """

    number: int
    inputs: Any
    answer: Tensor
    text: str
    table: CategoryTable
    masks: dict[str, np.ndarray]
    labels: tuple[str | None, ...]


def ask(
    model: Any,
    processor: Any,
    sample: CocoSample,
    number: int,
    settings: Settings,
    table: CategoryTable,
    answer: Sequence[int] | None = None,
) -> Request:
    """Put the question about a picture and take the model's answer, or the picture's caption.

    Args:
        model: the model.
        processor: its processor.
        sample: the picture.
        number: of the picture in the data.
        settings: the run's.
        table: the categories that words may name.
        answer: ids of the answer, where it is known from an earlier run.

    Raises:
        ValueError: the picture can't be read, has no caption though one is to be explained, or the
            model says nothing.
    """
    made, _ = prepare_inputs(processor, [sample.image], settings.prompt)
    inputs = made.to(model.device, model.dtype)
    target: Any = None if answer is None else torch.tensor(answer)
    if target is None and settings.answers == "captions":
        if not sample.captions:
            raise ValueError(f"image {sample.image_id} has no caption to be explained.")
        target = sample.captions[0]
    trace = LogitLens(model, processor).trace(
        inputs, target, gen_args={"max_new_tokens": settings.max_new_tokens}
    )
    ids = trace.text_ids[trace.n_prompt :].cpu()
    words = group_words(trace.labels[trace.n_prompt :], spaced=marks_spaces(trace.labels))
    found = match_categories([word.text for word in words], table, parity=settings.parity)
    labels: list[str | None] = [None] * len(ids)
    for word, label in zip(words, found, strict=True):
        for token in word.tokens:
            labels[token] = label
    return Request(
        number=number,
        inputs=inputs,
        answer=ids,
        text=processor.tokenizer.decode(ids, skip_special_tokens=True),
        table=table,
        masks=_masks(sample),
        labels=tuple(labels),
    )


def _masks(sample: CocoSample) -> dict[str, np.ndarray]:
    """Everything of each category in one mask; what no pixel shows is not annotated."""
    masks: dict[str, np.ndarray] = {}
    for thing in sample.objects:
        before = masks.get(thing.category)
        masks[thing.category] = thing.mask if before is None else before | thing.mask
    return {name: mask for name, mask in masks.items() if mask.any()}


def explained(
    model: Any, processor: Any, request: Request, method: str, settings: Settings
) -> MLLMAttributionResult:
    """A method's maps of the answer.

    Args:
        model: the model.
        processor: its processor.
        request: the question.
        method: a name of :data:`captum_mllm.methods.METHODS`.
        settings: the run's.
    """
    masks = None
    if METHODS[method].needs == "masks":
        masks = {t: request.masks[x] for t, x in enumerate(request.labels) if x in request.masks}
    options: dict[str, Any] = {"seed": settings.seed + request.number}
    options |= settings.options.get(method, {})
    return explain(method, model, processor, request.inputs, request.answer, masks=masks, **options)


def scores(
    model: Any,
    processor: Any,
    request: Request,
    result: MLLMAttributionResult,
    size: tuple[int, int],
    settings: Settings,
) -> dict[str, list[float]]:
    """All metrics of one answer's maps.

    Args:
        model: the model, which only insertion and its like run.
        processor: its processor.
        request: the question.
        result: a method's maps.
        size: (height, width) of the picture.
        settings: the run's.

    Returns:
        Per metric one value per mention of an annotated category ("obj_iou" and other metrics of
        masks), per function word ("func_iou") or per scored token (insertion and its like); NaN
        where there is none. "f1_iou" is made of the two others when all pictures are known.
    """
    if not request.table.names:
        return {name: [] for name in settings.metrics if name != "f1_iou"}
    masks: dict[str, Any] = dict(request.masks)
    if not masks:  # nothing to find, but function words are still scored, at the picture's size
        masks = {request.table.names[0]: np.zeros(size, bool)}
    further = [name for name in settings.metrics if name in MASK_METRICS and name != "obj_iou"]
    found = score_words(result, masks, table=request.table, parity=settings.parity, metrics=further)
    values = {"obj_iou": found.obj, "func_iou": found.func, **found.more}
    if any(name in PERTURBATION for name in settings.metrics):
        values |= _perturbation_scores(model, processor, request, result, settings)
    wanted = [name for name in values if name in settings.metrics]
    if "f1_iou" in settings.metrics:
        wanted = list(dict.fromkeys([*wanted, "obj_iou", "func_iou"]))
    return {name: [float(value) for value in values[name]] for name in wanted}


def _perturbation_scores(
    model: Any, processor: Any, request: Request, result: MLLMAttributionResult, settings: Settings
) -> dict[str, np.ndarray]:
    """Per scored token; comprehensiveness and sufficiency as means over the shares of area."""
    tokens = range(len(request.answer))
    if settings.scored_tokens == "objects":
        tokens = [t for t in tokens if request.labels[t] is not None]
    if not tokens:
        return {name: np.zeros(0) for name in PERTURBATION}
    found = insertion_deletion(
        model,
        request.inputs,
        request.answer,
        result,
        processor=processor,
        tokens=list(tokens),
        baseline=settings.baseline,
        steps=settings.steps,
        perturbations_per_eval=settings.perturbations_per_eval,
    )
    kept = found.difference.masked_fill(~found.sensitive, float("nan"))
    values = {
        "insertion": found.insertion_auc,
        "deletion": found.deletion_auc,
        "difference": found.difference,
        "difference_sensitive": kept,
        "comprehensiveness": torch.stack(list(found.comprehensiveness.values())).mean(0),
        "sufficiency": torch.stack(list(found.sufficiency.values())).mean(0),
    }
    return {name: tensor.numpy() for name, tensor in values.items()}
