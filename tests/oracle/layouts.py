"""What the contract suite knows of each family's layout, written down without the adapters.

Every fact here is one of the family's own (where its processor puts what, what its tower makes of
it), so that the suite compares the adapters with something that is not them.
"""

import functools
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.oracle.families import NAMES, PATCH, family, patchify, without_mixing

QWEN = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
TILED = ("InternVL", "Idefics3", "SmolVLM")
ONE_SIZE = ("Gemma3", "LlavaNext")
ANY_SIZE = tuple(name for name in NAMES if name not in ONE_SIZE)
CASES = ("usual", "wide", "tall", "two")
CELL = 8  # pixels of one cell, where four patches make one
TILE = 32  # pixels of a tile of InternVL, Idefics3 and SmolVLM: 4 x 4 cells
LAYOUTS = {  # (width, height) -> tiles down and across; of InternVL, then of Idefics3 and SmolVLM
    True: {(32, 32): (1, 1), (64, 32): (1, 2), (32, 96): (3, 1)},
    False: {(64, 64): (2, 2), (64, 32): (1, 2), (32, 64): (2, 1)},
}
CANVASES = {(32, 32): (32, 32), (36, 24): (32, 32), (12, 36): (32, 16)}  # LLaVA-NeXT, (h, w)
MANY = torch.arange(45, 95)  # words of no meaning: some respond at every cell, whatever its sign

kin_of = functools.cache(family)


@functools.cache
def local_of(name: str) -> Any:
    """The family's model without attention: what happens in a cell is felt there alone."""
    return without_mixing(kin_of(name).model)


def pictures_of(kin: Any, case: str) -> list[Any]:
    """The pictures of a case."""
    usual, wide, tall = kin.picture, kin.wide_picture, kin.tall_picture
    return {"usual": [usual], "wide": [wide], "tall": [tall], "two": [wide, tall]}[case]


# ---- one painted cell ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Canvas:
    """LLaVA-NeXT's canvas, in picture pixels where not said: the suite's own arithmetic."""

    tiles: tuple[int, int]
    pad: tuple[int, int]  # cells cut off above and on the left
    shape: tuple[int, int]  # cells of the frame
    box: tuple[float, float, float, float]  # (left, upper, right, lower) of the frame
    size: tuple[int, int]  # (height, width) of the picture


