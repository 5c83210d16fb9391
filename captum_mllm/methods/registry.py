"""The methods by name, and the one call that runs any of them."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.devices import unwrap
from captum_mllm.adapters.hooks import unchanged
from captum_mllm.methods.request import Request
from captum_mllm.model.discovery import discover
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.validation import ArgumentError

Kind = Literal["ours", "baseline", "control"]


@dataclass(frozen=True)
class Method:
    """One way to explain an answer.

    Args:
        name: as :func:`explain` takes it.
        about: one line of what it does.
        kind: "ours", "baseline" (somebody else's method) or "control" (knows nothing, or all).
        run: computes the result of a request.
        options: names of the options that it takes; None if they are passed on to another method.
        needs: name of an argument that it can't do without ("masks"), or None.
        gradients: whether gradients flow through the model, which takes several times the memory
            and is not possible with offloaded weights.
    """

    name: str
    about: str
    kind: Kind
    run: Callable[..., MLLMAttributionResult]
    options: frozenset[str] | None = frozenset()
    needs: str | None = None
    gradients: bool = False


METHODS: dict[str, Method] = {}
"""Name -> :class:`Method` of all methods, baselines and controls."""

Run = Callable[..., MLLMAttributionResult]


def method(
    name: str,
    *,
    kind: Kind,
    options: frozenset[str] = frozenset(),
    needs: str | None = None,
    gradients: bool = False,
) -> Callable[[Run], Run]:
    """Register a function as a method: a decorator.

    The first line of the function's docstring says what the method does. Its options are the
    parameters after the request; ``**options`` stand for those named here or, if none are named,
    for those of another method.

    Args:
        name: of the method.
        kind: see :class:`Method`.
        options: names of the options that the function takes as ``**options``.
        needs: see :class:`Method`.
        gradients: see :class:`Method`.
    """

    def register(run: Run) -> Run:
        _, *parameters = inspect.signature(run).parameters.values()
        named = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        passes_on = len(named) < len(parameters) and not options
        about = (inspect.getdoc(run) or "").split("\n")[0].rstrip(".")
        taken = None if passes_on else named | options
        METHODS[name] = Method(name, about, kind, run, taken, needs, gradients)
        return run

    return register


def constructor_options(*kinds: type) -> frozenset[str]:
    """Names of the options of classes: their constructors' arguments after model and processor.

    Args:
        kinds: attributor classes.
    """
    names = (list(inspect.signature(kind).parameters)[1:] for kind in kinds)
    return frozenset(name for own in names for name in own) - {"processor"}


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
    gen_args: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    images: Any = None,
    **options: Any,
) -> MLLMAttributionResult:
    r"""Explain every token of an answer by any of :data:`METHODS`.

    The maps of all methods are in [0, 1], on the model's own grid or a finer one (several scales;
    ARC's ``upsampling``). Ours are normalised per token, jointly with the text before it; the
    others have no text side (``token_attr`` is 0) and are divided by their largest value over the
    whole answer. ``masks``, ``seed``, ``steps`` and ``gen_args`` are accepted by every method,
    which uses those that it needs. The model is left unchanged, also after an error.

    Ours, whose options are those of the classes' constructors (``layer``, ``scales``,
    ``alpha_max``...):

    - "lens", "tam", "msea", "arc", "msea+arc": ``JointNormalization(LogitLens(model))``,
      ``TokenActivationMap``, ``JointNormalization(MSEA(model))``, ``ARC``, ``ARC(MSEA(model))``.
    - "direct", "direct_lens": ``JointNormalization(MSEA(DirectLogitAttribution(model)))``,
      ``JointNormalization(DirectLens(model))``: what each mention of a word read.

    ARC (1.5) and the last two ("adaptive") calibrate their maps by default, which matters wherever
    maps are thresholded: compare with the same ``calibration`` and ``upsampling=2`` for the others,
    or with ``calibration=None`` for these.

    Baselines, of which positive values count:

    - "gradcam": Grad-CAM on the image features as the language model receives them.
    - "integrated_gradients": on pixels, summed over each cell. ``baseline``: "blur" (default;
      close to the training data, and no colour has an attribution of 0 by design),
      "black" or "mean"; ``batch``: images in one forward, default 4.
    - "attention": one layer, mean over heads, from the position that predicts a token.
      ``layer``: default the first of the last third.
    - "ablation": the drop in log-probability where a part of the image is blurred. ``grid``:
      (rows, cols) of parts, default the model's cells, joined to at most 64 parts; ``baseline``.

    Controls:

    - "random": uniform noise; "centre": a Gaussian at the canvas's centre (``sigma`` in sides of
      the canvas, default 0.25).
    - "randomised_model": another method (``of``, default "lens", and its options) on a copy of the
      model whose weights are permuted within each tensor; takes the model's memory once more.
      ``output_probs`` are the copy's.
    - "mask": the share of each cell that ``masks`` cover, as the model saw the image
      (``geometry``: needed without a processor). Tokens without a mask have a map of zeros.

    Args:
        method: a name of :data:`METHODS`.
        model: a transformers model.
        processor: its processor; None where neither labels, string targets nor the geometry of the
            picture are needed.
        inputs: the mapping that the processor returns for one sample.
        target: the answer: token ids, a string (needs a processor), or None (default) to generate
            it.
        masks: for "mask": position in the answer -> bool mask (height, width) of the original
            picture; for several pictures a sequence of one mask (or None) per picture.
        seed: of "random" and "randomised_model", default 0.
        steps: of "integrated_gradients", default 20.
        gen_args: keyword arguments of ``generate`` where the answer is generated, default None:
            greedy, one beam, 128 new tokens.
        show_progress: progress bar where a method runs the model many times, default False.
        images: the original picture(s), default None. Methods with several scales process them
            again at each scale; a model without an adapter needs them once, whatever the method.
        options: further options of the method, see ``METHODS[method].options``; for ours those of
            the classes' constructors.

    Returns:
        The result of the whole answer.

    Raises:
        TypeError: an option that the method does not take.
        ValueError: no such method; bad input, the message names the argument and how to fix it.

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
    request = Request(model, processor, inputs, target, masks, seed, steps, gen_args, show_progress)
    if images is not None:
        discover(find_adapter(model), processor, inputs, images)
        if "images" in (find_method(method).options or ()):
            options["images"] = images
    return run_method(method, request, **options)


