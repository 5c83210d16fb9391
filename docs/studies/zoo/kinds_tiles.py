"""Classes that cut a picture into tiles or slices beside a small whole one."""

from studies.zoo import spans
from studies.zoo.settings import LINEAR_AND_FULL, SAM, Settings, square
from studies.zoo.shrink import CLASS, VOCABULARY, WIDTH

PINPOINTS = [[32, 64], [64, 32], [64, 64]]
ANYRES = Settings(
    config={"image_grid_pinpoints": PINPOINTS},
    images={
        "image_grid_pinpoints": PINPOINTS,
        "size": {"shortest_edge": 32},
        "crop_size": square(32),
    },
)
TILES = {"crop_to_patches": True, "max_patches": 4}
IDEFICS3 = Settings(
    config={"scale_factor": 2},
    images={"max_image_size": {"longest_edge": 32}, "size": {"longest_edge": 64}},
    span=spans.named_tiles,
)
SLICES = {"scale_resolution": 32, "patch_size": 4, "max_slice_nums": 4}
QFORMER = {
    CLASS: "Blip2QFormerConfig",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "encoder_hidden_size": 64,
    "cross_attention_frequency": 1,
}
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

TILES_AND_WHOLE: dict[str, Settings] = {
    "aya_vision": Settings({"downsample_factor": 2}, TILES),
    "cohere2_vision": Settings(
        {"downsample_factor": 2, "alignment_intermediate_size": 64}, {"max_patches": 4}
    ),
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
    "idefics3": IDEFICS3,
    "internvl": Settings(images=TILES),
    "lfm2_vl": Settings(
        images={
            "encoder_patch_size": 4,
            "tile_size": 32,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
            "max_tiles": 4,
            "max_num_patches": 64,
            "size": square(32),
        }
    ),
    "llama4": Settings({"vision_config": {"intermediate_size": 128}}, {"max_patches": 4}),
    "llava_next": ANYRES,
    "llava_next_video": ANYRES,
    "llava_onevision": Settings(
        {"image_grid_pinpoints": [[32, 32], *PINPOINTS]},
        {"image_grid_pinpoints": [[32, 32], *PINPOINTS]},
    ),
    "minicpm_ocr": Settings(
        {"insert_layer_id": 1, "vision_config": {"insert_layer_id": 1}, **LINEAR_AND_FULL}, SLICES
    ),
    "minicpmv4_6": Settings(
        {"insert_layer_id": 1, "vision_config": {"insert_layer_id": 1}, **LINEAR_AND_FULL}, SLICES
    ),
    "minicpmv4_7": Settings(
        {
            "insert_layer_id": 1,
            "vision_config": {"insert_layer_id": 1},
            "image_start_id": spans.IMAGE_OPEN,
            "image_end_id": spans.IMAGE_CLOSE,
            "slice_start_id": spans.SLICE_START,
            "slice_end_id": spans.SLICE_END,
            "newline_id": spans.ROW_END,
            **LINEAR_AND_FULL,
        },
        SLICES,
        span=spans.slices,
    ),
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
    "ovis2": Settings(
        {
            "visual_indicator_token_ids": (111, 112, 113, 114, 115),
            "vocab_size": VOCABULARY,
            "vision_config": {"vocab_size": 64, "hidden_stride": 2},
        },
        TILES,
    ),
    "perception_lm": Settings(
        {"vision_config": TIMM_VIT, "projector_pooling_ratio": 2},
        {"tile_size": 32, "max_num_tiles": 4},
    ),
    "qianfan_ocr": Settings(images=TILES),
    "smolvlm": IDEFICS3,
    "step3p7": Settings(
        {"vision_config": {"mlp_ratio": 2.0}, "text_config": {"sliding_window": 64}},
        {"patch_size": 32, "max_image_size": 96},
    ),
    "unlimited_ocr": Settings(
        {
            "vision_config": {
                "sam_config": {
                    **SAM,
                    "image_size": 64,
                    "downsample_channels": [WIDTH, WIDTH],
                    "mlp_dim": 48,
                }
            },
        },
        {"size": square(64)},
    ),
}
