"""Which point of the user's pictures each number of the pixel inputs shows.

A few pictures of the same size go through the user's own image processor: black, white, a ramp
along each axis, two colours. How each number follows them tells what it shows. So resizing,
cropping, padding, tiles, thumbnails and the order of patches need not be known.
"""

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from captum_mllm.adapters.layout import LayoutError
from captum_mllm.validation import ArgumentError

_SHOWS = 0.5  # of the largest step from black to white: less shows no picture
_AGREES = 1e-2  # in standard deviations of the pixels, for inputs of half precision


@dataclass(frozen=True)
class PixelSource:
    """The user's image processor, called as it was for some inputs.

    Args:
        processor: the image processor.
        keys: names of the inputs that it makes.
        nested: whether it takes the pictures of one prompt as a list of their own.
        settings: keyword arguments that the model's processor adds to each call.
    """

    processor: Any
    keys: tuple[str, ...]
    nested: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, processor: Any, pictures: Sequence[Any], inputs: Mapping[str, Any]
    ) -> "PixelSource":
        """The way to call a processor that gives the pixels of some inputs again.

        Args:
            processor: a transformers processor, or its image processor.
            pictures: PIL pictures, those of ``inputs``.
            inputs: the model's inputs of one sample.

        Raises:
            ValueError: no call gives these pixels: other pictures, another processor or settings.
        """
        images = getattr(processor, "image_processor", processor)
        if not callable(images):
            raise ArgumentError(
                "processor",
                f"must be the model's processor, with an image processor; got "
                f"{type(processor).__name__}.",
            )
        seen: list[str] = []
        own = _own_settings(processor)
        for settings, nested in product([own, {}] if own else [{}], (False, True)):
            source = cls(images, (), nested, settings)
            try:
                made = source.call(pictures)
            except (TypeError, ValueError, IndexError, AttributeError) as error:
                seen.append(f"{type(error).__name__}: {error}")
                continue
            keys = tuple(key for key in made if key in inputs and key != "attention_mask")
            if why := _differs(made, inputs, keys):
                seen.append(why)
            else:
                return replace(source, keys=keys)
        raise ArgumentError(
            "images",
            f"through {type(images).__name__} do not give the pixels of inputs ({seen[0]}): are "
            f"they other pictures, in another order, is the processor that of another model, or "
            f"was it called with other settings? Set those on processor.image_processor itself.",
        )

    def __call__(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """The pixel inputs of other pictures.

        Args:
            pictures: PIL pictures, as many as there were.
        """
        made = self.call(pictures)
        return {key: made[key] for key in self.keys}

    def call(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """All tensors that the image processor makes.

        Args:
            pictures: PIL pictures.
        """
        given = [list(pictures)] if self.nested else list(pictures)
        made = self.processor(images=given, return_tensors="pt", **self.settings)
        if not isinstance(made, Mapping):
            raise TypeError(f"it returns {type(made).__name__}, not a mapping of inputs")
        return {key: value for key, value in made.items() if isinstance(value, Tensor)}


def _own_settings(processor: Any) -> dict[str, Any]:
    """What a processor's class adds to each call of its image processor."""
    if (own := getattr(processor, "images_kwargs", None)) is not None:
        return dict(own)
    kinds = [getattr(processor, "valid_processor_kwargs", None)]
    with warnings.catch_warnings():  # 5.5 keeps them beside the class, 5.24 deprecates that
        warnings.simplefilter("ignore", FutureWarning)
        for cls in type(processor).__mro__:
            kinds.append(getattr(sys.modules.get(cls.__module__), f"{cls.__name__}Kwargs", None))
    defaults = (getattr(kind, "_defaults", None) or {} for kind in kinds)
    return dict(next((d["images_kwargs"] for d in defaults if "images_kwargs" in d), {}))


def _differs(made: Mapping[str, Tensor], inputs: Mapping[str, Any], keys: Sequence[str]) -> str:
    """How what a processor made differs from the inputs; empty if it does not."""
    if not any(made[key].is_floating_point() for key in keys):
        return f"it makes {', '.join(made)}, the inputs hold {', '.join(inputs)}"
    for key in keys:
        ours, theirs = made[key], torch.as_tensor(inputs[key]).detach().cpu()
        if ours.shape != theirs.shape:
            return f"{key} of shape {tuple(ours.shape)}, inputs hold {tuple(theirs.shape)}"
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs.to(ours.dtype)):
                return f"other values of {key}"
            continue
        tolerance = _AGREES * max(float(ours.float().std(correction=0)), 1e-3)
        if float((ours.float() - theirs.float()).abs().mean()) > tolerance:
            return f"other values of {key}"
    return ""


@dataclass(frozen=True, eq=False)
class Painted:
    """What each number of the pixel inputs shows, flat over all of them in the order of ``shapes``.

    Args:
        shapes: shape of each input that shows pictures, by name.
        picture: which picture; -1 for none (padding).
        x: where in it, pixels from the left; NaN for none.
        y: pixels from the top; NaN for none.
        channel: 0 red, 1 green, 2 blue; -1 for several.
        black: value where the picture is black.
        white: value where it is white.
        tile: which image of a batch of images the number belongs to; 0 for inputs without.
    """

    shapes: dict[str, tuple[int, ...]]
    picture: Int64[Tensor, " numbers"]
    x: Float64[Tensor, " numbers"]
    y: Float64[Tensor, " numbers"]
    channel: Int64[Tensor, " numbers"]
    black: Float64[Tensor, " numbers"]
    white: Float64[Tensor, " numbers"]
    tile: Int64[Tensor, " numbers"]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the inputs that show pictures."""
        return tuple(self.shapes)

    @property
    def shows(self) -> Bool[Tensor, " numbers"]:
        """Whether a number shows a picture at all."""
        return self.picture >= 0

    def flat(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The numbers of some inputs in this order.

        Args:
            inputs: the model's inputs.
        """
        return torch.cat([inputs[key].flatten() for key in self.shapes])

    def shaped(self, numbers: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`flat`.

        Args:
            numbers: flat numbers.
        """
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        parts = numbers.split(sizes)
        return {
            key: part.reshape(shape)
            for (key, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def paint(source: PixelSource, sizes: Sequence[tuple[int, int]]) -> tuple[Painted, int]:
    """Find what each number shows, by the user's image processor alone.

    Args:
        source: calls the image processor.
        sizes: (height, width) of each picture, pixels.

    Returns:
        What was found, and how many calls it took.

    Raises:
        LayoutError: nothing that the processor makes follows the pictures.
    """
    made = {name: source([_canvas(size, name) for size in sizes]) for name in _CANVASES}
    black, white = made["black"], made["white"]
    shapes = {
        key: tuple(value.shape)
        for key, value in black.items()
        if value.is_floating_point()
        and all(other[key].shape == value.shape for other in made.values())
        and not torch.equal(value, white[key])
    }
    if not shapes:
        raise LayoutError(
            "what the image processor makes does not follow the picture, or changes its shape "
            "with what the picture shows."
        )
    values = {
        name: torch.cat([part[key].double().flatten() for key in shapes])
        for name, part in made.items()
    }
    low, high = values["black"], values["white"]
    span = high - low
    shows = span.abs() > _SHOWS * span.abs().max()

    def share(name: str) -> Tensor:
        return (values[name] - low) / torch.where(shows, span, 1.0)

    picture, calls = _pictures(source, sizes, shapes, shows, low)
    height, width = torch.tensor(sizes, dtype=torch.float64)[picture.clamp(min=0)].T
    nothing = torch.where(shows, 0.0, torch.nan)
    colours = torch.stack([share("red"), share("green"), 1 - share("red") - share("green")])
    level, channel = colours.max(0)
    return Painted(
        shapes,
        picture,
        share("across") * (width - 1) + 0.5 + nothing,
        share("down") * (height - 1) + 0.5 + nothing,
        torch.where(shows & (level > 0.99), channel, -1),
        low,
        high,
        _tiles(shapes.values()),
    ), len(made) + calls


def levels(painted: Painted) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Black and the step to white, as the pixel inputs hold them.

    Args:
        painted: what each number shows.

    Returns:
        Both for red, green and blue.

    Raises:
        LayoutError: some colour stands in no number by itself.
    """
    found = []
    for channel in range(3):
        here = painted.channel == channel
        if not here.any():
            raise LayoutError(
                "the image processor mixes colours, so pixels can't be replaced or traced back."
            )
        low, high = painted.black[here].median(), painted.white[here].median()
        found.append((low, high - low))
    black, span = torch.tensor(found).float().T.reshape(2, 3, 1, 1)
    return black, span


def repainted(
    painted: Painted,
    inputs: Mapping[str, Tensor],
    sizes: Sequence[tuple[int, int]],
    changes: Sequence[Float[Tensor, "1 3 height width"]],
) -> dict[str, Tensor]:
    """Change each number by what changes at the point that it shows; gradients pass.

    Args:
        painted: what each number shows.
        inputs: the model's inputs.
        sizes: (width, height) of each picture, pixels.
        changes: what is added to each picture as a canvas of any size, in the units of the inputs.

    Returns:
        The pixel inputs by name.

    Raises:
        LayoutError: some colour stands in no number by itself.
    """
    _, span = levels(painted)
    numbers = painted.flat(inputs)
    # in float32: coordinates do not fit into half precision
    total = torch.zeros_like(numbers, dtype=torch.float32)
    for k, (change, size) in enumerate(zip(changes, sizes, strict=True)):
        at = ((painted.picture == k) & (painted.channel >= 0)).nonzero()[:, 0]
        channel, device = painted.channel[at], change.device
        places = torch.stack([painted.x[at] / size[0], painted.y[at] / size[1]], 1) * 2 - 1
        sampled = F.grid_sample(
            change,
            places[None, None].to(device, torch.float32),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )[0, :, 0]
        own_channel = sampled.gather(0, channel[None].to(device))[0]
        factor = (painted.white - painted.black)[at] / span[channel, 0, 0]
        total = total.index_add(0, at.to(device), own_channel * factor.to(own_channel))
    return painted.shaped(numbers + total.to(numbers.dtype))


def _pictures(
    source: PixelSource,
    sizes: Sequence[tuple[int, int]],
    shapes: Mapping[str, tuple[int, ...]],
    shows: Tensor,
    low: Tensor,
) -> tuple[Tensor, int]:
    """Which picture each number shows, and how many calls it took: one white picture at a time."""
    picture = torch.where(shows, 0, -1)
    if len(sizes) == 1:
        return picture, 0
    for k in range(len(sizes)):
        names = ["white" if i == k else "black" for i in range(len(sizes))]
        made = source([_canvas(size, name) for size, name in zip(sizes, names, strict=True)])
        values = torch.cat([made[key].double().flatten() for key in shapes])
        picture[shows & ((values - low).abs() > 1e-6)] = k
    return picture, len(sizes)


def _tiles(shapes: Iterable[tuple[int, ...]]) -> Tensor:
    """For each number, which image of its batch it belongs to, counted over all inputs."""
    parts, first = [], 0
    for shape in shapes:  # (..., channels, height, width), (tiles, patches, numbers), or patches
        inner = 3 if len(shape) >= 4 else min(len(shape), 2)
        n = torch.Size(shape[: len(shape) - inner]).numel()
        parts.append(first + torch.arange(n).repeat_interleave(torch.Size(shape).numel() // n))
        first += n
    return torch.cat(parts)


_CANVASES = ("black", "white", "across", "down", "red", "green")


def _canvas(size: tuple[int, int], name: str) -> Any:
    """A picture to paint with."""
    from PIL import Image

    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    if name == "white":
        pixels[:] = 255
    elif name in ("red", "green"):
        pixels[..., ("red", "green").index(name)] = 255
    elif name == "across":
        pixels[:] = np.rint(np.linspace(0, 255, width)).astype(np.uint8)[None, :, None]
    elif name == "down":
        pixels[:] = np.rint(np.linspace(0, 255, height)).astype(np.uint8)[:, None, None]
    return Image.fromarray(pixels)
