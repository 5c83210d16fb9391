"""Joint normalisation alone: raw maps made comparable, nothing subtracted."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from typing_extensions import override

from captum_mllm.attr.base import TokenAttribution, make_result
from captum_mllm.attr.logit_lens import as_token_attribution
from captum_mllm.attr.postprocessing import Finishing
from captum_mllm.functional import joint_min_max
from captum_mllm.model.runner import Runner
from captum_mllm.model.targets import Explain
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import UNIT, MLLMAttributionResult


def unit_result(
    trace: TokenTrace, method: str, finishing: Finishing | None = None
) -> MLLMAttributionResult:
    """Raw maps and text scores of a trace, normalised jointly as TAM's and ARC's are.

    Args:
        trace: the evidence.
        method: name of the attributor.
        finishing: the last steps, default none.

    Returns:
        The result, units "[0, 1]".

    Reference:
        TAM, joint normalisation (:func:`~captum_mllm.functional.joint_min_max`).
    """
    raw = trace.cells[trace.text_class[trace.targets]]
    unit, scores = joint_min_max(raw, trace.text_scores, trace.is_earlier)
    maps = (finishing or Finishing())(trace.unpack_cells(unit))
    return make_result(trace, maps, scores, UNIT, method)


class JointNormalization(TokenAttribution):
    r"""Raw maps and text scores brought to [0, 1] together, as TAM's and ARC's are.

    What a comparison needs beside them: ``LogitLens`` and ``MSEA`` alone give logits, whose
    thresholds compare with nothing.

    Args:
        model_or_attribution: a transformers model, or a token attribution that gives raw maps
            (``LogitLens(model)``, ``MSEA(model)``).
        processor: the model's processor, default None; with an attribution, give it to that.
        layer: as for ``LogitLens``, default -1.
        rank_filter: see :class:`~captum_mllm.attr.postprocessing.Finishing`.
        upsampling: see :class:`~captum_mllm.attr.postprocessing.Finishing`.
        calibration: see :class:`~captum_mllm.attr.postprocessing.Finishing`.

    Raises:
        ValueError: a base that already subtracts context; numbers out of range.

    Reference:
        TAM's joint normalisation, without its other steps.

    Example:
        >>> from captum_mllm import JointNormalization
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> lens = JointNormalization(model, processor, calibration=1.5)
        >>> maps = lens.attribute(inputs, target="there is a dog").grid_attr[0]
        >>> bool(maps.min() >= 0) and bool(maps.max() <= 1)
        True
    """

    def __init__(
        self,
        model_or_attribution: nn.Module | TokenAttribution,
        processor: Any = None,
        *,
        layer: int = -1,
        rank_filter: bool = False,
        upsampling: int = 1,
        calibration: float | None = None,
    ) -> None:
        base = as_token_attribution(
            model_or_attribution, processor, layer, caller="JointNormalization"
        )
        super().__init__(base.forward_func)
        self.attribution_method = base
        self.finishing = Finishing(rank_filter, upsampling, calibration)

    @property
    @override
    def subtracts_context(self) -> bool:
        return True  # its maps are in [0, 1]: what subtracts context needs logits

    @property
    @override
    def runner(self) -> Runner:
        return self.attribution_method.runner

    @override
    def trace(
        self,
        inputs: Mapping[str, Any],
        target: Any = None,
        *,
        explain: Explain = "answer",
        top_k: int | None = None,
        **options: Any,
    ) -> TokenTrace:
        return self.attribution_method.trace(
            inputs, target, explain=explain, top_k=top_k, **options
        )

    @override
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        return unit_result(trace, self.name, self.finishing)
