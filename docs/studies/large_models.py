"""Real architectures of 7 and 8 billion parameters with random weights, and inputs for them.

Written out, so that nothing is downloaded; :mod:`studies.large` measures on them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from captum_mllm.functional import frames_to_patches, resize_pixels, split_tiles

SEED, DTYPE, ATTENTION = 0, torch.bfloat16, "sdpa"
BEFORE, AFTER, ANSWER = 4, 16, 64  # text tokens before and after the image, and of the answer
DEFAULT, SMALLER = (1.0, 1.25, 1.5), (1.0, 0.75, 0.5)


@dataclass(frozen=True)
class Case:
    """One picture and the scales at which MSEA sees it.

    Args:
        cells: image tokens down and across at scale 1; of a tile where there are tiles.
        scales: factors of both.
        tokens: image tokens that the forward of each scale must have, thumbnail included.
        tiles: tiles down and across.
    """

    cells: tuple[int, int]
    scales: tuple[float, ...]
    tokens: tuple[int, ...]
    tiles: tuple[int, int] = (1, 1)

    @property
    def map_shape(self) -> tuple[int, int]:
        """Rows and columns of the maps: the grid of the largest scale, without thumbnail."""
        largest = max(self.scales)
        rows, cols = (round(cells * largest) for cells in self.cells)
        return self.tiles[0] * rows, self.tiles[1] * cols


def _squares(*cases: tuple[int, tuple[float, ...]]) -> tuple[Case, ...]:
    """Square pictures of so many tokens a side at scale 1."""
    return tuple(
        Case((side, side), scales, tuple(round(side * s) ** 2 for s in scales))
        for side, scales in cases
    )


def _tiled(side: int, *cases: tuple[int, int, tuple[float, ...]]) -> tuple[Case, ...]:
    """Pictures of so many tiles down and across; tokens with the thumbnail of several tiles."""
    return tuple(
        Case(
            (side, side),
            scales,
            tuple((down * across + (down * across > 1)) * round(side * s) ** 2 for s in scales),
            (down, across),
        )
        for down, across, scales in cases
    )


@dataclass(frozen=True)
class Family:
    """A model's architecture, written out, and what its inputs look like.

    Args:
        title: the model whose architecture it is.
        vision: arguments of the vision config.
        text: arguments of the text config.
        config: makes the whole config of these two.
        pixels: the pixel inputs of a picture (3, height, width) with tiles down and across.
        unit: side of an image token, pixels.
        image: id of the image token.
        markers: ids before and after the image.
        words: ids below are text.
        cases: what is measured.
    """

    title: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    config: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    pixels: Callable[[Tensor, tuple[int, int]], dict[str, Tensor]]
    unit: int
    image: int
    markers: tuple[tuple[int, ...], tuple[int, ...]]
    words: int
    cases: tuple[Case, ...]


def _llava_config(vision: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision),
        text_config=hf.LlamaConfig(**text),
        image_token_index=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _qwen_config(vision: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    ids: dict[str, Any] = {"image_token_id": 151655, "video_token_id": 151656}
    ids |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    parts: dict[str, Any] = {"vision_config": dict(vision), "text_config": dict(text)}
    return hf.Qwen2VLConfig(**parts, **ids, tie_word_embeddings=False)


def _internvl_config(vision: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**vision),
        text_config=hf.Qwen2Config(**text),
        image_token_id=151667,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def _qwen_pixels(picture: Tensor, _tiles: tuple[int, int]) -> dict[str, Tensor]:
    rows = frames_to_patches(picture.expand(2, -1, -1, -1), patch=14, temporal=2, merge=2)
    shape = [1, picture.shape[1] // 14, picture.shape[2] // 14]
    return {"pixel_values": rows, "image_grid_thw": torch.tensor([shape])}


def _internvl_pixels(picture: Tensor, tiles: tuple[int, int]) -> dict[str, Tensor]:
    own = split_tiles(picture, tiles)
    if len(own) > 1:  # the thumbnail
        own = torch.cat([own, resize_pixels(picture[None], (own.shape[-2], own.shape[-1]))])
    return {"pixel_values": own}


_CLIP: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP |= {"intermediate_size": 4096, "patch_size": 14}
_LLAMA: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA |= {"intermediate_size": 11008, "num_key_value_heads": 32, "max_position_embeddings": 4096}
_QWEN: dict[str, Any] = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
_QWEN |= {"intermediate_size": 18944, "num_key_value_heads": 4, "max_position_embeddings": 32768}
_QWEN |= {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}

FAMILIES = {
    "llava": Family(
        "LLaVA-1.5-7B",  # one size of its own; at others its positions are interpolated
        _CLIP | {"image_size": 336, "projection_dim": 768},
        _LLAMA | {"vocab_size": 32064, "rms_norm_eps": 1e-5, "pad_token_id": 32001},
        _llava_config,
        lambda picture, _tiles: {"pixel_values": picture[None]},
        14, 32000, ((), ()), 32000,
        _squares((24, SMALLER), (24, DEFAULT), (24, (1.0, 1.5, 2.0)), (24, (1.0, 1.5, 64 / 24))),
    ),
    "qwen2vl": Family(
        "Qwen2-VL-7B",
        {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 3584}
        | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        _QWEN | {"vocab_size": 152064, "rope_parameters": _ROPE | {"mrope_section": [16, 24, 24]}},
        _qwen_config,
        _qwen_pixels,
        28, 151655, ((151652,), (151653,)), 151643,
        _squares((24, SMALLER), (24, DEFAULT), (32, DEFAULT), (43, DEFAULT), (64, SMALLER)),
    ),
    "internvl": Family(
        "InternVL3-8B",  # InternVL2.5-8B has the same vision part, but InternLM2.5-7B
        _CLIP | {"image_size": 448, "attention_bias": True},
        _QWEN | {"vocab_size": 151674, "rope_parameters": _ROPE},
        _internvl_config,
        _internvl_pixels,
        28, 151667, ((151665,), (151666,)), 151643,
        _tiled(16, (1, 1, DEFAULT), (2, 2, SMALLER), (3, 3, SMALLER), (2, 3, DEFAULT),
               (3, 5, SMALLER)),
    ),
}  # fmt: skip


def tiny(name: str) -> Family:
    """A family with few and narrow layers, pictures of few tokens, the true vocabulary and ids.

    Args:
        name: key in ``FAMILIES``.
    """
    family = replace(FAMILIES[name], title=f"{FAMILIES[name].title}, tiny")
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    small |= {"intermediate_size": 48}
    text = {**family.text, **small, "num_key_value_heads": 2}
    if name == "qwen2vl":
        text["rope_parameters"] = _ROPE | {"mrope_section": [2, 3, 3]}
        vision = {**family.vision, "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}
        return replace(family, vision=vision, text=text, cases=_squares((4, DEFAULT), (6, SMALLER)))
    cases = _squares((4, SMALLER), (4, DEFAULT))
    if name == "internvl":
        cases = _tiled(4, (1, 1, DEFAULT), (2, 3, SMALLER))
    vision = {**family.vision, **small, "image_size": family.unit * 4}
    return replace(family, vision=vision, text=text, cases=cases)


def build(family: Family, device: torch.device) -> Any:
    """The model with random weights, made where it stays, in bfloat16.

    The classes initialise themselves on the device (a second on a GPU), so that all buffers, such
    as the rotary frequencies in float32, are those of ``from_pretrained``.

    Args:
        family: its architecture.
        device: where it stays.
    """
    torch.manual_seed(SEED)
    config = family.config(family.vision, family.text)
    with torch.device(device):
        model = hf.AutoModelForImageTextToText.from_config(
            config, dtype=DTYPE, attn_implementation=ATTENTION
        )
    return model.eval().requires_grad_(False)


def make_inputs(
    family: Family, case: Case, device: torch.device, answer: int = ANSWER
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What a processor would return, of a smooth random picture and random words.

    Args:
        family: the model's.
        case: size of the picture.
        device: of the model.
        answer: tokens of the answer.

    Returns:
        The prompt's inputs, the inputs of prompt and answer, and the answer's ids.
    """
    noise = torch.Generator().manual_seed(SEED)
    height, width = (family.unit * c * n for c, n in zip(case.cells, case.tiles, strict=True))
    picture = resize_pixels(torch.randn(1, 3, 12, 12, generator=noise), (height, width))[0]
    pixels = family.pixels(picture.to(device, DTYPE), case.tiles)
    words = torch.randint(3, family.words, (BEFORE + AFTER + answer,), generator=noise).tolist()
    first, last = family.markers
    ids = [*words[:BEFORE], *first, *[family.image] * case.tokens[case.scales.index(1.0)], *last]
    ids += words[BEFORE:]

    def inputs(tokens: Sequence[int]) -> dict[str, Tensor]:
        row = torch.tensor([tokens], device=device)
        made = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if "image_grid_thw" in pixels:
            made["mm_token_type_ids"] = (row == family.image).long()
        return made | {name: value.to(device) for name, value in pixels.items()}

    return inputs(ids[:-answer]), inputs(ids), torch.tensor(words[-answer:])
