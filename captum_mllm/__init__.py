"""captum_mllm: explain multimodal large language models with captum.

For every word a model says: where in the image it looked, and which words led to it. The data
flows one way::

    inputs -> adapter -> one forward under hooks -> TokenTrace -> (MSEA: more scales) -> TokenTrace
           -> (ARC | TAM | as it is) -> MLLMAttributionResult -> metrics | visualization | cli

``inputs`` reads a sample, ``adapters`` hold what differs between model families, ``capture`` sets
the hooks, ``runner`` runs the model, ``functional`` holds the formulas, ``attr`` the captum
attributors, ``result`` what they return, ``bridge`` what captum's own methods need on such models.
"""

from captum_mllm.attr import (
    ARC,
    MSEA,
    PRESETS,
    JointNormalization,
    LogitLens,
    MultiScaleAttribution,
    RankCorrelationDenoiser,
    TokenActivationMap,
)
from captum_mllm.bridge import PromptInput, TeacherForced, TokenLogProb, check_llm_attribution
from captum_mllm.geometry import ImageGeometry
from captum_mllm.result import MLLMAttributionResult

__version__ = "0.1.0.dev0"

__all__ = [
    "ARC",
    "MSEA",
    "PRESETS",
    "ImageGeometry",
    "JointNormalization",
    "LogitLens",
    "MLLMAttributionResult",
    "MultiScaleAttribution",
    "PromptInput",
    "RankCorrelationDenoiser",
    "TeacherForced",
    "TokenActivationMap",
    "TokenLogProb",
    "__version__",
    "check_llm_attribution",
]
