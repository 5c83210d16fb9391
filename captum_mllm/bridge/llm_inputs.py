"""Inputs and labels for captum's LLMAttribution: pictures by segments, prompts, exact labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from captum.attr import ImageMaskInput, TextTokenInput
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters import find_adapter
from captum_mllm.model.inputs import read_sample
from captum_mllm.pictures import to_eight_bits
from captum_mllm.words import token_labels, tokenizer_of


def image_input(
    pictures: Any,
    mask: Tensor | None,
    text: str,
    processor: Any,
    *,
    image: int = 0,
    baseline: tuple[int, int, int] = (255, 255, 255),
) -> ImageMaskInput:
    """A picture of a prompt as captum's ``ImageMaskInput``.

    Args:
        pictures: PIL picture, or a sequence of all pictures of the prompt.
        mask: (height, width): number of each pixel's segment, e.g.
            :func:`~captum_mllm.functional.grid_mask` or
            :func:`~captum_mllm.functional.rank_mask`; None for the whole picture as one.
        text: the prompt as the processor takes it, placeholders included.
        processor: the model's processor; its default resizing and cropping apply.
        image: which of the pictures is perturbed, default the first.
        baseline: RGB colour that stands in for an absent segment, default white as in captum.

    Returns:
        captum's ``ImageMaskInput``: one feature per segment, for ``LLMAttribution``.

    Raises:
        TypeError: ``pictures`` are not PIL pictures; ``processor`` is not callable.
        ValueError: a mask of another size than the picture; a processor that pads.
        IndexError: no such picture.

    Example:
        >>> from captum_mllm.functional import grid_mask
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> picture, _ = render_pil(make_scene(1))
        >>> mask = grid_mask((picture.height, picture.width), 3, 3)
        >>> inp = image_input(picture, mask, "USER: <image> what ? ASSISTANT:", load()[1])
        >>> inp.n_itp_features
        9
    """
    all_pictures = list(pictures) if isinstance(pictures, Sequence) else [pictures]
    for picture in all_pictures:
        if not hasattr(picture, "convert"):
            raise TypeError(
                f"pictures must be PIL pictures, got {type(picture).__name__}: open paths with "
                f"PIL.Image.open(path)."
            )
    if not 0 <= image < len(all_pictures):
        raise IndexError(f"image {image} is out of range: there are {len(all_pictures)} pictures.")
    if not callable(processor):
        raise TypeError(f"processor must be the model's processor, got {type(processor).__name__}.")
    encode: Any = processor
    all_pictures = [to_eight_bits(picture) for picture in all_pictures]
    perturbed = all_pictures[image].convert("RGB")  # captum paints three channels
    mask = None if mask is None else torch.as_tensor(mask)
    if mask is not None and tuple(mask.shape) != (perturbed.height, perturbed.width):
        raise ValueError(
            f"mask must be (height, width) = {(perturbed.height, perturbed.width)} as the picture, "
            f"got {tuple(mask.shape)}."
        )

    def process(changed: Any) -> dict[str, Any]:
        images = [changed if n == image else picture for n, picture in enumerate(all_pictures)]
        inputs = dict(encode(images=images, text=text, return_tensors="pt"))
        inputs.pop("labels", None)  # PaliGemma's, for training
        if not bool(inputs.get("attention_mask", torch.ones(1)).all()):
            raise ValueError("processor pads the prompt, which captum would attend to; don't pad.")
        return inputs

    return ImageMaskInput(perturbed, mask, baseline=baseline, processor_fn=process)


class PromptInput(TextTokenInput):
    r"""The prompt of an image as captum's ``TextTokenInput``: its features are the text tokens.

    Placeholders, special tokens, markers and images are never perturbed.

    Args:
        inputs: the mapping that the processor returns for one sample.
        model: the model; its adapter determines which tokens are text.
        processor: its processor, for labels; default None.
        baseline: id that stands in for an absent token, default 0.

    Raises:
        ValueError: inputs that don't fit the model; ``baseline`` outside the vocabulary or an
            image token; no text.

    Example:
        >>> from captum.attr import FeatureAblation, LLMAttribution
        >>> from captum_mllm import TeacherForced
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> inp = PromptInput(inputs, model, processor)
        >>> ablation = LLMAttribution(FeatureAblation(TeacherForced(model)), processor.tokenizer)
        >>> result = ablation.attribute(inp, "there is a dog", forward_in_tokens=False)
        >>> result.token_attr.shape == (4, len(inp.values))
        True
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        model: nn.Module,
        processor: Any = None,
        baseline: int = 0,
    ) -> None:
        adapter, tokenizer = find_adapter(model), tokenizer_of(processor)
        sample = read_sample(inputs, adapter)
        number = isinstance(baseline, int)
        if not number or not 0 <= baseline < adapter.vocabulary or baseline in adapter.visual_ids:
            raise ValueError(
                f"baseline must be a token id in 0..{adapter.vocabulary - 1} and not an image "
                f"token, got {baseline!r}."
            )
        special = adapter.special_ids | set(getattr(tokenizer, "all_special_ids", []))
        ids = sample.prompt_ids
        positions = [p for p in sample.text_positions if int(ids[p]) not in special]
        if not positions:
            raise ValueError("inputs hold no text except special tokens: there is no feature.")
        self.positions = torch.tensor(positions, device=ids.device)
        """(features,): position of each feature in ``input_ids`` without padding."""
        self._kwargs = {k: v for k, v in sample.kwargs.items() if k != "attention_mask"}
        self.tokenizer, self.skip_tokens, self.baselines = tokenizer, None, baseline
        self.inp_tensor = ids[None]
        self.itp_mask = torch.zeros_like(self.inp_tensor, dtype=torch.bool)
        self.itp_mask[0, self.positions] = True
        self.itp_tensor = self.inp_tensor[:, self.positions]
        self.values = list(token_labels(ids[self.positions].tolist(), tokenizer))
        self.n_itp_features = len(positions)

    @override
    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Any:
        """The model's inputs with absent tokens replaced.

        Args:
            perturbed_tensor: (1, features): 1 for features that are present; None for all.

        Returns:
            A mapping, as the processor returned it, with its ``input_ids`` changed.
        """
        return {**self._kwargs, "input_ids": super().to_model_input(perturbed_tensor)}


