"""Tiny models of ten families: the real classes, their real processors, known random weights.

The weights depend on the seed and on each parameter's name alone, so that they are the same with
every version of transformers.
"""

import copy
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from einops import rearrange
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from captum_mllm.adapters.image_only import image_only_processor
from tests.oracle.tiny import Subject, random_picture, tiny_llava, tiny_processor

NAMES: tuple[str, ...] = (
    "Llava",
    "LlavaNext",
    "Qwen2VL",
    "Qwen2_5_VL",
    "Qwen3VL",
    "InternVL",
    "Idefics3",
    "SmolVLM",
    "PaliGemma",
    "Gemma3",
)
# Above the adapters a family is no more than its layout of tokens: one family stands for each.
REPRESENTATIVES = ("Llava", "LlavaNext", "Qwen2_5_VL", "InternVL", "Gemma3")


def above(names: Sequence[str] = NAMES) -> list[Any]:
    """Families for a test above the adapters; the others are left to `make check`."""
    return [n if n in REPRESENTATIVES else pytest.param(n, marks=pytest.mark.slow) for n in names]


VOCABULARY = 128
PATCH = 4
PAD, BOS, EOS = 0, 1, 2
COMMON = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = "USER: what is here ? ASSISTANT: a dog cat on the left right and there"
TIMES = ["<0.2", "<1.2", "<2.2", "seconds>"]
ROWS_AND_COLUMNS = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
QWEN = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
SMOL = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
    "video_token": "<video>",
} | {tile.strip("<>") + "_token": tile for tile in ROWS_AND_COLUMNS}
SPECIAL = {  # family -> its own special tokens, by the names under which its processor asks
    "Llava": {"image_token": "<image>"},
    "LlavaNext": {"image_token": "<image>"},
    "Qwen2VL": QWEN,
    "Qwen2_5_VL": QWEN,
    "Qwen3VL": QWEN,
    "InternVL": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "Idefics3": SMOL,
    "SmolVLM": SMOL,
    "PaliGemma": {"image_token": "<image>"},
    "Gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}
WITHOUT_BOS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "InternVL", "PaliGemma")  # as in the real ones
PLACEHOLDER = {  # what stands for one picture in a prompt
    "InternVL": "<IMG_CONTEXT>",
    "Gemma3": "<start_of_image>",
} | dict.fromkeys(
    ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"), "<|vision_start|><|image_pad|><|vision_end|>"
)
PICTURES = {  # family -> (width, height) of the usual picture, the wide one, the tall one
    "Llava": ((16, 16), (28, 16), (16, 28)),
    "LlavaNext": ((32, 32), (36, 24), (12, 36)),
    "Qwen2VL": ((32, 32), (56, 24), (24, 40)),
    "Qwen2_5_VL": ((32, 32), (56, 24), (24, 40)),
    "Qwen3VL": ((32, 32), (56, 24), (24, 40)),
    "InternVL": ((32, 32), (64, 32), (32, 96)),
    "Idefics3": ((64, 64), (64, 32), (32, 64)),
    "SmolVLM": ((64, 64), (64, 32), (32, 64)),
    "PaliGemma": ((16, 16), (28, 16), (16, 28)),
    "Gemma3": ((32, 32), (56, 32), (32, 56)),
}
ANSWERS = {  # one word twice, one that is in the prompt; with seed 0 all have a map
    "Llava": "the a the is on",
    "Qwen2_5_VL": "dog left dog here cat",
    "Qwen3VL": "cat a cat here and",
    "InternVL": "dog left dog is cat",
    "PaliGemma": "left a left is cat",
    "Gemma3": "left right left ? there",
}


@dataclass(frozen=True)
class FamilySubject(Subject):
    """A subject whose prompt takes any number of pictures, and two pictures of other shapes."""

    placeholder: str
    wide_picture: Image.Image
    tall_picture: Image.Image

    def encode(self, *pictures: Image.Image, prompt: str | None = None) -> dict[str, torch.Tensor]:
        """What the processor makes of prompt and pictures; a lone placeholder is multiplied."""
        images = list(pictures) or [self.picture]
        text = self.prompt if prompt is None else prompt
        if text.count(self.placeholder) == 1:
            text = text.replace(self.placeholder, " ".join([self.placeholder] * len(images)))
        with warnings.catch_warnings():
            # Two processors give tensors to numpy in a way it frowns upon (PaliGemma, InternVL).
            warnings.filterwarnings("ignore", "__array_", DeprecationWarning)
            inputs = dict(self.processor(images=images, text=text, return_tensors="pt"))
        inputs.pop("labels", None)  # PaliGemma's, for training
        return inputs


