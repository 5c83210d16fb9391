"""The check of a model: every line tried on its own, none of which stops the others."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from captum_mllm.adapters.devices import unwrap
from captum_mllm.adapters.hooks import unchanged
from captum_mllm.checking.report import Finding, TrustReport
from captum_mllm.checking.subject import NotTriedError, Subject
from captum_mllm.checking.tested import installed_versions
from captum_mllm.pictures import to_eight_bits
from captum_mllm.validation import ArgumentError

if TYPE_CHECKING:
    from PIL.Image import Image

Line = Callable[[Subject], Finding]

SIZE = (224, 336)  # (height, width) of the shipped scene; not square, so that tiles are told apart
SCENES = (23, 24)


def check(
    model: nn.Module,
    processor: Any,
    image: "Image | None" = None,
    prompt: str | None = None,
    *,
    max_new_tokens: int = 24,
    only: Sequence[str] | None = None,
    on_line: Callable[[Finding], None] | None = None,
) -> TrustReport:
    r"""Check on a model of yours, on this machine, what its explanations rest on.

    Each line of the report is measured on the model itself: where its image tokens lie (by
    repainting cells of the picture), whether the lens is its head, whether one forward gives what
    ``generate`` computed, and so on; :doc:`What we guarantee </docs/guarantees>` lists all. An
    error within a line fails that line and no other. The model is left as it was, also after an
    error. Takes seconds for a small model on a CPU, and for a large one some forwards of the
    language model and a dozen of the vision encoder; its randomised copy takes the model's memory
    once more (the line is not tried where there is too little).

    Args:
        model: a transformers model.
        processor: its processor.
        image: a PIL picture of the kind that you want to explain; None (default) for a drawn scene
            that ships with the library.
        prompt: what to ask about it, with or without the model's template around it; None
            (default) for "what is in the picture?". Insertion and deletion need both an image
            and a prompt of yours.
        max_new_tokens: length of the model's answer at most, default 24.
        only: names of the lines to check, None (default) for all of them.
        on_line: is called with each line as soon as it is there, default None.

    Returns:
        :class:`~captum_mllm.checking.TrustReport`; print it, or write it with ``save`` and
        ``to_html``.

    Raises:
        TypeError: ``model`` is no torch module, or ``image`` no PIL picture.
        ArgumentError: ``max_new_tokens`` is below 1, the prompt is empty, or ``only`` holds no line
            of that name.

    Example:
        >>> from captum_mllm import check
        >>> from captum_mllm.reference import load
        >>> report = check(*load())
        >>> report.passed, report["layout"].verdict
        (True, 'passed')
    """
    _check_arguments(model, image, prompt, max_new_tokens)
    chosen = _chosen(only)
    subject = _subject(model, processor, image, prompt, max_new_tokens)
    lines = []
    before = _state(model)
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        for name, line in chosen.items():
            finding = _tried(name, line, subject)
            lines.append(finding)
            if on_line is not None:
                on_line(finding)
    left = _tried("model unchanged", lambda _: _unchanged_since(before, model), subject)
    lines.append(left)
    if on_line is not None:
        on_line(left)
    return TrustReport(tuple(lines), _about(subject), subject.pictures)


def _lines() -> dict[str, Line]:
    """Name -> what checks it, in the order of the report."""
    from captum_mllm.checking import controls, costs, facts, layout, numbers, processing

    return {
        "class": facts.check_class,
        "versions": facts.check_versions,
        "inputs": processing.check_inputs,
        "image tokens": processing.check_image_tokens,
        "processor": processing.check_processor,
        "side inputs": processing.check_side_inputs,
        "layout": layout.check_layout,
        "teacher forcing": numbers.check_teacher_forcing,
        "lens": numbers.check_lens,
        "prefix": numbers.check_prefix,
        "another picture": numbers.check_another_picture,
        "scales and views": costs.check_scales_and_views,
        "randomised layers": controls.check_randomised_layers,
        "faithfulness": controls.check_faithfulness,
        "memory": costs.check_memory,
    }


def _chosen(only: Sequence[str] | None) -> dict[str, Line]:
    lines = _lines()
    if only is None:
        return lines
    names = [only] if isinstance(only, str) else list(only)
    if unknown := [name for name in names if name not in lines]:
        raise ArgumentError("only", f"must hold names of {', '.join(lines)}; got {unknown}.")
    return {name: line for name, line in lines.items() if name in names}


def _tried(name: str, line: Line, subject: Subject) -> Finding:
    """A line's finding; an error in it is a failure of that line."""
    subject.line = name
    start = time.perf_counter()
    try:
        finding = line(subject)
    except NotTriedError as error:
        finding = Finding(name, "not tried", str(error), error.advice)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        advice = "Mend what the message says; if it is no fault of the inputs, report it."
        finding = Finding(name, "failed", text, advice)
    return replace(finding, seconds=round(time.perf_counter() - start, 3))


