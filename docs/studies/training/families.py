"""What differs between the families of reference models; training and evaluation are the same."""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from captum_mllm.reference.captions import Conversation, draw_conversation
from captum_mllm.reference.scenes import Scene, SceneBatch, draw_scenes
from studies.training.layouts import NATIVE, Layout
from studies.training.tokenizer import pieces

Width = tuple[int, int, int, int]  # width, layers, heads, width of the MLP


@dataclass(frozen=True)
class Way:
    """A way in which pictures reach a model when it is evaluated.

    Args:
        layout: What the model reads.
        drawn: Height and width of the pictures that are handed to the processor, which resizes
            them; None: drawn as the model reads them.
    """

    layout: Layout
    drawn: tuple[int, int] | None = None

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width of the pictures that are handed to the processor."""
        return self.drawn or (self.layout.height, self.layout.width)


class Family(ABC):
    """One family of models: how one is built, and how pictures and prompts reach it."""

    name: ClassVar[str]  # of the shipped model
    kind: ClassVar[str]  # of the models of transformers: `kind`ForConditionalGeneration
    tokens: ClassVar[Mapping[str, str]]  # see `tokenizer.special_tokens`
    words: ClassVar[Sequence[str]] = ()  # that only this family knows as one piece
    around: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = ((), ())  # tokens about an image
    video: ClassVar[Mapping[str, Any] | None] = None  # settings of the full processor's third part
    sizes: ClassVar[Mapping[str, Mapping[str, Width]]]
    cell: ClassVar[int] = 8  # side in pixels of what one image position stands for
    layouts: ClassVar[tuple[Layout, ...]]  # one is drawn for every training step
    tiny_layouts: ClassVar[tuple[Layout, ...]] = (Layout(),)
    ways: ClassVar[Mapping[str, Way]]
    steps: ClassVar[tuple[int, int]]  # of the shipped model's two stages
    planted: ClassVar[bool] = False  # whether a co-occurrence was planted in them
    asked: ClassVar[bool] = False  # whether it is trained on `captum_mllm.reference.questions`
    card: ClassVar[Mapping[str, str]]  # the model card's words on this family

    def draw(self, seeds: Tensor) -> SceneBatch:
        """The scenes that it is trained on."""
        return draw_scenes(seeds)

    def draw_tested(self, seeds: Tensor) -> SceneBatch:
        """The scenes whose objects it is to name when it is evaluated."""
        return self.draw(seeds)

    def converse(self, scene: Scene, pick: random.Random) -> Conversation:
        """A conversation that it is trained on."""
        return draw_conversation(scene, pick)

    @abstractmethod
    def build_model(self, size: str) -> Any:
        """Build an untrained model, float32, from torch's global random generator."""

    @abstractmethod
    def build_processor(self) -> Any:
        """Build the processor, with its tokenizer."""

    @abstractmethod
    def load_processor(self, path: Any) -> Any:
        """Load the processor from a model's folder."""

    @abstractmethod
    def features(self, model: Any, pictures: Tensor) -> Tensor:
        """What the language model reads in place of an image's tokens.

        Args:
            model: The model.
            pictures: Normalised pixels (batch, tiles, 3, height, width).

        Returns:
            (batch, cells, width of the language model), in the order of the image's tokens.
        """

    def tower_layers(self, _model: Any) -> list[Any]:
        """Modules of the tower that `compile` compiles."""
        return []

    def compile(self, model: Any) -> None:
        """Compile a model's layers, one graph for every size, to train faster."""
        for layer in (*model.model.language_model.layers, *self.tower_layers(model)):
            layer.compile(dynamic=True)

    def positions(self, _model: Any, _layout: Layout, _text: int) -> Tensor | None:
        """Position ids of a training sequence with an image, if they don't just count.

        Args:
            model: The model.
            layout: The image's.
            text: Number of tokens that follow the image and what closes it.

        Returns:
            Broadcastable to (3, batch, tokens), or None.
        """
        return None

    def call_settings(self, _way: Way) -> dict[str, Any]:
        """Keyword arguments for the processor that make a way's pictures be read as it says."""
        return {}

    @contextlib.contextmanager
    def reading(self, _model: Any, _processor: Any, _layout: Layout) -> Iterator[None]:
        """Within it, model and processor can read a layout."""
        yield

    def weight_name(self, name: str) -> str:
        """A weight's name in the saved file, which every supported version reads."""
        return name

    def widths(self, size: str) -> tuple[Width, Width]:
        """Sizes of tower and language model."""
        if size not in self.sizes:
            raise ValueError(f"size={size!r} is unknown; there are {sorted(self.sizes)}.")
        return self.sizes[size]["vision"], self.sizes[size]["text"]

    def token_id(self, token: str) -> int:
        """Id of one of the special tokens."""
        return pieces(self.tokens, self.words).index(token)

    def around_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that open and close an image."""
        before, after = self.around
        return tuple(map(self.token_id, before)), tuple(map(self.token_id, after))

    def finish(self, model: Any) -> Any:
        """Set the tokens that begin, end and fill a generated text."""
        generation = model.generation_config
        generation.bos_token_id = self.token_id("<s>")
        generation.eos_token_id = self.token_id("</s>")
        generation.pad_token_id = self.token_id("<pad>")
        return model

    def text_settings(self, width: Width) -> dict[str, Any]:
        """What the language models' configurations have in common."""
        hidden, layers, heads, mlp = width
        return {
            "vocab_size": len(pieces(self.tokens, self.words)),
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": mlp,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": self.token_id("<s>"),
            "eos_token_id": self.token_id("</s>"),
            "pad_token_id": self.token_id("<pad>"),
        }


def square(side: int, **settings: Any) -> Layout:
    """A square picture in one piece."""
    return Layout(side, side, **settings)


SIDES = (*range(80, 169, 8), NATIVE, NATIVE, NATIVE, 192, 224)  # sides in training
