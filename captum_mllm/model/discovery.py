"""A model without an adapter made known by its first pictures: layout and facts, found once."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_mllm.adapters import Adapter, find_adapter
from captum_mllm.adapters.devices import unwrap
from captum_mllm.adapters.discovered import DiscoveredAdapter
from captum_mllm.adapters.discovery import ShownSample, picture_grid
from captum_mllm.adapters.layout import LayoutError, TokenLayout
from captum_mllm.adapters.painting import PixelSource, paint
from captum_mllm.adapters.pixels import as_pictures, as_rgb, resized
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.facts import find_facts
from captum_mllm.model.inputs import Sample, one_sample
from captum_mllm.model.probing import find_layout
from captum_mllm.validation import ArgumentError


def discover(
    adapter: Adapter,
    processor: Any,
    inputs: Mapping[str, Any],
    images: Any,
    *,
    allow_irregular: bool = False,
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

    Raises:
        LayoutError: the pictures are missing or the layout is irregular; the tokens have no places.
        ValueError: ``images`` through the processor are not the pixels of ``inputs``.
    """
    if not isinstance(adapter, DiscoveredAdapter) or not isinstance(inputs, Mapping):
        return
    pictures = [] if images is None else [as_rgb(picture) for picture in as_pictures(images)]
    sizes = tuple((picture.height, picture.width) for picture in pictures)
    known = adapter.discovery.find(inputs)
    if known is not None and (images is None or sizes == _sizes(known)):
        return
    if processor is None or images is None:
        raise adapter.unknown()
    source = PixelSource.of(processor, pictures, inputs)
    kwargs = _checked(adapter, inputs, source)
    key = (_settings(source), sizes)
    found = key not in adapter.discovery.layouts
    if found:
        adapter.discovery.layouts[key] = find_layout(adapter, kwargs, source, pictures)
    layout, painted = adapter.discovery.layouts[key]
    if found:
        _say(adapter, layout)
    _refuse(adapter, layout, allow_irregular)
    if adapter.discovery.facts is None:
        ids = torch.tensor(layout.placeholders, device=adapter.device)
        where = torch.isin(kwargs["input_ids"][0], ids).nonzero()[:, 0]
        adapter.discovery.facts = find_facts(adapter, kwargs, where)
    adapter.discovery.remember(inputs, ShownSample(tuple(pictures), source, layout, painted))


def _sizes(shown: ShownSample) -> tuple[tuple[int, int], ...]:
    return tuple((picture.height, picture.width) for picture in shown.pictures)


def discover_scales(adapter: Adapter, sample: Sample, scales: Iterable[float]) -> None:
    """Probe a picture at other sizes too, where the model takes it in native resolution.

    That is: one picture, of one view, on one unbroken run of placeholders, whose pixels become more
    as it grows. Larger scales of any other are seen through windows.

    Args:
        adapter: the model's adapter; any but a :class:`DiscoveredAdapter` knows its sizes.
        sample: the prompt at scale 1.
        scales: factors of height and width.

    Raises:
        LayoutError: the picture can't be followed at one of the sizes.
    """
    if not isinstance(adapter, DiscoveredAdapter):
        return
    found, shown = adapter.discovery, adapter.shown(sample.kwargs)
    found.native = _is_native(shown)
    if not found.native:
        return
    (grid,), (picture,) = sample.grids, shown.pictures
    for scale in scales:
        if scale == 1.0:
            found.scaled[grid, scale] = grid
            continue
        size = (max(1, round(picture.height * scale)), max(1, round(picture.width * scale)))
        found.scaled[grid, scale] = _probe_size(adapter, sample, shown, resized(picture, size))


def _is_native(shown: ShownSample) -> bool:
    """Whether a picture of one view gets pixels in proportion to its size."""
    pictures, keys = shown.layout.pictures, shown.painted.keys
    (view, *others), runs = pictures[0].views, pictures[0].runs
    if len(pictures) > 1 or others or runs != (view.shape[0] * view.shape[1],):
        return False  # new lines, tiles: how their number follows the size is not known
    (picture,) = shown.pictures
    sizes = []
    for factor in (1.0, 1.5):
        size = (round(picture.height * factor), round(picture.width * factor))
        made = shown.source([resized(picture, size)])
        sizes.append(sum(made[key].numel() for key in keys))
    return sizes[1] > 1.5 * sizes[0]  # 2.25 but for rounding


