"""What the command line needs of a model: loading it, and a prompt made into its inputs.

A mistake of the user is raised as :class:`UsageError`, one line that names the argument.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


class UsageError(Exception):
    """A mistake of the user, as one line."""


def load_model(name: str | None, dtype: str, device_name: str | None) -> tuple[Any, Any]:
    """Model and processor on their device; a class that is not supported is refused first.

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
        return model.to(device), processor
    try:
        _check_class(name)
        processor = _load_processor(name)
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"argument --model: {name!r} can't be loaded: {error}") from error
    return model.to(device).eval(), processor


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

    from captum_mllm.adapters import find_adapter

    local = Path(name).expanduser()
    if not local.is_dir() and (local.exists() or name.startswith((".", "/", "~"))):
        raise OSError("no such folder; give a folder with config.json, or a hub id")
    config = AutoConfig.from_pretrained(name)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"a model of type {config.model_type!r} reads no pictures; give a multimodal model "
            f"such as LLaVA"
        )
    with torch.device("meta"):
        find_adapter(AutoModelForImageTextToText.from_config(config))


def _load_processor(name: str) -> Any:
    from transformers import AutoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    try:
        processor = AutoProcessor.from_pretrained(name)
    except Exception as error:
        text = str(error).lower()
        if not is_torchvision_available() and ("torchvision" in text or "video_processor" in text):
            raise ImportError(
                "its processor needs torchvision, which is not installed; pip install torchvision "
                "(the build that goes with your torch)"
            ) from error
        raise ValueError(f"its processor fails: {error}") from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError("it has no image processor (preprocessor_config.json is missing)")
    return processor


def prepare_inputs(processor: Any, picture: "Image", prompt: str) -> tuple[Any, str]:
    """The processor's mapping for one picture and prompt, and what was assumed, as a sentence.

    Args:
        processor: the model's processor.
        picture: the picture.
        prompt: what to ask, with or without the model's template around it.
    """
    image_token = getattr(processor, "image_token", None)
    tokenizer = processor.tokenizer
    if image_token and image_token in prompt:
        text, assumed = prompt, "Assumed: the prompt holds the image token, so it is used as it is."
    elif getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        assumed = "Assumed: the model's chat template, one user turn, the picture before the text."
    elif image_token:
        text = f"{image_token}\n{prompt}"
        assumed = f"Assumed: {image_token!r} and a new line before the prompt (no chat template)."
    else:
        raise UsageError(
            "argument --prompt: the processor has no chat template and no image token; write the "
            "whole prompt with its image token"
        )
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    special = {"add_special_tokens": False} if begins else {}
    try:
        return processor(images=picture, text=text, return_tensors="pt", **special), assumed
    except ValueError as error:
        raise UsageError(f"argument --prompt: {error}") from error
