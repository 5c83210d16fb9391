"""What a class needs beyond the tables of :mod:`studies.zoo.shrink`, and what several need.

Most need nothing. The others need sizes that fit each other (a head's width and its rotary
sections, a tower's stride and its picture), or a processor that cuts small tiles. Which class
needs what stands in ``kinds_one_size``, ``kinds_tiles``, ``kinds_native`` and ``kinds_other``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from studies.zoo.shrink import KEEP, WIDTH

Values = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Overrides of one class.

    Attributes:
        config: of its configuration (:func:`studies.zoo.shrink.tiny_config`).
        images: of its image processor's constructor.
        tokens: placeholders of a picture, where the model can't be asked.
        span: a picture's ids in the prompt from what the processor made of it, where they are
            more than a row of placeholders.
        pixels: the pixel inputs from what the image processor made, where it is not they.
        like: the kind whose image processor it takes, where transformers maps none.
        inputs: side inputs that it takes although its ``forward`` does not name them.
    """

    config: Values = field(default_factory=dict)
    images: Values = field(default_factory=dict)
    tokens: int | None = None
    span: Callable[[Mapping[str, Any]], list[int]] | None = None
    pixels: Callable[[Mapping[str, Any]], Values] | None = None
    like: str | None = None
    inputs: tuple[str, ...] = ()


def square(side: int) -> Values:
    """A size of equal sides, as image processors name it."""
    return {"height": side, "width": side}


def rope(*sections: int) -> Values:
    """Rotary settings; the sections sum to half of a head's rotated part."""
    common = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return {**common, "mrope_section": list(sections)}


LINEAR_AND_FULL = {"text_config": {"layer_types": ["linear_attention", "full_attention"]}}
SLIDING_AND_FULL = {
    "num_global_key_value_heads": KEEP,
    "layer_types": ["sliding_attention", "full_attention"],
}
NO_GROUPS = {"text_config": {"num_key_value_heads": 4}}
SAM = {"window_size": 4, "global_attn_indexes": [1], "output_channels": 32}
OWN_RATIO = {"vision_config": {"mlp_ratio": KEEP}}
VQ = {  # an autoencoder that halves a picture's sides twice, of 64 codes
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "latent_channels": WIDTH,
    "embed_dim": WIDTH,
    "resolution": 32,
}
