"""Is a word grounded or hallucinated? Scores of an answer's tokens without masks or captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.functional import lens_logits, merge_views
from captum_mllm.metrics.perturbation import all_masks, read_maps
from captum_mllm.model.baselines import BASELINES, Baseline, PerturbableImages, black_pixel
from captum_mllm.model.forward import answer_log_probs, captured_forward, evaluating
from captum_mllm.model.inputs import Sample, append_answer
from captum_mllm.model.targets import chosen_tokens, read_question
from captum_mllm.validation import check_number

CHUNK = 16384  # vocabulary entries at a time


def log_normalizer(
    hidden: Float[Tensor, "cells dim"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, " cells"]:
    """``log sum_v exp(W_v . h_i + b_v)`` of each cell, without all cells x vocabulary in memory.

    Args:
        hidden: hidden states after the final norm.
        weight: the LM head's matrix.
        bias: its bias, or None.
        chunk: vocabulary entries at a time, default 16384.

    Returns:
        One value per cell, float32 (float64 stays float64): a logit minus it is a
        log-probability.

    Raises:
        ValueError: ``chunk`` < 1.

    Reference:
        The denominator of the softmax.

    Example:
        >>> z = log_normalizer(torch.zeros(1, 2), torch.ones(5, 2), chunk=2)
        >>> round(float(z.exp()), 4)
        5.0
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    total: Tensor | None = None
    for start in range(0, len(weight), chunk):
        rows = slice(start, start + chunk)
        logits = lens_logits(hidden, weight[rows], None if bias is None else bias[rows])
        part = logits.logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    if total is None:
        raise ValueError("weight is empty: give the LM head's matrix.")
    return total


