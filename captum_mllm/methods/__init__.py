"""Every method, baseline and control by one call: what a fair comparison needs.

``explain(name, model, processor, inputs, target)`` gives the maps of the whole answer on the
model's own grid, in [0, 1], whichever method computed them.
"""

# The order of the imports is the order of METHODS.
from captum_mllm.methods import ours, gradients, attention, ablation, controls  # isort: skip  # noqa: F401
from captum_mllm.methods.mask_controls import control_maps
from captum_mllm.methods.registry import METHODS, Method, explain

__all__ = ["METHODS", "Method", "control_maps", "explain"]
