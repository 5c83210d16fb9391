"""captum_mllm: explain multimodal large language models with captum.

For every word a model says: which image regions and which earlier words support it. The data
flows one way::

    inputs -> adapter -> one forward under hooks -> TokenTrace -> (MSEA: more scales) -> TokenTrace
           -> (ARC | TAM | as it is) -> MLLMAttributionResult -> metrics | visualization | cli

``adapters`` hold what differs between model families, ``model`` runs the user's model,
``functional`` holds the formulas, one file per step of the paper, ``attr`` the captum attributors,
``result`` what they return, ``bridge`` what captum's own methods need on such models, ``methods``
every method by its name. CONTRIBUTING.md says where each formula stands.
"""

from captum_mllm.attr import (
    ARC,
    MSEA,
    DirectLens,
    DirectLogitAttribution,
    JointNormalization,
    LogitLens,
    MultiScaleAttribution,
    RankCorrelationDenoiser,
    TokenActivationMap,
)
from captum_mllm.bridge import PromptInput, TeacherForced, TokenLogProb, check_llm_attribution
from captum_mllm.geometry import ImageGeometry
from captum_mllm.model.discovery import probe_layout
from captum_mllm.result import MLLMAttributionResult

__version__ = "0.1.0.dev0"

__all__ = [
    "ARC",
    "MSEA",
    "DirectLens",
    "DirectLogitAttribution",
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
    "probe_layout",
]
