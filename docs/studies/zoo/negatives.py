"""Models whose image tokens have no places that a probe could rely on: it must refuse each.

All are torch models of transformers' classes with the interface of the others. Where a class of
its own has the trait (cross-attention, discrete codes), that class stands here; the rest are a
tiny LLaVA with another projector behind its vision tower.

Two have places after all, in ``layout``: a probe may refuse them, or give exactly these.
``permuted`` has LLaVA's tokens in another order, the same for every picture; ``wrong_patch_size``
loses the right and lower rim of the picture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from studies.zoo.subjects import Subject, subject

SIDE = 8  # the tiny LLaVA's patches, along a side
WIDTH = 32


@dataclass
class Negative(Subject):
    """A subject that must be refused.

    Attributes:
        says: a pattern (of :mod:`re`, ignoring case) that the refusal should contain.
        layout: (rows, columns) of the true places, where there are any after all.
        surplus: placeholders too many (or, negative, too few) in each picture's span.
        picture: (width, height) of a picture with which it shows, default 60 x 60.
    """

    says: str = ""
    layout: Tensor | None = None
    surplus: int = 0
    picture: tuple[int, int] = (60, 60)

    def span(self, picture: Image.Image) -> tuple[int, ...]:
        """See :meth:`Subject.span`."""
        right = super().span(picture)
        more = (self.image_token_id,) * self.surplus
        return (*right, *more) if self.surplus >= 0 else right[: self.surplus]


def _as_negative(one: Subject, says: str, **more: Any) -> Negative:
    return Negative(
        one.kind, one.model, one.processor, one.image_token_id, one.settings, says=says, **more
    )


# ---- projectors that lose the places ------------------------------------------------------------


class CrossAttention(nn.Module):
    """One head that adds to some states what they read from others."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, states: Tensor, others: Tensor) -> Tensor:
        parts = self.query(states), self.key(others), self.value(others)
        read = nn.functional.scaled_dot_product_attention(*(part[:, None] for part in parts))
        return states + self.out(read[:, 0])


class Queries(nn.Module):
    """Learned queries that read all patches, as in Q-Formers and perceivers."""

    def __init__(self, count: int, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.queries = nn.Parameter(torch.randn(count, WIDTH, generator=generator))
        self.layers = nn.ModuleList(CrossAttention() for _ in range(layers))
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.25, generator=generator)

    def forward(self, patches: Tensor) -> Tensor:
        states = self.queries.expand(len(patches), -1, -1)
        for layer in self.layers:
            states = layer(states, patches)
        return states


class Permuted(nn.Module):
    """The patches in another order, the same for every picture."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order

    def forward(self, patches: Tensor) -> Tensor:
        return patches[:, self.order]


class ByContent(nn.Module):
    """The patches with the largest norm first: a token's place hangs on the picture."""

    def forward(self, patches: Tensor) -> Tensor:
        order = patches.norm(dim=-1).argsort(dim=1, descending=True)
        return patches.gather(1, order[..., None].expand_as(patches))


class TokenMixing(nn.Module):
    """A dense layer over the positions, as in an MLP-Mixer: each token hears all patches."""

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__()
        self.mix = nn.Linear(count, count)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.mix.weight, std=0.3, generator=generator)

    def forward(self, patches: Tensor) -> Tensor:
        return self.mix(patches.transpose(1, 2)).transpose(1, 2)


def _llava(before: nn.Module) -> Subject:
    """A tiny LLaVA with a module between its vision tower and its projector."""
    one = subject("llava")
    inner = one.model.model
    inner.multi_modal_projector = nn.Sequential(before.eval(), inner.multi_modal_projector)
    return one


# ---- the list -----------------------------------------------------------------------------------

WHOLE_PICTURE = r"quer|resampl|whole picture|mixing|all over|attention"


def queries_as_many_as_patches() -> Negative:
    """64 queries for 64 patches: square attention that is no self-attention."""
    return _as_negative(_llava(Queries(SIDE**2)), WHOLE_PICTURE)


def perceiver() -> Negative:
    """16 queries for 64 patches."""
    return _as_negative(_llava(Queries(16)), WHOLE_PICTURE)


def token_mixing() -> Negative:
    """A dense layer over all positions."""
    return _as_negative(_llava(TokenMixing(SIDE**2)), WHOLE_PICTURE)


def permuted() -> Negative:
    """A fixed random order of the patches; ``layout`` tells where each went."""
    order = torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(0))
    places = order.argsort().reshape(SIDE, SIDE)  # of each cell, its token
    says = r"order|scrambl|irregular|permut|row by row"
    return _as_negative(_llava(Permuted(order)), says, layout=places)


def by_content() -> Negative:
    """Patches sorted by their norm."""
    says = r"content|another picture|depend|hang|painted|changed|own place"
    return _as_negative(_llava(ByContent()), says)


def placeholders_too_many() -> Negative:
    """One placeholder more than there are features."""
    return _as_negative(subject("llava"), r"placeholder|do not match|tokens", surplus=1)


def placeholders_too_few() -> Negative:
    """One placeholder less than there are features."""
    return _as_negative(subject("llava"), r"placeholder|do not match|tokens", surplus=-1)


def wrong_patch_size() -> Negative:
    """Mistral 3 with a processor that forgets that patches are merged.

    The model drops what is left over of a picture: 13 % of one of 60 x 60 pixels. The tokens that
    there are have their places, so a probe may also give exactly 7 x 7 cells of 8 pixels.
    """
    one = subject("mistral3")
    one.processor.image_processor.patch_size = {"height": 4, "width": 4}
    says = r"no token|not heard|lost|hears|reach|leaves out|%"
    return _as_negative(one, says, layout=torch.arange(49).reshape(7, 7))


def wrong_merge_size() -> Negative:
    """Qwen2-VL with a processor that merges no patches: tokens run on from row to row."""
    one = subject("qwen2_vl")
    one.processor.image_processor.merge_size = 1
    says = r"irregular|row|no token|several|cells|outside|uneven|places"
    return _as_negative(one, says, picture=(90, 50))


def cross_attention() -> Negative:
    """Mllama: the picture enters the layers by cross-attention, on no token."""
    return _as_negative(subject("mllama"), r"cross.attention|no image token|no embedding|no token")


def discrete_codes() -> Negative:
    """Chameleon: a patch becomes the id of the nearest code."""
    return _as_negative(subject("chameleon"), r"discrete|code|differentiab|gradient|no embeddings")


NEGATIVES: dict[str, Callable[[], Negative]] = {
    function.__name__: function
    for function in (
        queries_as_many_as_patches,
        perceiver,
        token_mixing,
        permuted,
        by_content,
        placeholders_too_many,
        placeholders_too_few,
        wrong_patch_size,
        wrong_merge_size,
        cross_attention,
        discrete_codes,
    )
}
