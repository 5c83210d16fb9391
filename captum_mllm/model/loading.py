"""A model and its processor from a checkpoint, and a prompt made into inputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_mllm.adapters.processors import image_token, lacks_video_part, placeholder_pattern
from captum_mllm.cli.arguments import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "describe the picture."  # of a benchmark, where none is given


_WITHOUT_VIDEO = "The processor was read without its video part, as torchvision is not installed."


def load_model(name: str | None, dtype: str, device_name: str | None) -> tuple[Any, Any, str]:
    """Model and processor on their device, and a note on how they were read, or "".

    A class that is not supported is refused before the weights are read.

    Args:
        name: hub id or folder; None for the shipped model.
        dtype: "auto" or a torch dtype's name.
        device_name: a torch device; None for cuda if there is one.
    """
    import torch

    device = _device(device_name)
    if name is None:
        from captum_mllm.reference.models import load

        try:
            model, processor = load()
        except OSError as error:
            raise UsageError("the shipped model is missing: reinstall captum_mllm") from error
        if dtype != "auto":
            model = model.to(getattr(torch, dtype))
        return model.to(device), processor, ""
    try:
        _check_class(name)
        processor, note = _load_processor(name)
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"argument --model: {name!r} can't be loaded: {error}") from error
    return model.to(device).eval(), processor, note


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"argument --device: can't use {name!r}: {reason}") from error
    return device


def _check_class(name: str) -> None:
    """Raise before the weights are loaded if no adapter knows the model's class."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from captum_mllm.adapters import find_adapter, registered_classes

    local = Path(name).expanduser()
    if not local.is_dir() and (local.exists() or name.startswith((".", "/", "~"))):
        raise OSError("no such folder; give a folder with config.json, or a hub id")
    config = AutoConfig.from_pretrained(name)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"a model of type {config.model_type!r} reads no pictures; give a multimodal model: "
            f"{', '.join(registered_classes())}"
        )
    with torch.device("meta"):
        find_adapter(AutoModelForImageTextToText.from_config(config))


def _load_processor(name: str) -> tuple[Any, str]:
    """The processor, and a note where it is not the whole one."""
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
    """What reads pictures of a processor that failed with ``error`` where torchvision is absent."""
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
                "(the build that goes with your torch)"
            ) from other
        raise ValueError(f"its processor fails: {error}") from error


def _folder(name: str) -> Path:
    """The folder with a model's small files; of a hub id, that of the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model"]))


def prepare_inputs(processor: Any, pictures: "Sequence[Image]", prompt: str) -> tuple[Any, str]:
    """The processor's mapping for pictures and prompt, and what was assumed, as a sentence.

    Args:
        processor: the model's processor.
        pictures: the pictures.
        prompt: what to ask, with or without the model's template around it.
    """
    text, assumed = _full_prompt(processor, len(pictures), prompt)
    start = processor.tokenizer.bos_token
    begins = start is not None and text.startswith(start)
    special = {"add_special_tokens": False} if begins else {}
    try:
        made = processor(images=list(pictures), text=text, return_tensors="pt", **special)
    except ValueError as error:
        raise UsageError(f"argument --prompt: {error}") from error
    return made, assumed


def _full_prompt(processor: Any, count: int, prompt: str) -> tuple[str, str]:
    """The prompt with a placeholder for each of ``count`` pictures, and what was assumed."""
    token = image_token(processor)
    if token and token in prompt:
        if prompt.count(token) != count:
            raise UsageError(
                f"argument --prompt: holds {prompt.count(token)} image tokens ({token!r}) for "
                f"{count} picture(s); write one for each, or none at all"
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
        raise UsageError(
            "argument --prompt: the processor has no chat template and no image token; write the "
            "whole prompt with its image token"
        )
    before = placeholder_pattern(processor).format(token=token) * count
    return before + prompt, f"Assumed: {before!r} before the prompt (no chat template)."