def run_method(name: str, request: Request, **options: Any) -> MLLMAttributionResult:
    """Explain a request by a method.

    Args:
        name: of the method.
        request: the request.
        options: of the method.

    Raises:
        TypeError: an option that the method does not take.
        ValueError: no such method, or one that needs an argument that the request lacks.
    """
    chosen = find_method(name)
    check_options(name, options)
    if chosen.needs == "masks" and request.masks is None:
        raise ArgumentError(
            "method",
            f"{name!r} needs masks=: a mapping of positions in the answer to bool masks "
            f"(height, width) of the picture.",
        )
    model = unwrap(request.model)
    with unchanged(model) if isinstance(model, nn.Module) else nullcontext():
        return chosen.run(request, **options)


def check_options(name: str, options: Iterable[str], always: Iterable[str] = ()) -> None:
    """Raise unless the method takes the options.

    Args:
        name: of the method.
        options: names of options.
        always: names that are accepted whatever the method, such as "steps".

    Raises:
        TypeError: an option that the method does not take; the message lists those that it takes.
        ValueError: no such method.
    """
    known = find_method(name).options
    if known is None:
        return
    if unknown := sorted(set(options) - known - set(always)):
        takes = ", ".join(sorted(known | set(always))) or "none"
        raise TypeError(
            f"method {name!r} does not take the option(s) {', '.join(unknown)}; it takes: {takes}."
        )


def find_method(name: Any) -> Method:
    """The method of a name.

    Args:
        name: of the method.

    Raises:
        ValueError: no such method; the message lists them.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ArgumentError("method", f"must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]
