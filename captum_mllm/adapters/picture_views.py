"""The pictures inside a model's pixel inputs: each view of each image, changed in its place."""

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch

import torch
from torch import Tensor

from captum_mllm.adapters.base import Adapter
from captum_mllm.adapters.frames import FrameAdapter
from captum_mllm.adapters.llava_next import LlavaNextAdapter
from captum_mllm.adapters.qwen import _KINDS, QwenVLAdapter
from captum_mllm.adapters.tiles import TileAdapter
from captum_mllm.functional import WHOLE, Box, join_tiles, split_tiles
from captum_mllm.geometry import ImageGrid

Change = Callable[[int, Tensor, Box], Tensor]
"""(image, view, box) -> the view changed. A view is (channels, height, width), of a video and of
Qwen's images (frames, channels, height, width), in the model's normalised units; the box is the
part of the image's frame that it shows, in fractions of that frame."""


@singledispatch
def change_pictures(
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    grids: Sequence[ImageGrid],
    change: Change,
) -> dict[str, Tensor]:
    """The inputs that hold or describe pixels, with every view of every image changed.

    A picture may be seen several times: cut into tiles, and small as a whole. Each is a view, put
    together to a picture before ``change`` sees it and taken apart after.

    Args:
        adapter: the model's adapter; a family of another layout registers a function of its own
            by ``change_pictures.register``.
        inputs: the model's inputs of one sample.
        grids: its images.
        change: called for each view with (image, view, box); returns a tensor of the same shape.
            The largest view of an image comes first.

    Returns:
        New tensors by name; bit for bit the given ones where ``change`` changes nothing.

    Raises:
        NotImplementedError: a family whose pixel layout is not known here.

    Example:
        >>> from captum_mllm.adapters import find_adapter
        >>> from captum_mllm.reference import load
        >>> adapter = find_adapter(load()[0])
        >>> inputs = {"pixel_values": torch.ones(1, 3, 112, 112)}
        >>> grids = adapter.grids(inputs)
        >>> negative = change_pictures(adapter, inputs, grids, lambda image, view, box: -view)
        >>> float(negative["pixel_values"].max())
        -1.0
    """
    raise NotImplementedError(
        f"{type(adapter).__name__}: where pictures lie in its pixel inputs is not known; teach it "
        f"with @change_pictures.register (captum_mllm.adapters.picture_views)."
    )


@change_pictures.register
def _(
    adapter: FrameAdapter,
    inputs: Mapping[str, Tensor],
    grids: Sequence[ImageGrid],
    change: Change,
) -> dict[str, Tensor]:
    del adapter, grids
    frames = [change(n, frame, WHOLE) for n, frame in enumerate(inputs["pixel_values"])]
    return {"pixel_values": torch.stack(frames)}


@change_pictures.register
def _(
    adapter: QwenVLAdapter,
    inputs: Mapping[str, Tensor],
    grids: Sequence[ImageGrid],
    change: Change,
) -> dict[str, Tensor]:
    del grids
    found: dict[str, Tensor] = {}
    image = 0
    for name, shape_name in _KINDS.items():
        if inputs.get(name) is None:
            continue
        shapes, made = inputs[shape_name], []
        pieces = inputs[name].split(shapes.prod(-1).tolist())
        for rows, shape in zip(pieces, shapes.tolist(), strict=True):
            made.append(adapter._patches(change(image, adapter._frames(rows, shape), WHOLE)))
            image += 1
        found |= {name: torch.cat(made), shape_name: shapes}
    return found


@change_pictures.register
def _(
    adapter: TileAdapter,
    inputs: Mapping[str, Tensor],
    grids: Sequence[ImageGrid],
    change: Change,
) -> dict[str, Tensor]:
    made = []
    pieces = adapter.tiles(inputs).split([adapter.count(grid) for grid in grids])
    for image, (own, grid) in enumerate(zip(pieces, grids, strict=True)):
        n = grid.tiles[0] * grid.tiles[1]
        picture = join_tiles(own[:n], grid.tiles)
        made.append(split_tiles(change(image, picture, WHOLE), grid.tiles))
        made += [change(image, overview, WHOLE)[None] for overview in own[n:]]
    return adapter.as_inputs(torch.cat(made))


@change_pictures.register
def _(
    adapter: LlavaNextAdapter,
    inputs: Mapping[str, Tensor],
    grids: Sequence[ImageGrid],
    change: Change,
) -> dict[str, Tensor]:
    pixels = inputs["pixel_values"].clone()
    for image, (own, grid) in enumerate(zip(pixels, grids, strict=True)):
        box = adapter._base_box(grid)  # both views show the whole picture
        end = 1 + grid.tiles[0] * grid.tiles[1]
        (height, width), (y, x) = adapter._content(adapter._picture(grid))
        canvas = join_tiles(own[1:end], grid.tiles).clone()
        inside = canvas[:, y : y + height, x : x + width]
        inside.copy_(change(image, inside.clone(), box))
        own[1:end] = split_tiles(canvas, grid.tiles)
        own[0] = change(image, own[0].clone(), box)
    return {"pixel_values": pixels, "image_sizes": inputs["image_sizes"]}
