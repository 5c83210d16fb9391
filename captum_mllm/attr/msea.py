"""MSEA: multi-scale explanation aggregation over a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from captum.attr import Attribution
from torch import nn
from typing_extensions import override

from captum_mllm._captum import log_usage
from captum_mllm.attr.logit_lens import LogitLens
from captum_mllm.attr.multi_scale import MultiScaleAttribution
from captum_mllm.attr.presets import PRESET, FromPreset
from captum_mllm.functional import Aggregation, ScaleNorm
from captum_mllm.model.targets import Explain


class MSEA(MultiScaleAttribution):
    """Multi-scale explanation aggregation over a model's logit lens or another attribution.

    ``MSEA(model)`` is ``MultiScaleAttribution(LogitLens(model))``.

    Args:
        model_or_attribution: a transformers model, or a captum attribution.
        processor: the model's processor, default None; with an attribution, give it to that.
        layer: as for ``LogitLens``, default -1.
        scales: see :class:`MultiScaleAttribution`.
        aggregation: see :class:`MultiScaleAttribution`.
        scale_norm: see :class:`MultiScaleAttribution`.
        scale_weights: see :class:`MultiScaleAttribution`.
        mirrored: see :class:`MultiScaleAttribution`.
        resize: see :class:`MultiScaleAttribution`.
        consistency: see :class:`MultiScaleAttribution`.
        preset: see :class:`MultiScaleAttribution`.

    Raises:
        TypeError: neither a transformers model nor a captum attribution.
        ValueError: no adapter for the model; ``processor`` or ``layer`` beside an attribution; see
            also :class:`MultiScaleAttribution`.
    """

    def __init__(
        self,
        model_or_attribution: nn.Module | Attribution,
        processor: Any = None,
        *,
        layer: int = -1,
        scales: Sequence[float] | FromPreset = PRESET,
        aggregation: Aggregation | FromPreset = PRESET,
        scale_norm: ScaleNorm | FromPreset = PRESET,
        scale_weights: str | FromPreset = PRESET,
        mirrored: bool | FromPreset = PRESET,
        resize: str = "mass",
        consistency: bool = False,
        preset: str = "measured",
    ) -> None:
        base = model_or_attribution
        if not isinstance(base, Attribution):
            base = LogitLens(base, processor, layer)
        elif processor is not None or layer != -1:
            raise ValueError(
                f"processor and layer belong to the innermost attribution: give them to "
                f"{type(base).__name__}, not to MSEA."
            )
        super().__init__(
            base,
            scales,
            aggregation,
            scale_norm=scale_norm,
            scale_weights=scale_weights,
            mirrored=mirrored,
            resize=resize,
            consistency=consistency,
            preset=preset,
        )

    @override
    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        explain: Explain = "answer",
        gen_args: Mapping[str, Any] | None = None,
        images: Any = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Explain each token of an answer at every scale and aggregate.

        Args:
            inputs: see :meth:`TokenAttribution.attribute`.
            target: see :meth:`TokenAttribution.attribute`.
            additional_forward_args: see :meth:`TokenAttribution.attribute`.
            explain: see :meth:`TokenAttribution.attribute`.
            gen_args: see :meth:`TokenAttribution.attribute`.
            images: see :meth:`TokenAttribution.attribute`.
            show_progress: see :meth:`TokenAttribution.attribute`.
            kwargs: further arguments of a captum attributor that traces no tokens.

        Returns:
            See :meth:`TokenAttribution.attribute`; around an attributor that traces no tokens, see
            :meth:`MultiScaleAttribution.attribute`.
        """
        given = {
            "target": target,
            "additional_forward_args": additional_forward_args,
            "gen_args": gen_args,
            "images": images,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if not (isinstance(explain, str) and explain == "answer"):
            kwargs["explain"] = explain
        if show_progress:
            kwargs["show_progress"] = True
        return super().attribute(inputs, **kwargs)
