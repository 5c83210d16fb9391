"""Tiny random models of the classes, their image processors made small, and inputs for both."""

import inspect
import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers.models.auto import image_processing_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from studies.zoo.kinds import SETTINGS, UNAVAILABLE
from studies.zoo.settings import Settings
from studies.zoo.shrink import BOS, EOS, IMAGE, PAD, VISION_END, VISION_START, tiny_config

KINDS: tuple[str, ...] = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
LARGEST = 130e6  # parameters
BEFORE, AFTER = (BOS, 5, 6), (7, 8, 9, 10, 11, 12)  # text tokens about the pictures
NAMES_OF_IDS = ("image_token_id", "image_token_index", "image_patch_id")


class Unavailable(RuntimeError):  # noqa: N818
    """A class of which no subject can be built here; the message says why."""


@dataclass(frozen=True)
class ImagesOnly:
    """As much of a processor as is needed without text: its image processor."""

    image_processor: Any
    tokenizer: None = None


@dataclass
class Subject:
    """A tiny model with random weights and what makes its inputs.

    Attributes:
        kind: transformers' model type.
        model: in eval mode, float32, on the CPU.
        processor: holds the real image processor, with small sizes, and no tokenizer.
        image_token_id: id of the placeholder.
    """

    kind: str
    model: Any
    processor: Any
    image_token_id: int
    settings: Settings = field(default_factory=Settings, repr=False)
    _spans: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    def encode(self, *pictures: Image.Image, text_after: int = 3) -> dict[str, Any]:
        """Inputs of one prompt: some text, each picture's placeholders, some text.

        Args:
            *pictures: in the order of the prompt; none makes a prompt of text.
            text_after: number of text tokens behind the last picture, 1 to 6, default 3.

        Returns:
            ``input_ids`` (1, tokens), ``attention_mask``, the pixel inputs, and the side inputs
            that the model's ``forward`` takes.

        Raises:
            Unavailable: the model does not say how many placeholders it needs.
        """
        ids = list(BEFORE)
        for picture in pictures:
            ids += [VISION_START, *self.span(picture), VISION_END]
        ids += AFTER[:text_after]
        return {**self._text(ids, len(pictures)), **(self._pixels(pictures) if pictures else {})}

    def span(self, picture: Image.Image) -> tuple[int, ...]:
        """Ids that stand for a picture in the prompt; the same for all of its size."""
        if picture.size not in self._spans:
            self._spans[picture.size] = tuple(self._new_span(picture))
        return self._spans[picture.size]

    def _new_span(self, picture: Image.Image) -> list[int]:
        if self.settings.span is not None:
            return self.settings.span(self._made([picture]))
        count = self.settings.tokens
        count = _count(self, self._pixels([picture])) if count is None else count
        return [self.image_token_id] * count

    @property
    def takes(self) -> set[str]:
        """Names of the inputs that the model takes."""
        return {*_parameters(self.model.forward), *self.settings.inputs, "pixel_values"}

    def _text(self, ids: list[int], pictures: int = 1) -> dict[str, Tensor]:
        tokens = torch.tensor([ids])
        is_image = (tokens == self.image_token_id).long()
        # Gemma 3 marks images by token_type_ids, PaliGemma the answer: none here.
        types = 0 * is_image if self.kind == "paligemma" else is_image
        side = {
            "mm_token_type_ids": is_image,
            "token_type_ids": types,
            "image_embeds_position_mask": is_image,
            "image_attention_mask": torch.ones(1, len(ids), pictures, dtype=torch.long),
            "bbox": torch.zeros(1, len(ids), 4),
            "qformer_input_ids": torch.tensor([[BOS, *BEFORE]]),
        }
        taken = {name: value for name, value in side.items() if name in self.takes}
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **taken}

    def _made(self, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        return {"pixel_values": made[None]} if isinstance(made, Tensor) else dict(made)

    def _pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        made = self._made(pictures)
        made = made if self.settings.pixels is None else self.settings.pixels(made)
        known = self.takes - {"attention_mask"}  # the patches' own, under the text's name
        return {name: _as_input(value) for name, value in made.items() if name in known}


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _as_input(value: Any) -> Any:
    """Floats in float32, and a tensor of the numbers of a list, as processors make them."""
    if isinstance(value, list) and not any(isinstance(each, Tensor | np.ndarray) for each in value):
        return _as_input(torch.tensor(value))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return value


# ---- the number of placeholders -----------------------------------------------------------------


class _Enough(Exception):  # noqa: N818
    """The embeddings have entered the decoder: the number of placeholders is right."""


FEATURES = re.compile(r"(?:features?|embeddings?)[^0-9]{0,5}(\d+)|(\d+) feature")


def _count(subject: Subject, pixels: Mapping[str, Any]) -> int:
    """Placeholders that the pixels need, read from the model's refusal of a single one.

    The refusal names the number of vectors; some models count the vectors' numbers instead.
    """
    refusal = _refusal(subject, 1, pixels)
    if refusal is None:
        return 1
    said = FEATURES.search(refusal)
    number = int(said[1] or said[2]) if said else 0
    for count in (number, number // subject.model.config.get_text_config().hidden_size):
        if count and _refusal(subject, count, pixels) is None:
            return count
    raise Unavailable(f"number of placeholders: {refusal}")


def _refusal(subject: Subject, number: int, pixels: Mapping[str, Any]) -> str | None:
    """What the model says against a number of placeholders; None if nothing."""
    ids = [*BEFORE, VISION_START, *[subject.image_token_id] * number, VISION_END, *AFTER]

    def enter(_decoder: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        embeddings = [x for x in (given.get("inputs_embeds"), *args) if isinstance(x, Tensor)]
        if any(x.is_floating_point() and x.ndim == 3 for x in embeddings):
            raise _Enough

    handle = subject.model.get_decoder().register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with torch.no_grad():
            subject.model(**subject._text(ids), **pixels, use_cache=False)
    except _Enough:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        handle.remove()
    return None


# ---- model and processor ------------------------------------------------------------------------


def subject(kind: str, seed: int = 0) -> Subject:
    """A tiny random model of a class with its real image processor.

    Args:
        kind: one of ``KINDS``.
        seed: of the weights, default 0.

    Raises:
        KeyError: no such kind.
        Unavailable: the class can't be built here, and why.

    Example:
        >>> from PIL import Image
        >>> llava = subject("llava")
        >>> inputs = llava.encode(Image.new("RGB", (60, 60)))
        >>> inputs["pixel_values"].shape, (inputs["input_ids"] == llava.image_token_id).sum()
        (torch.Size([1, 3, 32, 32]), tensor(64))
    """
    if kind not in KINDS:
        raise KeyError(f"kind must be one of studies.zoo.KINDS, got {kind!r}.")
    if kind in UNAVAILABLE:
        raise Unavailable(UNAVAILABLE[kind])
    settings = SETTINGS.get(kind, Settings())
    try:
        processor = ImagesOnly(_image_processor(kind, settings))
        model = _model(kind, settings, seed)
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(_first_line(error)) from error
    ids = (getattr(model.config, name, None) for name in NAMES_OF_IDS)
    image = next((value for value in ids if isinstance(value, int)), IMAGE)
    one = Subject(kind, model, processor, image, settings)
    _settle_batch_norms(one)
    return one


@torch.no_grad()
def _settle_batch_norms(one: Subject) -> None:
    """Batch norms get the statistics of a picture of noise, as training would have given them."""
    norms = [m for m in one.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    one.model(**one.encode(Image.fromarray(noise)))
    for norm in norms:
        norm.eval()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def _model(kind: str, settings: Settings, seed: int) -> Any:
    config = tiny_config(kind, settings.config)
    made_by = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in made_by(config).parameters())
    if parameters > LARGEST:
        raise Unavailable(f"{parameters / 1e6:.0f}M parameters: its configuration is not shrunk.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = made_by(config).float().eval()
    _fill(model, seed)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = BOS, EOS, PAD
    return model


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Random weights by each parameter's name; random norms, so that a forgotten norm shows."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        if parameter.ndim > 1:
            scale = min(0.25, 1.4 / math.sqrt(parameter[0].numel()))
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        elif parameter.numel() and parameter.min() == parameter.max():  # of a norm, or a bias
            noise = 0.2 * torch.rand(parameter.shape, generator=generator)
            parameter.copy_(noise + parameter.abs())
    for buffer in model.buffers():
        if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
            buffer.zero_()  # made by torch.empty, for a checkpoint to fill


def _image_processor(kind: str, settings: Settings) -> Any:
    """The class's image processor: the one on torchvision if it is there, or else on Pillow."""
    by_kind = vars(image_processing_auto)["IMAGE_PROCESSOR_MAPPING_NAMES"]
    known = by_kind.get(settings.like or kind)
    if known is None:
        raise Unavailable("transformers maps no image processor to this class.")
    backends = ("torchvision", "pil") if has_package("torchvision") else ("pil",)
    name = next((known[backend] for backend in backends if known.get(backend)), None)
    if name is None:
        raise Unavailable(f"its image processor {known['torchvision']} needs torchvision.")
    made_by = getattr(transformers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made_by(**(_small_sizes(made_by()) | settings.images))


def has_package(name: str) -> bool:
    """Whether transformers finds a package, "torchvision" or "timm"."""
    return bool(getattr(transformers.utils, f"is_{name}_available")())


def _small_sizes(images: Any) -> dict[str, Any]:
    """Sizes for a tower that takes 32 x 32 pixels in patches of 4, as the processor names them."""
    own, small = vars(images), {}
    size = own.get("size")
    if size is not None:
        named = size if isinstance(size, dict) else vars(size)
        names = {name for name, value in named.items() if value is not None}
        small["size"] = _small_size(names, "merge_size" in own)
    if own.get("crop_size") is not None:
        small["crop_size"] = {"height": 32, "width": 32}
    if own.get("patch_size") is not None:
        is_number = isinstance(own["patch_size"], int)
        small["patch_size"] = 4 if is_number else {"height": 4, "width": 4}
    return {name: value for name, value in small.items() if value is not None}


def _small_size(names: set[str], counts_pixels: bool) -> dict[str, int] | None:
    if counts_pixels:  # whole pictures in rows of patches: bounds of the number of pixels
        pixels = {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
        return pixels if "shortest_edge" in names else None
    small = {"height": 32, "width": 32}
    if names == set(small):
        return small
    if "min_pixels" in names:
        return {"min_pixels": 16 * 16, "max_pixels": 96 * 96}
    edges = {"shortest_edge": 32, "longest_edge": 64}
    return (
        {name: edges[name] for name in names}
        if names in ({"shortest_edge"}, {"longest_edge"})
        else None
    )