def canvas_of(picture: Any, canvas: tuple[int, int] | None = None) -> Canvas:
    """A picture is enlarged until it touches the canvas on two sides, and centred there."""
    width, height = picture.size
    high, wide = canvas or CANVASES[picture.size]
    factor = min(high / height, wide / width)
    shown_h, shown_w = min(ceil(height * factor), high), min(ceil(width * factor), wide)
    if high / height < wide / width:
        shown_h = high
    else:
        shown_w = wide
    at_y, at_x = (high - shown_h) // 2, (wide - shown_w) // 2
    rows, cols = high // PATCH, wide // PATCH
    top = left = 0
    if width / height > cols / rows:
        top = (rows - int(height * cols / width + 1e-7)) // 2
    else:
        left = (cols - int(width * rows / height + 1e-7)) // 2
    per_y, per_x = height / shown_h, width / shown_w
    box = (
        (left * PATCH - at_x) * per_x,
        (top * PATCH - at_y) * per_y,
        ((cols - left) * PATCH - at_x) * per_x,
        ((rows - top) * PATCH - at_y) * per_y,
    )
    shape = (rows - 2 * top, cols - 2 * left)
    return Canvas((high // 16, wide // 16), (top, left), shape, box, (height, width))


def frame_shape(kin: Any, picture: Any) -> tuple[int, int]:
    """Rows and columns of a picture's map."""
    width, height = picture.size
    if kin.name in QWEN:
        return height // CELL, width // CELL
    if kin.name in TILED:
        down, across = LAYOUTS[kin.name == "InternVL"][picture.size]
        return 4 * down, 4 * across
    if kin.name == "LlavaNext":
        return canvas_of(picture).shape
    return 4, 4


def painted(kin: Any, inputs: dict[str, Tensor], pictures: list[Any], every: int = 1) -> Any:
    """Inputs with one cell of one view painted, and what must change: (image, mask of its cells).

    Yields:
        (what was painted, inputs, image, mask over that image's frame).
    """
    pixels = inputs["pixel_values"]
    for n, (label, spot, image, mask) in enumerate(_spots(kin, pixels, pictures)):
        if n % every:
            continue
        changed = pixels.clone()
        changed[spot] += 0.7
        yield label, {**inputs, "pixel_values": changed}, image, mask


def _spots(kin: Any, pixels: Tensor, pictures: list[Any]) -> Any:
    """Every cell of every view: (label, index into the pixels, image, mask of the frame)."""
    start = 0  # first patch row, or first tile, of the image
    for image, picture in enumerate(pictures):
        shape = frame_shape(kin, picture)
        if kin.name in QWEN:
            for cell in range(shape[0] * shape[1]):
                row, col = divmod(cell, shape[1])
                spot = slice(start + 4 * cell, start + 4 * cell + 4)
                yield f"cell {row} {col}", spot, image, one_cell(shape, row, col)
            start += 4 * shape[0] * shape[1]
        elif kin.name in TILED:
            layout = LAYOUTS[kin.name == "InternVL"][picture.size]
            yield from _tile_spots(kin, start, layout, image)
            start += 1 if layout == (1, 1) else layout[0] * layout[1] + 1
        elif kin.name == "LlavaNext":
            yield from _next_spots(canvas_of(picture), image)
        else:
            side = pixels.shape[-1] // 4
            for cell in range(16):
                row, col = divmod(cell, 4)
                spot = (image, slice(None), *square(row, col, side))
                yield f"cell {row} {col}", spot, image, one_cell(shape, row, col)


def _tile_spots(kin: Any, start: int, layout: tuple[int, int], image: int) -> Any:
    """Tiles row by row, the overview last where there is more than one tile."""
    down, across = layout
    batch = () if kin.name == "InternVL" else (0,)
    for tile in range(down * across + (layout != (1, 1))):
        for cell in range(16):
            row, col = divmod(cell, 4)
            spot = (*batch, start + tile, slice(None), *square(row, col, CELL))
            mask = torch.zeros(4 * down, 4 * across, dtype=torch.bool)
            if tile < down * across:
                mask[tile // across * 4 + row, tile % across * 4 + col] = True
            else:  # a cell of the overview is as large as the frame has tiles
                mask[row * down : (row + 1) * down, col * across : (col + 1) * across] = True
            yield f"tile {tile} cell {row} {col}", spot, image, mask


def _next_spots(canvas: Canvas, image: int) -> Any:
    """The base image first, then the tiles of the canvas, less the padding's cells."""
    for tile in range(1 + canvas.tiles[0] * canvas.tiles[1]):
        for cell in range(16):
            row, col = divmod(cell, 4)
            spot = (image, tile, slice(None), *square(row, col, PATCH))
            mask = torch.zeros(canvas.shape, dtype=torch.bool)
            if tile:
                y = (tile - 1) // canvas.tiles[1] * 4 + row - canvas.pad[0]
                x = (tile - 1) % canvas.tiles[1] * 4 + col - canvas.pad[1]
                if 0 <= y < canvas.shape[0] and 0 <= x < canvas.shape[1]:
                    mask[y, x] = True
            else:
                mask = base_cell(canvas, row, col)
            yield f"tile {tile} cell {row} {col}", spot, image, mask


def base_cell(canvas: Canvas, row: int, col: int) -> Tensor:
    """The frame's cells that share some area with a cell of LLaVA-NeXT's base image."""
    height, width = canvas.size
    left, upper, right, lower = canvas.box
    mask = torch.zeros(canvas.shape, dtype=torch.bool)
    high, wide = (lower - upper) / canvas.shape[0], (right - left) / canvas.shape[1]
    for y in range(canvas.shape[0]):
        for x in range(canvas.shape[1]):
            begin, end = max(upper + y * high, row * height / 4), (row + 1) * height / 4
            shared_y = min(upper + (y + 1) * high, end) - begin
            begin, end = max(left + x * wide, col * width / 4), (col + 1) * width / 4
            shared_x = min(left + (x + 1) * wide, end) - begin
            mask[y, x] = shared_y > 1e-6 and shared_x > 1e-6
    return mask


def square(row: int, col: int, side: int) -> tuple[slice, slice]:
    """The pixels of a cell."""
    return slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)


def one_cell(shape: tuple[int, int], row: int, col: int) -> Tensor:
    """A mask of one cell."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[row, col] = True
    return mask


# ---- full forwards, written by hand -------------------------------------------------------------


def visual_ids(kin: Any) -> list[int]:
    """Ids of placeholders."""
    config = kin.model.config
    found = [config.image_token_id, getattr(config, "video_token_id", None)]
    return [i for i in found if i is not None]


def with_answer(kin: Any, inputs: dict[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """The inputs with the answer after them; PaliGemma's answer is of type 1."""
    full = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer[None]], 1)}
    kinds = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}
    kinds["token_type_ids"] = int(kin.name == "PaliGemma")
    for name, kind in kinds.items():
        if name in full:
            more = full[name].new_full((1, len(answer)), kind)
            full[name] = torch.cat([full[name], more], 1)
    return full


