"""Scenes that training has none of: many objects, covered ones, two of a kind, small ones.

All draws are hashes of (seed, number of the draw), as in `scenes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from captum_mllm.reference.render import draw_masks
from captum_mllm.reference.scenes import (
    BACKGROUND_NAMES,
    COLOR_SHARE,
    COLORS,
    LARGE,
    SMALL,
    Scene,
    SceneBatch,
    SceneObject,
    uniforms,
)
from captum_mllm.reference.sprites import CATEGORIES, STYLES

CROWD, CROWD_SIZE = (5, 8), (0.2, 0.3)  # number of objects; their size
SMALL_COUNT, SMALL_SIZE = (1, 3), (0.14, 0.2)
VISIBLE = (0.25, 0.6)  # visible share of the object that another covers
PLAIN = 0.9  # visible share from which on an object counts as uncovered
SPOTS = 60  # candidate places for an object
STREAM = 31  # of `uniforms`: streams from here on are this file's
_MEASURED_AT = 112  # side in pixels at which the visible share is measured


class _Draws:
    """Random choices for one scene."""

    def __init__(self, seed: Tensor, stream: int) -> None:
        self._next = itertools.chain.from_iterable(
            uniforms(seed, 512, STREAM + stream + 8 * turn)[0].tolist()
            for turn in itertools.count()
        )

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._next)

    def whole(self, low: int, high: int) -> int:
        return low + int(next(self._next) * (high - low + 1))

    def some(self, values: Sequence, count: int) -> list:
        keyed = [(next(self._next), i) for i in range(len(values))]
        return [values[i] for _, i in sorted(keyed)[:count]]

    def object(self, category: str, size: tuple[float, float]) -> SceneObject:
        """An object of some look, in the middle of the picture for now."""
        color = self.some(COLORS, 1)[0] if next(self._next) < COLOR_SHARE else None
        style, flip = self.some(STYLES, 1)[0], next(self._next) < 0.5
        return SceneObject(category, style, (0.5, 0.5), self.between(*size), color, flip)

    def placed(
        self, objects: Sequence[SceneObject], beside: Sequence[SceneObject] = ()
    ) -> list[SceneObject]:
        """Give objects places one after the other, each where it cuts the others least."""
        done = list(beside)
        for thing in objects:
            half = thing.size / 2
            spots = [
                (self.between(half, 1 - half), self.between(half, 1 - half)) for _ in range(SPOTS)
            ]
            moved = [replace(thing, center=spot) for spot in spots]
            done.append(min(moved, key=lambda one: sum(_overlap(one, other) for other in done)))
        return done[len(beside) :]


def _overlap(a: SceneObject, b: SceneObject) -> float:
    """Share of the smaller object's square that the other's cuts; a little more if they line up."""
    reach = (a.size + b.size) / 2
    dx, dy = (abs(p - q) for p, q in zip(a.center, b.center, strict=True))
    cut = max(reach - dx, 0) * max(reach - dy, 0) / min(a.size, b.size) ** 2
    return cut + max(0.05 - dx, 0)


def _scene(seed: Tensor, draws: _Draws, objects: Sequence[SceneObject]) -> Scene:
    background = draws.some(BACKGROUND_NAMES, 1)[0]
    ordered = sorted(objects, key=lambda thing: thing.center[0])
    return Scene(int(seed), background, tuple(ordered))


def crowd(seed: Tensor) -> Scene:
    """5-8 different objects.

    Args:
        seed: int64 (1,), from `scenes.seeds_of`.
    """
    return _several(seed, 0, CROWD, CROWD_SIZE)


def shrink(seed: Tensor) -> Scene:
    """1-3 different objects, about half as large as training's small ones.

    Args:
        seed: int64 (1,), from `scenes.seeds_of`.
    """
    return _several(seed, 1, SMALL_COUNT, SMALL_SIZE)


def _several(seed: Tensor, stream: int, count: tuple[int, int], size: tuple[float, float]) -> Scene:
    draws = _Draws(seed, stream)
    names = draws.some(CATEGORIES, draws.whole(*count))
    return _scene(seed, draws, draws.placed([draws.object(name, size) for name in names]))


def twin(seed: Tensor) -> Scene:
    """Two objects of one kind and 0-2 others; the two differ in size or colour, and in place.

    Args:
        seed: int64 (1,), from `scenes.seeds_of`.
    """
    draws = _Draws(seed, 2)
    names = draws.some(CATEGORIES, 1 + draws.whole(0, 2))
    small, large = (draws.object(names[0], size) for size in (SMALL, LARGE))
    if draws.whole(0, 1):  # of one size, of two colours
        colors = draws.some((*COLORS, None), 2)
        small, large = (replace(small, color=color) for color in colors)
    others = [draws.object(name, SMALL) for name in names[1:]]
    while True:
        placed = draws.placed([small, large, *others])
        if placed[0].position_words != placed[1].position_words:
            return _scene(seed, draws, placed)


def visible_share(scene: Scene) -> list[float]:
    """Share of every object's own area that later objects leave visible.

    Args:
        scene: The scene.
    """
    alone = [replace(scene, objects=(thing,)) for thing in scene.objects]
    areas = draw_masks(SceneBatch.of([scene, *alone]), _MEASURED_AT).sum((2, 3))
    return [float(areas[0, i] / areas[1 + i, 0]) for i in range(len(alone))]


def occlude(seed: Tensor) -> Scene:
    """2-4 different objects; one covers 40-75 % of another, the rest are in plain view.

    Shares are measured at 112 px; at other sizes they differ by a hair.

    Args:
        seed: int64 (1,), from `scenes.seeds_of`.
    """
    draws = _Draws(seed, 3)
    count = 2 + draws.whole(0, 2)
    while True:  # other kinds each time: a toothbrush covers nothing
        names = draws.some(CATEGORIES, count)
        (back,) = draws.placed([draws.object(names[0], LARGE)])
        front = _in_front(draws, draws.object(names[1], LARGE), back)
        if not _shows(Scene(0, "white", (back, front))):
            continue
        others = draws.placed([draws.object(name, SMALL) for name in names[2:]], (back, front))
        scene = _scene(seed, draws, [back, front, *others])
        if _shows(scene):
            return scene


def _in_front(draws: _Draws, thing: SceneObject, back: SceneObject) -> SceneObject:
    """Move an object so that it covers part of another, from the right."""
    shift = draws.between(0.05, 0.5) * back.size, draws.between(-0.4, 0.4) * back.size
    half = thing.size / 2
    x, y = (min(max(at + by, half), 1 - half) for at, by in zip(back.center, shift, strict=True))
    return replace(thing, center=(x, y))


def _shows(scene: Scene) -> bool:
    """Whether one object is covered as wanted and no other is."""
    least, *rest = sorted(visible_share(scene))
    return VISIBLE[0] <= least <= VISIBLE[1] and min(rest) > PLAIN
