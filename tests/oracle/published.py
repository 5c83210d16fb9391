"""The attributors with the plain published settings, for tests of the formulas themselves.

What is chosen by measurement is tested on its own (test_presets.py).
"""

from functools import partial

import captum_mllm

ARC = partial(captum_mllm.ARC, preset="paper")
MSEA = partial(captum_mllm.MSEA, preset="paper")
MultiScaleAttribution = partial(captum_mllm.MultiScaleAttribution, preset="paper")
RankCorrelationDenoiser = partial(captum_mllm.RankCorrelationDenoiser, preset="paper")