def logits_of(kin: Any, full: dict[str, Tensor], model: Any = None) -> Tensor:
    """One plain forward's logits, at any size of pixels."""
    model = model or kin.model
    handles = []
    if kin.name in ("Llava", "PaliGemma"):
        handles = [
            model.get_encoder(modality="image").register_forward_pre_hook(
                lambda _m, a, k: (a, {**k, "interpolate_pos_encoding": True}), with_kwargs=True
            )
        ]
    with torch.no_grad():
        logits = model(**full, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """As image processors resize."""
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)


def at_scale(
    kin: Any, inputs: dict[str, Tensor], pictures: list[Any], scale: float
) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """The inputs with the pictures on other grids, and per picture its views' positions.

    Positions are (rows, cols) of places among all placeholders; the first view fills the frame,
    the second is the overview.
    """
    made, lengths, views, new = {}, [], [], []
    count = start = 0
    for picture in pictures:
        rows, cols = frame_shape(kin, picture)
        per_tile, own = 4, 1
        layout = (1, 1)
        if kin.name in TILED:
            layout = LAYOUTS[kin.name == "InternVL"][picture.size]
            per_tile = round(4 * scale)
            n = layout[0] * layout[1]
            own = n + (n > 1)
            where = count + torch.arange(own * per_tile**2)
            mosaic, overview = where[: n * per_tile**2], where[n * per_tile**2 :]
            mosaic = rearrange(
                mosaic, "(d a r c) -> (d r) (a c)", d=layout[0], a=layout[1], r=per_tile
            )
            views.append([mosaic])
            if n > 1:
                views[-1].append(overview.reshape(per_tile, per_tile))
            if kin.name == "InternVL":
                lengths.append((own * 16, own * per_tile**2))
            else:
                lengths += [(16, per_tile**2)] * own
        else:
            new_rows, new_cols = round(rows * scale), round(cols * scale)
            where = count + torch.arange(new_rows * new_cols)
            views.append([where.reshape(new_rows, new_cols)])
            lengths.append((rows * cols, new_rows * new_cols))
        count += sum(v.numel() for v in views[-1])
        new.append(_scaled_pixels(kin, inputs, start, (rows, cols), layout, views[-1][0].shape))
        start += rows * cols * 4 if kin.name in QWEN else own
    pixels = torch.cat(new)
    if kin.name in ("Idefics3", "SmolVLM"):
        pixels = pixels[None]
        made["pixel_attention_mask"] = torch.ones(1, *pixels.shape[1:2], *pixels.shape[3:]).long()
    if kin.name in QWEN:
        shapes = [(1, 2 * v[0].shape[0], 2 * v[0].shape[1]) for v in views]
        made["image_grid_thw"] = torch.tensor(shapes)
    scaled = inputs | made | {"pixel_values": pixels}
    source = recounted(inputs["input_ids"][0], kin.model.config.image_token_id, lengths)
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            scaled[name] = inputs[name][:, source]
    return scaled, views


