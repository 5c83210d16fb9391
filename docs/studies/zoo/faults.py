"""Faults planted in what a user brings: a checker must find each, and say which it is.

Each builder gives a model, its processor and what makes inputs, as they would lie on a user's
table. The models run without an error in all but one case: maps and answers are wrong, no more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from captum_mllm.adapters import LlavaAdapter, View, register_adapter
from captum_mllm.geometry import ImageGrid
from studies.zoo.subjects import ImagesOnly, Subject, subject


@dataclass(frozen=True)
class Fault:
    """Something wrong.

    Attributes:
        model: a tiny model of transformers.
        processor: its processor, or what is taken for it.
        encode: pictures -> inputs of one prompt, as ``Subject.encode``.
        picture: (width, height) of a picture with which the fault shows.
        says: a pattern (of :mod:`re`, ignoring case) that the finding should contain.
    """

    model: Any
    processor: Any
    encode: Callable[..., dict[str, Any]]
    says: str
    picture: tuple[int, int] = (60, 60)


# ---- a wrong adapter ----------------------------------------------------------------------------


class TransposedLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA under another name, for an adapter of its own."""


@register_adapter("TransposedLlavaForConditionalGeneration")
class TransposedLlavaAdapter(LlavaAdapter):
    """An adapter that takes rows for columns."""

    def views(self, grid: ImageGrid) -> tuple[View, ...]:
        """See the base class; the tokens are those of the mirrored cells."""
        return tuple(View(view.tokens.T, view.box) for view in super().views(grid))


def wrong_adapter() -> Fault:
    """A LLaVA whose registered adapter swaps rows and columns."""
    one = subject("llava")
    one.model.__class__ = TransposedLlavaForConditionalGeneration
    return Fault(one.model, one.processor, one.encode, r"adapter|layout")


# ---- image tokens -------------------------------------------------------------------------------


def _one_less(one: Subject) -> Callable[..., dict[str, Any]]:
    """What makes inputs without the last placeholder."""

    def encode(*pictures: Image.Image, text_after: int = 3) -> dict[str, Any]:
        inputs = right.encode(*pictures, text_after=text_after)
        last = int((inputs["input_ids"][0] == one.image_token_id).nonzero().max())
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.cat([inputs[name][:, :last], inputs[name][:, last + 1 :]], dim=1)
        return inputs

    right = subject(one.kind)  # untouched: it knows how many there must be
    return encode


def count_off_by_one() -> Fault:
    """A LLaVA prompt with a placeholder too few: the model refuses it."""
    one = subject("llava")
    says = r"placeholder|image tokens|do not match"
    return Fault(one.model, one.processor, _one_less(one), says)


def silent_count_off_by_one() -> Fault:
    """The same in a model that does not count: the last patch is on no token."""
    one = subject("llava")
    inner = one.model.model

    def uncounted(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        del image_features
        return (input_ids == one.image_token_id)[..., None].expand_as(inputs_embeds)

    inner.get_placeholder_mask = uncounted
    says = r"placeholder|image tokens|do not match"
    return Fault(one.model, one.processor, _one_less(one), says)


# ---- the model ----------------------------------------------------------------------------------


class SwappedTiles(nn.Module):
    """A vision tower that is given the first two tiles the wrong way round."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.config, self.dtype = tower.config, tower.dtype

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        order = torch.arange(len(pixel_values))
        order[:2] = torch.tensor([1, 0])
        return self.tower(pixel_values=pixel_values[order], **kwargs)


def swapped_tiles() -> Fault:
    """An InternVL that shows its first two tiles in each other's place."""
    one = subject("internvl")
    inner = one.model.model
    inner.vision_tower = SwappedTiles(inner.vision_tower)
    return Fault(one.model, one.processor, one.encode, r"tile|layout|place")


# ---- the processor ------------------------------------------------------------------------------


def processor_of_another_model() -> Fault:
    """A LLaVA with the processor of a PaliGemma: other means and deviations, other proportions.

    The inputs come from the right processor; the attributors are given the wrong one.
    """
    one, other = subject("llava"), subject("paligemma")
    return Fault(one.model, other.processor, one.encode, r"processor")


def pixels_of_another_model() -> Fault:
    """The same, with which the inputs were made too."""
    one, other = subject("llava"), subject("paligemma")
    one.processor = ImagesOnly(other.processor.image_processor)
    return Fault(one.model, one.processor, one.encode, r"processor")


# ---- a side input -------------------------------------------------------------------------------


def missing_side_input() -> Fault:
    """A Qwen2.5-VL without mm_token_type_ids: it takes the picture for text, and says nothing."""
    one = subject("qwen2_5_vl")

    def encode(*pictures: Image.Image, text_after: int = 3) -> dict[str, Any]:
        inputs = one.encode(*pictures, text_after=text_after)
        del inputs["mm_token_type_ids"]
        return inputs

    return Fault(one.model, one.processor, encode, r"mm_token_type_ids")


FAULTS: dict[str, Callable[[], Fault]] = {
    function.__name__: function
    for function in (
        wrong_adapter,
        count_off_by_one,
        silent_count_off_by_one,
        swapped_tiles,
        processor_of_another_model,
        pixels_of_another_model,
        missing_side_input,
    )
}
