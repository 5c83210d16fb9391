"""How much room the test sets leave: the base logit lens on every set, beside its upper bound.

Usage: ``make study NAME=sets ARGS="[--models NAME ...] [--sets NAME ...] [--out DIR]"``;
writes ``sets.json.xz`` (every example's values) and ``sets.md`` (the table), after each model and
set anew; what ``sets.json.xz`` holds already, of the same weights and examples, is kept. Needs the
extra ``metrics``; the set "openmoji" needs its style (``captum_mllm.reference.openmoji``).

Maps are those of the reference answer, teacher-forced: its words' objects are known, whatever the
model would say itself. How far the model reads a set stands beside them.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from captum_mllm import LogitLens
from captum_mllm.functional import context_weights, eci_subtract, joint_min_max, upsample
from captum_mllm.metrics import average_precision, func_iou, is_function_word, obj_iou
from captum_mllm.model.trace import TokenTrace
from captum_mllm.reference.captions import named_objects
from captum_mllm.reference.models import MODELS, load, model_path
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.sets import SETS, Example, make_example
from studies.prompts import answer_ids, conversation_inputs, script_columns, whole_nouns
from studies.records import read_record, write_record
from studies.sets_table import NOTE, SEED, Row, hallucinations, rounded, table
from studies.training.evaluate_model import answers
from studies.training.models import family_of, sha256

SIDE = 112
NAMED = tuple(name for name in SETS if name != "questions")  # answers that name objects


def upper_bound(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The mask itself at the grid's resolution: the share of every cell that the object covers.

    What it scores is how far a map of that grid can be right. It is no strict limit: cells fitted
    to one metric could score a little more.

    Args:
        masks: bool (objects, height, width).
        grid: rows and columns of image tokens.

    Returns:
        (objects, rows, cols) in [0, 1].
    """
    return F.interpolate(masks[None].float(), grid, mode="area")[0]


def measure(trace: TokenTrace, example: Example, masks: torch.Tensor) -> Row:
    """One example's values for its base lens maps.

    Args:
        trace: of the example's conversation, its last answer as target, with rankings.
        example: the example.
        masks: bool (objects, height, width).

    Returns:
        Lists with one value per noun that names a visible object (``obj_iou``,
        ``average_precision`` and, likewise of the upper bound, ``bound_iou`` and ``bound_ap``;
        ``read``: whether the model predicts the noun itself; ``removed``: share of the map that
        estimated causal inference takes off as the context's), or per function word
        (``func_iou``).
    """
    raw = trace.cells[trace.map_rows[trace.targets]]
    unit, _ = joint_min_max(raw, trace.text_scores, trace.is_earlier)
    maps = trace.unpack_cells(unit)[0]
    start = trace.n_prompt
    words = [
        (word, [column - start for column in columns])
        for word, columns in script_columns(trace, example.talk)
        if columns[0] >= start
    ]
    nouns = [(word.obj, tokens) for word, tokens in whole_nouns(words)]
    functions = [tokens for word, tokens in words if is_function_word(word.text)]
    size = (masks.shape[-2], masks.shape[-1])
    bound = upsample(upper_bound(masks, (maps.shape[-2], maps.shape[-1])), size)
    pixels = upsample(maps, size)
    if trace.rankings is None:
        raise ValueError("trace has no rankings; make it with top_k=1 or more.")
    predicted = trace.rankings[start:, 0] == trace.text_ids[start:]
    removed = context_share(trace)
    row: Row = {name: [] for name in ("obj_iou", "average_precision", "read", "removed")}
    row |= {name: [] for name in ("bound_iou", "bound_ap", "func_iou")}
    for obj, tokens in nouns:
        if obj < 0 or not masks[obj].any():
            continue
        truth = masks[obj].expand(len(tokens), -1, -1)
        row["obj_iou"].append(float(np.max(obj_iou(pixels[tokens], truth))))
        row["average_precision"].append(float(np.max(average_precision(pixels[tokens], truth))))
        row["bound_iou"].append(float(obj_iou(bound[obj], masks[obj])))
        row["bound_ap"].append(float(average_precision(bound[obj], masks[obj])))
        row["read"].append(float(predicted[tokens[0]]))
        row["removed"].append(float(removed[tokens[0]]))
    if nouns and functions:
        row["func_iou"] = func_iou(maps, [tokens for _, tokens in nouns], functions, size).tolist()
    return row