def _scaled_pixels(
    kin: Any,
    inputs: dict[str, Tensor],
    start: int,
    old: tuple[int, int],
    layout: tuple[int, int],
    new: torch.Size,
) -> Tensor:
    """One picture's pixels on a grid of other cells."""
    pixels = inputs["pixel_values"]
    rows, cols = new
    if kin.name in QWEN:
        own = pixels[start : start + 4 * old[0] * old[1]]
        frames = rearrange(
            own,
            "(h w i j) (c u p q) -> u c (h i p) (w j q)",
            h=old[0],
            i=2,
            j=2,
            u=2,
            p=PATCH,
            q=PATCH,
        )
        return patchify(resized(frames, (rows * CELL, cols * CELL)))
    if kin.name not in TILED:
        return resized(pixels[start : start + 1], (rows * PATCH, cols * PATCH))
    tiles = pixels if kin.name == "InternVL" else pixels[0]
    down, across = layout
    n = down * across
    lines = [torch.cat(list(tiles[start + d * across :][:across]), -1) for d in range(down)]
    whole = resized(torch.cat(lines, -2)[None], (rows * CELL, cols * CELL))[0]
    high, wide = rows * CELL // down, cols * CELL // across
    cut = [
        whole[:, d * high : (d + 1) * high, a * wide : (a + 1) * wide]
        for d in range(down)
        for a in range(across)
    ]
    if n > 1:
        cut.append(resized(tiles[start + n : start + n + 1], (high, wide))[0])
    return torch.stack(cut)


def recounted(ids: Tensor, marker: int, lengths: list[tuple[int, int]]) -> Tensor:
    """Where each token of the text with other numbers of placeholders comes from."""
    waiting = list(lengths)
    source, at = [], 0
    while at < len(ids):
        if int(ids[at]) == marker:
            old, new = waiting.pop(0)
            assert bool((ids[at : at + old] == marker).all())
            source += [at] * new
            at += old
        else:
            source.append(at)
            at += 1
    assert not waiting
    return torch.tensor(source)


