"""One picture of a benchmark: its prompt, its answer, and the scores of a method's maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_mllm.attr import LogitLens
from captum_mllm.benchmark.settings import PERTURBATION, Settings
from captum_mllm.data import CategoryTable, CocoSample, match_categories
from captum_mllm.methods import METHODS
from captum_mllm.methods.registry import run_method
from captum_mllm.methods.request import Request, SharedTraces
from captum_mllm.metrics import MASK_METRICS, insertion_deletion, score_words
from captum_mllm.model.loading import prepare_inputs
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.words import group_words


@dataclass(frozen=True, eq=False)
class BenchmarkSample:
    """One picture, one answer about it, and what the maps of all methods are scored against.

    Args:
        number: of the picture in the data.
        inputs: the processor's mapping, on the model's device.
        answer: (tokens,) ids of the answer that is explained.
        text: the answer.
        table: the categories that its words may name.
        masks: per annotated category one mask of all its objects, bool (height, width).
        labels: per token of the answer the category that its word names, or None.
        shared: the traces that several methods share.
    """

    number: int
    inputs: Any
    answer: Tensor
    text: str
    table: CategoryTable
    masks: dict[str, np.ndarray]
    labels: tuple[str | None, ...]
    shared: SharedTraces = field(default_factory=SharedTraces)


def fingerprint(data: Sequence[CocoSample], number: int) -> dict[str, str | None]:
    """What identifies a picture and its annotation, whatever their names.

    Args:
        data: the annotated pictures.
        number: of the picture in the data.

    Returns:
        "picture": sha256 of the file's bytes; "annotation": sha256 of its captions, size, names and
        masks. None for what can't be read.
    """
    digests: dict[str, str | None] = {"picture": None, "annotation": None}
    try:
        sample = data[number]
    except Exception:  # the sample fails, and its line says why
        return digests
    try:
        with sample.path.open("rb") as file:
            digests["picture"] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        pass
    masks = [
        (thing.category, hashlib.sha256(np.packbits(thing.mask).tobytes()).hexdigest())
        for thing in sample.objects
    ]
    known = [sample.size, sample.captions, sample.extra.get("names"), masks]
    digests["annotation"] = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return digests


def prepare_sample(
    model: Any,
    processor: Any,
    sample: CocoSample,
    number: int,
    settings: Settings,
    table: CategoryTable,
    answer: Sequence[int] | None = None,
) -> BenchmarkSample:
    """Prompt the model about a picture and take its answer, or the picture's caption.

    Args:
        model: the model.
        processor: its processor.
        sample: the picture.
        number: of the picture in the data.
        settings: the run's.
        table: the categories that words may name.
        answer: ids of the answer, if it is known from an earlier run.

    Raises:
        ValueError: the picture can't be read, has no caption although captions are to be
            explained, or the model generates nothing.
    """
    inputs, _ = prepare_inputs(processor, [sample.image], settings.prompt)
    inputs = inputs.to(model.device, model.dtype)
    target: Any = None if answer is None else torch.tensor(answer)
    if target is None and settings.answers == "captions":
        if not sample.captions:
            raise ValueError(f"image {sample.image_id} has no caption to explain.")
        target = sample.captions[0]
    trace = LogitLens(model, processor).trace(
        inputs,
        target,
        gen_args={"max_new_tokens": settings.max_new_tokens},
        images=sample.image,
    )
    ids = trace.text_ids[trace.n_prompt :].cpu()
    words = group_words(trace.labels[trace.n_prompt :])
    categories = match_categories([word.text for word in words], table, parity=settings.parity)
    labels: list[str | None] = [None] * len(ids)
    for word, label in zip(words, categories, strict=True):
        for token in word.tokens:
            labels[token] = label
    return BenchmarkSample(
        number=number,
        inputs=inputs,
        answer=ids,
        text=processor.tokenizer.decode(ids, skip_special_tokens=True),
        table=table,
        masks=_masks(sample),
        labels=tuple(labels),
    )


def _masks(sample: CocoSample) -> dict[str, np.ndarray]:
    """One mask of all objects of each category; an object without a pixel is not annotated."""
    masks: dict[str, np.ndarray] = {}
    for thing in sample.objects:
        before = masks.get(thing.category)
        masks[thing.category] = thing.mask if before is None else before | thing.mask
    return {name: mask for name, mask in masks.items() if mask.any()}


def explain_sample(
    model: Any, processor: Any, sample: BenchmarkSample, method: str, settings: Settings
) -> MLLMAttributionResult:
    """A method's maps of the answer.

    Args:
        model: the model.
        processor: its processor.
        sample: the picture and the answer about it.
        method: a name of :data:`captum_mllm.methods.METHODS`.
        settings: the run's.
    """
    masks = None
    if METHODS[method].needs == "masks":
        masks = {t: sample.masks[x] for t, x in enumerate(sample.labels) if x in sample.masks}
    options = dict(settings.options.get(method, {}))
    request = Request(
        model,
        processor,
        sample.inputs,
        sample.answer,
        masks=masks,
        seed=settings.seed + sample.number,
        shared=sample.shared,
        **{name: options.pop(name) for name in ("steps",) if name in options},
    )
    return run_method(method, request, **options)


def score_sample(
    model: Any,
    processor: Any,
    sample: BenchmarkSample,
    result: MLLMAttributionResult,
    size: tuple[int, int],
    settings: Settings,
) -> dict[str, list[float]]:
    """All metrics of one answer's maps.

    Args:
        model: the model, which only insertion, deletion and the like run.
        processor: its processor.
        sample: the picture and the answer about it.
        result: a method's maps.
        size: (height, width) of the picture.
        settings: the run's.

    Returns:
        Per metric one value per mention of an annotated category ("obj_iou" and other metrics of
        masks), per function word ("func_iou") or per scored token (insertion, deletion and the
        like); NaN where there is none. "f1_iou" is computed from the two others once all pictures
        are done.
    """
    if not sample.table.names:
        return {name: [] for name in settings.metrics if name != "f1_iou"}
    masks: dict[str, Any] = dict(sample.masks)
    if not masks:  # no object, but function words are still scored, at the picture's size
        masks = {sample.table.names[0]: np.zeros(size, bool)}
    further = [name for name in settings.metrics if name in MASK_METRICS and name != "obj_iou"]
    words = score_words(result, masks, table=sample.table, parity=settings.parity, metrics=further)
    values = {"obj_iou": words.obj, "func_iou": words.func, **words.more}
    if any(name in PERTURBATION for name in settings.metrics):
        values |= _perturbation_scores(model, processor, sample, result, settings)
    wanted = [name for name in values if name in settings.metrics]
    if "f1_iou" in settings.metrics:
        wanted = list(dict.fromkeys([*wanted, "obj_iou", "func_iou"]))
    return {name: [float(value) for value in values[name]] for name in wanted}


def _perturbation_scores(
    model: Any,
    processor: Any,
    sample: BenchmarkSample,
    result: MLLMAttributionResult,
    settings: Settings,
) -> dict[str, np.ndarray]:
    """Per scored token; comprehensiveness and sufficiency as means over the shares of area."""
    tokens = range(len(sample.answer))
    if settings.scored_tokens == "objects":
        tokens = [t for t in tokens if sample.labels[t] is not None]
    if not tokens:
        return {name: np.zeros(0) for name in PERTURBATION}
    curves = insertion_deletion(
        model,
        sample.inputs,
        sample.answer,
        result,
        processor=processor,
        tokens=list(tokens),
        baseline=settings.baseline,
        steps=settings.steps,
        perturbations_per_eval=settings.perturbations_per_eval,
    )
    kept = curves.difference.masked_fill(~curves.sensitive, float("nan"))
    values = {
        "insertion": curves.insertion_auc,
        "deletion": curves.deletion_auc,
        "difference": curves.difference,
        "difference_sensitive": kept,
        "comprehensiveness": torch.stack(list(curves.comprehensiveness.values())).mean(0),
        "sufficiency": torch.stack(list(curves.sufficiency.values())).mean(0),
    }
    return {name: tensor.numpy() for name, tensor in values.items()}
