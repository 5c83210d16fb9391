"""Classes that take a picture at about its own size, as rows of patches."""

from studies.zoo import spans
from studies.zoo.settings import (
    LINEAR_AND_FULL,
    OWN_RATIO,
    SLIDING_AND_FULL,
    Settings,
    rope,
    square,
)
from studies.zoo.shrink import CLASS, KEEP, VISION_START, VOCABULARY, WIDTH

NATIVE = {"size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}}
NO_GROUPS = {"text_config": {"num_key_value_heads": 4}}
PIXTRAL = {"patch_size": square(8), "size": {"longest_edge": 64}}  # a patch of 4, merged by 2
INKLING = {**OWN_RATIO, "text_config": {"unpadded_vocab_size": VOCABULARY}}
MUSE_AUDIO = {"out_hidden_size": 32, "hidden_sizes": (8, 8, 8, 8), "num_hidden_layers": 4}
MROPE = Settings(config={"text_config": {"rope_parameters": rope(2, 1, 1)}})
THINKER = {
    "vision_start_token_id": VISION_START,
    **MROPE.config,
}  # its code asks for it, its class has none

NATIVE_SIZE: dict[str, Settings] = {
    "cohere_compass": Settings(
        {
            "text_config": {
                "layer_types": KEEP,
                "rope_parameters": {
                    "full_attention": rope(2, 1, 1),
                    "sliding_attention": rope(2, 1, 1),
                },
            }
        }
    ),
    "dots3_note": Settings(
        {
            "text_config": {"num_key_value_heads": 4},
            "vision_config": {
                "pyramid_num_routed": [0, 4],
                "adapter_in_dim": WIDTH,
                "adapter_out_dim": WIDTH,
            },
            "audio_config": {"adapter_input_size": WIDTH},
        },
        {"temporal_patch_size": 1},
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
    "fuyu": Settings(
        {"patch_size": 4, "image_size": 32},
        {"size": square(64)},
        span=spans.rows_of_patches,
        pixels=spans.fuyu_patches,
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
    "glm46v": MROPE,
    "glm4v": MROPE,
    "glm4v_moe": Settings(MROPE.config, like="glm4v"),
    "glm5_next": Settings(
        {
            "text_config": {
                "num_key_value_heads": 4,
                "qk_rope_head_dim": 0,
                "linear_num_heads": 4,
                "linear_head_dim": 8,
                "layer_types": ["linear_attention", "indexed_attention"],
            }
        },
        {"min_image_tokens": 4, "max_image_tokens": 64},
    ),
    "glm_ocr": Settings(MROPE.config, like="glm46v"),
    "glmga": MROPE,
    "hunyuan_vl": Settings(
        {"text_config": {"rope_parameters": rope(1, 1, 1, 1)}}, {"patch_size": 4, **NATIVE}
    ),
    "hy_v4_vl": Settings(images={"patch_size": 4, **NATIVE}),
    "inkling2": Settings(INKLING, {"size": square(8)}),
    "inkling2_loop": Settings(INKLING, {"size": square(8)}),
    "inkling_mm_model": Settings(images={"size": square(4)}),
    "kimi_k25": Settings(NO_GROUPS, {"max_patches": 1024}),
    "lfm3_vl": Settings({"text_config": {"layer_types": ["conv", "full_attention"]}}),
    "lighton_ocr": Settings(images=PIXTRAL, span=spans.rows_of_cells),
    "mistral3": Settings(images=PIXTRAL, span=spans.rows_of_cells),
    "mistral_large4": Settings(NO_GROUPS, PIXTRAL, span=spans.rows_of_cells),
    "muse_glimmer": Settings({"out_hidden_size": 128}, {"max_image_tokens": 64}),
    "muse_spark": Settings(
        {"out_hidden_size": 128, "audio_config": MUSE_AUDIO}, {"max_image_tokens": 64}
    ),
    "nemotron_h_omni": Settings(
        {
            "vision_hidden_size": WIDTH,
            "vision_config": {
                "mlp_ratio": KEEP,
                "patch_dim": 48,
                "video_patch_dim": 96,
                "video_temporal_patch_size": 2,
            },
        },
        {"patch_size": 4, "min_num_patches": 16, "max_num_patches": 144},
    ),
    "paddleocr_vl": MROPE,
    "qwen2_5_omni_thinker": Settings(THINKER, like="qwen2_vl"),
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen3_5": Settings(LINEAR_AND_FULL),
    "qwen3_5_moe": Settings(LINEAR_AND_FULL),
    "qwen3_omni_moe_thinker": Settings(THINKER, like="qwen2_vl"),
    "qwen3_vl_moe": Settings(like="qwen3_vl"),
    "qwen4_exp": Settings(LINEAR_AND_FULL),
}
