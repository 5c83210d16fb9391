"""The bridge's slow twins: frames and teacher-forced scores written by hand, copy by copy."""

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.families import patchify
from tests.oracle.layouts import (
    LAYOUTS,
    QWEN,
    TILE,
    TILED,
    at_scale,
    canvas_of,
    visual_ids,
    with_answer,
)


def tile_lines(tiles: Tensor, layout: tuple[int, int]) -> Tensor:
    """Tiles row by row, put together."""
    down, across = layout
    lines = [torch.cat(list(tiles[d * across : (d + 1) * across]), -1) for d in range(down)]
    return torch.cat(lines, -2)


def cut_tiles(picture: Tensor, layout: tuple[int, int], side: int) -> Tensor:
    """Inverse of :func:`tile_lines`."""
    return torch.stack(
        [
            picture[:, d * side : (d + 1) * side, a * side : (a + 1) * side]
            for d in range(layout[0])
            for a in range(layout[1])
        ]
    )


def content_of(picture: Any) -> tuple[slice, slice]:
    """Where a picture lies on LLaVA-NeXT's canvas."""
    canvas = canvas_of(picture)
    high, wide = canvas.tiles[0] * 16, canvas.tiles[1] * 16
    by_h, by_w = high / picture.height, wide / picture.width
    if by_w < by_h:
        h, w = min(ceil(picture.height * by_w), high), wide
    else:
        h, w = high, min(ceil(picture.width * by_h), wide)
    y, x = (high - h) // 2, (wide - w) // 2
    return slice(y, y + h), slice(x, x + w)


def shrunk(change: Tensor, side: int) -> Tensor:
    """A change of a picture as its overview sees it."""
    return F.interpolate(change, size=(side, side), mode="bicubic", antialias=True)


