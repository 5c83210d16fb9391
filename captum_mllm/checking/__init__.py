"""Check on a user's own model what its explanations rest on: ``captum_mllm.check``.

Nobody can run every public checkpoint, so the library proves itself where it is used: ``check``
measures on the given model that its image tokens lie where its adapter says, that the lens is the
model's head, that teacher forcing is what ``generate`` computed, and so on, and gives a line for
each with its figures, a verdict and what to do.
"""

from captum_mllm.checking.report import Finding, TrustReport
from captum_mllm.checking.run import check

__all__ = ["Finding", "TrustReport", "check"]
