"""Lines that a map which knows nothing must fail: randomised layers, insertion and deletion."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_mllm.checking.report import Finding
from captum_mllm.checking.subject import NotTriedError, Subject
from captum_mllm.functional import rank_correlation
from captum_mllm.methods import explain
from captum_mllm.methods.controls import cascading_copies, centre_map
from captum_mllm.metrics import insertion_deletion
from captum_mllm.visualization import overlay
from captum_mllm.words import group_words, token_labels

if TYPE_CHECKING:
    from PIL.Image import Image

METHOD = "msea+arc"  # the default of the command line
UNLIKE = 0.7  # rank correlation below which two maps are other maps
STEPS = 8
AT_ONCE = 4
TOKENS = 6
SENSITIVE = 0.02  # drop of probability from which on a token depends on the picture
DRAWS = 3
CLEAR = 2.0  # standard errors
PATIENCE = 300.0  # seconds that insertion and deletion may take


def check_randomised_layers(subject: Subject) -> Finding:
    """Whether maps change as the model's weights are randomised from the head downwards.

    Args:
        subject: the model under check.
    """
    _check_memory_for_copy(subject)
    own = subject.lens_maps(subject.model)
    steps: dict[str, float] = {}
    try:
        for name, other in cascading_copies(subject.adapter.model, 0):
            maps = subject.lens_maps(other)
            steps[name] = float(rank_correlation(own, maps).median())
    except ValueError as error:
        if "permuted weights" not in str(error):
            raise
        raise NotTriedError(
            str(error), "Check the model once without offload and unquantised, on the CPU."
        ) from error
    text = ", ".join(f"{name} {value:.2f}" for name, value in steps.items())
    found = f"Rank correlation with the maps of a copy whose weights are permuted: {text}."
    last = abs(steps["everything"])
    if last < UNLIKE:
        return Finding("randomised layers", "passed", found, "", steps)
    advice = "The maps show the picture's structure, not what the model learnt: don't trust them."
    return Finding("randomised layers", "failed", found, advice, steps)


def _check_memory_for_copy(subject: Subject) -> None:
    """Raise where a copy of the model would not fit."""
    model = subject.adapter.model
    needed = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    device = subject.adapter.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if free is not None and needed * 1.3 > free:
        raise NotTriedError(
            f"A copy of the model takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free.",
            "Check it on a machine with twice the model's memory.",
        )


def _free_memory() -> int | None:
    """Bytes that are available, or None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_faithfulness(subject: Subject) -> Finding:
    """Insertion minus deletion of the default method against a centre prior and random maps.

    Args:
        subject: the model under check.
    """
    if not subject.given:
        raise NotTriedError(
            "Without a picture and a prompt of yours it would tell nothing.",
            "Give both (--image and --prompt), of the kind that you want to explain.",
        )
    tokens = _sensitive_tokens(subject)
    _check_patience(subject, (len(tokens) + 1 + DRAWS) * 2 * STEPS)
    settings = {"max_new_tokens": subject.max_new_tokens}
    result = explain(
        METHOD, subject.model, subject.processor, subject.inputs, subject.answer, gen_args=settings
    )
    _draw(subject, result, tokens)
    grid = subject.sample.grids[0]
    draw = torch.Generator().manual_seed(0)
    maps = {METHOD: result, "centre": centre_map(grid.rows, grid.cols, 0.25)}
    drawn = [torch.rand(grid.rows, grid.cols, generator=draw) for _ in range(DRAWS)]
    scores = {name: _difference(subject, one, tokens) for name, one in maps.items()}
    scores["random"] = torch.stack([_difference(subject, one, tokens) for one in drawn]).mean(0)
    return _judge(subject, tokens, scores)


def _difference(subject: Subject, maps: object, tokens: list[int]) -> Tensor:
    """Insertion minus deletion of each token; several versions in a forward where they fit."""

    def curves(at_once: int) -> Tensor:
        return insertion_deletion(
            subject.model,
            subject.inputs,
            subject.answer,
            maps,
            processor=subject.processor,
            tokens=tokens,
            baseline="blur",
            steps=STEPS,
            perturbations_per_eval=at_once,
        ).difference

    try:
        return curves(AT_ONCE)
    except (RuntimeError, ValueError):  # no memory, or a model that takes one sample at a time
        return curves(1)


def _judge(subject: Subject, tokens: list[int], scores: Mapping[str, Tensor]) -> Finding:
    words = ", ".join(repr(subject.text(subject.answer[t : t + 1]).strip()) for t in tokens)
    text = ", ".join(f"{name} {float(values.mean()):.3f}" for name, values in scores.items())
    leads = {name: _lead(scores[METHOD] - scores[name]) for name in ("centre", "random")}
    by = ", ".join(f"{lead:+.1f} standard errors over {name}" for name, lead in leads.items())
    found = f"Insertion minus deletion over {len(tokens)} tokens ({words}): {text}; {by}."
    figures = {name: values.tolist() for name, values in scores.items()}
    if min(leads.values()) >= CLEAR:
        return Finding("faithfulness", "passed", found, "", figures)
    if leads["random"] <= -CLEAR:
        advice = "Random maps are better: don't trust maps of this model on such pictures."
        return Finding("faithfulness", "failed", found, advice, figures)
    advice = "Nothing clear: measure on many pictures (captum-mllm benchmark)."
    return Finding("faithfulness", "not tried", found, advice, figures)


def _lead(difference: Tensor) -> float:
    """Mean in standard errors; 0 for fewer than three values."""
    if len(difference) < 3:
        return 0.0
    error = float(difference.std()) / len(difference) ** 0.5
    return float(difference.mean()) / max(error, 1e-9)


def _sensitive_tokens(subject: Subject) -> list[int]:
    """Tokens of content words whose probability falls most where the picture is blurred."""
    from PIL import ImageFilter

    radius = max(subject.picture.size) / 8
    blurred = subject.picture.convert("RGB").filter(ImageFilter.GaussianBlur(radius))
    run = subject.run_of(blurred)
    drop = subject.run.answer_log_probs.exp() - run.answer_log_probs.exp()
    labels = token_labels(subject.answer.tolist(), subject.runner.tokenizer)
    words = group_words(labels)
    content = [token for word in words if word.content for token in word.tokens]
    content.sort(key=lambda token: -float(drop[token]))
    chosen = sorted(token for token in content[:TOKENS] if float(drop[token]) > SENSITIVE)
    if not chosen:
        raise NotTriedError(
            f"Blurring the picture changes no content word of {subject.text(subject.answer)!r}: "
            f"the answer does not depend on what the picture shows.",
            "Ask about something that can be seen in the picture.",
        )
    return chosen


def _check_patience(subject: Subject, forwards: int) -> None:
    start = time.perf_counter()
    subject.run_of(subject.picture)
    expected = (time.perf_counter() - start) * forwards
    if expected > PATIENCE:
        raise NotTriedError(
            f"{forwards} forwards would take {expected:.0f} s here.", "Check it on a GPU."
        )


def _draw(subject: Subject, result: object, tokens: list[int]) -> None:
    """The maps of the scored tokens over the picture, for the page."""
    picture: Image = subject.picture.convert("RGB")
    try:
        maps = result.to_image(0, picture)  # type: ignore[attr-defined]
    except ValueError:
        return  # where the picture lies is not known: the line "layout" says so
    for token in tokens:
        word = subject.text(subject.answer[token : token + 1]).strip()
        subject.pictures[f"{METHOD}, token {token + 1}: {word!r}"] = overlay(picture, maps[token])
