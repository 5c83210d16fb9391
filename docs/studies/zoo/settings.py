"""What single classes need beyond the tables of :mod:`studies.zoo.shrink`.

Most need nothing. The others need sizes that fit each other (a head's width and its rotary
sections, a tower's stride and its picture), or a processor that cuts small tiles.
"""

from dataclasses import dataclass, field
from typing import Any

from studies.zoo.shrink import CLASS, IMAGE, KEEP, VOCABULARY, WIDTH

Values = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Overrides of one class.

    Attributes:
        config: of its configuration (:func:`studies.zoo.shrink.tiny_config`).
        images: of its image processor's constructor.
        tokens: placeholders of a picture, where the model can't be asked.
        like: the kind whose image processor it takes, where transformers maps none.
        picture: (width, height) of the smallest picture it takes well, default 60 x 60.
    """

    config: Values = field(default_factory=dict)
    images: Values = field(default_factory=dict)
    tokens: int | None = None
    like: str | None = None
    picture: tuple[int, int] = (60, 60)


def _square(side: int) -> Values:
    return {"height": side, "width": side}


PINPOINTS = [[32, 64], [64, 32], [64, 64]]
ANYRES = Settings(
    config={"image_grid_pinpoints": PINPOINTS},
    images={
        "image_grid_pinpoints": PINPOINTS,
        "size": {"shortest_edge": 32},
        "crop_size": _square(32),
    },
)
TILES = {"crop_to_patches": True, "max_patches": 4}
NATIVE = {"size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}}
LINEAR_AND_FULL = {"text_config": {"layer_types": ["linear_attention", "full_attention"]}}
SLIDING_AND_FULL = {
    "num_global_key_value_heads": KEEP,
    "layer_types": ["sliding_attention", "full_attention"],
}
NO_GROUPS = {"text_config": {"num_key_value_heads": 4}}
IDEFICS3 = Settings(
    config={"scale_factor": 2},
    images={"max_image_size": {"longest_edge": 32}, "size": {"longest_edge": 64}},
)
PIXTRAL = {"patch_size": _square(8), "size": {"longest_edge": 64}}  # a patch of 4, merged by 2
SLICES = {"scale_resolution": 32, "patch_size": 4, "max_slice_nums": 4}
SAM = {"window_size": 4, "global_attn_indexes": [1], "output_channels": 32}
SAM_64 = Settings(
    config={"vision_config": {**SAM, "image_size": 64}}, images={"size": _square(64)}
)
OWN_RATIO = {"vision_config": {"mlp_ratio": KEEP}}
MUSE_AUDIO = {"out_hidden_size": 32, "hidden_sizes": (8, 8, 8, 8), "num_hidden_layers": 4}


def _rope(*sections: int) -> Values:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


GLM = Settings(config={"text_config": {"rope_parameters": _rope(2, 1, 1)}})
QFORMER = {
    CLASS: "Blip2QFormerConfig",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "encoder_hidden_size": 64,
    "cross_attention_frequency": 1,
}
EIGHT = "ABCDEFGH"
CODES = {f"IMGIMG{a}{b}Z": 100 + n for n, (a, b) in enumerate((a, b) for a in EIGHT for b in EIGHT)}
TIMM_VIT = {
    "architecture": "vit_pe_core_large_patch14_336",
    "model_args": {
        "embed_dim": WIDTH,
        "img_size": [32, 32],
        "patch_size": 4,
        "depth": 2,
        "num_heads": 4,
        "global_pool": "",
        "use_post_transformer_norm": False,
        "init_values": 0.1,
        "ref_feat_shape": [8, 8],
    },
}
FASTVIT = {
    "architecture": "fastvit_mci0",
    "do_pooling": True,
    "hidden_size": 1024,
    "num_features": 1024,
    "model_args": {"inference_mode": False},
}

SETTINGS: dict[str, Settings] = {
    "aria": Settings(
        config={
            "projector_patch_to_query_dict": {1225: 128, 4900: 256},
            "vision_config": {"image_size": 490, "patch_size": 14},
        },
        images={"max_image_size": 490, "min_image_size": 56},
    ),
    "aya_vision": Settings({"downsample_factor": 2}, TILES),
    "blip-2": Settings({"num_query_tokens": 32}, tokens=32),
    "chameleon": Settings({"vocabulary_map": {"<image>": IMAGE, **CODES}}),
    "cohere2_vision": Settings({"downsample_factor": 2}, {"max_patches": 4}),
    "cohere_compass": Settings(
        {
            "text_config": {
                "layer_types": KEEP,
                "rope_parameters": {
                    "full_attention": _rope(2, 1, 1),
                    "sliding_attention": _rope(2, 1, 1),
                },
            }
        }
    ),
    "deepseek_vl_hybrid": Settings(
        {
            **OWN_RATIO,
            "high_res_vision_config": {**SAM, "image_size": 64, "mlp_ratio": KEEP},
        },
        {"high_res_size": _square(64)},
    ),
    "ernie4_5_vl_moe": Settings(
        {
            "text_config": {
                "head_dim": 128,
                "rope_parameters": KEEP,
                "moe_intermediate_size": [16, 16],
            }
        }
    ),
    "fast_vlm": Settings(
        {"vision_config": FASTVIT},
        {"size": {"shortest_edge": 256}, "crop_size": _square(256)},
        like="vipllava",
    ),
    "florence2": Settings(
        {
            "vision_config": {
                "embed_dim": (16, 16, 16, 16),
                "num_heads": (2, 2, 2, 2),
                "num_groups": (2, 2, 2, 2),
                "depths": (1, 1, 1, 1),
                "mlp_ratio": 2.0,
                "projection_dim": WIDTH,
            }
        },
        {"size": _square(64), "crop_size": _square(64)},
    ),
    "gemma3n": Settings(
        {
            "vision_config": {"architecture": "mobilenetv3_small_050", "hidden_size": 288},
            "vision_soft_tokens_per_image": 4,
        },
        {"size": _square(64)},
    ),
    "gemma4": Settings(
        {
            "vision_config": {CLASS: "Gemma4VisionConfig", "num_hidden_layers": 2},
            "text_config": SLIDING_AND_FULL,
        },
        {"max_soft_tokens": 70, "pooling_kernel_size": 2, "patch_size": 4},
    ),
    "gemma4_unified": Settings(
        {
            "vision_config": {CLASS: "Gemma4UnifiedVisionConfig", "num_hidden_layers": 2},
            "text_config": SLIDING_AND_FULL,
        },
        {"max_soft_tokens": 70, "pooling_kernel_size": 2, "patch_size": 4},
    ),
    "git": Settings(
        {"hidden_size": 36, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 160}
    ),
    "glm46v": GLM,
    "glm4v": GLM,
    "glm4v_moe": Settings(GLM.config, like="glm4v"),
    "glm5_next": Settings(
        {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
        {"min_image_tokens": 4, "max_image_tokens": 64},
    ),
    "glm_ocr": Settings(GLM.config, like="glm46v"),
    "glmga": GLM,
    "got_ocr2": SAM_64,
    "granite4_vision": Settings(
        {
            "vision_config": {"hidden_size": 64, "num_attention_heads": 4},
            "image_grid_pinpoints": PINPOINTS,
            "deepstack_layer_map": [[0, 0]],
            "downsample_rate": "2/4",
            "spatial_target_layers": [0],
            "qformer_config": QFORMER,
        },
        ANYRES.images,
    ),
    "granite_docling": Settings({"scale_factor": 2}, {"max_patches": 4}),
    "hunyuan_vl": Settings(
        {"text_config": {"rope_parameters": _rope(1, 1, 1, 1)}}, {"patch_size": 4, **NATIVE}
    ),
    "hy_v4_vl": Settings(images={"patch_size": 4, **NATIVE}),
    "idefics2": Settings(
        {
            "perceiver_config": {
                "hidden_size": WIDTH,
                "resampler_n_latents": 8,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            }
        },
        {"size": {"shortest_edge": 16, "longest_edge": 32}},
    ),
    "idefics3": IDEFICS3,
    "inkling2": Settings(OWN_RATIO, {"size": _square(8)}),
    "inkling2_loop": Settings(OWN_RATIO, {"size": _square(8)}),
    "inkling_mm_model": Settings(images={"size": _square(4)}),
    "internvl": Settings(images=TILES),
    "kimi_k25": Settings(NO_GROUPS, {"max_patches": 1024}),
    "lfm2_vl": Settings(
        images={
            "encoder_patch_size": 4,
            "tile_size": 32,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
            "max_tiles": 4,
            "max_num_patches": 64,
            "size": _square(32),
        }
    ),
    "lighton_ocr": Settings(images=PIXTRAL),
    "llama4": Settings({"vision_config": {"intermediate_size": 128}}, {"max_patches": 4}),
    "llava_next": ANYRES,
    "llava_next_video": ANYRES,
    "llava_onevision": Settings(
        {"image_grid_pinpoints": [[32, 32], *PINPOINTS]},
        {"image_grid_pinpoints": [[32, 32], *PINPOINTS]},
    ),
    "minicpm_ocr": Settings(images=SLICES),
    "minicpmv4_6": Settings(
        {"insert_layer_id": 1, "vision_config": {"insert_layer_id": 1}, **LINEAR_AND_FULL}, SLICES
    ),
    "minicpmv4_7": Settings(
        {"insert_layer_id": 1, "vision_config": {"insert_layer_id": 1}}, SLICES
    ),
    "mistral3": Settings(images=PIXTRAL),
    "mistral_large4": Settings(NO_GROUPS, PIXTRAL),
    "molmo2": Settings(
        {
            "adapter_config": {
                "vision_feature_layer": [1, 0],
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "text_hidden_size": WIDTH,
            }
        },
        {"max_crops": 4, "overlap_margins": [1, 1], "patch_size": 4},
    ),
    "muse_glimmer": Settings({"out_hidden_size": 128}, {"max_image_tokens": 64}),
    "muse_spark": Settings(
        {"out_hidden_size": 128, "audio_config": MUSE_AUDIO}, {"max_image_tokens": 64}
    ),
    "nemotron_h_omni": Settings(
        {"vision_config": {"mlp_ratio": KEEP, "video_temporal_patch_size": 2}},
        {"patch_size": 4, "min_num_patches": 16, "max_num_patches": 144},
    ),
    "ovis2": Settings(
        {
            "visual_indicator_token_ids": (111, 112, 113, 114, 115),
            "vocab_size": VOCABULARY,
            "vision_config": {"vocab_size": 64, "hidden_stride": 2},
        },
        TILES,
    ),
    "paddleocr_vl": GLM,
    "perception_lm": Settings(
        {"vision_config": TIMM_VIT, "projector_pooling_ratio": 2},
        {"tile_size": 32, "max_num_tiles": 4},
    ),
    "pp_chart2table": SAM_64,
    "qianfan_ocr": Settings(images=TILES),
    "qwen2_5_omni_thinker": Settings(like="qwen2_vl"),
    "qwen3_5": Settings(LINEAR_AND_FULL),
    "qwen3_5_moe": Settings(LINEAR_AND_FULL),
    "qwen3_omni_moe_thinker": Settings(like="qwen2_vl"),
    "qwen3_vl_moe": Settings(like="qwen3_vl"),
    "qwen4_exp": Settings(LINEAR_AND_FULL),
    "smolvlm": IDEFICS3,
    "step3p7": Settings(
        {"vision_config": {"mlp_ratio": 2.0}}, {"patch_size": 32, "max_image_size": 96}
    ),
    "vipllava": Settings({"vision_feature_layers": [-1, -2]}),
}
