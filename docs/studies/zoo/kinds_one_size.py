"""Classes whose picture always has one size."""

from studies.zoo.settings import OWN_RATIO, SAM, VQ, Settings, square
from studies.zoo.shrink import KEEP

SAM_64 = Settings(config={"vision_config": {**SAM, "image_size": 64}}, images={"size": square(64)})
FASTVIT = {  # one block a stage, each half as wide as in the smallest real one or less
    "architecture": "fastvit_mci0",
    "do_pooling": True,
    "hidden_size": 128,
    "num_features": 128,
    "model_args": {
        "inference_mode": False,
        "layers": (1, 1, 1, 1),
        "embed_dims": (8, 16, 32, 64),
    },
}

ONE_SIZE: dict[str, Settings] = {
    "deepseek_vl_hybrid": Settings(
        {
            **OWN_RATIO,
            "high_res_vision_config": {**SAM, "image_size": 64, "mlp_ratio": KEEP},
        },
        {"high_res_size": square(64)},
    ),
    "fast_vlm": Settings(
        {"vision_config": FASTVIT},
        {"size": {"shortest_edge": 256}, "crop_size": square(256)},
        like="vipllava",
    ),
    "gemma3n": Settings(
        {
            "vision_config": {
                "architecture": "mobilenetv3_small_050",
                "vocab_size": 16,
                "vocab_offset": 128,
                "hidden_size": 288,
            },
            "vision_soft_tokens_per_image": 36,
        },
        {"size": square(192)},
    ),
    "got_ocr2": SAM_64,
    "janus": Settings({"vq_config": {**VQ, "num_embeddings": 64}}),
    "pp_chart2table": SAM_64,
    "vipllava": Settings({"vision_feature_layers": [-1, -2]}),
}
