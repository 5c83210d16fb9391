"""Image-only processors, for environments without torchvision.

A *processor* of transformers turns text and pictures into a model's inputs: it holds an image
processor, a tokenizer and, for some families, a video processor. Video processors need
torchvision, and a processor that has one can't be built without it, although pictures never use
it. The subclasses here leave out the video processor and inherit everything else: the same ids,
the same pixels, the same `mm_token_type_ids` (which tell for each token whether it is text, 0, or
image, 1).

The tests, the demo and the loading of models use them; no method of this library does. They rely
on one convention of transformers (checked with 5.5 and 5.23): the names of the constructor's
arguments tell which parts a processor has.

    image_only_processor(name, image_processor, tokenizer, chat_template=None) -> processor
    load_image_only(path) -> processor      from the folder of a saved model
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    Idefics3Processor,
    InternVLProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

__all__ = ["image_only_processor", "load_image_only"]


class _ImageOnly(ProcessorMixin):
    """The base of the image-only processors."""

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any):
        """Call the processor on images and text, as the full one is called."""
        if videos is not None:
            raise ValueError(
                f"videos: {type(self).__name__} has no video processor, as it is made for "
                f"environments without torchvision; install torchvision and use "
                f"{_full_name(self)}."
            )
        return super().__call__(images=images, text=text, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings to save; they name the full class, so that `AutoProcessor` can read them."""
        return {**super().to_dict(), "processor_class": _full_name(self)}


class ImageOnlyQwen2VLProcessor(_ImageOnly, Qwen2VLProcessor):
    """`Qwen2VLProcessor` without a video processor."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        Qwen2VLProcessor.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyQwen2_5_VLProcessor(_ImageOnly, Qwen2_5_VLProcessor):  # noqa: N801
    """`Qwen2_5_VLProcessor` without a video processor."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        Qwen2_5_VLProcessor.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs returned; the full class asks its video processor too."""
        parts = (self.tokenizer, self.image_processor)
        names = [name for part in parts for name in part.model_input_names]
        return [*names, "mm_token_type_ids"]


class ImageOnlyQwen3VLProcessor(_ImageOnly, Qwen3VLProcessor):
    """`Qwen3VLProcessor` without a video processor."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        Qwen3VLProcessor.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyInternVLProcessor(_ImageOnly, InternVLProcessor):
    """`InternVLProcessor` without a video processor.

    `image_seq_length` is the number of placeholder tokens per tile of the picture.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
    ) -> None:
        InternVLProcessor.__init__(
            self,
            image_processor,
            tokenizer,
            image_seq_length=image_seq_length,
            chat_template=chat_template,
        )


class ImageOnlySmolVLMProcessor(_ImageOnly, SmolVLMProcessor):
    """`SmolVLMProcessor` without a video processor; needs the package `num2words`.

    `image_seq_len` is the number of placeholder tokens per tile of the picture.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_len: int = 169,
        chat_template: str | None = None,
    ) -> None:
        SmolVLMProcessor.__init__(
            self,
            image_processor,
            tokenizer,
            None,
            image_seq_len=image_seq_len,
            chat_template=chat_template,
        )

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the template; the full class first asks its video processor for frame rates."""
        return ProcessorMixin.apply_chat_template(self, conversation, *args, **kwargs)


_CLASSES: dict[str, type[Any]] = {
    "Qwen2VL": ImageOnlyQwen2VLProcessor,
    "Qwen2_5_VL": ImageOnlyQwen2_5_VLProcessor,
    "Qwen3VL": ImageOnlyQwen3VLProcessor,
    "InternVL": ImageOnlyInternVLProcessor,
    "SmolVLM": ImageOnlySmolVLMProcessor,
}


# Idefics3 has no video part, but AutoProcessor of transformers 5.5 does not read it without
# torchvision either.
_LOADED: dict[str, type[Any]] = {**_CLASSES, "Idefics3": Idefics3Processor}


_LOADERS = {"SmolVLM": SmolVLMImageProcessorPil, "Idefics3": Idefics3ImageProcessorPil}


_MODEL_TYPES = {  # `model_type` in a model's config.json -> family
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "internvl": "InternVL",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
}


def _full_name(processor: ProcessorMixin) -> str:
    """Name of the transformers class that an image-only processor replaces."""
    return type(processor).__name__.removeprefix("ImageOnly")


def image_only_processor(
    name: str,
    image_processor: Any,
    tokenizer: Any,
    chat_template: str | None = None,
    **settings: Any,
) -> Any:
    """A family's processor for images and text, built without torchvision.

    Args:
        name: The family: "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "InternVL" or "SmolVLM".
        image_processor: The family's image processor of either backend (`...Pil` works without
            torchvision).
        tokenizer: The tokenizer, with the family's placeholder tokens (which mark where the
            picture's features go).
        chat_template: Jinja template that turns a conversation into a prompt.
        **settings: Further settings of the family's processor: `image_seq_length` (InternVL) or
            `image_seq_len` (SmolVLM), the number of placeholder tokens per tile.

    Returns:
        A processor that is also an instance of the family's own processor class.

    Raises:
        ValueError: If `name` is not one of the five.
    """
    if name not in _CLASSES:
        raise ValueError(
            f"name: {name!r} is not one of {', '.join(_CLASSES)}, the families whose processors "
            "need torchvision; build the others as usual."
        )
    return _CLASSES[name](image_processor, tokenizer, chat_template=chat_template, **settings)


def load_image_only(path: str | Path) -> Any:
    """The image-only processor of a model saved in a folder.

    The folder may have been saved by the full processor or by one of those here. Nothing is
    downloaded, and no code of the folder is run.

    Args:
        path: Folder with the files of the image processor and the tokenizer.

    Returns:
        The processor, with the folder's settings and chat template; for Idefics3, which has no
        video part, the full one.

    Raises:
        FileNotFoundError: If `path` is not a folder.
        ValueError: If the folder's family is neither one of the five nor Idefics3.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path: {str(folder)!r} is not a folder.")
    name = _family_of(folder)
    # Without torchvision, transformers 5.5 exports AutoImageProcessor only from its own module,
    # and it does not find all image processors.
    loader: Any = _LOADERS.get(name, AutoImageProcessor)
    own: Any = {"local_files_only": True, "trust_remote_code": False}
    images = loader.from_pretrained(folder, **own)
    tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    settings, _ = _LOADED[name].get_processor_dict(folder, local_files_only=True)
    return _LOADED[name].from_args_and_dict([images, tokenizer], settings)


def _family_of(folder: Path) -> str:
    """The family that a folder was saved for, by the class names in its files."""
    names: list[str] = []
    for file in ("processor_config", "preprocessor_config", "tokenizer_config", "config"):
        if (folder / f"{file}.json").is_file():
            saved = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
            named = saved.get("processor_class") or ""
            name = named.removeprefix("ImageOnly").removesuffix("Processor")
            name = _MODEL_TYPES.get(saved.get("model_type"), name)
            if name in _LOADED:
                return name
            names += [text for text in (named, saved.get("model_type")) if text]
    raise ValueError(
        f"path: {str(folder)!r} holds {', '.join(names) or 'no processor'}. Image-only processors, "
        f"for environments without torchvision, exist for {', '.join(_LOADED)}; for other families "
        "use transformers.AutoProcessor, with torchvision installed if it asks for it."
    )
