"""What ARC changes where context interferes: two questions about one scene, nouns repeated.

The first answer names every object twice, the second question is about one of them. The script
knows which context words are about the target's object (relevant) and which about others.

Usage: ``python -m captum_mllm.studies.interference [--scenes 200] [--seed 0] [--out DIR]``; writes
``interference.json``, ``interference.md`` and ``interference.png`` (the case at the median).
Needs the extra ``metrics``.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captum_mllm import LogitLens
from captum_mllm.functional import (
    arc_subtract,
    context_weights,
    eci_subtract,
    rank_biased_overlap,
    upsample,
)
from captum_mllm.metrics import auc, average_precision, energy_in_mask, paired_bootstrap
from captum_mllm.reference.captions import converse, text_of
from captum_mllm.reference.models import load, model_path
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import make_scene
from captum_mllm.studies.prompts import conversation_inputs, script_columns
from captum_mllm.trace import TokenTrace

SIDE, TOP_K, RBO_P = 112, 50, 0.9
SECOND = ("where", "color", "size", "beside")


@dataclass
class Case:
    """One target word with what each method makes of it.

    Args:
        scene: number of the scene.
        second: kind of the second question.
        word: the target's text.
        role: its role in the script.
        labels: labels of the context tokens.
        relevant: 1 about the target's object, 0 about another object, -1 about none.
        maps: raw map, ECI's and ARC's, (3, side, side).
        scores: raw text attributions and ARC's, (2, context tokens).
        relevance: r of each context token.
        figures: measured values by name.
    """

    scene: int
    second: str
    word: str
    role: str
    labels: tuple[str, ...]
    relevant: Tensor
    maps: Tensor
    scores: Tensor
    relevance: Tensor
    figures: dict[str, float]


def measure_case(
    trace: TokenTrace, row: int, about: Tensor, obj: int, masks: Tensor, scene: int, second: str
) -> Case:
    """One target under the raw lens, ECI and ARC.

    Args:
        trace: the evidence, its targets the second answer.
        row: which target.
        about: (text tokens,): object that each token is about, -1 for none.
        obj: the target's object.
        masks: (objects, side, side).
        scene: number of the scene.
        second: kind of the second question.
    """
    column = int(trace.targets[row])
    cells, rows = trace.cells, trace.text_class
    raw, context = cells[rows[column]][None], cells[rows]
    scores = trace.text_scores[row : row + 1]
    weights = context_weights(scores, trace.is_context[row : row + 1])
    rankings = trace.rankings if trace.rankings is not None else rows[:, None]
    relevance = rank_biased_overlap(rankings[column][None], rankings, RBO_P).to(cells)
    maps = torch.cat(
        [
            raw,
            eci_subtract(raw, context, weights),
            arc_subtract(raw, context, weights, relevance),
        ]
    )
    pixels = upsample(trace.unpack_cells(maps)[0], (SIDE, SIDE))
    before = scores[0, :column]
    text = torch.stack([before, before * relevance[0, :column]])
    earlier = about[:column]
    relevant = torch.where(earlier < 0, -1, (earlier == obj).long())
    figures = _image_figures(pixels, masks, obj) | _text_figures(text, relevance[0], relevant)
    return Case(
        scene,
        second,
        trace.labels[column],
        "",
        trace.labels[:column],
        relevant,
        pixels,
        text,
        relevance[0, :column],
        figures,
    )


def _image_figures(pixels: Tensor, masks: Tensor, obj: int) -> dict[str, float]:
    own = masks[obj]
    others = torch.cat([masks[:obj], masks[obj + 1 :]]).any(0) & ~own
    figures = {}
    for name, image in zip(("lens", "eci", "arc"), pixels, strict=True):
        figures[f"ap_{name}"] = float(average_precision(image, own))
        figures[f"own_{name}"] = float(energy_in_mask(image, own))
        figures[f"others_{name}"] = float(energy_in_mask(image, others))
    total = float(pixels[0].sum())
    for name, image in (("eci", pixels[1]), ("arc", pixels[2])):
        figures[f"removed_{name}"] = 1 - float(image.sum()) / total if total else float("nan")
    return figures


def _text_figures(text: Tensor, relevance: Tensor, relevant: Tensor) -> dict[str, float]:
    """Share of the text attribution that lies on the relevant words."""
    named = relevant >= 0
    hit = relevant == 1
    figures = {}
    for name, scores in zip(("lens", "arc"), text, strict=True):
        for scope, within in (("named", named), ("all", torch.ones_like(named))):
            total = float(scores[within].sum())
            share = float(scores[hit].sum()) / total if total else float("nan")
            figures[f"text_{scope}_{name}"] = share
    both = hit.any() and (relevant == 0).any()
    r = relevance[: len(relevant)]
    figures["auc_relevance"] = (
        float(auc(r[named][None], hit[named][None])) if both else float("nan")
    )
    figures["auc_score"] = (
        float(auc(text[0][named][None], hit[named][None])) if both else float("nan")
    )
    return figures


def collect(scenes: int, show_progress: bool = True) -> list[Case]:
    """All target words about an object in the second answers.

    Args:
        scenes: number of scenes of the test split with at least two objects.
        show_progress: progress bar, default True.
    """
    model, processor = load()
    lens = LogitLens(model, processor)
    cases: list[Case] = []
    number, done = 0, 0
    bar = tqdm(total=scenes, desc="conversations", disable=not show_progress)
    while done < scenes:
        scene = make_scene(number)
        number += 1
        if len(scene.objects) < 2:
            continue
        second = SECOND[done % len(SECOND)]
        talk = converse(scene, "describe", seed=number, second=second)
        picture, masks = render_pil(scene, SIDE)
        inputs = conversation_inputs(processor, picture, talk)
        trace = lens.trace(inputs, text_of(talk.turns[-1].answer), top_k=TOP_K)
        cases += _cases_of(trace, talk, masks, number - 1, second)
        done += 1
        bar.update()
    bar.close()
    return cases


def _cases_of(trace: TokenTrace, talk: Any, masks: Tensor, number: int, second: str) -> list[Case]:
    pairs = script_columns(trace, talk)
    about = torch.full((len(trace.text_ids),), -1)
    for word, columns in pairs:
        about[list(columns)] = word.obj
    cases = []
    first_target = int(trace.targets[0])
    for word, columns in pairs:
        if word.obj < 0 or columns[0] < first_target or word.role == "pronoun":
            continue
        row = columns[0] - first_target
        case = measure_case(trace, row, about, word.obj, masks, number, second)
        case.role = word.role
        cases.append(case)
    return cases


COMPARED = (
    ("image: average precision on the object", "ap_lens", "ap_arc"),
    ("image: energy inside the object", "own_lens", "own_arc"),
    ("image: energy on the other objects", "others_lens", "others_arc"),
    ("image: average precision, ECI instead of ARC", "ap_lens", "ap_eci"),
    ("text: share on relevant words, of words about objects", "text_named_lens", "text_named_arc"),
    ("text: share on relevant words, of all text", "text_all_lens", "text_all_arc"),
)
SINGLE = (
    ("image: share of the raw map that ARC removes", "removed_arc"),
    ("image: share of the raw map that ECI removes", "removed_eci"),
    ("text: AUC of the relevance r, relevant against irrelevant words", "auc_relevance"),
    ("text: AUC of the raw score, likewise", "auc_score"),
)


def table(cases: Sequence[Case], seed: int) -> str:
    """Markdown: medians with quartiles, and the mean change with its interval over scenes.

    Args:
        cases: from :func:`collect`.
        seed: seed of the bootstrap.
    """

    def column(name: str) -> np.ndarray:
        return np.array([case.figures[name] for case in cases])

    def spread(values: np.ndarray) -> str:
        low, mid, high = np.nanpercentile(values, [25, 50, 75])
        return f"{mid:.3f} ({low:.3f}, {high:.3f})"

    lines = [
        "| quantity | raw | cleaned | change | mean change [95 %] |",
        "| --- | --- | --- | --- | --- |",
    ]
    groups = _by_scene(cases)
    for title, raw, cleaned in COMPARED:
        before, after = column(raw), column(cleaned)
        mean, low, high = paired_bootstrap(groups(after), groups(before), seed=seed)
        lines.append(
            f"| {title} | {spread(before)} | {spread(after)} | {spread(after - before)} | "
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] |"
        )
    lines += ["", "| quantity | median (quartiles) |", "| --- | --- |"]
    lines += [f"| {title} | {spread(column(name))} |" for title, name in SINGLE]
    return "\n".join(lines)


def _by_scene(cases: Sequence[Case]) -> Callable[[np.ndarray], np.ndarray]:
    """Values as (scenes, values), padded with NaN: words of one scene are resampled together."""
    scenes = sorted({case.scene for case in cases})
    places: list[tuple[int, int]] = []
    counts = dict.fromkeys(scenes, 0)
    for case in cases:
        places.append((scenes.index(case.scene), counts[case.scene]))
        counts[case.scene] += 1
    shape = (len(scenes), max(counts.values()))

    def group(values: np.ndarray) -> np.ndarray:
        grid = np.full(shape, np.nan)
        for (row, column), value in zip(places, values, strict=True):
            grid[row, column] = value
        return grid

    return group


def median_case(cases: Sequence[Case]) -> Case:
    """The noun whose average precision ARC changes by the median amount."""
    nouns = [case for case in cases if case.role == "noun"]
    change = [case.figures["ap_arc"] - case.figures["ap_lens"] for case in nouns]
    return nouns[int(np.argsort(change)[len(change) // 2])]


def draw(case: Case, path: Path) -> None:
    """Picture of one case: scene, raw map, ARC's map, text attributions before and after.

    Args:
        case: the case.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    picture, _ = render_pil(make_scene(case.scene), SIDE)
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    top = figure.add_gridspec(2, 4, height_ratios=(1, 1.1))
    titles = ("scene", "raw lens map", "ECI", "ARC")
    for column, title in enumerate(titles):
        axes = figure.add_subplot(top[0, column])
        axes.imshow(picture)
        if column:
            image = case.maps[column - 1]
            axes.imshow(image, cmap="inferno", alpha=0.65, vmin=0, vmax=float(case.maps.max()))
        axes.set_title(title)
        axes.set_axis_off()
    axes = figure.add_subplot(top[1, :])
    shown = case.scores[0].topk(min(24, len(case.labels))).indices.sort().values.tolist()
    places = np.arange(len(shown))
    colours = {1: "tab:green", 0: "tab:red", -1: "tab:gray"}
    for offset, scores, alpha in ((-0.2, case.scores[0], 0.35), (0.2, case.scores[1], 1.0)):
        heights = [float(scores[n]) for n in shown]
        tints = [colours[int(case.relevant[n])] for n in shown]
        axes.bar(places + offset, heights, 0.4, color=tints, alpha=alpha)
    axes.set_xticks(places, [case.labels[n].strip() for n in shown], rotation=45, ha="right")
    axes.set_ylabel("attribution, logits")
    axes.set_title(
        f"words that led to '{case.word.strip()}' (question: {case.second}): raw (pale), times "
        f"relevance (full)\ngreen: about its object, red: about another, grey: neither"
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What ARC changes under interference.")
    parser.add_argument("--scenes", type=int, default=200, help="conversations, default 200")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cases = collect(args.scenes)
    sha = json.loads((model_path() / "figures.json").read_text())["sha256"]
    case = median_case(cases)
    text = (
        f"{args.scenes} two-question conversations of the test split, {len(cases)} target words "
        f"about an object, shipped LLaVA, weights {sha[:12]}; medians (quartiles) over words, "
        f"intervals by a bootstrap over scenes (seed {args.seed}). top_k {TOP_K}, rbo_p {RBO_P}, "
        f"strength 1.\n\n{table(cases, args.seed)}\n"
    )
    rows = [
        {"scene": c.scene, "second": c.second, "word": c.word, "role": c.role, **c.figures}
        for c in cases
    ]
    data = json.dumps({"weights_sha256": sha, "cases": rows}).replace("NaN", "null")
    (args.out / "interference.json").write_text(data + "\n")
    (args.out / "interference.md").write_text(text)
    draw(case, args.out / "interference.png")
    print(text)


if __name__ == "__main__":
    main()
