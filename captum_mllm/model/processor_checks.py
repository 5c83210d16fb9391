"""Whether pixels and processor can be those of the model: nothing fails where they are not."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.discovered import DiscoveredAdapter
from captum_mllm.adapters.processors import (
    other_family,
    pixel_statistics,
    read_preprocessing,
)
from captum_mllm.validation import ArgumentError

_ADVICE = (
    "Pass what the model's own processor makes of the picture: processor(images=picture, "
    "text=prompt, return_tensors='pt')."
)
_UNNORMALISED = 20.0
"""No mean and deviation of a processor takes 0 .. 1 beyond 3 or so; 0 .. 255 lies far beyond."""


def check_processor(processor: Any, adapter: Adapter) -> None:
    """Refuse a processor whose image token is not the model's: labels would be wrong.

    A class of processor that belongs to another family is warned of, where the ids agree.

    Args:
        processor: the processor given to the attributor, or None.
        adapter: the model's adapter.

    Raises:
        ArgumentError: its image token has another id than the model's, or its tokenizer lacks it.
    """
    token = getattr(processor, "image_token", None)
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(token, str) or tokenizer is None or isinstance(adapter, DiscoveredAdapter):
        return
    if token == getattr(processor, "boi_token", None):  # it begins an image; the one inside is:
        token = getattr(tokenizer, "image_token", token)
    found, ids = tokenizer.convert_tokens_to_ids(token), adapter.visual_ids
    if found not in ids:
        raise ArgumentError(
            "processor",
            f"{type(processor).__name__} stands for an image by {token!r}, id {found}, but "
            f"{type(adapter.model).__name__} by id {' or '.join(map(str, ids))}: it belongs to "
            f"another model, and would label the tokens wrongly. Load it from the model's own "
            f"folder or repository, AutoProcessor.from_pretrained(...).",
        )
    if own := other_family(processor, adapter.config.model_type):
        warnings.warn(
            f"processor is a {type(processor).__name__}, but {type(adapter.model).__name__} has a "
            f"{own}: labels of tokens are wrong if it is another model's. Load it from the "
            f"model's own folder or repository, AutoProcessor.from_pretrained(...).",
            stacklevel=2,
        )


def check_pixels(inputs: Mapping[str, Any], processor: Any, adapter: Adapter) -> None:
    """Warn of pixels that the processor's mean and deviation cannot give.

    That is: a range far beyond theirs (0 .. 255, or normalised twice); steps of 1/255 that belong
    to 0 .. 1 (not normalised) or to the channels in reverse order (BGR). A picture whose channels
    were exchanged before a processor with one mean for all is not told. Warn too of another size
    than the processor gives every picture, where it has one.

    Args:
        inputs: the processor's mapping.
        processor: the model's processor; without one, only a range far beyond any is told.
        adapter: the model's adapter.
    """
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or not pixels.numel():
        return
    if pixels.is_meta or not torch.isfinite(pixels).all():  # refused where the inputs are read
        return
    statistics, pixels = pixel_statistics(processor), pixels.detach()
    lowest, highest = (float(extreme) for extreme in pixels.aminmax())
    if statistics is None:
        problem = None
        if max(-lowest, highest) > _UNNORMALISED and not isinstance(adapter, DiscoveredAdapter):
            problem = f"range from {lowest:.3g} to {highest:.3g}, as pixels not normalised do"
    else:
        problem = _problem(pixels, lowest, highest, *statistics)
    if not adapter.fixed_size:  # else another size is an error where the inputs are read
        problem = problem or _size_problem(pixels, processor)
    if problem:
        warnings.warn(f"pixel_values {problem}. {_ADVICE}", stacklevel=4)


def _size_problem(pixels: Tensor, processor: Any) -> str | None:
    """Another size than the one to which the processor brings every picture."""
    if pixels.ndim != 4 or not hasattr(processor, "image_processor"):
        return None
    try:
        made = read_preprocessing(processor)
    except ValueError:
        return None
    size = None if made.whole else made.crop or made.resize
    if size is None or tuple(pixels.shape[-2:]) == size:
        return None
    height, width = pixels.shape[-2:]
    return (
        f"are {height} x {width} pixels, but the processor's settings make {size[0]} x {size[1]} "
        f"of every picture: they are another processor's, or where its settings were changed for "
        f"this call, maps lie in those pixels and to_image needs geometry="
    )


def _problem(
    pixels: Tensor, lowest: float, highest: float, mean: list[float], std: list[float]
) -> str | None:
    low = min(-m / s for m, s in zip(mean, std, strict=True))
    high = max((1 - m) / s for m, s in zip(mean, std, strict=True))
    slack = max(1.5, (high - low) / 2)  # noise on the pixels is none of our business
    if lowest < low - slack or highest > high + slack:
        return (
            f"range from {lowest:.3g} to {highest:.3g}, but the processor's mean and deviation "
            f"take 0 .. 255 to {low:.3g} .. {high:.3g}: they are not normalised, or twice"
        )
    values = _by_channel(pixels, len(mean))
    if values is None or values.dtype != torch.float32 or len(values.unique()) < 16:
        return None
    centre, width = values.new_tensor(mean)[:, None], values.new_tensor(std)[:, None]
    if _on_steps(values * width + centre) > 0.5:
        return None
    if _on_steps(values) > 0.999 and lowest >= 0 and highest <= 1:
        return "are 0 .. 1 in steps of 1/255: they are not normalised by the processor's mean"
    if _on_steps(values.flip(0) * width + centre) > 0.999:
        return "are normalised with their channels in reverse order: BGR instead of RGB"
    return None


def _by_channel(pixels: Tensor, channels: int) -> Float[Tensor, "channels some"] | None:
    """Some values of each channel, of pictures or of rows of patches, channel by channel."""
    if pixels.ndim > 3 and pixels.shape[-3] == channels:
        values = pixels.movedim(-3, 0).flatten(1)
    elif pixels.ndim == 2 and pixels.shape[1] % channels == 0:
        values = pixels.unflatten(1, (channels, -1)).movedim(1, 0).flatten(1)
    else:
        return None
    return values[:, :: max(1, values.shape[1] // 20_000)]


def _on_steps(values: Tensor) -> float:
    """Share of the values that are whole numbers of 1/255."""
    steps = values * 255
    return float(((steps - steps.round()).abs() < 0.01).float().mean())
