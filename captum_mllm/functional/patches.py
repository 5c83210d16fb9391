"""How models cut up an image: tiles, and rows of patches (Qwen)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def join_tiles(
    tiles: Float[Tensor, "tiles c h w"], layout: tuple[int, int]
) -> Float[Tensor, "c height width"]:
    """Join tiles, given row by row, into the image they were cut from.

    Args:
        tiles: (tiles, c, h, w).
        layout: (down, across), the number of tiles along the height and along the width.

    Returns:
        (c, down * h, across * w).

    Reference:
        Layout of transformers' InternVL and Idefics3 image processors.

    Example:
        >>> import torch
        >>> join_tiles(torch.arange(2.0).reshape(2, 1, 1, 1), (1, 2)).tolist()
        [[[0.0, 1.0]]]
    """
    return rearrange(tiles, "(down across) c h w -> c (down h) (across w)", down=layout[0])


def split_tiles(
    picture: Float[Tensor, "c height width"], layout: tuple[int, int]
) -> Float[Tensor, "tiles c h w"]:
    """Inverse of :func:`join_tiles`.

    Args:
        picture: the image's pixels (c, height, width).
        layout: (down, across), the number of tiles along the height and along the width; they
            must divide the image.

    Returns:
        (tiles, c, h, w), row by row.

    Reference:
        Layout of transformers' InternVL and Idefics3 image processors.

    Example:
        >>> import torch
        >>> split_tiles(torch.zeros(3, 4, 8), (1, 2)).shape
        torch.Size([2, 3, 4, 4])
    """
    return rearrange(
        picture, "c (down h) (across w) -> (down across) c h w", down=layout[0], across=layout[1]
    )


def find_layout(
    tiles: Float[Tensor, "tiles c h w"], overview: Float[Tensor, "c h w"]
) -> tuple[tuple[int, int], bool]:
    """Find how many tiles lie down and across by comparing them with the image's overview.

    Processors don't return the layout. The tiles, joined in the right layout and shrunk, look like
    the overview; in a wrong layout they don't.

    Args:
        tiles: the tiles, row by row.
        overview: the whole image at the size of one tile.

    Returns:
        (down, across), and whether it is certain: on a blank image all layouts look alike, and the
        one nearest to a square is returned.

    Reference:
        Ours.

    Example:
        >>> import torch
        >>> from captum_mllm.functional import resize_pixels
        >>> picture = torch.arange(16.0).reshape(1, 2, 8)
        >>> overview = resize_pixels(picture[None], (2, 2))[0]
        >>> find_layout(split_tiles(picture, (1, 4)), overview)
        ((1, 4), True)
    """
    n, side = len(tiles), tuple(overview.shape[-2:])
    layouts = [(down, n // down) for down in range(1, n + 1) if n % down == 0]
    layouts.sort(key=lambda layout: abs(layout[0] - layout[1]))
    if len(layouts) == 1:
        return layouts[0], True
    errors = []
    for layout in layouts:
        shrunk = F.interpolate(join_tiles(tiles, layout)[None].double(), size=side, mode="area")[0]
        errors.append(float((shrunk - overview.double()).square().mean()))
    ordered = sorted(errors)
    certain = ordered[0] < 0.9 * ordered[1]
    return layouts[errors.index(ordered[0]) if certain else 0], certain


def patches_to_frames(
    patches: Float[Tensor, "rows values"],
    grid: tuple[int, int, int],
    *,
    channels: int,
    patch: int,
    temporal: int,
    merge: int,
) -> Float[Tensor, "frames c height width"]:
    """Join Qwen's rows of patches into the frames they were cut from.

    A row holds the (channel, frame of the step, y, x) values of one patch; rows run over steps,
    then over blocks of merge x merge patches, then over the patches of a block. A still image is
    one step, whose frames are copies of the image.

    Args:
        patches: (steps * h * w, channels * temporal * patch * patch).
        grid: (steps, h, w): steps in time, and patches down and across, as in ``image_grid_thw``.
        channels: colour channels.
        patch: side of a patch, pixels.
        temporal: frames per step.
        merge: side of a block, patches.

    Returns:
        (steps * temporal, channels, h * patch, w * patch).

    Reference:
        Layout of transformers' Qwen2-VL image processor.

    Example:
        >>> import torch
        >>> rows = torch.zeros(8, 96)
        >>> patches_to_frames(rows, (1, 2, 4), channels=3, patch=4, temporal=2, merge=2).shape
        torch.Size([2, 3, 8, 16])
    """
    steps, h, w = grid
    return rearrange(
        patches,
        "(s h w mh mw) (c t y x) -> (s t) c (h mh y) (w mw x)",
        s=steps, h=h // merge, w=w // merge, mh=merge, mw=merge,
        c=channels, t=temporal, y=patch, x=patch,
    )  # fmt: skip


def frames_to_patches(
    frames: Float[Tensor, "frames c height width"], *, patch: int, temporal: int, merge: int
) -> Float[Tensor, "rows values"]:
    """Inverse of :func:`patches_to_frames`.

    Args:
        frames: (steps * temporal, c, height, width); sides are multiples of patch * merge.
        patch: side of a patch, pixels.
        temporal: frames per step.
        merge: side of a block, patches.

    Returns:
        (steps * h * w, channels * temporal * patch * patch).

    Reference:
        Layout of transformers' Qwen2-VL image processor.

    Example:
        >>> import torch
        >>> frames = torch.rand(2, 3, 8, 16)
        >>> rows = frames_to_patches(frames, patch=4, temporal=2, merge=2)
        >>> rows.shape
        torch.Size([8, 96])
        >>> back = patches_to_frames(rows, (1, 2, 4), channels=3, patch=4, temporal=2, merge=2)
        >>> torch.equal(back, frames)
        True
    """
    return rearrange(
        frames,
        "(s t) c (h mh y) (w mw x) -> (s h w mh mw) (c t y x)",
        t=temporal, mh=merge, mw=merge, y=patch, x=patch,
    )  # fmt: skip
