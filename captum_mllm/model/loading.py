"""Load a model and its processor from a checkpoint, and turn a prompt into inputs."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


_CODE = (
    "it brings Python code of its own, which runs with all your rights and therefore only with "
    "trust_remote_code=True: read the code first"
)

_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")

_OBJECT = re.compile(r"config\.json$|^(tokenizer|special_tokens_map)\.json$|\.index\.json$")

_LONGEST = 500  # characters of another library's message


def load_model(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, str]:
    """Load a model and its processor.

    A class that is not supported is refused before the weights are read. Code that the checkpoint
    brings is not run, and nothing is asked on standard input, unless ``trust_remote_code`` is True.

    Args:
        name: hub id or folder.
        dtype: name of a torch floating point dtype; "auto" (default) for the checkpoint's own.
        device: name of a torch device; None (default) for "cuda" if there is one, else "cpu".
        trust_remote_code: whether to run Python files of the checkpoint, which can do all that
            you can; default False. Only for code that you have read.

    Returns:
        The model in evaluation mode on its device, its processor, and what is to be said about how
        they were loaded (weights that the checkpoint lacks, say), "" if there is nothing.

    Raises:
        ArgumentError: ``name`` can't be loaded (the message names the damaged file where it can be
            told, and the cause), ``dtype`` is unknown, or ``device`` can't be used.

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
        _check_class(name, trust_remote_code)
        processor, note = _load_processor(name, trust_remote_code)
        from transformers import AutoModelForImageTextToText

        with _naming("its weights (or generation_config.json)"):
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
            model, info = loaded
            model = model.to(place).eval()
    except Exception as error:  # transformers lets through what its parts raise on damaged files
        raise ArgumentError("name", f"{name!r} can't be loaded: {_cause(name, error)}") from error
    notes = [line for line in (note, _missing_weights(info)) if line]
    return model, processor, " ".join(notes)


@contextmanager
def _naming(part: str) -> Iterator[None]:
    """Say of which part an error is; OSErrors name a file themselves."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{part}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | ImportError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _cause(name: str, error: Exception) -> str:
    """Why loading failed, in one line: the damaged file of a folder, if one is found."""
    text = _one_line(error)
    if "trust_remote_code" in text:
        return _CODE
    folder = Path(name).expanduser()
    damaged = _damaged(folder) if folder.is_dir() else None
    if damaged is None and folder.is_dir() and text.startswith("its processor fails"):
        damaged = _missing_tokenizer(folder)
    return text if damaged is None or damaged in text else f"{damaged} ({text})"


def _missing_tokenizer(folder: Path) -> str | None:
    """What to say of a folder without one, of which transformers says that it lacks a library."""
    if any(any(folder.glob(name)) for name in _TOKENIZERS):
        return None
    return "it holds no tokenizer (tokenizer.json is missing)"


def _damaged(folder: Path) -> str | None:
    """The first file of a model's folder that can't be read, and why."""
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if _OBJECT.search(path.name) and not isinstance(content, dict):
                    raise ValueError("it must hold an object")
            elif path.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix == ".jinja":
                path.read_text(encoding="utf-8")
        except RecursionError:
            return f"{path.name} is damaged: nested too deeply"
        except Exception as error:
            return f"{path.name} is damaged: {_one_line(error)}"
    return None


def _missing_weights(info: dict[str, Any]) -> str:
    missing = sorted(info.get("missing_keys") or ())
    if not missing:
        return ""
    few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"{len(missing)} of the model's weights are not in the checkpoint and are random: {few}. "
        "What is explained is then not the trained model."
    )


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError("device", f"{name!r} can't be used: {reason}") from error
    return device


def _check_class(name: str, trusted: bool = False) -> None:
    """Raise before the weights are loaded if a model of this class can't be explained."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from captum_mllm.adapters import find_adapter, registered_classes

    local = Path(name).expanduser()
    if not local.is_dir() and (local.exists() or name.startswith((".", "/", "~"))):
        raise OSError("there is no such folder; give a folder with config.json, or a hub id")
    with _naming("config.json"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    own = trusted and "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if not own and type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"a model of type {config.model_type!r} takes no images; give a multimodal model, such "
            f"as {', '.join(registered_classes())}"
        )
    with _naming("config.json"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trusted)
    find_adapter(model)


def _load_processor(name: str, trusted: bool) -> tuple[Any, str]:
    """The processor, and a note where its video part is missing."""
    from transformers import AutoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    try:
        processor, note = AutoProcessor.from_pretrained(name, trust_remote_code=trusted), ""
    except Exception as error:
        if is_torchvision_available():
            raise ValueError(f"its processor fails: {_one_line(error)}") from error
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
        raise ValueError(f"its processor fails: {_one_line(error)}") from error


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
        ArgumentError: ``pictures`` is empty; ``prompt`` is no valid Unicode, or holds another
            number of image tokens than there are pictures, or the processor refuses it; a processor
            without chat template and image token, or whose chat template or files are broken.

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
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError("prompt", f"is not valid Unicode: {prompt!a}.") from error
    text, assumed = _full_prompt(processor, len(pictures), prompt)
    start = processor.tokenizer.bos_token
    begins = start is not None and text.startswith(start)
    special = {"add_special_tokens": False} if begins else {}
    try:
        images = [to_eight_bits(picture) for picture in pictures]
        inputs = processor(images=images, text=text, return_tensors="pt", **special)
    except ValueError as error:
        raise ArgumentError("prompt", f"is refused by the processor: {error}") from error
    except Exception as error:  # of a processor whose settings are broken
        raise ArgumentError("processor", f"fails on the pictures: {_one_line(error)}") from error
    return inputs, assumed


def _full_prompt(processor: Any, count: int, prompt: str) -> tuple[str, str]:
    """The prompt with a placeholder for each of ``count`` pictures, and what was assumed."""
    token = image_token(processor)
    # Of Gemma 3 the processor expands the token that begins an image, of its kin the other one.
    tokens = {token, getattr(processor, "image_token", None)} - {None, ""}
    held = {name: prompt.count(name) for name in tokens if name in prompt}
    if held:
        if count not in held.values():
            name, most = max(held.items(), key=lambda pair: pair[1])
            raise ArgumentError(
                "prompt",
                f"holds {most} image tokens ({name!r}) for {count} picture(s); write one for each "
                f"picture, or none at all.",
            )
        return prompt, "Assumed: the prompt holds the image token, so it is used as it is."
    if getattr(processor, "chat_template", None):
        content = [*[{"type": "image"}] * count, {"type": "text", "text": prompt}]
        try:
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        except Exception as error:  # jinja2's, and whatever the template does
            raise ArgumentError(
                "processor", f"has a chat template that fails: {_one_line(error)}"
            ) from error
        if tokens and all(text.count(name) != count for name in tokens):
            raise ArgumentError(
                "processor",
                f"has a chat template that gives {text.count(token)} image tokens ({token!r}) for "
                f"{count} picture(s); write the whole prompt with its image tokens.",
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
