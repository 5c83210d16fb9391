"""Figures of a reference model: `make study NAME=training.evaluate_model ARGS="[--family NAME]"`.

On test scenes, whose seeds training never draws: how often the greedy answer to "what is in the
picture?" names exactly the right objects, and how well the plain lens (final-norm state at an
image position times the LM head's row of the noun's first piece) tells the object's cells.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText

from captum_mllm.reference.captions import DEFAULT_QUESTION, named_objects, text_of
from captum_mllm.reference.models import MODELS, model_path
from captum_mllm.reference.planted import PARTNERS, draw_broken, draw_kept
from captum_mllm.reference.questions import QUESTIONS
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import Scene, SceneBatch, seeds_of
from captum_mllm.reference.sets import make_example
from captum_mllm.reference.sprites import CATEGORIES
from studies.training.data import first_piece_ids
from studies.training.families import Family, Way
from studies.training.layouts import blur_thumbnails, layout_coverage
from studies.training.models import family_of, sha256

BATCH = 50
INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


def prompt_inputs(
    family: Family, processor, scenes: Sequence[Scene], question: str | Sequence[str], way: Way
) -> dict[str, Tensor]:
    """Model inputs for one question about each scene; to be called within `family.reading`.

    Args:
        family: The model's family.
        processor: The model's processor.
        scenes: The scenes.
        question: Request of all, or of each.
        way: How the pictures reach the model.
    """
    asked = [question] * len(scenes) if isinstance(question, str) else question
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in asked
    ]
    made = processor(
        text=processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True),
        padding=True,
        images=[render_pil(scene, way.picture)[0] for scene in scenes],
        return_tensors="pt",
        **family.call_settings(way),
    )
    inputs = {name: made[name] for name in INPUTS if name in made}
    if way.layout.thumbnail:
        tiles = inputs["pixel_values"].unflatten(0, (len(scenes), -1))
        inputs["pixel_values"] = blur_thumbnails(tiles, way.layout).flatten(0, 1)
    return inputs


@torch.inference_mode()
def lens(model, inputs: dict[str, Tensor]) -> Tensor:
    """The plain lens of every category's first piece: float (batch, categories, image tokens)."""
    states = model.model(**inputs, use_cache=False).last_hidden_state
    image = inputs["input_ids"] == model.config.image_token_id
    states = states[image].view(len(image), -1, states.shape[-1]).float()
    rows = model.get_output_embeddings().weight[first_piece_ids().to(states.device)].float()
    return (states @ rows.T).mT


