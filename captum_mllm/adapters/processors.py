"""What the classes of processors tell: the geometry of pictures, placeholders in prompts.

A *processor* turns pictures and text into a model's inputs; its *image processor* does the
pictures' part. Their classes are known here by name, and nowhere else in the package.
"""

from typing import Any

from captum_mllm.geometry import Preprocessing

# Image processors by the first part of their class name (backends append Pil or Fast).
_STRETCHES_FREELY = ("GotOcr2ImageProcessor", "Idefics3ImageProcessor", "SmolVLMImageProcessor")
_STRETCHES_TO_BLOCKS = ("Qwen2VLImageProcessor", "Qwen3VLImageProcessor")
_TELLS_BY_IMAGE_SIZES = ("LlavaNextImageProcessor",)
_PADS_BEFORE_RESIZING = ("LlavaImageProcessor",)

_PLACEHOLDERS = {
    "Qwen2VLProcessor": "<|vision_start|>{token}<|vision_end|>",
    "Qwen2_5_VLProcessor": "<|vision_start|>{token}<|vision_end|>",
    "Qwen3VLProcessor": "<|vision_start|>{token}<|vision_end|>",
    "PaliGemmaProcessor": "{token}",  # its start token directly follows the last picture
}
"""By class of processor: what stands for one picture in a prompt without a chat template."""

_KIN = (
    {"LlavaProcessor", "LlavaNextProcessor", "PixtralProcessor"},
    {"Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"},
    {"Idefics3Processor", "SmolVLMProcessor"},
)
"""Classes of processors that checkpoints of one another's families come with."""


def read_preprocessing(processor: Any) -> Preprocessing:
    """Read what a processor does to a picture from its settings.

    Args:
        processor: a transformers processor with ``image_processor``, or an image processor.

    Returns:
        How it pads, resizes and crops a picture.

    Raises:
        ValueError: it has no image processor, or it treats pictures in a way that can't be undone
            from the settings alone.

    Example:
        >>> from transformers import CLIPImageProcessor
        >>> read_preprocessing(CLIPImageProcessor()).crop
        (224, 224)
    """
    settings = getattr(processor, "image_processor", processor)
    name = type(settings).__name__
    if not hasattr(settings, "do_resize"):
        raise ValueError(
            f"processor must have an image processor, got {name}; pass geometry= instead."
        )
    if name.startswith(_STRETCHES_FREELY):
        return Preprocessing(whole=True)
    if name.startswith(_STRETCHES_TO_BLOCKS):
        return Preprocessing(whole=True, keeps_aspect=settings.patch_size * settings.merge_size)
    if name.startswith(_TELLS_BY_IMAGE_SIZES):
        raise ValueError(
            f"processor {name} pads each picture differently; the box is known from the inputs' "
            f"image_sizes. Pass geometry= instead."
        )
    if getattr(settings, "do_pan_and_scan", False):
        raise ValueError(
            f"processor {name} has do_pan_and_scan=True: it adds crops of a picture as further "
            f"images, and nothing tells which part of the picture each shows. Pass geometry= "
            f"instead."
        )
    shortest_edge, resize = _resizing(settings, name)
    crop = None
    if getattr(settings, "do_center_crop", False):
        size = dict(settings.crop_size or {})
        if not (size.get("height") and size.get("width")):
            raise ValueError(
                f"processor {name} crops to {size}, which to_image can't undo; it knows height and "
                f"width. Pass geometry= instead."
            )
        crop = (size["height"], size["width"])
    pads = bool(getattr(settings, "do_pad", False))
    square = pads and name.startswith(_PADS_BEFORE_RESIZING)
    return Preprocessing(square, shortest_edge, resize, crop)


def _resizing(settings: Any, name: str) -> tuple[int | None, tuple[int, int] | None]:
    """The shortest edge, or (height, width), that an image processor resizes to."""
    if not settings.do_resize:
        return None, None
    size = dict(settings.size or {})
    shortest_edge = size.get("shortest_edge")
    both = bool(size.get("height") and size.get("width"))
    if not (shortest_edge or both) or size.get("longest_edge"):
        raise ValueError(
            f"processor {name} resizes by {size}, which to_image can't undo; it knows "
            f"shortest_edge, or height and width. Pass geometry= instead."
        )
    return shortest_edge, (size["height"], size["width"]) if both else None


def image_token(processor: Any) -> str | None:
    """The token that stands for a picture in a prompt.

    Args:
        processor: a transformers processor.

    Returns:
        The token's text, or None if the processor has none. Of Gemma 3 it is the begin-of-image
        token, which its processor replaces by the image tokens.
    """
    return getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)


def placeholder_pattern(processor: Any) -> str:
    r"""What stands for one picture before the text of a prompt without a chat template.

    Args:
        processor: a transformers processor, of any class.

    Returns:
        A pattern with ``{token}`` where the image token goes; by default the token and a new line.

    Example:
        >>> placeholder_pattern(object())
        '{token}\n'
    """
    names = (cls.__name__ for cls in type(processor).__mro__)
    return next((_PLACEHOLDERS[name] for name in names if name in _PLACEHOLDERS), "{token}\n")


def lacks_video_part(processor: Any) -> bool:
    """Whether a processor is one of :mod:`~captum_mllm.adapters.image_only`, without a video part.

    Args:
        processor: a transformers processor.
    """
    return type(processor).__name__.startswith("ImageOnly")


def pixel_statistics(processor: Any) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation per channel by which a processor normalises pixels of 0 .. 1.

    Args:
        processor: a transformers processor, an image processor or None.

    Returns:
        Mean and standard deviation; None where it does not bring bytes to 0 .. 1 and normalise.
    """
    settings = getattr(processor, "image_processor", processor)
    wanted = ("do_rescale", "do_normalize", "image_mean", "image_std", "rescale_factor")
    if not all(getattr(settings, name, None) for name in wanted):
        return None
    mean, std = settings.image_mean, settings.image_std
    if not isinstance(mean, list | tuple) or not isinstance(std, list | tuple):
        return None
    whole = abs(settings.rescale_factor * 255 - 1) < 1e-3
    return (list(mean), list(std)) if whole and len(mean) == len(std) and min(std) > 0 else None


def other_family(processor: Any, model_type: str) -> str | None:
    """The class of processor that a type of model has, where this one is another type's.

    Args:
        processor: a transformers processor.
        model_type: of the model's config.

    Returns:
        The class's name; None where the processor may be the model's, or nothing is known of it.
    """
    from transformers.models.auto import processing_auto

    classes: dict[str, Any] = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"]
    own = classes.get(model_type)
    registered = {name for name in classes.values() if isinstance(name, str)}
    names = {cls.__name__ for cls in type(processor).__mro__} & registered
    alike = {own}.union(*(kin for kin in _KIN if own in kin))
    return own if isinstance(own, str) and names and names.isdisjoint(alike) else None