def context_share(trace: TokenTrace) -> torch.Tensor:
    """Share of each target's raw map that estimated causal inference ascribes to its context.

    Args:
        trace: of one sample.

    Returns:
        (targets,) in [0, 1]; 0 for a map that is 0.
    """
    raw, own = trace.cells, trace.map_rows
    maps = raw[own[trace.targets]]
    weights = context_weights(trace.text_scores, trace.is_context)
    left = eci_subtract(maps, raw[own], weights).sum(1)
    total = maps.sum(1)
    return torch.where(total > 0, 1 - left / total.clamp(min=1e-12), 0.0)


def evaluate(name: str, set_name: str, examples: int, split: str = "test") -> dict[str, Any]:
    """One model on one set.

    Args:
        name: of a shipped model.
        set_name: one of `NAMED`.
        examples: number of examples, from 0 on.
        split: "test" or "validation".

    Returns:
        ``{"exact": [bool per example], "rows": [values per example, see measure]}``.
    """
    model, processor = load(name)
    lens = LogitLens(model, processor)
    chosen = [make_example(set_name, number, split) for number in range(examples)]
    family, scenes = family_of(name), [example.scene for example in chosen]
    texts = answers(family, model, processor, scenes, family.ways["native"])
    named = [named_objects(text) for text in texts]
    exact = [
        sorted(found) == sorted(example.scene.categories)
        for found, example in zip(named, chosen, strict=True)
    ]
    rows = []
    for example in tqdm(chosen, desc=f"{name}, {set_name}"):
        picture, masks = render_pil(example.scene, SIDE)
        inputs = conversation_inputs(processor, picture, example.talk)
        trace = lens.trace(inputs, answer_ids(processor, example.talk), top_k=1)
        rows.append(measure(trace, example, masks))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"exact": exact, "named": named, "rows": rows, **versions}


def known(out: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an earlier run has measured of the same weights, examples and split.

    Args:
        out: folder of the record.
        settings: number of examples, split, side.
    """
    path = out / "sets.json.xz"
    if not path.exists():
        return {}
    record = read_record(path)
    if any(record.get(name) != value for name, value in settings.items()):
        return {}
    return {
        name: sets
        for name, sets in record["measured"].items()
        if record["weights"][name] == weights_of(name)
    }


def weights_of(name: str) -> str:
    """Hash of a shipped model's weights."""
    return sha256(model_path(name) / "model.safetensors")


def write(out: Path, measured: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Write the record and the table.

    Args:
        out: folder of the record.
        measured: model -> set -> what :func:`evaluate` returns.
        settings: number of examples, split, side.

    Returns:
        The table with its heading.
    """
    measured = {
        name: {one: rounded(sets[one]) for one in SETS if one in sets}
        for name, sets in measured.items()
    }
    hashes = {name: weights_of(name) for name in measured}
    done = {set_name for sets in measured.values() for set_name in sets}
    about = "\n".join(f"- *{name}*: {SETS[name].about}" for name in SETS if name in done)
    text = (
        f"`make study NAME=sets` on {settings['examples']} examples of each set's "
        f"{settings['split']} split, {SIDE} px, base logit lens of the reference answer "
        "(teacher-forced), 95 % intervals by a bootstrap over examples (seed "
        f"{SEED}, 2,000 resamples). Small models of synthetic scenes; weights "
        + ", ".join(f"{name} {value[:12]}" for name, value in hashes.items())
        + f".\n\n{about}\n\n{table(measured)}\n\n"
        f"{NOTE}\n\n"
        "Hallucinations on the biased set: greedy answers that name the partner.\n\n"
        f"{hallucinations(measured, settings['split'])}\n"
    )
    record = {"weights": hashes, **settings, "measured": measured}
    write_record(out / "sets.json.xz", record)
    (out / "sets.md").write_text(text)
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="The base logit lens on every test set.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sets", nargs="+", choices=NAMED, default=NAMED)
    parser.add_argument("--examples", type=int, default=200, help="per set")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"examples": args.examples, "split": args.split, "side": SIDE}
    measured = known(args.out, settings)
    for name in args.models:
        for set_name in args.sets:
            if set_name not in measured.setdefault(name, {}):
                found = evaluate(name, set_name, args.examples, args.split)
                measured[name][set_name] = found
                write(args.out, measured, settings)
    print(write(args.out, measured, settings))


if __name__ == "__main__":
    main()