def rank_of(
    hidden: Float[Tensor, "words dim"],
    ids: Int64[Tensor, " words"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    *,
    chunk: int = CHUNK,
) -> Int64[Tensor, " words"]:
    """Rank of each id among all logits of its own state: 1 is the largest; ties by lower id.

    Args:
        hidden: one state per word, e.g. that of its peak cell.
        ids: one id per word.
        weight: the LM head's matrix.
        bias: its bias, or None.
        chunk: vocabulary entries at a time, default 16384.

    Returns:
        (words,): ranks from 1 to the size of the vocabulary.

    Raises:
        ValueError: ``chunk`` < 1.

    Reference:
        Ours.

    Example:
        >>> rank_of(torch.ones(1, 1), torch.tensor([2]), torch.tensor([[3.0], [1.0], [2.0]]))
        tensor([2])
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    parts = []  # each logit is computed once, so that equal ones are bitwise equal
    columns = torch.arange(len(ids), device=ids.device)
    bounds = [slice(start, start + chunk) for start in range(0, len(weight), chunk)]
    of_ids = torch.empty(0)
    for part in bounds:
        logits = lens_logits(hidden, weight[part], None if bias is None else bias[part])
        inside = (ids >= part.start) & (ids < part.start + len(logits))
        if not len(of_ids):
            of_ids = logits.new_zeros(len(ids))
        of_ids[inside] = logits[ids[inside] - part.start, columns[inside]]
        parts.append(logits)
    ranks = torch.ones_like(ids)
    for part, logits in zip(bounds, parts, strict=True):
        entries = torch.arange(len(logits), device=ids.device)[:, None] + part.start
        ranks += ((logits > of_ids) | ((logits == of_ids) & (entries < ids))).sum(0)
    return ranks


def map_entropy(maps: Float[Tensor, "targets ..."]) -> Float64[Tensor, " targets"]:
    """How spread a map is: entropy of its share per cell, relative to that of a constant map.

    Args:
        maps: any values; negative ones count as 0. All axes but the first are cells.

    Returns:
        Value in [0, 1] per map: 0 where one cell holds everything, 1 for a constant map. A map
        without a positive value points nowhere and counts as constant.

    Reference:
        Shannon entropy; its use as a score of hallucination is ours.

    Example:
        >>> map_entropy(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])).tolist()
        [0.5]
    """
    shares = _shares(maps)
    if shares.shape[1] == 1:
        return torch.zeros(len(shares), dtype=torch.float64)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return entropy / torch.tensor(float(shares.shape[1]), dtype=torch.float64).log()


def mass_area(
    maps: Float[Tensor, "targets ..."], mass: float = 0.85
) -> Float64[Tensor, " targets"]:
    """Smallest share of the cells that together hold a share of the map's mass.

    Args:
        maps: any values; negative ones count as 0. All axes but the first are cells.
        mass: share of the mass in (0, 1], default 0.85.

    Returns:
        Value in (0, 1] per map. A map without a positive value counts as constant.

    Raises:
        ValueError: ``mass`` out of range.

    Reference:
        Ours.

    Example:
        >>> mass_area(torch.tensor([[6.0, 3.0, 1.0, 0.0]])).tolist()
        [0.5]
    """
    mass = check_number("mass", mass, "above 0 and up to 1", lambda m: 0 < m <= 1)
    shares = _shares(maps).sort(1, descending=True).values
    short = shares.cumsum(1) < mass - 1e-9  # sums of equal shares round
    return (short.sum(1) + 1).clamp(max=shares.shape[1]).double() / shares.shape[1]


def _shares(maps: Tensor) -> Float64[Tensor, "targets cells"]:
    if maps.ndim < 2 or 0 in maps.shape[1:]:
        raise ValueError(f"maps must be (targets, ...cells), got shape {tuple(maps.shape)}.")
    if bool(maps.isnan().any()):
        raise ValueError("maps must not hold NaN.")
    flat = maps.detach().cpu().double().flatten(1).clamp(min=0)
    total = flat.sum(1, keepdim=True)
    return torch.where(total > 0, flat / total.clamp(min=1e-300), 1 / flat.shape[1])


@dataclass(frozen=True, eq=False)
class HallucinationScores:
    """Scores of each target token; all on the CPU, float64 except the rank.

    Args:
        log_prob: (targets,): log p(y | image), the baseline to beat. Low: doubtful.
        decodability: (targets,): max over image cells of log p(y) by the logit lens. Low: no image
            region decodes to that word.
        rank: (targets,): rank of y in the vocabulary at the cell of that maximum, 1 the first.
        entropy: (targets,): :func:`map_entropy` of the token's map. High: no region stands out.
        area: (targets,): :func:`mass_area` of the token's map at 85 % of its mass.
        reliance: (targets,): log p(y | image) - log p(y | blank image). Low: predicted
            without visual evidence.
        tokens: position of each target in the answer.
    """

    log_prob: Float64[Tensor, " targets"]
    decodability: Float64[Tensor, " targets"]
    rank: Int64[Tensor, " targets"]
    entropy: Float64[Tensor, " targets"]
    area: Float64[Tensor, " targets"]
    reliance: Float64[Tensor, " targets"]
    tokens: tuple[int, ...]

    def of_words(self, words: Sequence[Sequence[int]]) -> "HallucinationScores":
        """The scores of words of several tokens.

        Probabilities follow the chain rule (``log_prob`` and ``reliance`` are sums); the rest is
        that of the word's most decodable token.

        Args:
            words: per word, positions of its tokens in the answer, all among ``tokens``.

        Returns:
            Scores with one row per word; ``tokens`` holds its most decodable token.

        Raises:
            ValueError: a word without tokens, or with tokens that have no scores.
        """
        at = {token: row for row, token in enumerate(self.tokens)}
        for word in words:
            if not len(word) or any(token not in at for token in word):
                raise ValueError(
                    f"words must hold positions among {list(self.tokens)}, got {list(word)}."
                )
        rows = [torch.tensor([at[token] for token in word]) for word in words]
        best = torch.tensor(
            [int(word[self.decodability[word].argmax()]) for word in rows], dtype=torch.int64
        )

        def sums(values: Tensor) -> Tensor:
            return torch.tensor([float(values[word].sum()) for word in rows], dtype=torch.float64)

        return HallucinationScores(
            log_prob=sums(self.log_prob),
            decodability=self.decodability[best],
            rank=self.rank[best],
            entropy=self.entropy[best],
            area=self.area[best],
            reliance=sums(self.reliance),
            tokens=tuple(self.tokens[int(row)] for row in best),
        )


def hallucination_scores(
    model: Any,
    inputs: Mapping[str, Any],
    target: Any,
    *,
    processor: Any,
    tokens: Sequence[int] | None = None,
    attribution: Any = None,
    baseline: Baseline = "black",
) -> HallucinationScores:
    r"""How well the image supports each token of an answer: two forwards for all tokens.

    Args:
        model: a transformers model of a registered family; left unchanged.
        inputs: the processor's mapping for one sample; several images count as one.
        target: the answer: token ids, or a string.
        processor: the model's processor; gives the value of black after normalisation.
        tokens: positions in the answer that are scored, default all; e.g. those of its nouns.
        attribution: maps for ``entropy`` and ``area``, as in
            :func:`captum_mllm.metrics.insertion_deletion`; default None: the logit lens.
        baseline: the blank image of ``reliance``: "black" (default), "mean" or "blur"; for an
            overview see :func:`captum_mllm.metrics.insertion_deletion`.

    Returns:
        :class:`HallucinationScores`; ``of_words`` makes them those of whole words.

    Raises:
        TypeError: a missing target, or arguments of another kind.
        ValueError: bad input; the message names the argument and how to fix it.

    Reference:
        Decodability: the maximum of the logit lens's probability over the image, as in Jiang et
        al., "Interpreting and editing vision-language representations to mitigate
        hallucinations", ICLR 2025. The others are ours.

    Example:
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> scores = hallucination_scores(model, inputs, "there is a dog", processor=processor)
        >>> scores.decodability.shape, bool((scores.decodability <= 0).all())
        (torch.Size([4]), True)
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {baseline!r}.")
    adapter, sample, answer = read_question(model, inputs, target, processor)
    chosen = chosen_tokens(tokens, len(answer))
    maps = None if attribution is None else read_maps(attribution, sample.grids, answer, chosen)
    blank = PerturbableImages(adapter, sample, baseline, black_pixel(processor))
    with evaluating(adapter):
        lens, decodability, rank, log_prob = _decoded(adapter, sample, answer, chosen)
        dark = blank.replaced(all_masks(sample, True))
        without = answer_log_probs(adapter, sample, answer, [dark], [chosen])[0].double().cpu()
    cells = lens if maps is None else _packed(maps, len(chosen))
    return HallucinationScores(
        log_prob=log_prob,
        decodability=decodability,
        rank=rank,
        entropy=map_entropy(cells),
        area=mass_area(cells),
        reliance=log_prob - without,
        tokens=tuple(chosen),
    )