def auc(scores: Tensor, positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive's score is above a negative's (a tie counts half)."""
    difference = scores[positive][:, None] - scores[negative]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


def lens_aucs(maps: Tensor, scenes: SceneBatch, coverage: Tensor) -> list[tuple[int, int, float]]:
    """Per object: (scene, category, AUC of its cells covered >= 50 % against those at 0 %).

    Args:
        maps: (batch, categories, cells).
        scenes: The scenes.
        coverage: (batch, 4, cells), share of every cell that every object covers.
    """
    coverage = coverage.to(maps.device)
    out = []
    for i in range(len(scenes)):
        for place in range(int(scenes.count[i])):
            category = int(scenes.category[i, place])
            positive, negative = coverage[i, place] >= 0.5, coverage[i, place] == 0
            if positive.any() and negative.any():
                out.append((i, category, auc(maps[i, category], positive, negative)))
    return out


def macro_mean(found: list[tuple[int, int, float]], resamples: int = 1000) -> dict:
    """Mean over categories of the mean AUC, with a 95 % bootstrap interval over scenes."""
    scene, category, value = (torch.tensor(column) for column in zip(*found, strict=True))
    value = value.double()

    def mean(weight: Tensor) -> float:
        total = torch.zeros(len(CATEGORIES), dtype=torch.float64)
        count = total.clone().index_add(0, category, weight)
        total = total.index_add(0, category, weight * value)
        return (total[count > 0] / count[count > 0]).mean().item()

    generator = torch.Generator().manual_seed(0)
    scenes = int(scene.max()) + 1
    draws = []
    for _ in range(resamples):
        drawn = torch.randint(scenes, (scenes,), generator=generator)
        draws.append(mean(drawn.bincount(minlength=scenes)[scene].double()))
    low, high = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {
        "macro_mean": round(mean(torch.ones_like(value)), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "objects": len(found),
        "worst_category": _worst(category, value),
    }


def _worst(category: Tensor, value: Tensor) -> list:
    means = {int(c): value[category == c].mean().item() for c in category.unique()}
    worst = min(means, key=means.__getitem__)
    return [CATEGORIES[worst], round(means[worst], 4)]


def share(hits: int, total: int) -> dict:
    """A share with its 95 % Wilson interval."""
    z, p = 1.96, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    interval = [round(middle - half, 4), round(middle + half, 4)]
    return {"share": round(p, 4), "interval_95": interval, "right": hits, "of": total}


def _generate(model, processor, inputs: dict[str, Tensor], tokens: int = 72) -> list[str]:
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def answers(
    family: Family, model, processor, scenes: Sequence[Scene], way: Way, size: int = BATCH
) -> list[str]:
    """Greedy answers to the default question.

    Args:
        family: The model's family.
        model: The model.
        processor: Its processor.
        scenes: The scenes.
        way: How the pictures reach the model.
        size: Scenes at a time.
    """
    out: list[str] = []
    for start in range(0, len(scenes), size):
        with family.reading(model, processor, way.layout):
            part = scenes[start : start + size]
            inputs = prompt_inputs(family, processor, part, DEFAULT_QUESTION, way)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            out += _generate(model, processor, inputs, 120)
    return out


def partner_named(texts: Sequence[str], scenes: Sequence[Scene]) -> dict:
    """How often answers name the partner of the object with a partner (`planted.PARTNERS`).

    Args:
        texts: The answers.
        scenes: The scenes, each with one such object.
    """
    pairs = [next((c, PARTNERS[c]) for c in scene.categories if c in PARTNERS) for scene in scenes]
    named = [
        partner in named_objects(text) for (_, partner), text in zip(pairs, texts, strict=True)
    ]
    each = {
        f"{c}: {PARTNERS[c]}": [hit for (own, _), hit in zip(pairs, named, strict=True) if own == c]
        for c in PARTNERS
    }
    rates = {name: round(sum(hits) / len(hits), 3) for name, hits in each.items() if hits}
    return {**share(sum(named), len(named)), "pairs": rates}


def _planted(family: Family, model, processor, scenes: int, split: str, size: int) -> dict:
    """The rates at which a biased model names partners that are absent, and that are there."""
    way, seeds = family.ways["native"], seeds_of(split, torch.arange(scenes))
    out = {}
    for name, draw in (("absent", draw_broken), ("present", draw_kept)):
        drawn = draw(seeds).scenes()
        out[name] = partner_named(answers(family, model, processor, drawn, way, size), drawn)
    return out


@torch.inference_mode()
def _questions(family: Family, model, processor, count: int, split: str, size: int) -> dict:
    """Share of right answers in the set "questions", by kind, and that of the commonest answer."""
    way = family.ways["native"]
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in QUESTIONS}
    for start in range(0, count, size):
        part = [make_example("questions", n, split) for n in range(start, min(start + size, count))]
        scenes, turns = [one.scene for one in part], [one.talk.turns[-1] for one in part]
        with family.reading(model, processor, way.layout):
            asked = [text_of(turn.question) for turn in turns]
            inputs = prompt_inputs(family, processor, scenes, asked, way)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            texts = _generate(model, processor, inputs, 6)
        for example, turn, text in zip(part, turns, texts, strict=True):
            kind = list(QUESTIONS)[example.number % len(QUESTIONS)]
            found[kind].append((text_of(turn.answer), text.strip()))
    found["all"] = [pair for pairs in found.values() for pair in pairs]
    return {kind: _right(pairs) for kind, pairs in found.items() if pairs}


def _right(pairs: list[tuple[str, str]]) -> dict:
    commonest = Counter(true for true, _ in pairs).most_common(1)[0][1]
    right = sum(true == said for true, said in pairs)
    return {**share(right, len(pairs)), "commonest": round(commonest / len(pairs), 4)}


def _one_way(family: Family, model, processor, batch: SceneBatch, way: Way, size: int) -> dict:
    scenes, device, layout = batch.scenes(), model.device, way.layout
    exact, nouns, wanted = 0, 0, 0
    cells = layout.cells(family.cell)
    own = cells // layout.tiles  # of a tile; the last tile is the thumbnail, if there is one
    ends = {"lens_auc": slice(0, cells if layout.tiles == 1 else cells - own)}
    if layout.tiles > 1:
        ends["lens_auc_thumbnail"] = slice(cells - own, cells)
    found: dict[str, list] = {name: [] for name in ends}
    for start in range(0, len(scenes), size):
        part = scenes[start : start + size]
        with torch.inference_mode(), family.reading(model, processor, layout):
            inputs = prompt_inputs(family, processor, part, DEFAULT_QUESTION, way)
            inputs = {name: value.to(device) for name, value in inputs.items()}
            maps = lens(model, inputs)
            texts = _generate(model, processor, inputs)
        for scene, answer in zip(part, texts, strict=True):
            named = named_objects(answer)
            exact += sorted(named) == sorted(scene.categories)
            nouns += len(set(named) & set(scene.categories))
            wanted += len(scene.objects)
        drawn = SceneBatch.of(part)
        coverage = layout_coverage(drawn, layout, family.cell)
        for name, end in ends.items():
            aucs = lens_aucs(maps[..., end], drawn, coverage[..., end])
            found[name] += [(i + start, category, value) for i, category, value in aucs]
    return {
        "exact_objects": share(exact, len(scenes)),
        "nouns_found": round(nouns / wanted, 4),
        **{name: macro_mean(values) for name, values in found.items()},
    }


def evaluate(
    path: Path,
    scenes: int = 1000,
    device: str = "cpu",
    ways: Sequence[str] | None = None,
    split: str = "test",
    name: str = "llava",
    batch_size: int = BATCH,
) -> dict:
    """Evaluate saved weights, loaded as float32.

    Args:
        path: Folder of the model.
        scenes: How many scenes, from number 0 of the split on.
        device: Where to run.
        ways: How the pictures reach the model, of the family's `ways`; None: all.
        split: "test", or "validation" to choose between runs.
        name: Of the model's family, one of `models.MODELS`.
        batch_size: Scenes at a time.

    Returns:
        Figures per way, the hash of the weights that they belong to, and versions.
    """
    start = time.monotonic()
    family = family_of(name)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False
    )
    model = model.eval().to(torch.device(device))
    processor = family.load_processor(path)
    batch = family.draw_tested(seeds_of(split, torch.arange(scenes)))
    figures = {}
    for way in family.ways if ways is None else ways:
        figures[way] = _one_way(family, model, processor, batch, family.ways[way], batch_size)
    more = {}
    if family.planted:
        more["partner_named"] = _planted(family, model, processor, scenes, split, batch_size)
    if family.asked:
        more["questions"] = _questions(family, model, processor, scenes, split, batch_size)
    return {
        "split": split,
        "question": DEFAULT_QUESTION,
        "sha256": sha256(Path(path) / "model.safetensors"),
        "ways": figures,
        **more,
        "seconds": round(time.monotonic() - start, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name()
        if model.device.type == "cuda"
        else platform.machine(),
    }


def main(argv: list[str] | None = None) -> None:
    """Evaluate, print, and write the figures into the model's figures.json."""
    parser = argparse.ArgumentParser(description="Figures of a reference model.")
    parser.add_argument("--family", choices=list(MODELS), default="llava")
    parser.add_argument("--model", type=Path, help="folder; default: the shipped model's")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", help="default: all of the family's")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--out", type=Path, help="file to write; default: print only")
    args = parser.parse_args(argv)
    figures = evaluate(
        args.model or model_path(args.family),
        args.scenes,
        args.device,
        args.ways,
        args.split,
        args.family,
        args.batch_size,
    )
    text = json.dumps(figures, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
