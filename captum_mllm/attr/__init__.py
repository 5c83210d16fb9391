"""The attributors: thin captum ``Attribution`` subclasses over the pure functions."""

from captum_mllm.attr.base import TokenAttribution
from captum_mllm.attr.logit_lens import LogitLens
from captum_mllm.attr.multi_scale import MSEA, MultiScaleAttribution
from captum_mllm.attr.rank_correlation import ARC, RankCorrelationDenoiser
from captum_mllm.attr.token_activation_map import TokenActivationMap

__all__ = [
    "ARC",
    "MSEA",
    "LogitLens",
    "MultiScaleAttribution",
    "RankCorrelationDenoiser",
    "TokenActivationMap",
    "TokenAttribution",
]
