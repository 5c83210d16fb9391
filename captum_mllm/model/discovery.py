"""A model without an adapter made known by its first pictures: layout and facts, found once."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.discovered import DiscoveredAdapter
from captum_mllm.adapters.discovery import ShownSample
from captum_mllm.adapters.layout import LayoutError, TokenLayout
from captum_mllm.adapters.painting import PixelSource, paint
from captum_mllm.model.facts import find_facts
from captum_mllm.model.probing import find_layout
from captum_mllm.validation import ArgumentError


def discover(
    adapter: Adapter,
    processor: Any,
    inputs: Mapping[str, Any],
    images: Any,
    *,
    allow_irregular: bool = False,
    layout: TokenLayout | None = None,
) -> None:
    """Find what a model without an adapter needs to be known of it, unless it is known.

    Prints one line about what was found to standard error. What is found is kept with the model, in
    memory: by processor, its settings and the pictures' sizes.

    Args:
        adapter: the model's adapter; any but a :class:`DiscoveredAdapter` knows everything.
        processor: the model's processor, or None.
        inputs: what the processor made of prompt and pictures.
        images: the original picture(s), or None.
        allow_irregular: use a layout that does not fit, default False.
        layout: a layout found before, for this processor and these picture sizes; default: probe.

    Raises:
        LayoutError: the pictures are missing or the layout is irregular; the tokens have no places.
        ValueError: ``images`` through the processor are not the pixels of ``inputs``.
    """
    if not isinstance(adapter, DiscoveredAdapter) or not isinstance(inputs, Mapping):
        return
    known = adapter.discovery.find(inputs)
    if known is not None:
        _refuse(adapter, known.layout, allow_irregular)
        return
    if processor is None or images is None:
        adapter.grids(inputs)  # says what is missing
    pictures = _pictures(images)
    source = PixelSource.of(processor, pictures, inputs)
    kwargs = _unpadded(adapter, inputs)
    sizes = tuple((picture.height, picture.width) for picture in pictures)
    key = (_settings(source), sizes)
    if layout is not None:
        adapter.discovery.layouts[key] = (layout, paint(source, sizes)[0])
    found = key not in adapter.discovery.layouts
    if found:
        adapter.discovery.layouts[key] = find_layout(adapter, kwargs, source, pictures)
    known_layout, painted = adapter.discovery.layouts[key]
    if found:
        _say(adapter, known_layout)
    _refuse(adapter, known_layout, allow_irregular)
    if adapter.discovery.facts is None:
        ids = torch.tensor(known_layout.placeholders, device=adapter.device)
        where = torch.isin(kwargs["input_ids"][0], ids).nonzero()[:, 0]
        adapter.discovery.facts = find_facts(adapter, kwargs, where)
    adapter.discovery.remember(inputs, ShownSample(tuple(pictures), source, known_layout, painted))


def probe_layout(
    model: nn.Module,
    inputs: Mapping[str, Any],
    processor: Any,
    images: Any,
) -> TokenLayout:
    """Probe the layout of a prompt's image tokens, whatever the model's class, known or not.

    Args:
        model: the user's model.
        inputs: what the processor made of prompt and pictures.
        processor: the model's processor, or its image processor.
        images: the original picture(s).

    Returns:
        The layout, with notes where it is irregular.

    Raises:
        LayoutError: the image tokens have no places in the picture.
        ValueError: ``images`` through the processor are not the pixels of ``inputs``.
    """
    adapter = DiscoveredAdapter(model)
    pictures = _pictures(images)
    source = PixelSource.of(processor, pictures, inputs)
    return find_layout(adapter, _unpadded(adapter, inputs), source, pictures)[0]


def _say(adapter: Adapter, layout: TokenLayout) -> None:
    runs = f"{layout.forwards} forwards, {layout.backwards} backwards of the vision encoder"
    name = type(adapter.model).__name__
    sys.stderr.write(f"captum_mllm: probed {name}: {layout} ({runs}).\n")


def _refuse(adapter: Adapter, layout: TokenLayout, allow_irregular: bool) -> None:
    if layout.notes and not allow_irregular:
        raise LayoutError(
            f"model: the layout of the image tokens of {type(adapter.model).__name__} is "
            f"irregular: {'; '.join(layout.notes)}. Maps would be drawn in wrong places. "
            f"allow_irregular=True uses it all the same."
        )


def _pictures(images: Any) -> list[Any]:
    pictures = list(images) if isinstance(images, list | tuple) else [images]
    for picture in pictures:
        if not hasattr(picture, "convert"):
            raise TypeError(
                f"images= takes PIL pictures, not {type(picture).__name__}: open paths by "
                f"PIL.Image.open(path), make arrays pictures by PIL.Image.fromarray(array)."
            )
    return pictures


def _unpadded(adapter: Adapter, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one sample on the model's device, without left padding."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        raise ArgumentError(
            "inputs", "must hold input_ids of exactly one sample, a tensor (1, tokens)."
        )
    mask = inputs.get("attention_mask")
    padding = int((mask[0] == 0).sum()) if isinstance(mask, Tensor) else 0
    kept = {
        name: value.to(adapter.device)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name != "labels"
    }
    for name in adapter.token_wise:
        if name in kept:
            kept[name] = kept[name][:, padding:]
    return kept


def _settings(source: PixelSource) -> str:
    """What an image processor does, as far as it tells."""
    describe = getattr(source.processor, "to_dict", None)
    settings: Any = describe() if callable(describe) else vars(source.processor)
    return json.dumps(
        [type(source.processor).__name__, source.nested, dict(source.settings), settings],
        default=repr,
    )
