"""Tiny random models of the real architectures, with their real processors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

VOCABULARY = 97
IMAGE_TOKEN = 3
PATCH, SIDE = 4, 16
WORDS = "USER: what is here ? ASSISTANT: a dog cat on the left right and there"


def tiny_llava(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A LLaVA of the real class: 4 x 4 image tokens, 3 LM layers, random weights."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
        ),
        image_token_index=IMAGE_TOKEN,
        **overrides,
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    # Random norms, so that a forgotten norm shows.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def tiny_processor(center_crop: bool = True, side: int = SIDE):
    """The real LlavaProcessor around a word-level tokenizer."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE_TOKEN, "<unk>": 4}
    vocabulary |= {word: 5 + n for n, word in enumerate(WORDS.split())}
    vocabulary |= {f"w{n}": n for n in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    size = {"shortest_edge": side} if center_crop else {"height": side, "width": side}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=size,
            crop_size={"height": side, "width": side},
            do_center_crop=center_crop,
        ),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def random_picture(seed: int = 0, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Noise; size is (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@dataclass(frozen=True)
class Subject:
    """A model to explain, with two pictures, the inputs of the first, and an answer."""

    name: str
    model: Any
    processor: Any
    prompt: str
    picture: Image.Image
    other_picture: Image.Image
    answer: torch.Tensor

    def encode(self, *pictures: Image.Image, prompt: str | None = None) -> dict[str, torch.Tensor]:
        """What the processor makes of the prompt and the pictures (the first by default)."""
        images = list(pictures) or [self.picture]
        text = self.prompt if prompt is None else prompt
        return dict(self.processor(images=images, text=text, return_tensors="pt"))

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.encode()
