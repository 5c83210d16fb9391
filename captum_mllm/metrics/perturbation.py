"""Pixels in the order of a map, and forwards over images changed in that order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.functional import upsample
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.baselines import PerturbableImages, mask_shape
from captum_mllm.model.forward import answer_log_probs
from captum_mllm.model.inputs import Sample

_LEVELS = 1e9  # values nearer than this share of the largest are ties: rounding of the upsampling


def pixel_ranks(
    maps: Sequence[Float[Tensor, "*frames rows cols"]], grids: Sequence[ImageGrid]
) -> tuple[Int64[Tensor, "*frames height width"], ...]:
    """Rank of every pixel of all images in the order of their maps, 0 the highest.

    Args:
        maps: one map per image, on any grid; upsampled to pixels bilinearly.
        grids: the images' grids.

    Returns:
        Per image, the ranks on its canvas. Pixels of all images share one order; ties keep the
        order of the images, then row by row from the upper left. So a constant map scans from the
        top.
    """
    pixels = [
        upsample(values.detach().cpu().double(), (grid.height, grid.width))
        for values, grid in zip(maps, grids, strict=True)
    ]
    flat = torch.cat([values.flatten() for values in pixels])
    largest = flat.abs().max()
    levels = (flat / largest * _LEVELS).round() if largest > 0 else flat
    order = levels.sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    sizes = [prod(mask_shape(grid)) for grid in grids]
    pairs = zip(ranks.split(sizes), grids, strict=True)
    return tuple(places.reshape(mask_shape(grid)) for places, grid in pairs)


def step_sizes(pixels: int, steps: int) -> list[int]:
    """How many pixels are changed after each of 0..steps equal steps of area."""
    return [(2 * step * pixels + steps) // (2 * steps) for step in range(steps + 1)]


def read_maps(
    attribution: Any, grids: Sequence[ImageGrid], answer: Tensor, chosen: Sequence[int]
) -> list[tuple[Tensor, ...]]:
    """The maps of an attribution: one tuple (a map per image) per chosen token, or one for all.

    Args:
        attribution: see :func:`captum_mllm.metrics.insertion_deletion`.
        grids: the sample's images.
        answer: ids of the answer.
        chosen: positions in it.

    Raises:
        TypeError: neither a result nor tensors.
        ValueError: another number of images or tokens, NaN, or a result of another answer.
    """
    tensors = getattr(attribution, "grid_attr", attribution)
    tensors = tuple(tensors) if isinstance(tensors, tuple | list) else (tensors,)
    if any(not hasattr(maps, "shape") for maps in tensors):
        kinds = ", ".join(type(maps).__name__ for maps in tensors)
        raise TypeError(
            f"attribution must be a result of attribute, a tensor of maps, or a tuple of one "
            f"tensor per image; got {kinds}."
        )
    if len(tensors) != len(grids):
        raise ValueError(
            f"attribution must hold one tensor of maps per image ({len(grids)}), got "
            f"{len(tensors)}."
        )
    pairs = zip(tensors, grids, strict=True)
    per_image = [_one_image(torch.as_tensor(maps), grid) for maps, grid in pairs]
    counts = {len(maps) for maps in per_image}
    if len(counts) > 1 or not counts <= {1, len(chosen), len(answer)}:
        raise ValueError(
            f"attribution must hold one map for the sequence, or one for each of {len(chosen)} "
            f"chosen tokens (or of {len(answer)} of the answer); got {sorted(counts)} maps."
        )
    rows = list(chosen) if counts == {len(answer)} else list(range(*counts))
    ids = getattr(attribution, "output_ids", None)
    if ids is not None:
        expected = answer.cpu() if len(ids) == len(answer) else answer.cpu()[list(chosen)]
        if not torch.equal(torch.as_tensor(ids).cpu(), expected):
            raise ValueError(
                f"attribution explains the ids {list(map(int, ids))}, but target and tokens are "
                f"{expected.tolist()}: pass the result's own output_ids as target."
            )
    return [tuple(maps[row] for maps in per_image) for row in rows]


def _one_image(maps: Tensor, grid: ImageGrid) -> Float[Tensor, "maps ..."]:
    axes = 3 if grid.steps else 2
    shape = tuple(maps.shape)
    maps = maps[None] if maps.ndim == axes else maps
    if maps.ndim != axes + 1 or 0 in maps.shape:
        wanted = "frames, rows, cols" if grid.steps else "rows, cols"
        raise ValueError(
            f"attribution must be (tokens, {wanted}) or ({wanted}) for each image, got {shape}."
        )
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("attribution holds NaN or infinite values; they can't be ranked.")
    if grid.steps and maps.shape[1] != grid.frames:
        if maps.shape[1] != grid.steps:
            raise ValueError(
                f"attribution must hold {grid.frames} frames of a video, got {maps.shape[1]}."
            )
        maps = maps.repeat_interleave(grid.frames // grid.steps, 1)
    return maps


class Version(NamedTuple):
    """One perturbed version of the images, and which probabilities are read at which step.

    Args:
        pictures: changes the images.
        masks: per image, what is replaced.
        rows: which of the chosen tokens are read.
        deletes: whether it belongs to the deletion curve.
        step: its index in the curve.
    """

    pictures: PerturbableImages
    masks: list[Tensor]
    rows: tuple[int, ...]
    deletes: bool = False
    step: int = 0


@dataclass(frozen=True)
class Run:
    """Forwards over versions, several at a time.

    Args:
        adapter: the model's adapter, already ``running()``.
        sample: the prompt.
        answer: ids of the answer.
        chosen: positions in it that are scored.
        per_eval: versions in one forward.
        bar: progress bar over the versions.
    """

    adapter: Adapter
    sample: Sample
    answer: Tensor
    chosen: list[int]
    per_eval: int
    bar: Any

    def probs(self, versions: Iterator[Version]) -> Iterator[tuple[Version, Tensor]]:
        """Probabilities of each version's own rows, float64 on the CPU.

        Args:
            versions: what to run; all of a batch read equally many rows.
        """
        while batch := list(islice(versions, self.per_eval)):
            pixels = [version.pictures.replaced(version.masks) for version in batch]
            tokens = [[self.chosen[row] for row in version.rows] for version in batch]
            log_probs = answer_log_probs(self.adapter, self.sample, self.answer, pixels, tokens)
            self.bar.update(len(batch))
            yield from zip(batch, log_probs.double().exp().cpu(), strict=True)


def perturbed_versions(
    maps: Sequence[tuple[Tensor, ...]],
    sample: Sample,
    pictures: PerturbableImages,
    n_chosen: int,
    sizes: Sequence[int],
) -> Iterator[Version]:
    """Every version between the ends of the curves.

    Args:
        maps: one map per image, for each chosen token or once for all.
        sample: the prompt with its images.
        pictures: changes them.
        n_chosen: number of chosen tokens.
        sizes: number of changed pixels after each step, the first and the last included.
    """
    for n, per_image in enumerate(maps):
        ranks = pixel_ranks(per_image, sample.grids)
        rows = (n,) if len(maps) > 1 else tuple(range(n_chosen))
        for step in range(1, len(sizes) - 1):
            best = [places < sizes[step] for places in ranks]
            yield Version(pictures, [~mask for mask in best], rows, False, step)
            yield Version(pictures, best, rows, True, step)


def all_masks(sample: Sample, replaced: bool) -> list[Tensor]:
    """Masks that replace nothing, or everything.

    Args:
        sample: the prompt with its images.
        replaced: which of the two.
    """
    return [torch.full(mask_shape(grid), replaced) for grid in sample.grids]