def _check_arguments(model: Any, image: Any, prompt: Any, max_new_tokens: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}.")
    if image is not None and not hasattr(image, "convert"):
        raise TypeError(
            f"image must be a PIL picture, got {type(image).__name__}: open a file by "
            f"PIL.Image.open(path)."
        )
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        raise ArgumentError("prompt", f"must be a text that is not empty, got {prompt!r}.")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"max_new_tokens must be a whole number, got {max_new_tokens!r}.")
    if max_new_tokens < 1:
        raise ArgumentError("max_new_tokens", f"must be at least 1, got {max_new_tokens}.")


def _subject(
    model: nn.Module, processor: Any, image: Any, prompt: str | None, max_new_tokens: int
) -> Subject:
    from captum_mllm.reference.captions import DEFAULT_QUESTION
    from captum_mllm.reference.render import render_pil
    from captum_mllm.reference.scenes import make_scene

    shown, other = (render_pil(make_scene(n), size=SIZE)[0] for n in SCENES)
    if image is not None:
        shown, other = to_eight_bits(image).convert("RGB"), other.resize(image.size)
    given = image is not None and prompt is not None
    return Subject(
        model, processor, shown, other, prompt or DEFAULT_QUESTION, given, max_new_tokens
    )


def _about(subject: Subject) -> dict[str, str]:
    model = unwrap(subject.model)
    width, height = subject.picture.size
    made = subject.made.get("steps", (None, None))[0]
    return {
        "model": str(getattr(model, "name_or_path", "") or "in memory"),
        "model class": type(model).__name__,
        "processor class": type(subject.processor).__name__,
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "device": str(getattr(model, "device", "")),
        "picture": f"{width} x {height}",
        "prompt": subject.prompt,
        "answer": "" if made is None else subject.text(made[0], whole=True),
        **installed_versions(),
    }


# ---- the user's model is left as it was ---------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Any]:
    """What must not change: weights (by their versions and sums), modes, hooks."""
    weights = {
        name: (tensor.requires_grad, *_fingerprint(tensor))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    hooks = {
        name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    return {"weights": weights, "modes and hooks": hooks}


def _fingerprint(tensor: torch.Tensor) -> tuple[int | float, ...]:
    """What changes with a tensor's values; of an offloaded one, which is loaded anew, nothing.

    The sum of some entries shows a change by way of ``.data``, which the version does not count.
    """
    if tensor.is_meta:
        return ()
    some = tensor.detach().flatten()[:4096].double().nan_to_num()
    return id(tensor), tensor._version, float(some.sum())


def _unchanged_since(before: dict[str, Any], model: nn.Module) -> Finding:
    after = _state(model)
    changed = [what for what in before if before[what] != after[what]]
    if changed:
        return Finding(
            "model unchanged",
            "failed",
            f"The check changed the model's {', '.join(changed)}.",
            "Load the model again, and report it.",
        )
    found = f"Weights, modes and hooks of {len(before['modes and hooks'])} modules are as before."
    return Finding("model unchanged", "passed", found)
