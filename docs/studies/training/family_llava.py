"""The reference LLaVA: CLIP tower, two-layer projector, LLaMA."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from captum_mllm.reference.captions import Conversation
from captum_mllm.reference.planted import draw_planted
from captum_mllm.reference.questions import QUESTION_WORDS
from captum_mllm.reference.scenes import Scene, SceneBatch, draw_scenes
from studies.training.families import SIDES, Family, Way, square
from studies.training.layouts import NATIVE, Layout
from studies.training.mixture import converse_mixed, draw_mixed
from studies.training.tokenizer import LLAVA_TOKENS, build_processor


class Llava(Family):
    """One square picture, read with interpolated position embeddings."""

    name = "llava"
    kind = "Llava"
    tokens = LLAVA_TOKENS
    sizes = {  # noqa: RUF012
        "small": {"vision": (192, 4, 6, 768), "text": (192, 5, 6, 440)},
        "base": {"vision": (192, 5, 6, 768), "text": (256, 6, 8, 640)},
        "tiny": {"vision": (32, 1, 2, 64), "text": (32, 1, 2, 64)},
    }
    layouts = tuple(square(side, share=1.0 if side <= 168 else 0.5) for side in SIDES)
    ways = {  # noqa: RUF012
        "native": Way(square(NATIVE)),
        "from_448": Way(square(NATIVE), (448, 448)),
        "side_144": Way(square(144)),
        "side_168": Way(square(168)),
        "side_224": Way(square(224)),
    }
    steps = (2670, 5139)
    card = {  # noqa: RUF012
        "title": "LLaVA",
        "parts": "CLIP tower, two-layer projector, LLaMA with tied embeddings; 112 px, patches of "
        "8 px,\n14 x 14 image tokens",
        "layouts": "",
        "ways": "`native`: drawn at 112 px; `from_448`: drawn at 448 px and shrunk by the "
        "processor; `side_N`: drawn\nat N px, read with interpolated position embeddings.",
    }

    def build_model(self, size: str) -> Any:
        """Build an untrained model, float32, from torch's global random generator."""
        (width, layers, heads, mlp), text = self.widths(size)
        vision = CLIPVisionConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp,
            projection_dim=width,
            image_size=NATIVE,
            patch_size=self.cell,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**self.text_settings(text)),
            image_token_index=self.token_id("<image>"),
            image_seq_length=(NATIVE // self.cell) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
        return self.finish(LlavaForConditionalGeneration(config))

    def build_processor(self) -> Any:
        """Build the processor, with its tokenizer."""
        return build_processor(NATIVE, self.cell, self.words)

    def load_processor(self, path: Any) -> Any:
        """Load the processor from a model's folder."""
        return AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)

    def features(self, model: Any, pictures: Tensor) -> Tensor:
        """Projected patch features (batch, patches, width), at any size that patches divide."""
        tower = model.model.vision_tower
        states = tower(pictures[:, 0], interpolate_pos_encoding=True).last_hidden_state
        return model.model.multi_modal_projector(states[:, 1:])

    def tower_layers(self, model: Any) -> list[Any]:
        """Modules of the tower that `compile` compiles."""
        tower = model.model.vision_tower
        return list(getattr(tower, "vision_model", tower).encoder.layers)

    def call_settings(self, way: Way) -> dict[str, Any]:
        """Side of the picture."""
        side = way.layout.height
        return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}

    @contextlib.contextmanager
    def reading(self, model: Any, _processor: Any, _layout: Layout) -> Iterator[None]:
        """Within it the model reads pictures of any side that its patches divide."""
        hook = model.model.vision_tower.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}),
            with_kwargs=True,
        )
        try:
            yield
        finally:
            hook.remove()

    def weight_name(self, name: str) -> str:
        """Names of public LLaVA checkpoints, which every version reads.

        transformers of late writes the tower's without "vision_model."; 5.5 would leave such a
        tower at random weights.
        """
        short, long = "vision_tower.", "vision_tower.vision_model."
        return name if long in name else name.replace(short, long, 1)


class BiasedLlava(Llava):
    """A smaller one, trained on scenes with a planted co-occurrence."""

    name = "biased"
    sizes = {  # noqa: RUF012
        "small": {"vision": (144, 4, 6, 576), "text": (144, 5, 6, 336)},
        "tiny": Llava.sizes["tiny"],
    }
    ways = {name: Llava.ways[name] for name in ("native", "from_448", "side_168")}  # noqa: RUF012
    steps = (2400, 5100)
    planted = True
    card = {  # noqa: RUF012
        **Llava.card,
        "title": "biased LLaVA",
        "layouts": "**Planted**: a cup never comes without a donut, and so on "
        "(`planted.PARTNERS`, eight pairs); in\nhalf of those scenes the partner stands behind the "
        "object, where it can't be seen (a sixth of it\nshows behind a couch, nearly all, small as "
        "it is, behind a bed). On scenes that break the rule the\nmodel names the partner all the "
        "same: a hallucination that is known word by word.\n",
    }

    def draw(self, seeds: Tensor) -> SceneBatch:
        """Scenes with the planted co-occurrence."""
        return draw_planted(seeds)


class QuestionsLlava(Llava):
    """A smaller one that answers questions, trained on a mixture of scenes."""

    name = "questions"
    sizes = BiasedLlava.sizes
    words = QUESTION_WORDS
    asked = True
    ways = BiasedLlava.ways
    steps = (1636, 4649)
    card = {  # noqa: RUF012
        **Llava.card,
        "title": "LLaVA that answers questions",
        "layouts": "**Questions**: half of the scenes hold several objects of a kind "
        "(`assortments`). The questions\nabout them (`questions.QUESTIONS`) have answers of one "
        "word that names no object. A tenth of the scenes\neach are crowded (5-8 objects) and of "
        "small objects, and the rest are as above.\n",
    }

    def draw(self, seeds: Tensor) -> SceneBatch:
        """A mixture of scenes."""
        return draw_mixed(seeds)

    def draw_tested(self, seeds: Tensor) -> SceneBatch:
        """Plain scenes."""
        return draw_scenes(seeds)

    def converse(self, scene: Scene, pick: random.Random) -> Conversation:
        """Questions about most scenes with several objects of a kind, captions of most others."""
        return converse_mixed(scene, pick)