def family(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "sdpa"
) -> FamilySubject:
    """A tiny model of a family with its processor, a prompt, pictures and an answer."""
    tokenizer = _tokenizer(name)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL[name].items()}
    model = tiny_llava() if name == "Llava" else _model(name, ids)
    _fill(model, seed)
    model = model.to(dtype).eval()
    model.set_attn_implementation(attn)
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = BOS, EOS, PAD
    processor = tiny_processor() if name == "Llava" else _processor(name, tokenizer)
    usual, wide, tall = PICTURES[name]
    placeholder = PLACEHOLDER.get(name, "<image>")
    words = ANSWERS.get(name, "dog left dog what cat")
    return FamilySubject(
        name=name,
        model=model,
        processor=processor,
        prompt=f"USER: {placeholder} what is here ? ASSISTANT:",
        picture=random_picture(0, usual),
        other_picture=random_picture(1, usual),
        answer=torch.tensor(processor.tokenizer.convert_tokens_to_ids(words.split())),
        placeholder=placeholder,
        wide_picture=random_picture(2, wide),
        tall_picture=random_picture(3, tall),
    )


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights from each parameter's name; random norms, so that a forgotten norm shows."""
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            # Some versions have one more level, `vision_model`, inside a vision tower.
            key = f"{name}.{part}".replace("vision_model.", "")
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) + seed)
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and part in ("weight", "lambda_1", "lambda_2")
            if is_scale:  # Gemma's norms multiply by 1 + weight
                noise = noise.abs().clamp(0, 1) + (-0.4 if _is_gemma_norm(module) else 0.5)
            with torch.no_grad():
                parameter.copy_(noise if is_scale else 0.3 * noise)


def _is_gemma_norm(module: torch.nn.Module) -> bool:
    return type(module).__name__.startswith("Gemma")


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token a word, one for a line break and one for two; specials as the family has them."""
    special = [*COMMON, *SPECIAL[name].values()]
    known = [*special, "\n", "\n\n", *WORDS.split(), *TIMES]
    known += [f"w{n}" for n in range(len(known), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({t: n for n, t in enumerate(known)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
        ]
    )
    if name not in WITHOUT_BOS:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[name],
        padding_side="left",
    )


def _processor(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    square = {"height": 32, "width": 32}
    if name == "LlavaNext":
        return transformers.LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size={"shortest_edge": 16},
                crop_size={"height": 16, "width": 16},
                image_grid_pinpoints=PINPOINTS,
            ),
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if name in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"):
        images = Qwen2VLImageProcessorPil(
            patch_size=PATCH, size={"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
        )
        return image_only_processor(name, images, tokenizer)
    if name == "InternVL":
        images = GotOcr2ImageProcessorPil(size=square, min_patches=1, max_patches=4)
        return image_only_processor(name, images, tokenizer, image_seq_length=16)
    if name in ("Idefics3", "SmolVLM"):
        sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
        if name == "SmolVLM":
            images = SmolVLMImageProcessorPil(**sizes)
            return image_only_processor(name, images, tokenizer, image_seq_len=16)
        images = Idefics3ImageProcessorPil(**sizes)
        return transformers.Idefics3Processor(images, tokenizer, image_seq_len=16)
    if name == "PaliGemma":
        images = SiglipImageProcessorPil(size={"height": 16, "width": 16}, image_seq_length=16)
        images.image_seq_length = 16
        return transformers.PaliGemmaProcessor(images, tokenizer)
    images = Gemma3ImageProcessorPil(size=square)
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=16)


PINPOINTS = [[16, 32], [32, 16], [32, 32]]
WIDTH = 32
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": PATCH,
}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
LM = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _model(name: str, ids: dict[str, int]) -> Any:
    """A model of the family's class, with weights yet to be filled in."""
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(tie_word_embeddings=False, **_settings(name, ids))
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _settings(name: str, ids: dict[str, int]) -> dict[str, Any]:
    """The arguments of the family's config class."""
    if name.startswith("Qwen"):
        return _qwen_settings(name) | {
            key.replace("token", "token_id"): index for key, index in ids.items()
        }
    if name == "LlavaNext":
        return {
            "vision_config": transformers.CLIPVisionConfig(image_size=16, **VISION),
            "text_config": transformers.LlamaConfig(**LM),
            "image_token_index": ids["image_token"],
            "image_grid_pinpoints": PINPOINTS,
        }
    if name == "InternVL":
        return {
            "vision_config": transformers.InternVLVisionConfig(image_size=32, **VISION),
            "text_config": transformers.Qwen2Config(**LM),
            "image_token_id": ids["context_image_token"],
            "image_seq_length": 16,
        }
    if name in ("Idefics3", "SmolVLM"):
        vision_class = getattr(transformers, f"{name}VisionConfig")
        return {
            "vision_config": vision_class(image_size=32, **VISION).to_dict(),
            "text_config": transformers.LlamaConfig(**LM),
            "image_token_id": ids["image_token"],
            "pad_token_id": PAD,
        }
    if name == "PaliGemma":
        vision = {**VISION, "image_size": 16, "vision_use_head": False}
        return {
            "vision_config": transformers.SiglipVisionConfig(**vision, projection_dim=WIDTH),
            "text_config": transformers.GemmaConfig(**LM, head_dim=8),
            "image_token_index": ids["image_token"],
            "projection_dim": WIDTH,
            "hidden_size": WIDTH,
        }
    vision = {**VISION, "image_size": 32, "vision_use_head": False}
    layers = ["sliding_attention", "full_attention"]
    text = {**LM, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 24}
    return {
        "vision_config": transformers.SiglipVisionConfig(**vision),
        "text_config": transformers.Gemma3TextConfig(**text, layer_types=layers),
        "mm_tokens_per_image": 16,
        "boi_token_index": ids["boi_token"],
        "eoi_token_index": ids["eoi_token"],
        "image_token_index": ids["image_token"],
    }


