"""Scenes: objects on a smooth background, each scene determined by one integer seed.

`draw_scenes` makes what the models are trained on, 1-4 objects; the harder ones are in `sets`.

Every random draw is a hash of (seed, number of the draw), so a scene does not depend on what was
drawn before it, on the batch it is drawn in, or on a library's random generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_mllm.reference.sprites import ALL_STYLES, CATEGORIES, STYLES

# Seeds of the splits: split -> (first seed, number of seeds). The one place that keeps them apart.
SPLITS = {
    "train": (0, 10**12),
    "validation": (10**12, 10**6),
    "test": (2 * 10**12, 10**6),
}
MAX_OBJECTS = 4  # of the scenes that models are trained on
MOST_OBJECTS = 8  # of any scene
COLORS = ("gray", "red", "green", "blue")
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.94),
    "gray": (0.70, 0.70, 0.71),
    "blue": (0.62, 0.76, 0.93),
    "green": (0.66, 0.86, 0.64),
    "yellow": (0.96, 0.91, 0.62),
    "pink": (0.96, 0.74, 0.80),
    "purple": (0.78, 0.68, 0.90),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
SMALL, LARGE = (0.28, 0.34), (0.40, 0.50)
LARGE_TOP = (0.50, 0.50, 0.48, 0.44)  # the largest size when there are 1, 2, 3, 4 objects
LARGE_SHARE = (0.55, 0.55, 0.45, 0.35)  # chance that an object is large, likewise
COLOR_SHARE = 0.3
BEHIND_SIZE, BEHIND_SHIFT = 0.42, 0.015  # of an object behind another: size, how far to the left
LAYOUTS = 96  # candidate layouts drawn per scene; the one with the least overlap is kept
MIN_GAP = (
    0.07  # wanted distance between two objects' centres along x: "from left to right" is clear
)


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Args:
        category: One of `CATEGORIES`.
        style: "noto" or "twemoji"; "openmoji" where that style was built (`openmoji`).
        center: (x, y) in 0..1 of the image's side, y downwards.
        size: Side of the sprite's square in 0..1 of the image's side.
        color: Tint, one of `COLORS`, or None for the natural colours.
        flip: Whether the sprite is mirrored left to right.
    """

    category: str
    style: str
    center: tuple[float, float]
    size: float
    color: str | None = None
    flip: bool = False

    @property
    def size_word(self) -> str:
        """The size as a word: small or large."""
        return "large" if self.size > (SMALL[1] + LARGE[0]) / 2 else "small"

    @property
    def position_words(self) -> tuple[str, ...]:
        """Where the object's centre lies, e.g. ("top", "left"), ("right",) or ("middle",)."""
        x, y = self.center
        row = "top" if y < 0.38 else "bottom" if y > 0.62 else ""
        column = "left" if x < 0.38 else "right" if x > 0.62 else ""
        return tuple(word for word in (row, column) if word) or ("middle",)


@dataclass(frozen=True)
class Scene:
    """A picture's description.

    Args:
        seed: Seeds the background's noise.
        background: Colour word, one of `BACKGROUNDS`.
        objects: 1-8 objects, from left to right; later ones are drawn over earlier ones. In
            scenes that models are trained on there are 1-4, of different categories.
    """

    seed: int
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """The objects' categories, from left to right."""
        return tuple(o.category for o in self.objects)


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as tensors; the second axis of the per-object tensors has a place for every object.

    There are 4 places, or as many as the largest scene has objects.

    Args:
        seed: int64 (batch,).
        background: int64 (batch,), index into `BACKGROUND_NAMES`.
        count: int64 (batch,), number of objects; places from there on are meaningless.
        category, style, color: int64 (batch, places), indices; color -1 is natural.
        flip: bool (batch, places).
        center: float32 (batch, places, 2).
        size: float32 (batch, places).
    """

    seed: Tensor
    background: Tensor
    count: Tensor
    category: Tensor
    style: Tensor
    color: Tensor
    flip: Tensor
    center: Tensor
    size: Tensor

    def __len__(self) -> int:
        return len(self.seed)

    def to(self, device: torch.device | str) -> SceneBatch:
        """The same scenes on another device."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items()}
        return SceneBatch(**moved)

    def scenes(self) -> list[Scene]:
        """The same scenes as descriptions."""
        rows = zip(
            *(getattr(self, name).tolist() for name in self.__dataclass_fields__), strict=True
        )
        return [_describe(*row) for row in rows]

    @staticmethod
    def of(scenes: Sequence[Scene]) -> SceneBatch:
        """Descriptions as tensors."""
        count = max([MAX_OBJECTS, *(len(scene.objects) for scene in scenes)])
        places = [_places(scene, count) for scene in scenes]
        return SceneBatch(
            seed=torch.tensor([s.seed for s in scenes]),
            background=torch.tensor([BACKGROUND_NAMES.index(s.background) for s in scenes]),
            count=torch.tensor([len(s.objects) for s in scenes]),
            category=torch.tensor([[CATEGORIES.index(o.category) for o in p] for p in places]),
            style=torch.tensor([[ALL_STYLES.index(o.style) for o in p] for p in places]),
            color=torch.tensor(
                [[-1 if o.color is None else COLORS.index(o.color) for o in p] for p in places]
            ),
            flip=torch.tensor([[o.flip for o in p] for p in places]),
            center=torch.tensor([[o.center for o in p] for p in places], dtype=torch.float32),
            size=torch.tensor([[o.size for o in p] for p in places], dtype=torch.float32),
        )