def _scaled_inputs(sample: Sample, shown: ShownSample, picture: Any) -> dict[str, Tensor]:
    """The prompt with another size of its picture, and as many placeholders as that takes."""
    device = sample.prompt_ids.device
    made = {
        key: value.to(device, sample.kwargs[key].dtype)
        for key, value in shown.source([picture]).items()
    }
    keys = shown.painted.keys
    before, after = (sum(held[key].numel() for key in keys) for held in (sample.kwargs, made))
    where = sample.image_positions[0]
    count = round(len(where) * after / before)
    first, last = int(where[0]), int(where[-1])
    source = torch.cat(
        [
            torch.arange(first),
            torch.full((count,), first),
            torch.arange(last + 1, len(sample.prompt_ids)),
        ]
    ).to(device)
    shape = sample.kwargs["input_ids"].shape
    inputs = {
        key: value[:, source] if value.shape == shape and key not in made else value
        for key, value in sample.kwargs.items()
    }
    return {**inputs, **made}


def _probe_size(
    adapter: DiscoveredAdapter, sample: Sample, shown: ShownSample, picture: Any
) -> ImageGrid:
    """The grid of the picture at another size, which is then known by its pixels."""
    size = (picture.height, picture.width)
    key, layouts = (_settings(shown.source), (size,)), adapter.discovery.layouts
    inputs = _scaled_inputs(sample, shown, picture)
    if key not in layouts:
        try:
            layouts[key] = find_layout(adapter, inputs, shown.source, [picture])
        except LayoutError as error:
            raise LayoutError(f"scales: the picture at {size}: {error}") from error
    layout, painted = layouts[key]
    _refuse(adapter, layout, allow_irregular=bool(shown.layout.notes))
    made = ShownSample((picture,), shown.source, layout, painted)
    adapter.discovery.remember(inputs, made, derived=True)
    return picture_grid(layout.pictures[0])


def probe_layout(
    model: nn.Module,
    inputs: Mapping[str, Any],
    processor: Any,
    images: Any,
    *,
    layout: TokenLayout | None = None,
) -> TokenLayout:
    r"""Probe the layout of a prompt's image tokens, with or without an adapter for the class.

    Args:
        model: the user's model.
        inputs: what the processor made of prompt and pictures.
        processor: the model's processor, or its image processor.
        images: the original picture(s).
        layout: a layout that was found before, by the same model and processor, default None: it
            is kept instead of being probed.

    Returns:
        The layout, with notes where it is irregular. It is kept in memory too, for pictures of
        these sizes.

    Raises:
        LayoutError: the image tokens have no places in the picture.
        ValueError: ``images`` through the processor are not the pixels of ``inputs``.

    Reference:
        Our reading; see docs/methods.md.

    Example:
        >>> from captum_mllm import probe_layout
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> print(probe_layout(model, inputs, processor, picture))
        14 x 14 tokens over 336 x 336 pixels
    """
    find_adapter(model)  # what can't be explained at all
    adapter = DiscoveredAdapter(unwrap(model))
    pictures = [as_rgb(picture) for picture in as_pictures(images)]
    source = PixelSource.of(processor, pictures, inputs)
    kwargs = _checked(adapter, inputs, source)
    sizes = tuple((picture.height, picture.width) for picture in pictures)
    if layout is None:
        found = find_layout(adapter, kwargs, source, pictures)
    elif tuple(picture.size for picture in layout.pictures) == sizes:
        found = (layout, paint(source, sizes)[0])
    else:
        known = [picture.size for picture in layout.pictures]
        raise ArgumentError("layout", f"is of pictures of {known}, images are of {list(sizes)}.")
    adapter.discovery.layouts[_settings(source), sizes] = found
    return found[0]


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


def _checked(adapter: Adapter, inputs: Mapping[str, Any], source: PixelSource) -> dict[str, Tensor]:
    """The tensors of one sample on the model's device, without left padding."""
    shown = [key for key in source.keys if inputs[key].is_floating_point()]
    return one_sample(inputs, adapter, shown)[0]


def _settings(source: PixelSource) -> str:
    """What an image processor does, as far as it tells."""
    describe = getattr(source.processor, "to_dict", None)
    settings: Any = describe() if callable(describe) else vars(source.processor)
    return json.dumps(
        [type(source.processor).__name__, source.nested, dict(source.settings), settings],
        default=repr,
    )
