"""Do maps tell real from hallucinated objects? Scores of nouns that a biased model says itself.

Usage: ``make study NAME=hallucination ARGS="[--examples 400] [--validation 400]
[--first 0] [--processes 1] [--out DIR]"``; writes ``hallucination.json`` (every noun's values) and
``hallucination.md`` (the tables). Needs the extra ``metrics``.

The model was trained where some objects never come without a partner; every other scene of the set
*biased* breaks that rule. Its greedy answers to the default question name the absent partner, so
which of its nouns are hallucinated is known: those whose object is not in the scene.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from captum_mllm import MSEA, LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.data import CategoryTable, match_categories
from captum_mllm.functional import lens_logits
from captum_mllm.metrics import (
    HallucinationScores,
    hallucination_scores,
    log_normalizer,
    map_entropy,
    mass_area,
)
from captum_mllm.model.forward import captured_forward, evaluating
from captum_mllm.model.inputs import cut, read_sample, rescaled_inputs
from captum_mllm.model.rescaling import scaled_inputs
from captum_mllm.model.trace import TokenTrace
from captum_mllm.reference.models import load
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import make_example
from captum_mllm.reference.sprites import CATEGORIES
from captum_mllm.words import group_words
from studies.compare import Method, methods
from studies.hallucination_table import NOTE, SEED, table
from studies.processes import Columns, joined, measured
from studies.prompts import default_inputs
from studies.sets import weights_of
from studies.sets_table import rounded

MODEL, SET, SIDE, TOP_K = "biased", "biased", 112, 50
MAPS = {  # rows of `compare.methods` -> names here
    "LogitLens": "lens",
    "TAM": "TAM",
    "MSEA": "MSEA",
    "ARC": "ARC",
    "MSEA+ARC": "MSEA+ARC",
}
PAPER_SCALES = (1.0, 1.25, 1.5)
TABLE = CategoryTable.of(CATEGORIES)


def named_words(labels: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """The objects that an answer names, and the tokens that do so.

    Args:
        labels: labels of the answer's tokens.

    Returns:
        Pairs of category and tokens, one per mention, in order.
    """
    words = group_words(labels)
    kinds = match_categories([word.text for word in words], TABLE)
    found: list[tuple[str, tuple[int, ...]]] = []
    at = 0
    while at < len(words):
        kind = kinds[at]
        length = 1 if kind is None else len(kind.split())
        if kind is not None:
            found.append((kind, tuple(t for w in words[at : at + length] for t in w.tokens)))
        at += length
    return found


def decodability(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Any],
    ids: Tensor,
    scales: Sequence[float] = PAPER_SCALES,
) -> Float64[Tensor, "scales ids"]:
    """Max over the image's cells of the lens's log-probability, with the image at several scales.

    Args:
        model: a model whose images can be rescaled.
        processor: its processor.
        inputs: the prompt.
        ids: (ids,): what is decoded.
        scales: factors of the image's height and width, default the published ones.

    Returns:
        Nats, a row per scale: at scale 1 what :func:`captum_mllm.metrics.hallucination_scores`
        calls decodability.

    Raises:
        ValueError: a model that takes images of one size only.

    Reference:
        Decodability as there; the scales are MSEA's idea, their use here is ours.
    """
    adapter = find_adapter(model)
    if adapter.fixed_size:
        raise ValueError("model takes images of one size only: it has no other scales to decode.")
    sample = read_sample(inputs, adapter)
    tokens = cut(sample.kwargs, sample.prefix_length, adapter)
    matrix, bias = adapter.class_weights(slice(None))
    rows = []
    for scale in scales:
        grids = tuple(adapter.scaled_grid(grid, scale) for grid in sample.grids)
        with evaluating(adapter):
            pixels = scaled_inputs(adapter, processor, sample, grids, None)
            scaled = rescaled_inputs(tokens, sample, grids, pixels, adapter)
            captured = captured_forward(
                adapter, scaled.kwargs, scaled.grids, rows=scaled.prompt_ids[:0]
            )
            hidden = captured.final_hidden[torch.cat(list(scaled.image_positions))]
            logits = lens_logits(hidden, *adapter.class_weights(ids))
            best = (logits - log_normalizer(hidden, matrix, bias)).max(1).values
        rows.append(best.double().cpu())
    return torch.stack(rows)


def plain_scores(found: HallucinationScores) -> dict[str, Tensor]:
    """The scores of words, each turned so that higher means hallucinated.

    Args:
        found: of words, from ``HallucinationScores.of_words``.
    """
    return {
        "own probability": -found.log_prob,
        "decodability": -found.decodability,
        "rank": found.rank.double(),
        "entropy": found.entropy,
        "area": found.area,
        "reliance": -found.reliance,
    }


def map_scores(name: str, maps: Tensor) -> dict[str, Tensor]:
    """Scores of words' maps, each turned so that higher means hallucinated.

    Args:
        name: of the method.
        maps: (words, rows, cols), jointly normalised to [0, 1].

    Returns:
        Entropy, area, and the height of the peak: how far the image outshines the text.
    """
    return {
        f"entropy, {name}": map_entropy(maps),
        f"area, {name}": mass_area(maps),
        f"peak, {name}": -maps.flatten(1).amax(1).double(),
    }


def scale_scores(
    scaled: Float64[Tensor, "scales tokens"], words: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Decodability of words over scales, turned so that higher means hallucinated.

    Args:
        scaled: from :func:`decodability`, of the answer's tokens.
        words: tokens of each word, of which the most decodable counts, at each scale anew.
    """
    best = torch.stack([scaled[:, list(tokens)].amax(1) for tokens in words], 1)
    return {
        "decodability, max of scales": -best.amax(0),
        "decodability, mean of scales": -best.mean(0),
    }


