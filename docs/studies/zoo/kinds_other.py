"""Classes whose decoder gets no lattice of image tokens, or gets them in another way.

Queries over the whole picture, discrete codes, cross-attention, encoder-decoders.
"""

from studies.zoo.settings import SAM, VQ, Settings, square
from studies.zoo.shrink import IMAGE, KEEP, WIDTH

EIGHT = "ABCDEFGH"
CODES = {f"IMGIMG{a}{b}Z": 100 + n for n, (a, b) in enumerate((a, b) for a in EIGHT for b in EIGHT)}

OTHER: dict[str, Settings] = {
    "apertus1p5": Settings(
        {
            "image_token_offset": 200,
            "audio_token_offset": 264,
            "text_config": {"vocab_size": 300},
            "vision_config": {**VQ, "attn_resolutions": [8], "codebook_size": 64},
            "audio_config": {
                "hidden_size": WIDTH,
                "codebook_dim": WIDTH,
                "codebook_size": 32,
                "num_filters": 4,
            },
        },
        {"size": {"min_pixels": 16 * 16, "max_pixels": 32 * 32}, "spatial_factor": 4},
    ),
    "aria": Settings(
        config={
            "projector_patch_to_query_dict": {1225: 128, 4900: 256},
            "vision_config": {"image_size": 490, "patch_size": 14},
        },
        images={"max_image_size": 490, "min_image_size": 56},
    ),
    "blip": Settings(tokens=0),
    "blip-2": Settings({"num_query_tokens": 32}, tokens=32),
    "chameleon": Settings(
        {
            "vocab_size": 180,
            "vocabulary_map": {"<image>": IMAGE, **CODES},
            "vq_config": {**VQ, "num_embeddings": 64},
        }
    ),
    "deepseek_ocr2": Settings(
        {
            "text_config": {"mlp_layer_types": ["dense", "sparse"]},
            "vision_config": {
                "sam_config": {
                    **SAM,
                    "image_size": 64,
                    "downsample_channels": [WIDTH, WIDTH],
                    "mlp_dim": 48,
                }
            },
        },
        {"size": square(64), "tile_size": 64},
    ),
    "diffusion_gemma": Settings(
        {
            "canvas_length": 16,
            "vision_config": {"patch_size": 4},
            "text_config": {
                "per_layer_config": KEEP,
                "layer_types": ["sliding_attention", "full_attention"],
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 16,
            },
        },
        like="gemma4",
        inputs=("image_position_ids", "mm_token_type_ids"),
        images={"max_soft_tokens": 70, "pooling_kernel_size": 2, "patch_size": 4},
    ),
    "emu3": Settings(
        {
            "vocabulary_map": {
                "<image>": IMAGE,
                "<|extra_200|>": 99,
                **{f"<|visual token {n:06d}|>": 100 + n for n in range(64)},
            },
            "text_config": {"vocab_size": 180},
            "vq_config": {
                **VQ,
                "codebook_size": 64,
                "attn_resolutions": [8],
                "hidden_size": 64,
                "num_attention_heads": 1,
                "embed_dim": 4,
                "latent_channels": 4,
            },
        },
        {"min_pixels": 16 * 16, "max_pixels": 32 * 32, "spatial_factor": 4},
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
        {"size": square(64), "crop_size": square(64)},
    ),
    "git": Settings(
        {"hidden_size": 36, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 160},
        tokens=0,
    ),
    "idefics": Settings(tokens=0),
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
    "instructblip": Settings({"num_query_tokens": 32}, tokens=32),
    "kosmos-2": Settings({"latent_query_num": 16}, tokens=16),
    "kosmos-2.5": Settings(
        {"latent_query_num": 16, "vision_config": {"patch_embed_hidden_size": 48}},
        {"max_patches": 64},
        tokens=16,
    ),
    "mllama": Settings({"vision_config": {"vision_output_dim": 2 * WIDTH}}, tokens=1),
    "pix2struct": Settings(
        {"vision_config": {"patch_embed_hidden_size": 48}}, {"max_patches": 64}, tokens=0
    ),
    "pp_formulanet": Settings(
        {
            "vision_config": {
                **SAM,
                "image_size": 64,
                "mlp_dim": 48,
                "decoder_hidden_size": WIDTH,
                "post_conv_in_channels": WIDTH,
                "post_conv_mid_channels": WIDTH,
                "post_conv_out_channels": WIDTH,
            }
        },
        {"size": square(64)},
        tokens=0,
    ),
    "t5gemma2": Settings(
        {"encoder": {"mm_tokens_per_image": 16, "image_token_index": IMAGE}}, tokens=16
    ),
    "udop": Settings(
        {"image_size": 32, "patch_size": 4, "num_decoder_layers": 2}, {"apply_ocr": False}, tokens=0
    ),
}
