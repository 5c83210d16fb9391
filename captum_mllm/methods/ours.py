"""The project's own attributors, all in one unit.

Each method is a chain of attributors, innermost first; its options are those of the constructors.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from captum_mllm.attr import (
    ARC,
    MSEA,
    DirectLens,
    DirectLogitAttribution,
    JointNormalization,
    LogitLens,
    TokenActivationMap,
    TokenAttribution,
)
from captum_mllm.functional.calibration import Calibration
from captum_mllm.methods.registry import constructor_options, method
from captum_mllm.methods.request import Request
from captum_mllm.result import MLLMAttributionResult


def _options(*kinds: type) -> frozenset[str]:
    """Names of the options of a chain; the layer is an option only if the innermost has one."""
    names = constructor_options(*kinds)
    return names if "layer" in constructor_options(kinds[0]) else names - {"layer"}


@method("lens", kind="ours", options=_options(LogitLens, JointNormalization))
def lens(request: Request, **options: Any) -> MLLMAttributionResult:
    """Logit lens on the image tokens.

    ``JointNormalization(LogitLens(model))``; options as those of both constructors.
    """
    return _attribute(request, LogitLens, JointNormalization, options=options)


@method("tam", kind="ours", options=_options(LogitLens, TokenActivationMap))
def tam(request: Request, **options: Any) -> MLLMAttributionResult:
    """Token activation map.

    ``TokenActivationMap(LogitLens(model))``; options as those of both constructors.
    """
    return _attribute(request, LogitLens, TokenActivationMap, options=options)


@method("msea", kind="ours", options=_options(LogitLens, MSEA, JointNormalization))
def msea(request: Request, images: Any = None, **options: Any) -> MLLMAttributionResult:
    """Logit lens aggregated over several scales.

    ``JointNormalization(MSEA(LogitLens(model)))``; options as those of the constructors, and
    ``images``.
    """
    kinds = (LogitLens, MSEA, JointNormalization)
    return _attribute(request, *kinds, options=options, images=images)


@method("arc", kind="ours", options=_options(LogitLens, ARC))
def arc(request: Request, **options: Any) -> MLLMAttributionResult:
    """Logit lens with interference from irrelevant context suppressed.

    ``ARC(LogitLens(model))``; options as those of both constructors.
    """
    return _attribute(request, LogitLens, ARC, options=options)


@method("msea+arc", kind="ours", options=_options(LogitLens, MSEA, ARC))
def msea_arc(request: Request, images: Any = None, **options: Any) -> MLLMAttributionResult:
    """Several scales aggregated, and interference from irrelevant context suppressed.

    ``ARC(MSEA(LogitLens(model)))``; options as those of the constructors, and ``images``.
    """
    return _attribute(request, LogitLens, MSEA, ARC, options=options, images=images)


@method("direct", kind="ours", options=_options(DirectLogitAttribution, MSEA, JointNormalization))
def direct(
    request: Request,
    images: Any = None,
    upsampling: int = 2,
    calibration: Calibration | None = "adaptive",
    **options: Any,
) -> MLLMAttributionResult:
    """Direct logit attribution aggregated over several scales.

    ``JointNormalization(MSEA(DirectLogitAttribution(model)))``, upsampled as ARC is, and
    calibrated adaptively; options as those of the constructors, and ``images``.
    """
    kinds = (DirectLogitAttribution, MSEA, JointNormalization)
    options |= {"upsampling": upsampling, "calibration": calibration}
    return _attribute(request, *kinds, options=options, images=images)


@method("direct_lens", kind="ours", options=_options(DirectLens, JointNormalization))
def direct_lens(
    request: Request,
    images: Any = None,
    upsampling: int = 2,
    calibration: Calibration | None = "adaptive",
    **options: Any,
) -> MLLMAttributionResult:
    """Logit lens times direct logit attribution, over several scales.

    ``JointNormalization(DirectLens(model))``, upsampled as ARC is, and calibrated adaptively;
    options as those of both constructors, and ``images``.
    """
    options |= {"upsampling": upsampling, "calibration": calibration}
    return _attribute(request, DirectLens, JointNormalization, options=options, images=images)


def _attribute(
    request: Request, *kinds: type, options: Mapping[str, Any], images: Any = None
) -> MLLMAttributionResult:
    """Compose the attributors, trace the answer with all but the last, explain it with the last.

    Args:
        request: the request.
        kinds: the attributors' classes, innermost first; the last is a post-processor.
        options: of all constructors.
        images: the original pictures, for the scales.
    """
    innermost, *around, last = kinds
    own = _known(options, innermost)
    source: TokenAttribution = innermost(request.model, request.processor, **own)
    for kind in around:
        source = kind(source, **_wrapping(options, kind))
    attributor = last(source, **_wrapping(options, last))
    depth = attributor.ranking_depth
    if request.shared is None or images is not None:
        return attributor.attribute_trace(_trace(request, source, depth, images))
    wanted = _common_depth(source) if depth is None else depth
    sources = kinds[:-1]
    settings = repr([(kind.__name__, _settings(options, kind)) for kind in sources])
    trace = request.shared.get(settings, depth, lambda: _trace(request, source, wanted, None))
    return attributor.attribute_trace(trace)


def _trace(request: Request, source: TokenAttribution, depth: int | None, images: Any) -> Any:
    return source.trace(
        request.inputs,
        request.target,
        top_k=depth,
        gen_args=request.gen_args,
        images=images,
        show_progress=request.show_progress,
    )


def _common_depth(source: TokenAttribution) -> int:
    """The depth of the rankings that ARC needs by default: a shared trace gathers them at once."""
    depth = ARC(source).ranking_depth
    vocabulary = source.runner.adapter.vocabulary
    return vocabulary if depth is None else min(depth, vocabulary)


def _known(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The options of one constructor."""
    names = constructor_options(kind)
    return {name: value for name, value in options.items() if name in names}


def _wrapping(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The options of an attributor around another, whose layer belongs to the innermost one."""
    return {name: value for name, value in _known(options, kind).items() if name != "layer"}


def _settings(options: Mapping[str, Any], kind: type) -> list[tuple[str, Any]]:
    """All options of one constructor by name, with the defaults of those that are not given."""
    given = inspect.signature(kind).parameters
    defaults = {name: given[name].default for name in constructor_options(kind)}
    return sorted({**defaults, **_known(options, kind)}.items())
