"""The attributors with the plain published settings, for tests of the formulas themselves.

What was chosen by measurement is tested on its own (tests/attr/test_defaults.py).
"""

import captum_mllm

ARC = captum_mllm.ARC.paper
MSEA = captum_mllm.MSEA.paper
RankCorrelationDenoiser = captum_mllm.RankCorrelationDenoiser.paper


def MultiScaleAttribution(method, *args, **options):  # noqa: N802
    """Over a token attribution ``MSEA.paper``; otherwise the class itself."""
    if not isinstance(method, captum_mllm.attr.TokenAttribution):
        return captum_mllm.MultiScaleAttribution(method, *args, **options)
    names = ("scales", "aggregation")
    return MSEA(method, **dict(zip(names, args, strict=False)), **options)
