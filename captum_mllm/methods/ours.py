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
from captum_mllm.methods.request import Asked
from captum_mllm.result import MLLMAttributionResult

INNER = frozenset({"layer"})  # of a chain, only the innermost attributor takes them


def options_of(kind: type) -> frozenset[str]:
    """Names of a class's options: its constructor's arguments after model and processor."""
    names = [name for name in inspect.signature(kind).parameters if name != "processor"]
    return frozenset(names[1:])


def lens(asked: Asked, **options: Any) -> MLLMAttributionResult:
    """``JointNormalization(LogitLens(model))``, options as those of both."""
    return _answered(asked, _normalised(LogitLens, asked, options))


def tam(asked: Asked, **options: Any) -> MLLMAttributionResult:
    """``TokenActivationMap``; options as its constructor's."""
    return _answered(asked, TokenActivationMap(asked.model, asked.processor, **options))


def msea(asked: Asked, images: Any = None, **options: Any) -> MLLMAttributionResult:
    """``JointNormalization(MSEA(model))``, options as those of both, and ``images``."""
    return _answered(asked, _normalised(MSEA, asked, options), images)


def arc(asked: Asked, **options: Any) -> MLLMAttributionResult:
    """``ARC``; options as its constructor's."""
    return _answered(asked, ARC(asked.model, asked.processor, **options))


def msea_arc(asked: Asked, images: Any = None, **options: Any) -> MLLMAttributionResult:
    """``ARC(MSEA(model))``; each takes the options that its constructor knows.

    An option that both know goes to both, but for ``layer``, which is the lens's.
    """
    inner = MSEA(asked.model, asked.processor, **_known(options, options_of(MSEA)))
    return _answered(asked, ARC(inner, **_known(options, options_of(ARC) - INNER)), images)


FINISHING = options_of(JointNormalization) - INNER  # of methods that subtract nothing


def _normalised(
    kind: type[LogitLens] | type[MSEA], asked: Asked, options: dict[str, Any]
) -> TokenAttribution:
    inner = kind(asked.model, asked.processor, **_known(options, options_of(kind)))
    return JointNormalization(inner, **_known(options, FINISHING))


def _known(options: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _answered(
    asked: Asked, attributor: TokenAttribution, images: Any = None
) -> MLLMAttributionResult:
    return attributor.attribute(
        asked.inputs, asked.target, images=images, show_progress=asked.show_progress
    )
