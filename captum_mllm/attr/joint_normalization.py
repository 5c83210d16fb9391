"""Joint normalisation alone: raw maps made comparable, nothing subtracted."""

from typing import Any

from torch import nn
from typing_extensions import override

from captum_mllm.attr.base import TokenAttribution, build_result
from captum_mllm.attr.logit_lens import as_token_attribution
from captum_mllm.attr.postprocessing import PostProcessor
from captum_mllm.functional import joint_min_max
from captum_mllm.functional.calibration import Calibration
from captum_mllm.model.trace import TokenTrace
from captum_mllm.result import UNIT, MLLMAttributionResult


class JointNormalization(PostProcessor):
    r"""Normalises raw maps and text scores jointly to [0, 1], as TAM and ARC do.

    Use it to compare methods: ``LogitLens`` and ``MSEA`` alone give logits, whose thresholds are
    not comparable with those of maps in [0, 1].

    Args:
        model_or_attribution: a transformers model, or a token attribution that gives logits
            (``LogitLens(model)``, ``MSEA(model)``).
        processor: see :class:`LogitLens`, default None; with an attribution, give it to that.
        layer: as for ``LogitLens``, default -1.
        upsampling: see :class:`~captum_mllm.attr.postprocessing.PostProcessor`; default 1.
        calibration: see :class:`~captum_mllm.attr.postprocessing.PostProcessor`; default None.

    Raises:
        ValueError: a base whose maps are normalised already; numbers out of range.

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
        upsampling: int = 1,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(
            as_token_attribution(
                model_or_attribution, processor, layer, caller="JointNormalization"
            ),
            upsampling=upsampling,
            calibration=calibration,
        )

    @override
    def attribute_trace(self, trace: TokenTrace) -> MLLMAttributionResult:
        raw = trace.cells[trace.map_rows[trace.targets]]
        unit, scores = joint_min_max(raw, trace.text_scores, trace.is_earlier)
        maps = self.finish(trace.unpack_cells(unit))
        return build_result(trace, maps, scores, UNIT, self.name)
