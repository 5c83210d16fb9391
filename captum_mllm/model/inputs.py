"""One sample: ids, pixels, where its images and its text lie; teacher forcing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.geometry import ImageGrid
from captum_mllm.validation import ArgumentError


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with its images, without padding, on the model's device.

    Args:
        kwargs: the model's inputs of one sample.
        grids: grid and frame of each image, then of each video.
        image_positions: per image, positions of all its placeholders, extra tokens included.
        prefix_length: number of tokens that the maps depend on: up to and including the last
            placeholder, or the whole prompt where it sees itself.
        padding: columns of left padding that were cut off.
        blocks: per image, the positions that belong to it, its markers included.
    """

    kwargs: Mapping[str, Tensor]
    grids: tuple[ImageGrid, ...]
    image_positions: tuple[Int64[Tensor, " placeholders"], ...]
    prefix_length: int
    padding: int
    blocks: tuple[range, ...] = ()

    @property
    def prompt_ids(self) -> Int64[Tensor, " tokens"]:
        """Ids of the prompt, placeholders included."""
        return self.kwargs["input_ids"][0]

    @property
    def text_positions(self) -> list[int]:
        """Prompt positions outside of every image's block."""
        inside = {position for block in self.blocks for position in block}
        return [p for p in range(len(self.prompt_ids)) if p not in inside]


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
    kwargs, padding = one_sample(inputs, adapter)
    adapter.check_inputs(kwargs)
    grids = adapter.grids(kwargs)
    positions = _placeholders(kwargs["input_ids"][0], grids, adapter)
    _check_runs(positions, grids, adapter)
    prefix = max(int(where[-1]) for where in positions) + 1
    if adapter.whole_prompt:
        prefix = kwargs["input_ids"].shape[1]
    blocks = tuple(adapter.block(kwargs["input_ids"][0], where) for where in positions)
    return Sample(kwargs, grids, positions, prefix, padding, blocks)


def _placeholders(
    ids: Int64[Tensor, " tokens"], grids: Sequence[ImageGrid], adapter: Adapter
) -> tuple[Int64[Tensor, " placeholders"], ...]:
    """Positions of each image's placeholders.

    Raises:
        ValueError: another number of placeholders than the images make.
    """
    counts = [sum(adapter.runs(grid)) for grid in grids]
    kinds = [adapter.placeholder(grid) for grid in grids]
    per_kind: dict[int, Sequence[Tensor]] = {}
    names = {True: "pixel_values_videos", False: "pixel_values"}
    for kind in dict.fromkeys((*kinds, *adapter.visual_ids)):
        where = (ids == kind).nonzero()[:, 0]
        expected = [count for count, other in zip(counts, kinds, strict=True) if other == kind]
        if len(where) != sum(expected):
            shapes = ", ".join(" x ".join(map(str, grid.shape)) for grid in grids)
            of_video = kind == getattr(adapter.config, "video_token_id", None)
            what = "video" if of_video else "image"
            raise ValueError(
                f"input_ids hold {len(where)} {what} tokens, but "
                f"{names[of_video]} make {sum(expected)} ({len(expected)} {what}(s); grids of "
                f"{shapes} tokens): text and images must come from the same processor call, and "
                f"the processor's patch_size must be the model's. (A pixel tensor as inputs means "
                f"versions of one image; several images go in a mapping.)"
            )
        per_kind[kind] = list(where.split(expected))
    return tuple(per_kind[kind].pop(0) for kind in kinds)  # type: ignore[attr-defined]


def _check_runs(positions: Sequence[Tensor], grids: Sequence[ImageGrid], adapter: Adapter) -> None:
    """Raise where text stands between image tokens that belong together."""
    for where, grid in zip(positions, grids, strict=True):
        for run in where.split(adapter.runs(grid)):
            if int(run[-1] - run[0]) + 1 != len(run):
                raise ArgumentError(
                    "input_ids",
                    f"hold other tokens between the {len(run)} image tokens from {int(run[0])} to "
                    f"{int(run[-1])}, which must stand side by side (padding not counted): pass "
                    f"what the processor returns.",
                )


