"""The maths: pure functions on tensors, one file per step of the paper. Nothing here knows a model.

- ``lens``: the logit lens, the raw map of a token.
- ``msea``: multi-scale explanation aggregation.
- ``tam``: context weights, interference, joint normalisation, rank Gaussian filter.
- ``arc``: activation ranking correlation: rankings, their overlap, the subtraction.
- ``direct``: direct logit attribution, and its product with the lens.
- ``calibration``: maps whose values a threshold can separate.
- ``resampling``, ``patches``, ``segments``: other grids, how models cut up an image, segments.
- ``odds``: how certain a token is, without saturation.
- ``ownership``: which token hears which pixel, read from the signs of a few gradients.

The axes have the same names throughout: ``targets`` are the explained tokens, ``tokens`` the text
tokens that serve as context, and ``cells`` the cells of *all* images of the sample concatenated (so
that one fit or one normalisation spans them all).

Each docstring names its source: **paper** is "Explaining multimodal LLMs via intra-modal token
interactions" (arXiv 2509.22415), **TAM** is "Token Activation Map" (arXiv 2506.23270) as its
released code computes it, and **our reading** is ours where the paper leaves a detail open.
"""

from captum_mllm.functional.arc import arc_subtract, rank_biased_overlap, top_k_rankings
from captum_mllm.functional.calibration import calibrate
from captum_mllm.functional.direct import (
    added_to_scores,
    attention_rows,
    head_contributions,
    head_outputs,
    product_of_experts,
    visible_keys,
)
from captum_mllm.functional.lens import lens_logits
from captum_mllm.functional.msea import (
    AGGREGATIONS,
    Aggregation,
    adaptive_weights,
    aggregate,
    rank_correlation,
)
from captum_mllm.functional.odds import log_odds
from captum_mllm.functional.ownership import NOBODY, SEVERAL, owners, sign_codes
from captum_mllm.functional.patches import (
    find_layout,
    frames_to_patches,
    join_tiles,
    patches_to_frames,
    split_tiles,
)
from captum_mllm.functional.resampling import (
    WHOLE,
    Box,
    join_windows,
    merge_views,
    resample_cells,
    resize_attributions,
    resize_pixels,
    sum_cells,
    upsample,
    window_boxes,
)
from captum_mllm.functional.segments import grid_mask, rank_mask
from captum_mllm.functional.tam import (
    context_weights,
    eci_subtract,
    joint_min_max,
    rank_gaussian_filter,
)

__all__ = [
    "AGGREGATIONS",
    "NOBODY",
    "SEVERAL",
    "WHOLE",
    "Aggregation",
    "Box",
    "adaptive_weights",
    "added_to_scores",
    "aggregate",
    "arc_subtract",
    "attention_rows",
    "calibrate",
    "context_weights",
    "eci_subtract",
    "find_layout",
    "frames_to_patches",
    "grid_mask",
    "head_contributions",
    "head_outputs",
    "join_tiles",
    "join_windows",
    "joint_min_max",
    "lens_logits",
    "log_odds",
    "merge_views",
    "owners",
    "patches_to_frames",
    "product_of_experts",
    "rank_biased_overlap",
    "rank_correlation",
    "rank_gaussian_filter",
    "rank_mask",
    "resample_cells",
    "resize_attributions",
    "resize_pixels",
    "sign_codes",
    "split_tiles",
    "sum_cells",
    "top_k_rankings",
    "upsample",
    "visible_keys",
    "window_boxes",
]
