"""The project's own attributors, all in one unit."""

import inspect
from typing import Any

from captum_mllm.attr import (
    ARC,
    MSEA,
    JointNormalization,
    LogitLens,
    TokenActivationMap,
    TokenAttribution,
)
from captum_mllm.methods.request import Request
from captum_mllm.result import MLLMAttributionResult

INNER = frozenset({"layer"})  # of a chain, only the innermost attributor takes them


def options_of(kind: type) -> frozenset[str]:
    """Names of a class's options: its constructor's arguments after model and processor."""
    names = [name for name in inspect.signature(kind).parameters if name != "processor"]
    return frozenset(names[1:])


def lens(request: Request, **options: Any) -> MLLMAttributionResult:
    """``JointNormalization(LogitLens(model))``, options as those of both."""
    return _answered(request, _normalised(LogitLens, request, options))


def tam(request: Request, **options: Any) -> MLLMAttributionResult:
    """``TokenActivationMap``; options as its constructor's."""
    return _answered(request, TokenActivationMap(request.model, request.processor, **options))


def msea(request: Request, images: Any = None, **options: Any) -> MLLMAttributionResult:
    """``JointNormalization(MSEA(model))``, options as those of both, and ``images``."""
    return _answered(request, _normalised(MSEA, request, options), images)


def arc(request: Request, **options: Any) -> MLLMAttributionResult:
    """``ARC``; options as its constructor's."""
    return _answered(request, ARC(request.model, request.processor, **options))


def msea_arc(request: Request, images: Any = None, **options: Any) -> MLLMAttributionResult:
    """``ARC(MSEA(model))``; each takes the options that its constructor knows.

    An option that both know goes to both, but for ``layer``, which is the lens's.
    """
    inner = MSEA(request.model, request.processor, **_known(options, options_of(MSEA)))
    return _answered(request, ARC(inner, **_known(options, options_of(ARC) - INNER)), images)


FINISHING = options_of(JointNormalization) - INNER  # of methods that subtract nothing


def _normalised(
    kind: type[LogitLens] | type[MSEA], request: Request, options: dict[str, Any]
) -> TokenAttribution:
    inner = kind(request.model, request.processor, **_known(options, options_of(kind)))
    return JointNormalization(inner, **_known(options, FINISHING))


def _known(options: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _answered(
    request: Request, attributor: TokenAttribution, images: Any = None
) -> MLLMAttributionResult:
    return attributor.attribute(
        request.inputs, request.target, images=images, show_progress=request.show_progress
    )