def word_scores(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Any],
    traces: tuple[TokenTrace, TokenTrace],
    words: Sequence[Sequence[int]],
    rows: Sequence[Method],
) -> dict[str, list[float]]:
    """Every score of some words of an answer.

    Args:
        model: the model.
        processor: its processor.
        inputs: the prompt.
        traces: of the whole answer at one scale, and at MSEA's.
        words: tokens of each word, counted from the answer's first; at least one word.
        rows: methods whose maps are scored.

    Returns:
        Name -> a value per word, higher for hallucinated.
    """
    single, several = traces
    answer = single.text_ids[single.n_prompt :]
    tokens = sorted({token for word in words for token in word})
    base = hallucination_scores(model, inputs, answer, processor=processor, tokens=tokens)
    found = base.of_words(words)
    scores = plain_scores(found)
    scores |= scale_scores(decodability(model, processor, inputs, answer), words)
    for row in rows:
        maps = row.read(several if row.multi_scale else single).grid_attr[0]
        scores |= map_scores(MAPS[row.name], maps[list(found.tokens)])
    return {name: values.tolist() for name, values in scores.items()}


def measure(model_name: str, examples: int, first: int = 0, split: str = "test") -> Columns:
    """All nouns that a model says itself about consecutive scenes of the biased set.

    Args:
        model_name: of a shipped model; "biased" hallucinates.
        examples: number of scenes, at least 1.
        first: number of the first, default 0; even ones break the rule.
        split: "test" (default) or "validation".

    Returns:
        Columns with one value per noun: ``number`` (of the scene), ``word``, ``hallucinated``,
        ``partner`` (whether it is the partner of the scene's rule), ``scores`` by name.

    Example:
        >>> found = measure("biased", 1)
        >>> [word for word, made_up in zip(found["word"], found["hallucinated"]) if made_up]
        ['flower']
    """
    model, processor = load(model_name)
    lens, msea = LogitLens(model, processor), MSEA.paper(model, processor)
    rows = [row for row in methods(model) if row.name in MAPS]
    parts: list[Columns] = []
    for number in range(first, first + examples):
        example = make_example(SET, number, split)
        picture, _ = render_pil(example.scene, SIDE)
        inputs = default_inputs(processor, picture)
        single = lens.trace(inputs, top_k=TOP_K)
        answer = single.text_ids[single.n_prompt :]
        nouns = named_words(single.labels[single.n_prompt :])
        if not nouns or example.planted is None:
            continue
        several = msea.trace(inputs, answer, top_k=TOP_K)
        words = [tokens for _, tokens in nouns]
        scores = word_scores(model, processor, inputs, (single, several), words, rows)
        kinds = [kind for kind, _ in nouns]
        parts.append(
            {
                "number": [number] * len(kinds),
                "word": kinds,
                "hallucinated": [kind not in example.scene.categories for kind in kinds],
                "partner": [kind == example.planted[1] for kind in kinds],
                "scores": scores,
            }
        )
    return joined(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="Scores of real and hallucinated nouns.")
    parser.add_argument("--examples", type=int, default=400, help="test scenes, default 400")
    parser.add_argument("--validation", type=int, default=400, help="scenes for the thresholds")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene of each")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    counts = {"validation": args.validation, "test": args.examples}
    found = {
        split: rounded(measured(measure, MODEL, count, args.first, split, processes=args.processes))
        for split, count in counts.items()
    }
    sha = weights_of(MODEL)
    text = (
        f"`make study NAME=hallucination`: {args.examples} test scenes of the set "
        f"*biased* (from number {args.first}), thresholds from {args.validation} validation "
        f"scenes, {SIDE} px, the model's own greedy answers to the default question, shipped "
        f"LLaVA with a planted co-occurrence, weights {sha[:12]}; 95 % intervals by a bootstrap "
        f"over scenes (seed {SEED}, 2,000 resamples).\n\n{NOTE}\n\n{table(found)}\n"
    )
    record = {"weights_sha256": sha, "examples": counts, "first": args.first, "measured": found}
    (args.out / "hallucination.json").write_text(json.dumps(record) + "\n")
    (args.out / "hallucination.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