class ExactLabels:
    """A tokenizer for ``LLMAttribution`` that labels an answer's ids one by one.

    captum decodes the answer and encodes the text again to find each token's piece of it; ids that
    don't survive that (a generated image marker, half a character) give an ``IndexError`` or labels
    of other tokens. All other calls go to the real tokenizer.

    Args:
        processor: the model's processor or tokenizer.

    Raises:
        TypeError: ``processor`` is neither of them.

    Reference:
        captum 0.9.0, ``_convert_ids_to_pretty_tokens``.

    Example:
        >>> from captum_mllm.bridge import ExactLabels
        >>> from captum_mllm.reference import load
        >>> tokenizer = ExactLabels(load()[1])
        >>> tokenizer.encode("a dog", add_special_tokens=False) == tokenizer("a dog",
        ...     add_special_tokens=False)["input_ids"]
        True
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = tokenizer_of(processor)
        if tokenizer is None:
            raise TypeError("processor must be the model's processor or tokenizer, got None.")
        self._tokenizer = tokenizer
        self._last: tuple[str, dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any, *args: Any, **kwargs: Any) -> str:
        """The joined labels of several ids, which the next call splits again; one id as usual.

        Args:
            ids: one token id, or several.
            args: of the tokenizer's ``decode``.
            kwargs: of the tokenizer's ``decode``.

        Returns:
            The text; of several ids their labels, one after another.
        """
        flat = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(flat, list) or args or kwargs:
            return self._tokenizer.decode(ids, *args, **kwargs)
        offsets, text = [], ""
        for label in token_labels(flat, self._tokenizer):
            offsets.append((len(text), len(text) + len(label)))
            text += label
        self._last = (text, {"input_ids": flat, "offset_mapping": offsets})
        return text

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer; for the text that :meth:`decode` returned last, exactly its ids."""
        if kwargs.get("return_offsets_mapping") and self._last and self._last[0] == text:
            return self._last[1]
        return self._tokenizer(text, *args, **kwargs)
