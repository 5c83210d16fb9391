"""Draw scenes, any number at once, at any resolution, on any device, with every object's mask."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from captum_mllm.reference import openmoji
from captum_mllm.reference.scenes import (
    BACKGROUNDS,
    Scene,
    SceneBatch,
    uniforms,
)
from captum_mllm.reference.sprites import STYLES, load_sprites

COLOR_RAMPS = {  # tint -> colour of the sprite's lightest and of its darkest parts
    "gray": ((0.92, 0.92, 0.92), (0.12, 0.12, 0.12)),
    "red": ((1.00, 0.72, 0.68), (0.42, 0.00, 0.00)),
    "green": ((0.72, 0.98, 0.70), (0.00, 0.28, 0.04)),
    "blue": ((0.70, 0.80, 1.00), (0.00, 0.06, 0.45)),
}
TINT = 0.75  # strength of a tint; the rest are the sprite's own colours
SMOOTH_CELLS, GRAIN_CELLS = 5, 56  # the background's slow waves and its grain, cells per side
SMOOTH_STRENGTH, GRAIN_STRENGTH = 0.07, 0.05


@dataclass(frozen=True)
class Rendered:
    """Pictures and masks.

    Args:
        pixels: float32 (batch, 3, size, size) in 0..1, red green blue.
        masks: bool (batch, places, size, size); where an object is visible (opacity left after
            later objects are drawn over it > .5). Places beyond a scene's objects are all False.
    """

    pixels: Tensor
    masks: Tensor


@functools.lru_cache(maxsize=4)
def _sprites(device: torch.device, third: openmoji.Built | None) -> Tensor:
    """Premultiplied sprites (styles, categories, 5, 64, 64): red, green, blue, luminance, alpha.

    Args:
        device: Where they are wanted.
        third: The third style's file, with the time and size that make another version of it
            another key of the cache; None: the shipped styles alone.
    """
    rgba = load_sprites()
    if third is not None:
        rgba = np.concatenate([rgba, openmoji.load_openmoji(third.path)[None]])
    rgba = torch.from_numpy(rgba.copy()).to(device).float().div(255).movedim(-1, 2)
    alpha = rgba[:, :, 3:]
    weights = torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)
    gray = (rgba[:, :, :3] * weights).sum(2, keepdim=True)
    return torch.cat([rgba[:, :, :3] * alpha, gray * alpha, alpha], 2)


def _background(scenes: SceneBatch, size: tuple[int, int]) -> Tensor:
    device = scenes.seed.device
    colors = torch.tensor(list(BACKGROUNDS.values()), device=device)[scenes.background]
    batch = len(scenes)
    smooth = uniforms(scenes.seed, 3 * SMOOTH_CELLS**2, 11)
    smooth = smooth.view(batch, 3, SMOOTH_CELLS, SMOOTH_CELLS)
    grain = uniforms(scenes.seed, GRAIN_CELLS**2, 12).view(batch, 1, GRAIN_CELLS, GRAIN_CELLS)
    smooth = F.interpolate(smooth, size, mode="bilinear", align_corners=True) - 0.5
    grain = F.interpolate(grain, size, mode="bilinear", align_corners=False) - 0.5
    out = colors[:, :, None, None] + 2 * SMOOTH_STRENGTH * smooth + 2 * GRAIN_STRENGTH * grain
    return out.clamp(0, 1)


def _layer(scenes: SceneBatch, place: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One object per scene on the whole canvas: premultiplied colour, and alpha."""
    device = scenes.seed.device
    style = scenes.style[:, place]
    third = openmoji.built() if bool((style >= len(STYLES)).any()) else None
    sprites = _sprites(device, third)[style, scenes.category[:, place]]
    half = scenes.size[:, place]
    x, y = (scenes.center[:, place] * 2 - 1).unbind(-1)
    sign = torch.where(scenes.flip[:, place], -1.0, 1.0)
    zero = torch.zeros_like(half)
    theta = torch.stack(
        [
            torch.stack([sign / half, zero, -sign * x / half], -1),
            torch.stack([zero, 1 / half, -y / half], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [len(scenes), 5, *size], align_corners=False)
    layer = F.grid_sample(sprites, grid, mode="bilinear", align_corners=False)
    present = (place < scenes.count)[:, None, None, None]
    rgb, gray, alpha = (layer * present).split([3, 1, 1], 1)
    ramps = torch.tensor(list(COLOR_RAMPS.values()), device=device)
    light, dark = ramps[scenes.color[:, place].clamp(min=0)].unbind(1)
    light, dark = light[:, :, None, None], dark[:, :, None, None]
    tinted = TINT * (dark * alpha + (light - dark) * gray) + (1 - TINT) * rgb
    rgb = torch.where((scenes.color[:, place] < 0)[:, None, None, None], rgb, tinted)
    return rgb, alpha


def render(
    scenes: Scene | Sequence[Scene] | SceneBatch,
    size: int | tuple[int, int] = 112,
    oversample: float = 1,
    device: torch.device | str | None = None,
) -> Rendered:
    """Draw scenes.

    Args:
        scenes: One scene, several, or a batch as tensors.
        size: Side of the pictures in pixels, or (height, width), to which scenes are stretched.
        oversample: Draw at `oversample * size` and resize (bicubic, antialiased), as a large
            picture is shrunk by a model's processor. Below 1 the picture is enlarged.
        device: Where to draw; default: where the scenes' tensors are, else the CPU.

    Returns:
        Pictures and masks; masks are always drawn at `size` itself.

    Raises:
        ValueError: `size` or `oversample` is not positive.
        FileNotFoundError: An object is in the style "openmoji" and that style was not built.

    Example:
        >>> from captum_mllm.reference import make_scene
        >>> drawn = render([make_scene(0), make_scene(1)], size=64)
        >>> drawn.pixels.shape, drawn.masks.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 4, 64, 64]))
    """
    if min(_pair(size)) < 1 or oversample <= 0:
        raise ValueError(f"size={size} and oversample={oversample} must both be positive.")
    if isinstance(scenes, Scene):
        scenes = [scenes]
    if not isinstance(scenes, SceneBatch):
        scenes = SceneBatch.of(scenes)
    if device is not None:
        scenes = scenes.to(device)
    return Rendered(draw(scenes, size, oversample), draw_masks(scenes, size))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def draw(scenes: SceneBatch, size: int | tuple[int, int], oversample: float = 1) -> Tensor:
    """The pictures of `render` alone."""
    size = _pair(size)
    drawn = (round(size[0] * oversample), round(size[1] * oversample))
    pixels = _background(scenes, drawn)
    for place in range(scenes.category.shape[1]):
        rgb, alpha = _layer(scenes, place, drawn)
        pixels = pixels * (1 - alpha) + rgb
    if drawn == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(
        0, 1
    )


def draw_masks(scenes: SceneBatch, size: int | tuple[int, int]) -> Tensor:
    """The masks of `render` alone."""
    size = _pair(size)
    visible: list[Tensor] = []
    for place in range(scenes.category.shape[1]):
        _, alpha = _layer(scenes, place, size)
        visible = [v * (1 - alpha) for v in visible] + [alpha]
    return torch.cat(visible, 1) > 0.5


def render_pil(scene: Scene, size: int | tuple[int, int] = 336) -> tuple[Image.Image, Tensor]:
    """Draw one scene as a user would hand it to a processor.

    Args:
        scene: The scene.
        size: Side of the picture in pixels, or (height, width), to which the scene is stretched.

    Returns:
        The picture (RGB, 8 bit) and masks, bool (objects, height, width).

    Example:
        >>> from captum_mllm.reference import make_scene
        >>> image, masks = render_pil(make_scene(0), size=96)
        >>> image.size, masks.dtype
        ((96, 96), torch.bool)
    """
    drawn = render(scene, size)
    array = drawn.pixels[0].mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array), drawn.masks[0, : len(scene.objects)]