def one_sample(
    inputs: Mapping[str, Any], adapter: Adapter, pixel_keys: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], int]:
    """The tensors of one sample on the model's device, and how much left padding was cut.

    Args:
        inputs: what the processor returns.
        adapter: the model's adapter.
        pixel_keys: names of the pixel inputs, default the adapter's.

    Raises:
        TypeError: not a mapping.
        ValueError: no pixels, more than one sample, padding on the right, values that are not
            finite.
    """
    pixel_keys = adapter.pixel_keys if pixel_keys is None else pixel_keys
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs must be the mapping that the processor returns (with input_ids and "
            f"pixel_values), or a pixel tensor with the rest of the mapping as "
            f"additional_forward_args; got {type(inputs).__name__}."
        )
    refuse_meta(inputs)
    pixels = [name for name in pixel_keys if inputs.get(name) is not None]
    for name in ("input_ids", *(pixels or pixel_keys[:1])):
        if not isinstance(inputs.get(name), Tensor):
            got = "nothing" if inputs.get(name) is None else type(inputs[name]).__name__
            raise ValueError(
                f"inputs must hold a tensor {name!r}, got {got}: call the processor with "
                f"images=, text= and return_tensors='pt'."
            )
    _check_ids(inputs["input_ids"], adapter)
    for name in pixels:
        if name.startswith("pixel_values") and not inputs[name].is_floating_point():
            raise ArgumentError(
                name,
                f"must be normalised floats, got {inputs[name].dtype}: bytes of a picture are no "
                f"input of the model. Pass what its processor makes of the picture, with "
                f"return_tensors='pt'.",
            )
        if not torch.isfinite(inputs[name]).all():
            raise ValueError(f"{name} hold NaN or infinite values; check the image.")
    _check_tensors(inputs, adapter)
    device = adapter.device
    kept = {
        name: value.to(device)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name != "labels"
    }
    kept["input_ids"] = kept["input_ids"].long()  # of any type of whole numbers, as models take
    padding = _left_padding(kept, adapter)
    for name in adapter.token_wise:
        if name in kept:
            kept[name] = kept[name][:, padding:]
    return kept, padding


def refuse_meta(tensors: Mapping[str, Any]) -> None:
    """Raise on tensors of the meta device, which hold no values.

    Args:
        tensors: arguments by their names; those that are no tensors don't matter.

    Raises:
        ArgumentError: one lies on the meta device.
    """
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ArgumentError(
                name,
                "lies on the meta device, where tensors have no values: make it on the CPU or the "
                "model's device, outside of torch.device('meta') and init_empty_weights().",
            )


def _check_tensors(inputs: Mapping[str, Any], adapter: Adapter) -> None:
    """Raise on inputs that the model reads but that are not tensors: we would leave them out."""
    known = signature(adapter.model.forward).parameters
    for name, value in inputs.items():
        if value is not None and not isinstance(value, Tensor) and name in known:
            raise ValueError(
                f"inputs must hold a tensor {name!r}, got {type(value).__name__}: call the "
                f"processor with return_tensors='pt', or make a tensor of it."
            )


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
        if name not in adapter.token_wise and _looks_token_wise(name, value, ids):
            raise ValueError(
                f"inputs hold {name!r} with one entry per token, which can't follow the answer or "
                f"other scales: leave it out; known are {', '.join(adapter.token_wise)}."
            )
    padding = int((mask[0] == 0).sum())
    if padding == ids.shape[1]:
        raise ValueError("attention_mask is 0 everywhere: 1 marks the tokens that count.")
    if bool((mask[0, :padding] != 0).any()):
        raise ValueError(
            "attention_mask: only left padding is allowed, but zeros follow a one. Set "
            "processor.tokenizer.padding_side = 'left', or don't pad."
        )
    _check_hidden(ids[0, :padding], adapter)
    return padding


