"""The attributors: thin captum ``Attribution`` subclasses over the pure functions."""

from captum_mllm.attr.arc import ARC, RankCorrelationDenoiser
from captum_mllm.attr.base import TokenAttribution
from captum_mllm.attr.direct_lens import DirectLens
from captum_mllm.attr.direct_logit import DirectLogitAttribution
from captum_mllm.attr.joint_normalization import JointNormalization
from captum_mllm.attr.logit_lens import LogitLens
from captum_mllm.attr.msea import MSEA
from captum_mllm.attr.multi_scale import MultiScaleAttribution
from captum_mllm.attr.postprocessing import PostProcessor
from captum_mllm.attr.tam import TokenActivationMap
from captum_mllm.model.runner import RunOptions

__all__ = [
    "ARC",
    "MSEA",
    "DirectLens",
    "DirectLogitAttribution",
    "JointNormalization",
    "LogitLens",
    "MultiScaleAttribution",
    "PostProcessor",
    "RankCorrelationDenoiser",
    "RunOptions",
    "TokenActivationMap",
    "TokenAttribution",
]
