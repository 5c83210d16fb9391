"""The methods by name, and the one call that runs any of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from captum_mllm.attr import ARC, MSEA, LogitLens, TokenActivationMap
from captum_mllm.methods import controls, ours
from captum_mllm.methods.ablation import ablation
from captum_mllm.methods.attention import attention
from captum_mllm.methods.controls import shuffled_copy
from captum_mllm.methods.gradients import gradcam, integrated_gradients
from captum_mllm.methods.request import Request
from captum_mllm.result import MLLMAttributionResult

Kind = Literal["ours", "baseline", "control"]


@dataclass(frozen=True)
class Method:
    """One way to explain an answer.

    Args:
        name: as :func:`explain` takes it.
        about: one line of what it does.
        kind: "ours", "baseline" (somebody else's method) or "control" (knows nothing, or all).
        run: makes the result of a question.
        options: names of the options that it takes; None where another method's are passed on.
        needs: name of the argument that it can't do without ("masks"), or None.
        gradients: whether gradients flow through the model, which takes several times the memory
            and can't be done with offloaded weights.
    """

    name: str
    about: str
    kind: Kind
    run: Callable[..., MLLMAttributionResult]
    options: frozenset[str] | None = frozenset()
    needs: str | None = None
    gradients: bool = False


_IMAGES = frozenset({"images"})
_LENS = ours.options_of(LogitLens) | ours.FINISHING
_MSEA = ours.options_of(MSEA) | _IMAGES
_OURS = (
    (
        "lens",
        "logit lens on the image's tokens",
        ours.lens,
        _LENS,
    ),
    ("tam", "token activation map", ours.tam, ours.options_of(TokenActivationMap)),
    (
        "msea",
        "logit lens over several scales",
        ours.msea,
        ours.options_of(MSEA) | ours.FINISHING | _IMAGES,
    ),
    ("arc", "logit lens, irrelevant context taken off", ours.arc, ours.options_of(ARC)),
    (
        "msea+arc",
        "several scales, irrelevant context taken off",
        ours.msea_arc,
        _MSEA | ours.options_of(ARC),
    ),
)


def _randomised_model(request: Request, of: str = "lens", **options: Any) -> MLLMAttributionResult:
    """Another method on a copy of the model with shuffled weights: what is left, it didn't learn.

    Args:
        request: the question; a target that is None is the answer of the model itself.
        of: name of the method, default "lens".
        options: of that method.
    """
    inner = _find(of)
    if inner.run is _randomised_model:
        raise ValueError(f"of must be another method than {of!r}.")
    answer = request.run().answer_ids
    model = shuffled_copy(request.model, request.seed)
    result = explain(
        of,
        model,
        request.processor,
        request.inputs,
        answer,
        masks=request.masks,
        seed=request.seed,
        steps=request.steps,
        show_progress=request.show_progress,
        **options,
    )
    return replace(result, method=f"randomised_model({result.method})")


_ALL = (
    *(Method(name, about, "ours", run, options) for name, about, run, options in _OURS),
    Method("gradcam", "Grad-CAM on the image's features", "baseline", gradcam, gradients=True),
    Method(
        "integrated_gradients",
        "integrated gradients on pixels, summed over cells",
        "baseline",
        integrated_gradients,
        frozenset({"baseline", "batch"}),
        gradients=True,
    ),
    Method(
        "attention",
        "attention of one layer, mean over heads",
        "baseline",
        attention,
        frozenset({"layer"}),
    ),
    Method(
        "ablation",
        "what each part of the picture is worth",
        "baseline",
        ablation,
        frozenset({"grid", "baseline"}),
    ),
    Method("random", "uniform noise for every token", "control", controls.random),
    Method(
        "centre",
        "a Gaussian at the frame's centre",
        "control",
        controls.centre,
        frozenset({"sigma"}),
    ),
    Method(
        "randomised_model",
        "another method on a copy with shuffled weights",
        "control",
        _randomised_model,
        None,
    ),
    Method(
        "mask",
        "the annotated masks on the model's grid",
        "control",
        controls.mask,
        frozenset({"geometry"}),
        needs="masks",
    ),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""Name -> :class:`Method` of all methods, baselines and controls."""


def explain(
    method: str,
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Any],
    target: Any = None,
    *,
    masks: Mapping[int, Any] | None = None,
    seed: int = 0,
    steps: int = 20,
    show_progress: bool = False,
    **options: Any,
) -> MLLMAttributionResult:
    r"""Explain every token of an answer by any of :data:`METHODS`.

    The maps of all methods are in [0, 1], on the model's own grid or a finer one (several scales;
    ARC's ``upsampling``). Ours are normalised per token, jointly with the text before it; the
    others have no text side (``token_attr`` is 0) and are divided by their largest value over the
    whole answer. ``masks``, ``seed`` and ``steps``
    may always be given; a method uses what it needs of them. The model is left bit for bit as it
    was, also after an error.

    Ours, their options those of the classes' constructors (``layer``, ``scales``, ``alpha_max``...)
    and, of those with several scales, ``images`` (the original pictures, processed anew):

    - "lens", "tam", "msea", "arc", "msea+arc": ``JointNormalization(LogitLens(model))``,
      ``TokenActivationMap``, ``JointNormalization(MSEA(model))``, ``ARC``, ``ARC(MSEA(model))``.
      Of these ARC alone calibrates its maps by default, which thresholds see: compare with
      ``calibration=1.5, upsampling=2`` for the others, or ``calibration=None`` for ARC.

    Baselines, of which positive values count:

    - "gradcam": Grad-CAM on the image's features as the language model gets them.
    - "integrated_gradients": on pixels, summed over each cell. ``baseline``: "blur" (default;
      near what the model was trained on, and no colour is without a say) or "black"; ``batch``:
      pictures at once, default 4.
    - "attention": of one layer, mean over heads, from the position that predicts a token.
      ``layer``: default the first of the last third.
    - "ablation": the drop in log-probability where a part of the picture is blurred. ``grid``:
      (rows, cols) of parts, default the model's cells, joined to at most 64 parts; ``baseline``.

    Controls:

    - "random": uniform noise; "centre": a Gaussian at the frame's centre (``sigma`` in sides of
      the frame, default 0.25).
    - "randomised_model": another method (``of``, default "lens", and its options) on a copy of the
      model whose weights are permuted within each tensor; takes the model's memory once more.
      ``output_probs`` are the copy's.
    - "mask": the share of each cell that ``masks`` cover, as the model saw the picture
      (``geometry``: needed without a processor). Tokens without a mask have a map of zeros.

    Args:
        method: a name of :data:`METHODS`.
        model: a transformers model of a registered family.
        processor: its processor; None where neither labels, string targets nor the geometry of the
            picture are wanted.
        inputs: the mapping that the processor returns for one sample.
        target: the answer: token ids, a string (needs a processor), or None (default) to generate
            it.
        masks: for "mask": position in the answer -> bool mask (height, width) of the original
            picture; of several pictures a sequence of one mask (or None) per picture.
        seed: of "random" and "randomised_model", default 0.
        steps: of "integrated_gradients", default 20.
        show_progress: progress bar where a method runs the model many times, default False.
        options: further options of the method, see ``METHODS[method].options``; of ours those of
            the class's constructor.

    Returns:
        The result of the whole answer.

    Raises:
        TypeError: an option that the method does not take.
        ValueError: no such method; bad input, the message names the argument and how to mend it.

    Example:
        >>> from captum_mllm.methods import explain
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> result = explain("msea+arc", model, processor, inputs, "there is a dog", alpha_max=1.0)
        >>> result.method, result.units, tuple(result.grid_attr[0].shape)
        ('ARC(MSEA(LogitLens))', '[0, 1]', (4, 56, 56))
    """
    chosen = _find(method)
    if chosen.options is not None and (unknown := sorted(options.keys() - chosen.options)):
        takes = ", ".join(sorted(chosen.options)) or "none"
        raise TypeError(
            f"method {method!r} does not take the option(s) {', '.join(unknown)}; it takes: "
            f"{takes}."
        )
    if chosen.needs == "masks" and masks is None:
        raise ValueError(
            f"method {method!r} needs masks=: a mapping of positions in the answer to bool masks "
            f"(height, width) of the picture."
        )
    request = Request(model, processor, inputs, target, masks, seed, steps, show_progress)
    return chosen.run(request, **options)


def _find(name: Any) -> Method:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]