def _check_hidden(hidden: Tensor, adapter: Adapter) -> None:
    """Raise where the attention mask hides what can't be padding.

    Padding repeats one id. Which, a tokenizer may choose otherwise than the model's config, so
    that several tokens of one id are taken for padding whatever it is.
    """
    found = hidden.unique().tolist()
    text = adapter.config.get_text_config()
    configs = (adapter.config, text, adapter.model.generation_config)
    # Not by getattr: of a composite config, transformers calls that deprecated.
    pads = {vars(config).get("pad_token_id") for config in configs if config is not None} - {None}
    ends = set(adapter.special_ids) - {getattr(text, "bos_token_id", None)}
    alone = len(hidden) == 1 and pads and not pads.union(ends).intersection(found)
    if len(found) > 1 or alone:
        raise ArgumentError(
            "attention_mask",
            f"hides the first {len(hidden)} tokens, ids {hidden[:8].tolist()}, which are no "
            f"padding: without them the prompt is another. Leave them out of input_ids, or set the "
            f"mask to 1.",
        )


def _looks_token_wise(name: str, value: Tensor, ids: Tensor) -> bool:
    """Whether an unknown input seems to have one entry per token."""
    if name in ("position_ids", "cache_position", "inputs_embeds"):
        return True
    about_pixels = any(word in name for word in ("pixel", "grid", "image", "video"))
    return value.shape[:2] == ids.shape and not about_pixels


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


def rescaled_inputs(
    inputs: Mapping[str, Tensor],
    sample: Sample,
    grids: Sequence[ImageGrid],
    pixels: Mapping[str, Tensor],
    adapter: Adapter,
) -> Sample:
    """The same tokens with the images on other grids, hence with other numbers of placeholders.

    Args:
        inputs: token-wise inputs, from the prompt's first token to any after the last placeholder
            (the prefix, or prompt and answer).
        sample: the prompt at its own scale, which tells where its images lie.
        grids: the grids to reach, one per image.
        pixels: the pixel inputs on those grids.
        adapter: tells how many placeholders a grid takes.

    Returns:
        A sample whose every token-wise input has the new number of placeholders.
    """
    runs = []  # (first position, its old length, its new length, image)
    for n, (where, old, new) in enumerate(
        zip(sample.image_positions, sample.grids, grids, strict=True)
    ):
        lengths = adapter.runs(old)
        for run, length in zip(where.split(lengths), adapter.runs(new), strict=True):
            runs.append((int(run[0]), len(run), length, n))
    device, end = sample.prompt_ids.device, inputs["input_ids"].shape[1]
    pieces: list[Tensor] = []
    positions: list[list[Tensor]] = [[] for _ in grids]
    at = length = 0
    for start, old_length, new_length, image in sorted(runs):
        pieces += [torch.arange(at, start), torch.full((new_length,), start)]
        begin = length + start - at
        positions[image].append(torch.arange(begin, begin + new_length, device=device))
        at, length = start + old_length, begin + new_length
    source = torch.cat([*pieces, torch.arange(at, end)]).to(device)
    kwargs = dict(inputs) | dict(pixels)
    for name in adapter.token_wise:
        if name in kwargs:
            kwargs[name] = kwargs[name][:, source]
    where = tuple(torch.cat(runs_of_image) for runs_of_image in positions)
    return Sample(kwargs, tuple(grids), where, length, sample.padding)


def moved_positions(
    sample: Sample, scaled: Sample, positions: Int64[Tensor, " tokens"]
) -> Int64[Tensor, " tokens"]:
    """Where text tokens stand once the images have other numbers of placeholders.

    Args:
        sample: the prompt at its own scale.
        scaled: the same tokens, and perhaps more, with the images on other grids.
        positions: of tokens that are no placeholders; those of the answer follow the prompt's.

    Returns:
        Their positions at the other scale.
    """
    device = positions.device
    before = torch.ones(int(positions.max()) + 1, dtype=torch.bool, device=device)
    after = torch.ones(len(scaled.prompt_ids), dtype=torch.bool, device=device)
    for tokens, images in ((before, sample.image_positions), (after, scaled.image_positions)):
        for where in images:
            tokens[where[where < len(tokens)]] = False
    order = before.cumsum(0)[positions] - 1  # text keeps its order
    return after.nonzero()[:, 0][order]


def cut(inputs: Mapping[str, Tensor], length: int, adapter: Adapter) -> dict[str, Tensor]:
    """The inputs with every token-wise one cut to its first ``length`` tokens.

    Args:
        inputs: the model's inputs.
        length: how many tokens stay.
        adapter: tells which inputs are token-wise.
    """
    return {
        name: value[:, :length] if name in adapter.token_wise else value
        for name, value in inputs.items()
    }
