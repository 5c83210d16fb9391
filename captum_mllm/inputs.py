"""One sample: ids, pixels, where its images and its text lie; teacher forcing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.geometry import ImageGrid


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with its images, without padding, on the model's device.

    Args:
        kwargs: the model's inputs of one sample.
        grids: grid and frame of each image.
        image_positions: per image, positions of all its placeholders, extra tokens included.
        padding: columns of left padding that were cut off.
    """

    kwargs: Mapping[str, Tensor]
    grids: tuple[ImageGrid, ...]
    image_positions: tuple[Int64[Tensor, " placeholders"], ...]
    padding: int

    @property
    def prompt_ids(self) -> Int64[Tensor, " tokens"]:
        """Ids of the prompt, placeholders included."""
        return self.kwargs["input_ids"][0]

    @property
    def prefix_length(self) -> int:
        """Number of tokens up to and including the last image's last placeholder."""
        return int(self.image_positions[-1][-1]) + 1

    def grid_positions(self, adapter: Adapter) -> list[Int64[Tensor, " cells"]]:
        """Per image, the position of each grid cell, row by row."""
        pairs = zip(self.image_positions, self.grids, strict=True)
        return [where[adapter.grid_tokens(grid).to(where.device)] for where, grid in pairs]


def read_sample(inputs: Mapping[str, Any], adapter: Adapter) -> Sample:
    """Check what a processor returned and cut it to one sample without padding.

    Args:
        inputs: any mapping that the HF processor returns: ``input_ids`` (1, tokens),
            ``pixel_values``, usually ``attention_mask``; left padding is allowed.
        adapter: the model's adapter.

    Raises:
        TypeError: not a mapping.
        ValueError: no pixels, more than one sample, placeholders that don't match the images.
    """
    kwargs, padding = _one_sample(inputs, adapter)
    grids = adapter.grids(kwargs)
    placeholder = torch.tensor(adapter.visual_ids, device=kwargs["input_ids"].device)
    positions = torch.isin(kwargs["input_ids"][0], placeholder).nonzero()[:, 0]
    counts = [adapter.tokens_per_image(grid) for grid in grids]
    if len(positions) != sum(counts):
        shapes = ", ".join(f"{grid.rows} x {grid.cols}" for grid in grids)
        raise ValueError(
            f"input_ids hold {len(positions)} image tokens, but pixel_values make {sum(counts)} "
            f"({len(grids)} image(s) of {shapes} tokens): text and images must come from the same "
            f"processor call, and the processor's patch_size must be the model's. (A pixel tensor "
            f"as inputs means versions of one image; several images go in a mapping.)"
        )
    return Sample(kwargs, grids, tuple(positions.split(counts)), padding)


def _one_sample(inputs: Mapping[str, Any], adapter: Adapter) -> tuple[dict[str, Tensor], int]:
    """The tensors of one sample on the model's device, and how much left padding was cut."""
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs must be the mapping that the processor returns (with input_ids and "
            f"pixel_values), or a pixel tensor with the rest of the mapping as "
            f"additional_forward_args; got {type(inputs).__name__}."
        )
    for name in ("input_ids", "pixel_values"):
        if not isinstance(inputs.get(name), Tensor):
            got = "nothing" if inputs.get(name) is None else type(inputs[name]).__name__
            raise ValueError(
                f"inputs must hold a tensor {name!r}, got {got}: call the processor with "
                f"images=, text= and return_tensors='pt'."
            )
    _check_ids(inputs["input_ids"], adapter)
    if not torch.isfinite(inputs["pixel_values"]).all():
        raise ValueError("pixel_values hold NaN or infinite values; check the image.")
    device = adapter.model.device
    kept = {
        name: value.to(device)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name != "labels"
    }
    padding = _left_padding(kept, adapter)
    for name in adapter.token_wise:
        if name in kept:
            kept[name] = kept[name][:, padding:]
    return kept, padding


def _check_ids(ids: Tensor, adapter: Adapter) -> None:
    """Raise unless these are the ids of exactly one sample."""
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(
            f"inputs must hold exactly one sample, input_ids of shape (1, tokens); got "
            f"{tuple(ids.shape)}. Call attribute once per sample."
        )
    last = adapter.vocabulary - 1
    if ids.is_floating_point() or bool(((ids < 0) | (ids > last)).any()):
        raise ValueError(
            f"input_ids must be integers in 0..{last} (the vocabulary), got {ids.dtype} from "
            f"{ids.min()} to {ids.max()}: is the processor that of the model?"
        )