def _places(scene: Scene, count: int) -> tuple[SceneObject, ...]:
    if not 1 <= len(scene.objects) <= MOST_OBJECTS:
        raise ValueError(
            f"scene.objects holds {len(scene.objects)} objects; give it 1 to {MOST_OBJECTS}."
        )
    return scene.objects + scene.objects[:1] * (count - len(scene.objects))


def _describe(seed, background, count, category, style, color, flip, center, size) -> Scene:
    objects = tuple(
        SceneObject(
            category=CATEGORIES[category[i]],
            style=ALL_STYLES[style[i]],
            center=(center[i][0], center[i][1]),
            size=size[i],
            color=None if color[i] < 0 else COLORS[color[i]],
            flip=flip[i],
        )
        for i in range(count)
    )
    return Scene(seed=seed, background=BACKGROUND_NAMES[background], objects=objects)


def uniforms(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Random numbers that depend on nothing but (seed, stream, place): a hash (SplitMix64).

    Args:
        seeds: int64 (batch,).
        count: Numbers per seed.
        stream: Keeps uses of the same seed apart.

    Returns:
        float32 (batch, count) in [0, 1).
    """

    def shift(x: Tensor, by: int) -> Tensor:  # logical, not arithmetic
        return (x >> by) & ((1 << (64 - by)) - 1)

    golden, mix1, mix2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
    place = torch.arange(1, count + 1, device=seeds.device)
    x = seeds[:, None] * 6364136223846793005 + (stream * 1_000_003 + place) * golden
    x = (x ^ shift(x, 30)) * mix1
    x = (x ^ shift(x, 27)) * mix2
    return shift(x ^ shift(x, 31), 40).float() / (1 << 24)


def seeds_of(split: str, indices: Tensor | Sequence[int]) -> Tensor:
    """Seeds of a split's scenes.

    Args:
        split: "train", "validation" or "test".
        indices: Which of the split's scenes, each >= 0.

    Returns:
        int64 tensor like `indices`; no seed belongs to two splits.

    Raises:
        ValueError: Unknown split, or an index outside it.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; there are {sorted(SPLITS)}.")
    first, size = SPLITS[split]
    indices = torch.as_tensor(indices, dtype=torch.int64)
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < size):
        raise ValueError(f"a scene's number in split {split!r} must be in 0..{size - 1}.")
    return first + indices


def draw_scenes(seeds: Tensor) -> SceneBatch:
    """Draw scenes as models are trained on them.

    Args:
        seeds: int64 (batch,), from `seeds_of`.

    Returns:
        The scenes, on the seeds' device; objects run from left to right.
    """
    return arrange(seeds, *draw_categories(seeds))


def draw_categories(seeds: Tensor) -> tuple[Tensor, Tensor]:
    """What a scene holds, before anything is placed.

    Args:
        seeds: int64 (batch,).

    Returns:
        Number of objects (batch,), and the categories in random order (batch, all categories), of
        which the first ones are in the scene.
    """
    count = 1 + (uniforms(seeds, 1, 0)[:, 0] * MAX_OBJECTS).long()
    return count, uniforms(seeds, len(CATEGORIES), 1).argsort(1)


