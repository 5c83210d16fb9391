"""The pixels of a sample at other scales: from the given tensor, or again from the pictures."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.pixels import as_pictures
from captum_mllm.functional import Box
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.inputs import Sample

_TOLERANCE = 0.2  # mean difference of pixels, in their standard deviations


def scaled_inputs(
    adapter: Adapter, processor: Any, sample: Sample, grids: Sequence[ImageGrid], images: Any
) -> dict[str, Tensor]:
    """The inputs that hold or describe pixels, on other grids.

    Args:
        adapter: the model's adapter.
        processor: the model's processor, or None.
        sample: the prompt at its own scale.
        grids: the grids to reach, one per image.
        images: original pictures to start from, or None to resize the pixel tensor.

    Raises:
        TypeError: paths instead of pictures.
        ValueError: ``images`` that can't be used, or are not those of the inputs.
    """
    if images is None or adapter.from_pictures:
        return adapter.rescale_pixels(sample.kwargs, grids)
    pictures, settings = checked_pictures(adapter, processor, sample, images)
    return _to_sample(sample, adapter.pixels_from_pictures(pictures, settings, grids))


def window_inputs(
    adapter: Adapter, processor: Any, sample: Sample, boxes: Sequence[Box], images: Any
) -> dict[str, Tensor]:
    """The inputs that hold pixels, at the model's own size, of a box of each image.

    Args:
        adapter: the model's adapter.
        processor: the model's processor, or None.
        sample: the prompt at its own scale.
        boxes: per image, (left, upper, right, lower) in fractions of it.
        images: original pictures to start from, or None to resize the pixel tensor.

    Raises:
        TypeError: paths instead of pictures.
        ValueError: ``images`` that can't be used, or are not those of the inputs.
    """
    if images is None or adapter.from_pictures:
        return adapter.window_pixels(sample.kwargs, sample.grids, boxes)
    pictures, settings = checked_pictures(adapter, processor, sample, images)
    cuts = []
    for picture, (left, upper, right, lower) in zip(pictures, boxes, strict=True):
        wide, high = picture.size
        edges = (left * wide, upper * high, right * wide, lower * high)
        cuts.append(picture.crop(tuple(round(edge) for edge in edges)))
    return _to_sample(sample, adapter.pixels_from_pictures(cuts, settings, sample.grids))


def _to_sample(sample: Sample, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the sample's device; in the dtype of its inputs where it has them."""
    device = sample.prompt_ids.device
    return {name: x.to(device, sample.kwargs.get(name, x).dtype) for name, x in pixels.items()}


def checked_pictures(
    adapter: Adapter, processor: Any, sample: Sample, images: Any
) -> tuple[list[Any], Any]:
    """The pictures, compared with the sample's pixels, and the image processor.

    Args:
        adapter: the model's adapter.
        processor: the model's processor.
        sample: the prompt at its own scale.
        images: original pictures.

    Raises:
        TypeError: paths instead of pictures.
        ValueError: no processor, a video, or pictures that are not those of the sample.
    """
    pictures = as_pictures(images)
    settings = getattr(processor, "image_processor", None)
    if settings is None:
        raise ValueError("images= needs a processor: make the attributor with one.")
    if any(grid.steps for grid in sample.grids):
        raise ValueError("images= can't hold a video: leave it out to resize its frames.")
    if len(pictures) != len(sample.grids):
        raise ValueError(
            f"images= holds {len(pictures)} pictures, inputs have {len(sample.grids)}."
        )
    for picture, grid in zip(pictures, sample.grids, strict=True):
        if grid.picture not in (None, (picture.height, picture.width)):
            raise ValueError(
                f"images= holds a picture of {picture.height} x {picture.width} pixels (height x "
                f"width), but image_sizes say {grid.picture[0]} x {grid.picture[1]}: pass the "
                f"pictures that inputs were made of."
            )
    again = adapter.pixels_from_pictures(pictures, settings, sample.grids)["pixel_values"]
    pixels = sample.kwargs["pixel_values"].to(again)
    # Resizing differs a little between ways of resampling; another picture differs much.
    close = again.shape == pixels.shape and float((again - pixels).abs().mean()) <= (
        _TOLERANCE * float(pixels.std().clamp(min=1e-3))
    )
    if not close:
        raise ValueError(
            f"images= through the processor's settings are not the pixels of inputs (shapes "
            f"{tuple(again.shape)} and {tuple(pixels.shape)}): are they other pictures, in another "
            f"order, or was the processor called with other settings? Leave images out to resize "
            f"the pixel tensor."
        )
    return pictures, settings
