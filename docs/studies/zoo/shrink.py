"""A default configuration of transformers made small: two layers, a width of 32.

A configuration of a vision-language model is a tree: on top what joins the parts, below it one
configuration for text and one (or two) for pictures. Their classes name the same thing in dozens
of ways; the tables here give for every name that transformers uses the small value, and a value
is taken only where the class has such a setting.
"""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

KEEP = ...  # in overrides: the default of the configuration's class stays
CLASS = "class"  # in overrides: the name of a part's configuration class

VOCABULARY, WIDTH, MLP, EXPERT, HEAD = 160, 32, 48, 16, 8
PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO = 90, 91
VISION_START, VISION_END = 92, 93

Values = dict[str, Any]


def _table(*rows: tuple[Any, str]) -> Values:
    """Rows (value, names), names apart by spaces, as name -> value."""
    return {name: value for value, names in rows for name in names.split()}


SPECIAL = _table(
    (IMAGE, "image_token_id image_token_index image_patch_id media_placeholder_token_id"),
    (VIDEO, "video_token_id video_token_index"),
    (VISION_START, "vision_start_token_id"),
    (VISION_END, "vision_end_token_id"),
    (103, "video_start_token_id"),  # not the images' ones: what stands between them is a video
    (104, "video_end_token_id"),
    (94, "boi_token_index boi_token_id im_start_id image_start_token_id"),
    (95, "eoi_token_index eoi_token_id im_end_id image_end_token_id"),
    (96, "audio_token_id audio_token_index"),
    (97, "boa_token_id audio_start_token_id"),
    (98, "eoa_token_id eoa_token_index audio_end_token_id"),
    (99, "im_newline_id image_break_token_id image_newline_token_id"),
    (100, "frame_start_token_id"),
    (101, "frame_end_token_id"),
    (102, "low_res_image_start_token_id"),
)
WIDTHS = "hidden_size d_model word_embed_proj_dim encoder_hidden_size"
LOW_RANK = "q_lora_rank kv_lora_rank qk_head_dim"
EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts"
EXPERT_WIDTHS = (
    "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"
    " share_expert_dim moe_hidden_size moe_shared_expert_intermediate_dim expert_ffn_hidden_size"
    " moe_latent_size router_intermediate_size ple_embed_dim"
)
HEADS = (
    "num_attention_heads encoder_attention_heads decoder_attention_heads num_heads"
    " num_sliding_attention_heads swa_num_attention_heads mamba_num_heads linear_num_value_heads"
)
PAIRS = (  # of each of these a model gets two
    "num_hidden_layers encoder_layers decoder_layers num_layers num_key_value_heads"
    " linear_num_key_heads swa_num_key_value_heads num_global_key_value_heads n_groups"
    " num_attention_groups num_experts_per_tok moe_k moe_topk altup_num_inputs index_n_heads"
    " indexer_n_heads heads_per_ngram hc_count"
)
HEAD_SIZES = (
    "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim"
    " linear_value_head_dim hidden_size_per_layer_input query_pre_attn_scalar global_head_dim"
    " laurel_rank index_head_dim d_kv mamba_head_dim ssm_state_size swa_head_dim"
    " attention_head_dim kv_hidden indexer_head_dim hc_lowrank"
)
NONE = "num_kv_shared_layers num_nextn_predict_layers"
FALSE = "block_auto_adjust_ff_dim attn_temperature_tuning"
ONE = (
    "n_group topk_group first_k_dense_replace num_shared_experts n_shared_experts"
    " cross_attention_frequency indexer_kv_heads make_ngram_vocab_size_divisible_by"
    " split_ngram_parts"
)
MLPS = "intermediate_size intermediate_size_mlp ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff"
TEXT = _table(
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (WIDTH, WIDTHS),
    (MLP, MLPS),
    (PAD, "pad_token_id"),
    (BOS, "bos_token_id decoder_start_token_id"),
    (EOS, "eos_token_id"),
    (4, f"{HEADS} {EXPERTS} indexer_compress_ratio"),
    (2, PAIRS),
    (HEAD, f"{HEAD_SIZES} additional_vocab_size"),
    (EXPERT, f"{EXPERT_WIDTHS} {LOW_RANK} chunk_size"),
    (1, ONE),
    (0, NONE),
    (False, FALSE),
    (1.0, "embedding_multiplier"),
    (2048, "max_position_embeddings"),
    (64, "sliding_window"),
    (512, "index_topk indexer_budget"),  # more than there are tokens: all are attended
    (211, "ngram_vocab_size_base"),
    ([1], "cross_attention_layers"),
    (None, "backbone_layer_counts"),
)
VISION_WIDTHS = (
    "hidden_size embed_dim out_hidden_size projection_dim text_hidden_size projector_input_dim"
    " projector_output_dim vision_output_dim projector_hidden_size width output_dim hidden_dim"
    " n_embed"
)
VISION_HEADS = "num_attention_heads num_heads attention_heads heads num_key_value_heads"
VISION_PAIRS = (
    "num_hidden_layers depth num_layers layers spatial_merge_size temporal_patch_size merge_size"
    " mlp_ratio tokens_per_second pooling_kernel_size"
)
VISION = _table(
    (WIDTH, f"{VISION_WIDTHS} image_size"),
    (MLP, "intermediate_size ffn_dim"),
    (4, f"{VISION_HEADS} patch_size max_num_tiles"),
    (2, VISION_PAIRS),
    (HEAD, "head_dim pos_emb_height pos_emb_width"),
    (64, "num_position_embeddings max_position_embeddings num_patches position_embedding_size"),
    (16, "window_size min_image_size"),
    (64, "max_image_size"),
    (1, "num_global_layers hidden_stride"),
    (5, "num_visual_indicator_tokens"),
    (0, "insert_layer_id"),
    (False, "vision_use_head"),
    ([0], "deepstack_visual_indexes intermediate_layers_indices"),
    ([1], "fullatt_block_indexes"),
)
AUDIO = _table(
    (WIDTH, "d_model hidden_size output_dim out_hidden_size adapter_out_dim output_proj_dims"),
    (MLP, "intermediate_size encoder_ffn_dim"),
    (4, "encoder_attention_heads num_attention_heads num_key_value_heads conf_num_attention_heads"),
    (1, "encoder_layers num_hidden_layers conf_num_hidden_layers"),
    (HEAD, "head_dim downsample_hidden_size"),
    (64, "conv_output_size max_source_positions"),
    (16, "vocab_size"),
    (144, "vocab_offset"),  # its ids are the last of the vocabulary
)
TOP = _table(
    (WIDTH, "hidden_size projector_hidden_size projection_dim projection_hidden_size"),
    (WIDTH, "out_hidden_size"),
    (16, "image_seq_length mm_tokens_per_image vision_soft_tokens_per_image"),
    (0.5, "downsample_ratio pixel_shuffle_ratio"),
)
SECTIONS = {2: [2, 2], 3: [2, 1, 1], 4: [1, 1, 1, 1]}  # shares of half a head, 4 numbers