def _packed(maps: Sequence[tuple[Tensor, ...]], n: int) -> Float[Tensor, "targets cells"]:
    """The cells of all images side by side, a row per target."""
    rows = [torch.cat([image.detach().cpu().double().flatten() for image in m]) for m in maps]
    return torch.stack(rows).expand(n, -1)


def _decoded(
    adapter: Adapter, sample: Sample, answer: Tensor, chosen: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of chosen tokens: lens maps (targets, cells), decodability, rank at its peak, log p."""
    full = append_answer(sample, answer, adapter)
    ids = answer[list(chosen)]
    rows = torch.tensor(chosen, device=ids.device) + len(sample.prompt_ids) - 1
    captured = captured_forward(adapter, full, sample.grids, rows=rows)
    logits = captured.logits.to(torch.promote_types(captured.logits.dtype, torch.float32))
    log_prob = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    hidden = captured.final_hidden
    weights = adapter.class_weights(ids)
    maps, states = [], []
    for where, grid in zip(sample.image_positions, sample.grids, strict=True):
        views, boxes = [], []
        for view in adapter.views(grid):
            state = hidden[where[view.tokens.flatten().to(where.device)]]
            views.append(lens_logits(state, *weights).clamp(min=0).unflatten(1, view.tokens.shape))
            boxes.append(view.box)
            states.append(state)
        maps.append(merge_views(views, boxes, grid.shape).flatten(1).cpu())
    cells = torch.cat(states)
    matrix, bias = adapter.class_weights(slice(None))
    there = cells.to(matrix.device)
    log_probs = lens_logits(cells, *weights) - log_normalizer(there, matrix, bias).to(cells.device)
    best, peak = log_probs.max(1)
    ranks = rank_of(there[peak.to(there.device)], ids.to(there.device), matrix, bias)
    return torch.cat(maps, 1), best.double().cpu(), ranks.cpu(), log_prob.double().cpu()