def by_hand(
    kin: Any,
    inputs: dict[str, Tensor],
    pictures: list[Any],
    answer: Tensor,
    scale: float,
    pixels: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Per picture the answer's maps, and its log-probabilities, of one full forward at a scale.

    The pixels are those of the inputs, resized, or those given.
    """
    scaled, views = at_scale(kin, inputs, pictures, scale)
    if pixels is not None:
        assert pixels.shape == scaled["pixel_values"].shape
        scaled["pixel_values"] = pixels
    logits = logits_of(kin, with_answer(kin, scaled, answer))
    length = scaled["input_ids"].shape[1]
    log_probs = logits[length - 1 : -1].log_softmax(-1).gather(1, answer[:, None])[:, 0]
    marker = kin.model.config.image_token_id
    seen = logits[:length][scaled["input_ids"][0] == marker]
    maps = []
    for own in views:
        lens = [seen[view][..., answer].clamp(min=0).permute(2, 0, 1) for view in own]
        if len(lens) == 2:
            down, across = (lens[0].shape[axis] // lens[1].shape[axis] for axis in (1, 2))
            lens[1] = lens[1].repeat_interleave(down, 1).repeat_interleave(across, 2)
        maps.append(torch.stack(lens).mean(0))
    return maps, log_probs


# ---- videos, by hand ----------------------------------------------------------------------------


def mixed(kin: Any, order: str, *, image: Any, steps: int = 2) -> dict[str, Tensor]:
    """A prompt with one video ("v") and one image ("i"), in the order given.

    The pixels are those of `families.video` and of the image processor; ids and types are written
    here. The image is 3 x 7 cells (the wide picture), a step of the video 3 x 4.
    """
    from tests.oracle.families import video

    clip, still = video(kin, 2 * steps), kin.encode(image)
    grid = still["image_grid_thw"][0]
    pads = "<|image_pad|>" * int(grid.prod() // 4)
    step = "<|video_pad|>" * 12
    if kin.name == "Qwen3VL":
        shown = "".join(
            f"<{n}.2 seconds><|vision_start|>{step}<|vision_end|>" for n in range(steps)
        )
    else:
        shown = f"<|vision_start|>{step * steps}<|vision_end|>"
    parts = {"v": shown, "i": f"<|vision_start|>{pads}<|vision_end|>"}
    before, after = kin.prompt.split(kin.placeholder)
    text = before + " ".join(parts[kind] for kind in order) + after
    inputs = dict(kin.processor.tokenizer(text, return_tensors="pt"))
    ids, config = inputs["input_ids"], kin.model.config
    kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    # Without second_per_grid_ts, whose default is the same 1 s: transformers 5.5's Qwen2.5-VL takes
    # one of them for each image too, and stops short at the video (mended in later versions).
    inputs |= {name: clip[name] for name in ("pixel_values_videos", "video_grid_thw")}
    inputs |= {name: still[name] for name in ("pixel_values", "image_grid_thw")}
    return inputs | {"mm_token_type_ids": kinds}


def video_by_hand(kin: Any, inputs: dict[str, Tensor], answer: Tensor, scale: float) -> Tensor:
    """The video's maps (answer, steps, rows, cols) of one full forward at a scale."""
    steps, h, w = inputs["video_grid_thw"][0].tolist()
    rows, cols = round(h / 2 * scale), round(w / 2 * scale)
    frames = rearrange(
        inputs["pixel_values_videos"],
        "(t h w i j) (c u p q) -> (t u) c (h i p) (w j q)",
        t=steps,
        h=h // 2,
        i=2,
        j=2,
        u=2,
        p=PATCH,
        q=PATCH,
    )
    runs, old, new = (steps, 1) if kin.name == "Qwen3VL" else (1, steps), h * w // 4, rows * cols
    marker = kin.model.config.video_token_id
    lengths = [(old * runs[1], new * runs[1])] * runs[0]
    source = recounted(inputs["input_ids"][0], marker, lengths)
    scaled = inputs | {
        name: inputs[name][:, source]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    scaled["pixel_values_videos"] = patchify(resized(frames, (rows * CELL, cols * CELL)))
    scaled["video_grid_thw"] = torch.tensor([[steps, 2 * rows, 2 * cols]])
    logits = logits_of(kin, with_answer(kin, scaled, answer))
    seen = logits[: len(source)][scaled["input_ids"][0] == marker][:, answer].clamp(min=0)
    return seen.T.reshape(len(answer), steps, rows, cols)


# ---- windows, by hand ---------------------------------------------------------------------------


def windows_by_hand(
    kin: Any, method: Any, inputs: dict[str, Tensor], pictures: list[Any], scale: float
) -> list[Tensor]:
    """Maps of a model of one size on the grids of enlarged pictures: window by window."""
    grids = [frame_shape(kin, picture) for picture in pictures]
    large = [tuple(round(side * scale) for side in grid) for grid in grids]
    n = max(ceil(big[k] / grid[k]) for grid, big in zip(grids, large, strict=True) for k in (0, 1))
    sums = [torch.zeros(len(kin.answer), *big) for big in large]
    weights = [torch.zeros(big) for big in large]
    for i in range(n):
        for j in range(n):
            windows = [_box(grid, big, i, j, n) for grid, big in zip(grids, large, strict=True)]
            cut = [_window(kin, inputs, k, p, windows[k]) for k, p in enumerate(pictures)]
            seen = method.attribute({**inputs, "pixel_values": torch.stack(cut)}, kin.answer)
            for k, picture in enumerate(pictures):
                left, upper, right, lower = _window_frame(kin, picture, windows[k])
                down = shares(upper, lower, grids[k][0], large[k][0])
                across = shares(left, right, grids[k][1], large[k][1])
                sums[k] += torch.einsum("yr,trc,xc->tyx", down, seen.grid_attr[k], across)
                weights[k] += down.sum(1)[:, None] * across.sum(1)[None, :]
    return [
        torch.where(weight > 0, total / weight.clamp(min=1e-9), torch.zeros(()))
        for total, weight in zip(sums, weights, strict=True)
    ]


def _box(
    grid: tuple[int, int], large: tuple[int, ...], i: int, j: int, n: int
) -> tuple[float, ...]:
    """(left, upper, right, lower) of window i down, j across of n x n, in fractions."""
    top = round(i * (large[0] - grid[0]) / max(n - 1, 1))
    left = round(j * (large[1] - grid[1]) / max(n - 1, 1))
    right, lower = left + grid[1], top + grid[0]
    return left / large[1], top / large[0], right / large[1], lower / large[0]


def shares(start: float, end: float, old: int, new: int) -> Tensor:
    """Length that each of ``new`` cells over [0, 1] shares with each of ``old`` over the window."""
    own = (end - start) / old
    table = torch.zeros(new, old)
    for y in range(new):
        for r in range(old):
            begin = max(y / new, start + r * own)
            table[y, r] = max(0.0, min((y + 1) / new, start + (r + 1) * own) - begin)
    table[table < 1e-7] = 0
    return table


def _window(
    kin: Any, inputs: dict[str, Tensor], k: int, picture: Any, window: tuple[float, ...]
) -> Tensor:
    """The pixels of picture k that show only a window of it, enlarged."""
    own = inputs["pixel_values"][k]
    if kin.name == "Gemma3":
        return _enlarged_cut(own, window)
    canvas = canvas_of(picture)
    down, across = canvas.tiles
    lines = [torch.cat(list(own[1 + d * across :][:across]), -1) for d in range(down)]
    whole = torch.cat(lines, -2).clone()
    factor = min(whole.shape[-2] / picture.height, whole.shape[-1] / picture.width)
    shown_h = min(ceil(picture.height * factor), whole.shape[-2])
    shown_w = min(ceil(picture.width * factor), whole.shape[-1])
    y, x = (whole.shape[-2] - shown_h) // 2, (whole.shape[-1] - shown_w) // 2
    cut = _enlarged_cut(whole[:, y : y + shown_h, x : x + shown_w], window)
    whole[:, y : y + shown_h, x : x + shown_w] = cut
    tiles = [
        whole[:, d * 16 : d * 16 + 16, a * 16 : a * 16 + 16]
        for d in range(down)
        for a in range(across)
    ]
    made = torch.stack([resized(cut[None], (16, 16))[0], *tiles])
    return F.pad(made, (0, 0, 0, 0, 0, 0, 0, len(own) - len(made)))


def _enlarged_cut(image: Tensor, window: tuple[float, ...]) -> Tensor:
    left, upper, right, lower = window
    height, width = image.shape[-2:]
    large = resized(image[None], (round(height / (lower - upper)), round(width / (right - left))))
    top, start = round(upper * large.shape[-2]), round(left * large.shape[-1])
    return large[0, :, top : top + height, start : start + width]


def _window_frame(kin: Any, picture: Any, window: tuple[float, ...]) -> tuple[float, ...]:
    """Where the frame of a window of the picture lies in the picture's frame, in fractions."""
    if kin.name == "Gemma3":
        return window
    canvas = canvas_of(picture)
    height, width = canvas.size
    left, upper, right, lower = canvas.box

    def across(p: float) -> float:  # picture pixels of the window -> fraction of the frame
        return (window[0] * width + p * (window[2] - window[0]) - left) / (right - left)

    def down(p: float) -> float:
        return (window[1] * height + p * (window[3] - window[1]) - upper) / (lower - upper)

    return across(left), down(upper), across(right), down(lower)
