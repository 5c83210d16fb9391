"""ARC where context matters, with cheaper measures of relevance in place of rank-biased overlap.

Usage: ``make study NAME=relevance ARGS="[--models NAME ...] [--sets NAME ...]
[--examples 200] [--first 0] [--split test] [--processes 1] [--out DIR]"``; writes
``relevance.json.xz`` (every example's values) and ``relevance.md`` (the tables), after each model
and set anew. Needs the extra ``metrics``.

The sets: *interference* (two questions, every noun repeated) and *twins* (two objects of one
kind). The script knows which context words are about the target's object (relevant) and which are
about another. Targets are the words about an object in the last answer, teacher-forced, but for
pronouns; of a word of several tokens the first.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_mllm import LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.functional import arc_subtract, context_weights, upsample
from captum_mllm.metrics import average_precision, energy_in_mask
from captum_mllm.model.forward import captured_forward, evaluating, full_logits
from captum_mllm.model.inputs import append_answer, read_sample
from captum_mllm.model.trace import TokenTrace
from captum_mllm.reference.captions import Word as ScriptWord
from captum_mllm.reference.models import MODELS, load
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import Example, make_example
from studies.compare import nan_to_none
from studies.detection import auroc
from studies.processes import Columns, joined, measured
from studies.prompts import answer_ids, conversation_inputs, script_columns
from studies.records import write_record
from studies.relevance_measures import MEASURES, relevances
from studies.relevance_table import ALPHAS, GROUPS, NOTE, SEED, mean_of, table
from studies.sets import weights_of
from studies.sets_table import rounded

SIDE, TOP_K, RBO_P = 112, 50, 0.9
SETS, FAMILIES = ("interference", "twins"), ("llava", "qwen2vl", "internvl")
Pair = tuple[ScriptWord, tuple[int, ...]]
Figures = dict[str, np.ndarray]  # one value per target


def predictions(model: nn.Module, inputs: Mapping[str, Any], trace: TokenTrace) -> list[Tensor]:
    """What predicts each text token of a trace: one more forward.

    Args:
        model: the model.
        inputs: the prompt of the trace.
        trace: of the whole answer.

    Returns:
        Final hidden states (tokens, dim) and logits (tokens, vocabulary) at the position before
        each text token.
    """
    adapter = find_adapter(model)
    sample = read_sample(inputs, adapter)
    full = append_answer(sample, trace.text_ids[trace.n_prompt :], adapter)
    rows = trace.text_positions - sample.padding - 1
    with evaluating(adapter):
        captured = captured_forward(adapter, full, sample.grids, rows=rows)
        hidden = captured.final_hidden[rows]
        return [hidden, full_logits(adapter, hidden)]


def image_figures(maps: Tensor, own: Tensor, others: Tensor, raw: Tensor) -> Figures:
    """How far cleaned maps lie on their object.

    Args:
        maps: (targets, rows, cols), cleaned.
        own: bool (targets, height, width), the target's object.
        others: the same of all that is another object's alone.
        raw: (targets, rows, cols), before the cleaning.

    Returns:
        ``ap`` (average precision on the object), ``own`` and ``others`` (share of the energy
        there), ``removed`` (share of the raw map that is gone); NaN for an empty mask or raw map.
    """
    pixels = upsample(maps, (own.shape[-2], own.shape[-1]))
    left, total = (cells.double().flatten(1).sum(1).numpy() for cells in (maps, raw))
    return {
        "ap": np.atleast_1d(average_precision(pixels, own)),
        "own": np.atleast_1d(energy_in_mask(pixels, own)),
        "others": np.atleast_1d(energy_in_mask(pixels, others)),
        "removed": np.divide(total - left, total, out=np.full_like(total, np.nan), where=total > 0),
    }


def text_figures(scores: Tensor, relevance: Tensor, about: Tensor, obj: int) -> dict[str, float]:
    """How far one target's text attribution, times the relevance, lies on relevant words.

    Args:
        scores: (context tokens,), raw, >= 0.
        relevance: (context tokens,), r.
        about: (context tokens,): object that each is about, -1 for none.
        obj: the target's object.

    Returns:
        ``share_named`` and ``share_all``: share on relevant words of what is left on words about
        any object, or on all words; 0 where nothing is left. ``auc_r`` and ``auc_kept``: how well
        r alone and the product rank words about the right object above words about others.
        ``keeps``: whether anything is left. All NaN unless the context has words about the
        target's object as well as about another, and a raw score > 0 on either.
    """
    named, hit = about >= 0, about == obj
    names = ("share_named", "share_all", "auc_r", "auc_kept", "keeps")
    if not hit.any() or not (named & ~hit).any() or not scores[named].sum() > 0:
        return dict.fromkeys(names, float("nan"))
    kept = scores.double() * relevance
    right, once = float(kept[hit].sum()), np.ones((1, int(named.sum())))

    def share(within: Tensor) -> float:
        total = float(kept[within].sum())
        return right / total if total > 0 else 0.0

    def ranked(values: Tensor) -> float:
        return float(auroc(values[named].numpy(), hit[named].numpy(), once)[0])

    return {
        "share_named": share(named),
        "share_all": share(torch.ones_like(named)),
        "auc_r": ranked(relevance),
        "auc_kept": ranked(kept),
        "keeps": float(kept.sum() > 0),
    }


def target_words(pairs: Sequence[Pair], n_prompt: int) -> list[Pair]:
    """Words of the answer about an object, pronouns left out.

    Args:
        pairs: from :func:`studies.prompts.script_columns`.
        n_prompt: number of text tokens before the answer.
    """
    return [
        (word, columns)
        for word, columns in pairs
        if word.obj >= 0 and columns[0] >= n_prompt and word.role != "pronoun"
    ]


def example_figures(
    trace: TokenTrace,
    hidden: Tensor,
    logits: Tensor,
    pairs: Sequence[Pair],
    masks: Tensor,
    seed: int,
) -> tuple[list[str], dict[str, Figures]]:
    """All figures of one example's targets under every measure.

    Args:
        trace: of its conversation, the whole last answer as target, with rankings.
        hidden: from :func:`predictions`.
        logits: from :func:`predictions`.
        pairs: its words and their columns.
        masks: bool (objects, height, width).
        seed: of the random control.

    Returns:
        The targets' roles; measure -> figure -> one value per target. Image figures come twice,
        those of the bounded alpha end in " bounded".
    """
    if trace.rankings is None:
        raise ValueError("trace has no rankings; make it with top_k=1 or more.")
    about = torch.full((len(trace.text_ids),), -1)
    for word, own in pairs:
        about[list(own)] = word.obj
    words = target_words(pairs, trace.n_prompt)
    columns = torch.tensor([own[0] for _, own in words])
    objects = torch.tensor([word.obj for word, _ in words])
    own_word = torch.stack([torch.isin(trace.text_ids, trace.text_ids[list(o)]) for _, o in words])
    found = relevances(
        columns, trace.rankings, hidden, logits, own_word, about == objects[:, None],
        rbo_p=RBO_P, seed=seed,
    )  # fmt: skip
    at = columns - int(trace.targets[0])
    cells, rows = trace.cells, trace.map_rows
    raw, context, scores = cells[rows[columns]], cells[rows], trace.text_scores[at]
    weights = context_weights(scores, trace.is_context[at])
    own_masks = masks[objects]
    others = masks.any(0) & ~own_masks
    figures: dict[str, Figures] = {}
    for name, r in found.items():
        values: Figures = {}
        for suffix, alpha_max in ALPHAS.items():
            cleaned = arc_subtract(raw, context, weights, r.to(raw), alpha_max=alpha_max)
            maps = (trace.unpack_cells(one)[0] for one in (cleaned, raw))
            image = image_figures(next(maps), own_masks, others, next(maps))
            values |= {key + suffix: value for key, value in image.items()}
        text = [
            text_figures(scores[n, :c], r[n, :c], about[:c], int(objects[n]))
            for n, c in enumerate(columns.tolist())
        ]
        values |= {key: np.array([row[key] for row in text]) for key in text[0]}
        figures[name] = values
    return [word.role for word, _ in words], figures


def as_columns(example: Example, roles: Sequence[str], figures: Mapping[str, Figures]) -> Columns:
    """One example's record: means over its nouns, and over all of its target words.

    Args:
        example: the example.
        roles: of its targets.
        figures: from :func:`example_figures`.

    Returns:
        ``number`` and, per group of words, ``words`` (how many) and measure -> figure -> [mean],
        NaN where no word has a value.
    """
    out: Columns = {"number": [example.number]}
    for group, wanted in GROUPS.items():
        chosen = np.array([wanted in (None, role) for role in roles])
        out[group] = {"words": [int(chosen.sum())]}
        for name, values in figures.items():
            out[group][name] = {key: [mean_of(v[chosen])] for key, v in values.items()}
    return out


def measure(
    model_name: str, examples: int, first: int = 0, split: str = "test", set_name: str = SETS[0]
) -> Columns:
    """One model on consecutive examples of one set.

    Args:
        model_name: of a shipped model.
        examples: number of examples, at least 1.
        first: number of the first, default 0.
        split: "test" (default) or "validation".
        set_name: "interference" (default) or "twins"; other sets work too.

    Returns:
        Columns with one value per example, see :func:`as_columns`.

    Example:
        >>> found = measure("llava", 1, set_name="twins")
        >>> found["number"], found["nouns"]["keep"]["removed"]
        ([0], [0.0])
    """
    model, processor = load(model_name)
    lens, parts = LogitLens(model, processor), []
    for number in range(first, first + examples):
        example = make_example(set_name, number, split)
        picture, masks = render_pil(example.scene, SIDE)
        inputs = conversation_inputs(processor, picture, example.talk)
        trace = lens.trace(inputs, answer_ids(processor, example.talk), top_k=TOP_K)
        hidden, logits = predictions(model, inputs, trace)
        pairs = script_columns(trace, example.talk)
        roles, figures = example_figures(trace, hidden, logits, pairs, masks, number)
        parts.append(as_columns(example, roles, figures))
    return joined(parts)


def write(out: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Write the record and the tables.

    Args:
        out: folder of the record.
        found: model -> set -> columns.
        settings: number of examples, of the first one, split.

    Returns:
        The tables with their heading.
    """
    found = rounded(nan_to_none(found))  # the record holds all that the tables show
    hashes = {name: weights_of(name) for name in found}
    about = "\n".join(f"- *{name}*: {text}" for name, text in MEASURES.items())
    text = (
        f"`make study NAME=relevance`: {settings['examples']} examples of each set's "
        f"{settings['split']} split (from number {settings['first']}), {SIDE} px, logit lens of "
        f"the reference answer (teacher-forced), top_k {TOP_K}, rbo_p {RBO_P}, strength 1. Means "
        f"over examples of the mean over each one's words; differences are paired, 95 % intervals "
        f"by a bootstrap over examples (seed {SEED}, 2,000 resamples). Small models of synthetic "
        "scenes; weights "
        + ", ".join(f"{name} {value[:12]}" for name, value in hashes.items())
        + f".\n\n{about}\n\n{NOTE}\n\n{table(found)}\n"
    )
    record = {"weights": hashes, **settings, "measured": found}
    write_record(out / "relevance.json.xz", record)
    (out / "relevance.md").write_text(text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="ARC with other measures of relevance.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(FAMILIES))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--examples", type=int, default=200, help="per set, default 200")
    parser.add_argument("--first", type=int, default=0, help="number of the first example")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"examples": args.examples, "first": args.first, "split": args.split}
    found: dict[str, dict[str, Columns]] = {}
    text = ""
    for name in args.models:
        for set_name in args.sets:
            found.setdefault(name, {})[set_name] = measured(
                measure, name, **settings, processes=args.processes, set_name=set_name
            )
            text = write(args.out, found, settings)
    print(text)


if __name__ == "__main__":
    main()
