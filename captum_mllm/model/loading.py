"""Load a model and its processor from a checkpoint, and turn a prompt into inputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_mllm.adapters.processors import image_token, lacks_video_part, placeholder_pattern
from captum_mllm.pictures import to_eight_bits
from captum_mllm.validation import ArgumentError

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "describe the picture."  # of a benchmark, unless another one is given


_WITHOUT_VIDEO = (
    "The processor was loaded without its video part because torchvision is not installed."
)


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any, str]:
    """Load a model and its processor.

    A class that is not supported is refused before the weights are read.

    Args:
        name: hub id or folder.
        dtype: name of a torch floating point dtype; "auto" (default) for the checkpoint's own.
        device: name of a torch device; None (default) for "cuda" if there is one, else "cpu".

    Returns:
        The model in evaluation mode on its device, its processor, and a sentence on how they were
        loaded, "" if there is nothing to say.

    Raises:
        ArgumentError: ``name`` can't be loaded, ``dtype`` is unknown, or ``device`` can't be used.

    Example:
        >>> from captum_mllm.reference import model_path
        >>> model, processor, note = load_model(str(model_path()), device="cpu")
        >>> type(model).__name__, note
        ('LlavaForConditionalGeneration', '')
    """
    import torch

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ArgumentError(
            "dtype", f"must be 'auto' or a torch floating point dtype's name, got {dtype!r}."
        )
    place = _device(device)
    try:
        _check_class(name)
        processor, note = _load_processor(name)
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise ArgumentError("name", f"{name!r} can't be loaded: {error}") from error
    return model.to(place).eval(), processor, note


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError("device", f"{name!r} can't be used: {reason}") from error
    return device


def _check_class(name: str) -> None:
    """Raise before the weights are loaded if a model of this class can't be explained."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from captum_mllm.adapters import find_adapter, registered_classes

    local = Path(name).expanduser()
    if not local.is_dir() and (local.exists() or name.startswith((".", "/", "~"))):
        raise OSError("there is no such folder; give a folder with config.json, or a hub id")
    config = AutoConfig.from_pretrained(name)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"a model of type {config.model_type!r} takes no images; give a multimodal model, such "
            f"as {', '.join(registered_classes())}"
        )
    with torch.device("meta"):
        find_adapter(AutoModelForImageTextToText.from_config(config))


def _load_processor(name: str) -> tuple[Any, str]:
    """The processor, and a note where its video part is missing."""
    from transformers import AutoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    try:
        processor, note = AutoProcessor.from_pretrained(name), ""
    except Exception as error:
        if is_torchvision_available():
            raise ValueError(f"its processor fails: {error}") from error
        processor = _without_torchvision(name, error)
        note = _WITHOUT_VIDEO if lacks_video_part(processor) else ""
    if getattr(processor, "image_processor", None) is None:
        raise ValueError("it has no image processor (preprocessor_config.json is missing)")
    return processor, note


def _without_torchvision(name: str, error: Exception) -> Any:
    """The image part of a processor that failed with ``error`` where torchvision is absent."""
    from captum_mllm.adapters.image_only import load_image_only

    try:
        return load_image_only(_folder(name))
    except ImportError:  # another package that it needs, which the message names
        raise
    except Exception as other:
        text = str(error).lower()
        if "torchvision" in text or "video_processor" in text or "video processor" in text:
            raise ImportError(
                "its processor needs torchvision, which is not installed; pip install torchvision "
                "(the build that matches your torch)"
            ) from other
        raise ValueError(f"its processor fails: {error}") from error


def _folder(name: str) -> Path:
    """The folder with a model's small files; for a hub id, the one in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model"]))


def prepare_inputs(processor: Any, pictures: "Sequence[Image]", prompt: str) -> tuple[Any, str]:
    r"""Turn pictures and a prompt into the inputs of a model.

    A prompt that holds image tokens is used as it is. Otherwise the processor's chat template is
    applied, with the pictures before the text of one user turn; without a chat template the image
    tokens are put before the prompt.

    Args:
        processor: the model's processor.
        pictures: the pictures, at least one.
        prompt: the user's text, with or without the model's template around it.

    Returns:
        The mapping that the processor returns, and a sentence on what was assumed.

    Raises:
        ArgumentError: ``pictures`` is empty; ``prompt`` holds another number of image tokens than
            there are pictures, or the processor refuses it; a processor without chat template and
            image token.

    Example:
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> _, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs, assumed = prepare_inputs(processor, [picture], "what is this ?")
        >>> sorted(inputs), assumed.split(",")[0]
        (['attention_mask', 'input_ids', 'pixel_values'], "Assumed: the model's chat template")
    """
    if not pictures:
        raise ArgumentError("pictures", "is empty: give at least one picture.")
    text, assumed = _full_prompt(processor, len(pictures), prompt)
    start = processor.tokenizer.bos_token
    begins = start is not None and text.startswith(start)
    special = {"add_special_tokens": False} if begins else {}
    try:
        images = [to_eight_bits(picture) for picture in pictures]
        inputs = processor(images=images, text=text, return_tensors="pt", **special)
    except ValueError as error:
        raise ArgumentError("prompt", f"is refused by the processor: {error}") from error
    return inputs, assumed


def _full_prompt(processor: Any, count: int, prompt: str) -> tuple[str, str]:
    """The prompt with a placeholder for each of ``count`` pictures, and what was assumed."""
    token = image_token(processor)
    if token and token in prompt:
        if prompt.count(token) != count:
            raise ArgumentError(
                "prompt",
                f"holds {prompt.count(token)} image tokens ({token!r}) for {count} picture(s); "
                f"write one for each picture, or none at all.",
            )
        return prompt, "Assumed: the prompt holds the image token, so it is used as it is."
    if getattr(processor, "chat_template", None):
        content = [*[{"type": "image"}] * count, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text, (
            "Assumed: the model's chat template, one user turn, the picture before the text."
        )
    if not token:
        raise ArgumentError(
            "prompt",
            "can't be completed: the processor has no chat template and no image token; write the "
            "whole prompt with its image token.",
        )
    before = placeholder_pattern(processor).format(token=token) * count
    return before + prompt, f"Assumed: {before!r} before the prompt (no chat template)."