def _left_padding(kept: dict[str, Tensor], adapter: Adapter) -> int:
    """Columns of left padding; fills in a missing attention mask."""
    ids = kept["input_ids"]
    mask = kept.setdefault("attention_mask", torch.ones_like(ids))
    for name, value in kept.items():
        if name in adapter.token_wise and value.shape != ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(ids.shape)}, got "
                f"{tuple(value.shape)}."
            )
        if name not in adapter.token_wise and value.shape[:2] == ids.shape:
            raise ValueError(
                f"inputs hold {name!r} with one entry per token, which can't follow the answer or "
                f"other scales: leave it out; known are {', '.join(adapter.token_wise)}."
            )
    padding = int((mask[0] == 0).sum())
    if bool((mask[0, :padding] != 0).any()):
        raise ValueError(
            "attention_mask: only left padding is allowed, but zeros follow a one. Set "
            "processor.tokenizer.padding_side = 'left', or don't pad."
        )
    return padding


def append_answer(
    sample: Sample, answer_ids: Int64[Tensor, " answer"], adapter: Adapter
) -> dict[str, Tensor]:
    """The model's inputs with the answer appended (teacher forcing).

    Args:
        sample: the prompt.
        answer_ids: token ids of the answer.
        adapter: tells how token-wise side inputs go on.
    """
    full = dict(sample.kwargs)
    full["input_ids"] = torch.cat([full["input_ids"], answer_ids[None]], dim=1)
    for name, fill in adapter.suffix_fill.items():
        if name in full:
            more = full[name].new_full((1, len(answer_ids)), fill)
            full[name] = torch.cat([full[name], more], dim=1)
    return full


def rescale_prefix(
    sample: Sample, grids: Sequence[ImageGrid], pixels: Mapping[str, Tensor], adapter: Adapter
) -> Sample:
    """The prefix that ends with the last image, with its images on other grids.

    Args:
        sample: the prompt at its own scale.
        grids: the grids to reach, one per image.
        pixels: the pixel inputs on those grids.
        adapter: tells how many placeholders a grid takes.

    Returns:
        A sample whose every token-wise input has the new number of placeholders.
    """
    pieces: list[Tensor] = []
    new_positions: list[Tensor] = []
    at = length = 0
    for where, grid in zip(sample.image_positions, grids, strict=True):
        count = adapter.tokens_per_image(grid)
        pieces += [torch.arange(at, int(where[0]), device=where.device), where[:1].expand(count)]
        start = length + int(where[0]) - at
        new_positions.append(torch.arange(start, start + count, device=where.device))
        at, length = int(where[-1]) + 1, start + count
    source = torch.cat(pieces)
    kwargs = dict(sample.kwargs) | dict(pixels)
    for name in adapter.token_wise:
        if name in kwargs:
            kwargs[name] = kwargs[name][:, source]
    return Sample(kwargs, tuple(grids), tuple(new_positions), sample.padding)


def read_target(
    target: Any, sample: Sample, adapter: Adapter, tokenizer: Any = None
) -> Int64[Tensor, " answer"]:
    """Check a given answer: ids, or a string where there is a tokenizer.

    Args:
        target: 1-D tensor or sequence of ids, or a string.
        sample: the prompt (for its device).
        adapter: the model's adapter.
        tokenizer: turns a string into ids.

    Raises:
        TypeError: neither ids nor a string.
        ValueError: empty, out of the vocabulary, holds an image token, or a string without
            a tokenizer.
    """
    if isinstance(target, str):
        if tokenizer is None:
            raise ValueError(
                "target is a string, which needs a processor: make the attributor with one, e.g. "
                "MSEA(model, processor), or give token ids."
            )
        target = tokenizer(target, add_special_tokens=False)["input_ids"]
    try:
        ids = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"target must be a 1-D tensor or list of token ids, a string or None; got "
            f"{type(target).__name__}."
        ) from error
    if ids.numel() == 0:
        raise ValueError("target is empty: give at least one token id, or None to generate.")
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(
            f"target must be a 1-D tensor or list of token ids, got shape {tuple(ids.shape)} of "
            f"{ids.dtype}."
        )
    ids = ids.to(device=sample.prompt_ids.device, dtype=torch.int64)
    if bool(((ids < 0) | (ids >= adapter.vocabulary)).any()):
        raise ValueError(
            f"target holds ids outside 0..{adapter.vocabulary - 1} (the vocabulary): "
            f"{ids[(ids < 0) | (ids >= adapter.vocabulary)].tolist()}."
        )
    if bool(torch.isin(ids, torch.tensor(adapter.visual_ids, device=ids.device)).any()):
        raise ValueError(
            f"target holds an image token (one of ids {list(adapter.visual_ids)}); only text can "
            f"be a target. Was the prompt left in the generated ids? Cut it off."
        )
    return ids