def _qwen_settings(name: str) -> dict[str, Any]:
    text: dict[str, Any] = {**LM, "rope_parameters": dict(MROPE)}
    if name == "Qwen2VL":
        vision = {**QWEN_VISION, "embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    else:
        vision = {**QWEN_VISION, "hidden_size": WIDTH, "out_hidden_size": WIDTH}
        vision["intermediate_size"] = 48
    if name == "Qwen2_5_VL":  # windows of 2 x 2 cells in the first layer, none in the second
        vision |= {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    if name == "Qwen3VL":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text |= {"head_dim": 8}
        text["rope_parameters"] |= {"mrope_interleaved": True}
        text.pop("bos_token_id"), text.pop("eos_token_id")
    return {"vision_config": vision, "text_config": text}


# A layer's attention and, in it, the projection of what was gathered from other positions.
MIXING = ("self_attn.out_proj", "self_attn.o_proj", "attn.proj", "attention.projection_layer")


def without_mixing(model: Any) -> Any:
    """A copy in which no position hears of any other: attention's output projections are zero."""
    model = copy.deepcopy(model)
    for part in (model.get_encoder(modality="image"), model.get_decoder()):
        found = [module for name, module in part.named_modules() if name.endswith(MIXING)]
        assert found, f"{type(part).__name__}: no output projection of attention was found"
        for module in found:
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
    return model


def patchify(frames: torch.Tensor) -> torch.Tensor:
    """Frames (time, channels, height, width) as the rows that Qwen's vision towers take."""
    return rearrange(
        frames,
        "(t u) c (h i p) (w j q) -> (t h w i j) (c u p q)",
        u=2,  # frames a row
        i=2,  # the four patches of a cell follow each other
        j=2,
        p=PATCH,
        q=PATCH,
    )


def video(subject: FamilySubject, frames: int = 4) -> dict[str, torch.Tensor]:
    """Inputs with a random video of 3 x 4 cells a step, as a Qwen processor would lay it out."""
    steps, rows, columns = frames // 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(frames, 3, rows * 2 * PATCH, columns * 2 * PATCH, generator=generator).to(
        subject.model.dtype
    )
    before, after = subject.prompt.split(subject.placeholder)
    if subject.name == "Qwen3VL":  # at 2 frames a second, a step's middle is at 0.25, 1.25, ...
        step = "<|vision_start|>" + "<|video_pad|>" * (rows * columns) + "<|vision_end|>"
        shown = "".join(f"<{n}.2 seconds>{step}" for n in range(steps))
    else:
        pads = "<|video_pad|>" * (steps * rows * columns)
        shown = f"<|vision_start|>{pads}<|vision_end|>"
    inputs = dict(subject.processor.tokenizer(before + shown + after, return_tensors="pt"))
    is_video = inputs["input_ids"] == subject.model.config.video_token_id
    inputs["mm_token_type_ids"] = 2 * is_video.long()
    inputs["pixel_values_videos"] = patchify(pixels)
    inputs["video_grid_thw"] = torch.tensor([[steps, 2 * rows, 2 * columns]])
    if subject.name == "Qwen2_5_VL":
        inputs["second_per_grid_ts"] = torch.tensor([1.0])
    return inputs