def tiny_config(kind: str, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The default configuration of a model type, made small.

    Args:
        kind: a key of transformers' CONFIG_MAPPING, "llava".
        overrides: settings that win over the tables; a mapping under a part's name holds that
            part's settings, ``"class"`` in it the name of the part's configuration class, and
            ``KEEP`` as a value leaves a setting as the class has it. Default none.

    Example:
        >>> config = tiny_config("llava", {"text_config": {"num_hidden_layers": 3}})
        >>> config.text_config.hidden_size, config.text_config.num_hidden_layers
        (32, 3)
    """
    default = CONFIG_MAPPING[kind]()
    own = vars(default)
    parts = [name for name in own if isinstance(_setting(default, name), PreTrainedConfig)]
    is_text = not parts or "num_hidden_layers" in own  # some keep the text model's on top
    return _tiny(default, (TEXT if is_text else TOP) | SPECIAL, overrides or {})


def _tiny(default: PreTrainedConfig, table: Values, overrides: Mapping[str, Any]) -> Any:
    """A configuration of the default's class with the table's values, its parts likewise."""
    inner = table if SPECIAL.keys().isdisjoint(table) else TEXT
    parts: Values = {}
    for name in dict.fromkeys([*vars(default), *overrides]):
        part, own = _setting(default, name), overrides.get(name)
        if isinstance(own, Mapping) and CLASS in own:
            part = getattr(transformers, own[CLASS])()
        if isinstance(part, PreTrainedConfig) and (own is None or isinstance(own, Mapping)):
            parts[name] = _tiny(part, _table_of(name, inner), own or {})
    rest = {name: value for name, value in overrides.items() if name not in {*parts, CLASS}}
    values = {**_small(default, table), **parts, **rest}
    return type(default)(**{name: value for name, value in values.items() if value is not KEEP})


def _table_of(name: str, otherwise: Values) -> Values:
    """The table for a part by its name; a part of a part has that one's unless it tells."""
    if name.startswith("audio"):
        return AUDIO
    return VISION if any(word in name for word in ("vision", "visual", "vit")) else otherwise


def _setting(config: PreTrainedConfig, name: str) -> Any:
    """A setting; None where the class refuses to tell."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _small(config: PreTrainedConfig, table: Values) -> Values:
    """The table's values for the settings that a configuration has, in the type it has them."""
    found: Values = {}
    for name, value in table.items():
        if not _has(config, name):
            continue
        old = _setting(config, name)
        if name in ("mlp_ratio", "sliding_window") and old is None:
            continue  # what is off stays off
        if isinstance(old, list | tuple) and not isinstance(value, list):
            if name not in ("image_size", "patch_size"):
                continue  # one value a layer: they have no common small value
            value = type(old)([value] * len(old))
        found[name] = float(value) if isinstance(old, float) and isinstance(value, int) else value
    rope = _setting(config, "rope_parameters")
    return found | ({"rope_parameters": _small_rope(rope)} if isinstance(rope, dict) else {})


def _has(config: PreTrainedConfig, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return hasattr(config, name)
    except Exception:  # some refuse to tell a value that depends on the layer
        return True


def _small_rope(rope: Mapping[str, Any]) -> Values:
    """Rotary settings (perhaps one a type of layer) whose sections fit a head of 8 numbers."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {k: _small_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    small = dict(rope)
    if "mrope_section" in small:
        parts = len(small["mrope_section"])
        small["mrope_section"] = SECTIONS.get(parts, [1] * parts)
        if small.get("partial_rotary_factor", 1) < 1:
            small["partial_rotary_factor"] = 1.0
    return small
