"""The maths: pure functions on tensors, one per formula. Nothing here knows a model.

Shapes use the same letters throughout: ``targets`` are the explained tokens, ``tokens`` the text
tokens that serve as context, ``cells`` the image cells of *all* images of the sample laid end to
end (so that one fit or one normalisation spans them all).

Sources are named in each docstring: **paper** is "Explaining multimodal LLMs via intra-modal
token interactions" (arXiv 2509.22415), **TAM** is "Token Activation Map" (arXiv 2506.23270) as
its released code computes it, **our reading** is ours where the paper leaves the detail open.
"""

from captum_mllm.functional.calibration import calibrate
from captum_mllm.functional.interference import (
    arc_subtract,
    context_weights,
    eci_subtract,
    joint_min_max,
)
from captum_mllm.functional.maps import (
    AGGREGATIONS,
    Aggregation,
    aggregate,
    lens_logits,
    rank_gaussian_filter,
    resize_attributions,
    upsample,
)
from captum_mllm.functional.masks import grid_mask, rank_mask
from captum_mllm.functional.pixels import (
    find_layout,
    frames_to_patches,
    join_tiles,
    patches_to_frames,
    resize_pixels,
    split_tiles,
)
from captum_mllm.functional.ranking import rank_biased_overlap, top_k_rankings
from captum_mllm.functional.scales import (
    SCALE_NORMS,
    ScaleNorm,
    adaptive_weights,
    match_levels,
    rank_correlation,
)
from captum_mllm.functional.views import (
    WHOLE,
    Box,
    join_windows,
    merge_views,
    resample_cells,
    sum_cells,
    window_boxes,
)

__all__ = [
    "AGGREGATIONS",
    "SCALE_NORMS",
    "WHOLE",
    "Aggregation",
    "Box",
    "ScaleNorm",
    "adaptive_weights",
    "aggregate",
    "arc_subtract",
    "calibrate",
    "context_weights",
    "eci_subtract",
    "find_layout",
    "frames_to_patches",
    "grid_mask",
    "join_tiles",
    "join_windows",
    "joint_min_max",
    "lens_logits",
    "match_levels",
    "merge_views",
    "patches_to_frames",
    "rank_biased_overlap",
    "rank_correlation",
    "rank_gaussian_filter",
    "rank_mask",
    "resample_cells",
    "resize_attributions",
    "resize_pixels",
    "split_tiles",
    "sum_cells",
    "top_k_rankings",
    "upsample",
    "window_boxes",
]
