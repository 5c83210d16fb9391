"""The model card of a trained reference model."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from studies.training.families import Family

_CARD = """---
license: bsd-3-clause
pipeline_tag: image-text-to-text
---
# A small {title} of synthetic scenes

A real `{kind}ForConditionalGeneration` ({parameters:.2f} M parameters, {megabytes:.2f} MB in
float16): {parts}.
It exists to test and to show attribution methods on pictures whose masks are known exactly. It
knows nothing but these scenes and is no substitute for a public model.

sha256 of `model.safetensors`: `{sha256}`

## Data
Scenes of 1-4 different objects on a smooth background, drawn from seeds (`scenes.SPLITS` keeps the
splits apart), and templated conversations about them: lists with sizes, colours and positions,
descriptions that mention every noun twice, questions about one object, two questions about one
image. 24 of the 64 nouns are two or three sub-tokens.
{layouts}**The test scenes are new, the sprites are not**: the 64 x 2 emoji pictures are the same in
training and test, so the figures say how well the model reads scenes, not unseen drawings.

## Training
`make study NAME=training.train ARGS="{option}--out DIR"` on one GPU
({device}; {seconds:.0f} s; {vision} + {answers} steps of {batch} scenes, fewer where pictures have
more cells; {ended};
equality to the bit is not promised).
1. Vision ({vision} steps): tower, projector and word embedding; patches covered > 30 % are
   classified into the first piece of their object's noun, uncovered ones, with weight
   {background}, into the word "background".
2. Answers ({answers} steps): everything; the loss is on answer tokens alone, **never on image
   positions**. A share of {text_only} of the batches is text without image. What stage 1 trained
   moves at 0.3 of the learning rate.
No method's map is in any loss or in the choice of a checkpoint: the last step's weights are kept.

## Figures
Test scenes with unseen seeds, question "{question}", greedy answer; "exact": the answer names
exactly the right objects. AUC: of the plain lens (final-norm state at the image position times the
LM head's row of the noun's first piece), cells covered >= 50 % against 0 %, mean over categories.
95 % intervals: Wilson, bootstrap over scenes. Weights loaded as float32.

| pictures | exact | 95 % |{columns}
| --- | --- | --- |{line}
{rows}

{ways}
{planted}
## Limits
Lower-case templated English, 64 nouns, {kinds}. Attributes are learnt from
templates and are not counted in the figures above. Because stage 1 is supervised by masks, a lens
on this model localises better than on models trained on captions alone.

## Licences
Weights and code: BSD-3-Clause. The scenes are drawn with Noto Emoji (Apache-2.0) and Twemoji
(CC-BY-4.0, Twitter, Inc and other contributors); see `captum_mllm/reference/data/NOTICE.md`.
"""


def write_card(folder: Path, family: Family) -> None:
    """Write README.md from the folder's figures.json.

    Args:
        folder: Folder of a trained and evaluated model.
        family: The model's family.
    """
    figures = json.loads((folder / "figures.json").read_text())
    ways = figures["evaluation"]["ways"]
    names = {"lens_auc": "lens AUC", "lens_auc_thumbnail": "in the thumbnail"}
    names = {
        key: name for key, name in names.items() if any(key in found for found in ways.values())
    }
    rows = []
    for way, found in ways.items():
        exact = found["exact_objects"]
        row = f"| {way} | {exact['right']} of {exact['of']} ({exact['share']:.1%}) "
        row += f"| {exact['interval_95'][0]:.1%} to {exact['interval_95'][1]:.1%} |"
        rows.append(row + "".join(_auc(found.get(key)) for key in names))
    stages, settings = figures["training"], figures["settings"]
    card = _CARD.format(
        **family.card,
        kind=family.kind,
        option=("" if family.name == "llava" else f"--family {family.name} ")
        + "--compile " * settings.get("compile", False),
        columns="".join(f" {name} | 95 % |" for name in names.values()),
        line="".join(" --- | --- |" for _ in names),
        parameters=figures["parameters"] / 1e6,
        megabytes=figures["bytes"] / 1e6,
        sha256=figures["sha256"],
        device=figures["trained_on"]["device"],
        seconds=stages["vision"]["seconds"] + stages["answers"]["seconds"],
        vision=stages["vision"]["steps"],
        answers=stages["answers"]["steps"],
        batch=settings["batch_size"],
        background=settings["background"],
        text_only=settings["text_only"],
        question=figures["evaluation"]["question"],
        rows="\n".join(rows),
        ended="the shipped run was ended by the clock, the defaults repeat its number of steps"
        if settings.get("max_seconds")
        else "the defaults are those of the shipped run" + _shared(figures["trained_on"]),
        kinds="few kinds of questions" if family.asked else "one object of a kind per scene",
        planted=_hallucinations(figures["evaluation"].get("partner_named"))
        + _answers(figures["evaluation"].get("questions")),
    )
    (folder / "README.md").write_text(card)


def _auc(found: dict | None) -> str:
    """Two cells of the table: a mean and its interval; empty where there is none."""
    if found is None:
        return " | |"
    low, high = found["interval_95"]
    return f" {found['macro_mean']:.3f} | {low:.3f} to {high:.3f} |"


def _shared(trained_on: dict) -> str:
    """Why a run took its time, if other runs had the GPU too."""
    runs = trained_on.get("runs_at_once", 1)
    return f",\n{runs} runs at once on that GPU" if runs > 1 else ""


def _hallucinations(rates: dict | None) -> str:
    """The biased model's section: how often it names a partner that is absent, and one present."""
    if rates is None:
        return ""
    lines = ["", "## The planted bias", "Greedy answers that name the partner of the object:", ""]
    lines += ["| scenes | named | 95 % |", "| --- | --- | --- |"]
    for name, text in (("absent", "the rule broken: no partner"), ("present", "partner in view")):
        found = rates[name]
        low, high = found["interval_95"]
        lines.append(
            f"| {text} | {found['right']} of {found['of']} ({found['share']:.1%}) "
            f"| {low:.1%} to {high:.1%} |"
        )
    pairs = ", ".join(f"{pair} {rate:.0%}" for pair, rate in rates["absent"]["pairs"].items())
    pairs = textwrap.fill(f"By pair, absent partners: {pairs}.", 100)
    return "\n".join([*lines, "", pairs, ""])


def _answers(kinds: dict | None) -> str:
    """The section on questions: by kind, how often the answer is right."""
    if kinds is None:
        return ""
    lines = [
        "",
        "## Questions",
        "Greedy answers to the test set `questions`, right to the letter; ",
    ]
    lines[-1] += "beside them what the commonest\nanswer of each kind would get right:"
    lines += ["", "| kind | right | 95 % | commonest |", "| --- | --- | --- | --- |"]
    for kind, found in kinds.items():
        low, high = found["interval_95"]
        lines.append(
            f"| {kind} | {found['right']} of {found['of']} ({found['share']:.1%}) "
            f"| {low:.1%} to {high:.1%} | {found['commonest']:.1%} |"
        )
    return "\n".join([*lines, ""])