def arrange(
    seeds: Tensor, count: Tensor, category: Tensor, behind: Tensor | None = None
) -> SceneBatch:
    """Give every object its look and its place.

    Args:
        seeds: int64 (batch,).
        count: Number of objects (batch,), 1 to 4.
        category: (batch, at least 4), the objects' categories first.
        behind: (batch, 2), objects of which the second is put behind the first, much smaller;
            negative: none. Default: none anywhere.
    """
    batch = len(seeds)
    category = category[:, :MAX_OBJECTS]
    look = uniforms(seeds, 6 * MAX_OBJECTS, 2).view(batch, 6, MAX_OBJECTS)
    top = torch.tensor(LARGE_TOP, device=seeds.device)[count - 1][:, None]
    share = torch.tensor(LARGE_SHARE, device=seeds.device)[count - 1][:, None]
    large = look[:, 0] < share
    size = torch.where(
        large,
        LARGE[0] + (top - LARGE[0]) * look[:, 1],
        SMALL[0] + (SMALL[1] - SMALL[0]) * look[:, 1],
    )
    color = torch.where(look[:, 2] < COLOR_SHARE, (look[:, 3] * len(COLORS)).long(), -1)
    center = _place(uniforms(seeds, LAYOUTS * MAX_OBJECTS * 2, 3), size, count)
    if behind is not None:
        center, size = _put_behind(center, size, behind)
    present = torch.arange(MAX_OBJECTS, device=seeds.device) < count[:, None]
    order = torch.where(present, center[..., 0], 2.0).argsort(1)

    def sort(x: Tensor) -> Tensor:
        return x.gather(1, order)

    return SceneBatch(
        seed=seeds,
        background=(uniforms(seeds, 2, 0)[:, 1] * len(BACKGROUNDS)).long(),
        count=count,
        category=sort(category),
        style=sort((look[:, 4] * len(STYLES)).long()),
        color=sort(color),
        flip=sort(look[:, 5] < 0.5),
        center=center.gather(1, order[..., None].expand(-1, -1, 2)),
        size=sort(size),
    )


def _put_behind(center: Tensor, size: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """Move the second of each pair a little to the left of the first, which then covers it."""
    place = torch.arange(size.shape[1], device=size.device)
    front, moved = behind.clamp(min=0).unbind(1)
    move = (place == moved[:, None]) & (behind[:, :1] >= 0)
    row = torch.arange(len(size), device=size.device)
    spot = center[row, front] - torch.tensor([BEHIND_SHIFT, 0.0], device=size.device)
    return (
        torch.where(move[..., None], spot[:, None], center),
        torch.where(move, BEHIND_SIZE * size[row, front][:, None], size),
    )


def _place(u: Tensor, size: Tensor, count: Tensor) -> Tensor:
    """Choose centres: of `LAYOUTS` random layouts the one with the least overlap."""
    batch = len(size)
    u = u.view(batch, LAYOUTS, MAX_OBJECTS, 2)
    margin = size[:, None, :, None] / 2
    centers = margin + u * (1 - 2 * margin)
    distance = (centers[:, :, :, None] - centers[:, :, None]).abs()  # (batch, layouts, 4, 4, 2)
    reach = (size[:, None, :, None] + size[:, None, None]) / 2
    cut = (reach[..., None] - distance).clamp(min=0).prod(-1)
    smaller = torch.minimum(size[:, None, :, None], size[:, None, None])
    cost = cut / smaller**2 + 5 * (MIN_GAP - distance[..., 0]).clamp(min=0)
    index = torch.arange(MAX_OBJECTS, device=size.device)
    pairs = (index[:, None] < index) & (index < count[:, None, None])
    best = (cost * pairs[:, None]).sum((2, 3)).argmin(1)
    return centers[torch.arange(batch, device=size.device), best]


def make_scene(seed: int, split: str = "test") -> Scene:
    """Make one scene.

    Args:
        seed: Number of the scene within its split, >= 0.
        split: "train", "validation" or "test"; the same number gives different scenes in each.

    Returns:
        The scene.

    Example:
        >>> scene = make_scene(0)
        >>> scene == make_scene(0), scene == make_scene(0, "train")
        (True, False)
    """
    return draw_scenes(seeds_of(split, [seed])).scenes()[0]