def pieces_of(kin: Any, inputs: dict[str, Tensor], pictures: list[Any]) -> list[Tensor]:
    """Each picture's own part of pixel_values."""
    pixels = inputs["pixel_values"]
    if kin.name in QWEN:
        return list(pixels.split([picture.width * picture.height // 16 for picture in pictures]))
    if kin.name in TILED:
        layouts = [LAYOUTS[kin.name == "InternVL"][picture.size] for picture in pictures]
        counts = [d * a + (d * a > 1) for d, a in layouts]
        return list((pixels if kin.name == "InternVL" else pixels[0]).split(counts))
    return list(pixels.split(1))


def frames_by_hand(kin: Any, inputs: dict[str, Tensor], pictures: list[Any]) -> list[Tensor]:
    """Each picture as one frame (1, 3, height, width)."""
    made = []
    for own, picture in zip(pieces_of(kin, inputs, pictures), pictures, strict=True):
        if kin.name in QWEN:
            h, w = picture.height // 8, picture.width // 8
            rows = own.reshape(h, w, 2, 2, 3, 2, 4, 4)[..., 0, :, :]  # of the two equal frames one
            made.append(rows.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, 8 * h, 8 * w))
        elif kin.name in TILED:
            down, across = LAYOUTS[kin.name == "InternVL"][picture.size]
            made.append(tile_lines(own[: down * across], (down, across))[None])
        elif kin.name == "LlavaNext":
            y, x = content_of(picture)
            made.append(tile_lines(own[0, 1:], canvas_of(picture).tiles)[None, :, y, x])
        else:
            made.append(own)
    return made


def pixels_by_hand(
    kin: Any, inputs: dict[str, Tensor], pictures: list[Any], frames: list[Tensor]
) -> Tensor:
    """pixel_values with other frames (1, 3, height, width); an overview takes the same change."""
    made = []
    old = frames_by_hand(kin, inputs, pictures)
    pieces = pieces_of(kin, inputs, pictures)
    for own, before, frame, picture in zip(pieces, old, frames, pictures, strict=True):
        if kin.name in QWEN:
            made.append(patchify(torch.cat([frame, frame])))
        elif kin.name in TILED:
            layout = LAYOUTS[kin.name == "InternVL"][picture.size]
            made.append(cut_tiles(frame[0], layout, TILE))
            if layout != (1, 1):
                made.append(own[-1:] + shrunk(frame - before, TILE))
        elif kin.name == "LlavaNext":
            layout = canvas_of(picture).tiles
            (y, x), n = content_of(picture), layout[0] * layout[1]
            canvas = tile_lines(own[0, 1 : 1 + n], layout)
            pad = (x.start, canvas.shape[2] - x.stop, y.start, canvas.shape[1] - y.stop)
            inside = F.pad(torch.ones_like(frame), pad)[0]
            canvas = torch.where(inside == 1, F.pad(frame, pad)[0], canvas)
            tiles = torch.cat(
                [own[0, :1] + shrunk(frame - before, 16), cut_tiles(canvas, layout, 16)]
            )
            made.append(torch.cat([tiles, own[0, 1 + n :]])[None])
        else:
            made.append(frame)
    pixels = torch.cat(made)
    if kin.name in ("Idefics3", "SmolVLM"):  # which drop tiles of nothing but zeros
        return (
            pixels[None] + 1e-30 * (pixels.flatten(1).abs().amax(1) == 0)[None, :, None, None, None]
        )
    return pixels


def log_probs_by_hand(kin: Any, inputs: dict[str, Tensor], answer: Tensor) -> Tensor:
    """(answer,): of one plain teacher-forced forward; differentiable."""
    full = with_answer(kin, inputs, answer)
    length = inputs["input_ids"].shape[1]
    logits = kin.model(**full, use_cache=False).logits[0, length - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def by_hand(kin: Any, inputs: dict[str, Tensor], pictures: list[Any], answer: Tensor) -> Any:
    """A plain function of frames (n, 3, height, width) that returns (n, answer), copy by copy."""

    def scores(*frames: Tensor) -> Tensor:
        rows = []
        for k in range(len(frames[0])):
            pixels = pixels_by_hand(kin, inputs, pictures, [f[k : k + 1] for f in frames])
            rows.append(log_probs_by_hand(kin, {**inputs, "pixel_values": pixels}, answer))
        return torch.stack(rows)

    return scores


def embedded_by_hand(kin: Any, inputs: dict[str, Tensor], answer: Tensor) -> Any:
    """The same of token embeddings (n, tokens, width), put in by a hook."""

    def scores(embeddings: Tensor) -> Tensor:
        rows = []
        for row in embeddings:
            table = kin.model.get_input_embeddings()
            handle = table.register_forward_hook(lambda _m, _a, _o, row=row: row[None])
            rows.append(log_probs_by_hand(kin, inputs, answer))
            handle.remove()
        return torch.stack(rows)

    return scores


def view_positions(kin: Any, inputs: dict[str, Tensor], picture: Any) -> list[Tensor]:
    """Positions (rows, cols) in the prompt of each view's tokens; the picture's own grid first."""
    where = (inputs["input_ids"][0] == visual_ids(kin)[0]).nonzero()[:, 0]
    if kin.name == "LlavaNext":
        rows, cols = canvas_of(picture).shape
        grid = where[16:].reshape(rows, cols + 1)[:, :-1]
        return [grid, where[:16].reshape(4, 4)]
    if kin.name not in (*QWEN, *TILED):
        return [where.reshape(4, 4)]
    return [where[view] for view in at_scale(kin, inputs, [picture], 1.0)[1][0]]


def cells_by_hand(kin: Any, inputs: dict[str, Tensor], picture: Any, answer: Tensor) -> Any:
    """The features of a picture's cells (1, width, rows, cols), and the scores of such."""
    where = view_positions(kin, inputs, picture)[0]
    seen = []

    def scores(cells: Tensor | None) -> Tensor:
        def put(_module: Any, args: Any, kwargs: Any) -> Any:
            given = kwargs["inputs_embeds"]
            seen.append(given[0, where].permute(2, 0, 1)[None].detach())
            if cells is None:
                return args, kwargs
            new = given.index_copy(1, where.flatten(), cells.flatten(2).transpose(1, 2))
            return args, {**kwargs, "inputs_embeds": new}

        handle = kin.model.get_decoder().register_forward_pre_hook(put, with_kwargs=True)
        try:
            return log_probs_by_hand(kin, inputs, answer)
        finally:
            handle.remove()

    with torch.no_grad():
        scores(None)
    return seen[0], lambda cells: torch.stack([scores(one[None]) for one in cells])
