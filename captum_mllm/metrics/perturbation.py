"""Pixels in the order of a map, and forwards over images changed in that order."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.functional import grid_mask, upsample
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.baselines import BASELINES, PerturbableImages, mask_shape
from captum_mllm.model.forward import answer_log_odds, answer_log_probs
from captum_mllm.model.inputs import Sample
from captum_mllm.validation import ArgumentError, check_choice

_LEVELS = 1e9  # values nearer than this share of the largest are ties: rounding of the upsampling


def spread_cells(
    cells: Shaped[Tensor, " cells"], grids: Sequence[ImageGrid]
) -> list[Shaped[Tensor, "*frames height width"]]:
    """Give each pixel of all images the value of the cell (image token) that it lies in.

    Args:
        cells: one value per cell of all images, image after image.
        grids: the images' grids.

    Returns:
        Per image, values of :func:`~captum_mllm.model.baselines.mask_shape`.
    """
    pixels = []
    for values, grid in zip(cells.split([grid.cells for grid in grids]), grids, strict=True):
        places = grid_mask((grid.height, grid.width), grid.rows, grid.cols)
        frames = values.reshape(-1, grid.rows * grid.cols)[:, places]
        each = grid.frames // grid.steps if grid.steps else 1
        pixels.append(frames.repeat_interleave(each, 0).reshape(mask_shape(grid)))
    return pixels


def pixel_ranks(
    maps: Sequence[Float[Tensor, "*frames rows cols"]],
    grids: Sequence[ImageGrid],
    seed: int | None = None,
) -> tuple[Int64[Tensor, "*frames height width"], ...]:
    """Rank of every pixel of all images in the order of their maps, 0 the highest.

    Args:
        maps: one map per image, on any grid; upsampled to pixels bilinearly.
        grids: the images' grids.
        seed: of the order of ties. They go cell by cell of the model's grid, in random order, so
            that a constant map is as good as a random one. None (default): see below.

    Returns:
        Per image, the ranks on its canvas. Pixels of all images share one order; without a seed
        ties keep the order of the images, then row by row from the upper left. So a constant map
        scans from the top.
    """
    pixels = [
        upsample(values.detach().cpu().double(), (grid.height, grid.width))
        for values, grid in zip(maps, grids, strict=True)
    ]
    flat = torch.cat([values.flatten() for values in pixels])
    levels = rounded_levels(flat)
    before = torch.arange(len(flat))
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        cells = torch.randperm(sum(grid.cells for grid in grids), generator=draw)
        keys = torch.cat([values.flatten() for values in spread_cells(cells, grids)])
        before = keys.argsort(stable=True)
    order = before[levels[before].sort(descending=True, stable=True).indices]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    sizes = [prod(mask_shape(grid)) for grid in grids]
    pairs = zip(ranks.split(sizes), grids, strict=True)
    return tuple(places.reshape(mask_shape(grid)) for places, grid in pairs)


def rounded_levels(values: Float64[Tensor, "*any"]) -> Float64[Tensor, "*any"]:
    """Values as whole multiples of 1e-9 of the largest, so that rounding makes no ranking.

    Args:
        values: float64; those of a map of zeros stay as they are.
    """
    largest = values.abs().max()
    return (values / largest * _LEVELS).round() if largest > 0 else values


def step_sizes(pixels: int, steps: int) -> list[int]:
    """How many pixels are changed after each of 0..steps equal steps of area."""
    return [(2 * step * pixels + steps) // (2 * steps) for step in range(steps + 1)]


def read_maps(
    attribution: Any,
    grids: Sequence[ImageGrid],
    answer: Tensor,
    chosen: Sequence[int],
    name: str = "attribution",
) -> list[tuple[Tensor, ...]]:
    """The maps of an attribution: one tuple (a map per image) per chosen token, or one for all.

    Args:
        attribution: see :func:`captum_mllm.metrics.insertion_deletion`.
        grids: the sample's images.
        answer: ids of the answer.
        chosen: positions in it.
        name: the argument's name, for messages.

    Raises:
        TypeError: neither a result nor tensors.
        ValueError: another number of images or tokens, NaN, or a result of another answer.
    """
    tensors = getattr(attribution, "grid_attr", attribution)
    tensors = tuple(tensors) if isinstance(tensors, tuple | list) else (tensors,)
    if any(not hasattr(maps, "shape") for maps in tensors):
        kinds = ", ".join(type(maps).__name__ for maps in tensors)
        raise TypeError(
            f"{name} must be a result of attribute, a tensor of maps, or a tuple of one "
            f"tensor per image; got {kinds}."
        )
    if len(tensors) != len(grids):
        raise ValueError(
            f"{name} must hold one tensor of maps per image ({len(grids)}), got {len(tensors)}."
        )
    pairs = zip(tensors, grids, strict=True)
    per_image = [_one_image(torch.as_tensor(maps), grid, name) for maps, grid in pairs]
    counts = {len(maps) for maps in per_image}
    if len(counts) > 1 or not counts <= {1, len(chosen), len(answer)}:
        raise ValueError(
            f"{name} must hold one map for the sequence, or one for each of {len(chosen)} "
            f"chosen tokens (or of {len(answer)} of the answer); got {sorted(counts)} maps."
        )
    rows = list(chosen) if counts == {len(answer)} else list(range(*counts))
    ids = getattr(attribution, "output_ids", None)
    if ids is not None:
        expected = answer.cpu() if len(ids) == len(answer) else answer.cpu()[list(chosen)]
        if not torch.equal(torch.as_tensor(ids).cpu(), expected):
            raise ValueError(
                f"{name} explains the ids {list(map(int, ids))}, but target and tokens are "
                f"{expected.tolist()}: pass the result's own output_ids as target."
            )
    return [tuple(maps[row] for maps in per_image) for row in rows]


def _one_image(maps: Tensor, grid: ImageGrid, name: str) -> Float[Tensor, "maps ..."]:
    axes = 3 if grid.steps else 2
    shape = tuple(maps.shape)
    maps = maps[None] if maps.ndim == axes else maps
    if maps.ndim != axes + 1 or 0 in maps.shape:
        wanted = "frames, rows, cols" if grid.steps else "rows, cols"
        raise ValueError(
            f"{name} must be (tokens, {wanted}) or ({wanted}) for each image, got {shape}."
        )
    if not bool(torch.isfinite(maps).all()):
        raise ValueError(f"{name} holds NaN or infinite values; they can't be ranked.")
    if grid.steps and maps.shape[1] != grid.frames:
        if maps.shape[1] != grid.steps:
            raise ValueError(
                f"{name} must hold {grid.frames} frames of a video, got {maps.shape[1]}."
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
        units: "probability" (default) or "log_odds": what is read.
    """

    adapter: Adapter
    sample: Sample
    answer: Tensor
    chosen: list[int]
    per_eval: int
    bar: Any
    units: str = "probability"

    def values(self, versions: Iterable[Version]) -> Iterator[tuple[Version, Tensor]]:
        """Probabilities or log-odds of each version's own rows, float64 on the CPU.

        Args:
            versions: what to run; all of a batch read equally many rows.
        """
        waiting = iter(versions)
        while batch := list(islice(waiting, self.per_eval)):
            pixels = [version.pictures.replaced(version.masks) for version in batch]
            tokens = [[self.chosen[row] for row in version.rows] for version in batch]
            what = (self.adapter, self.sample, self.answer, pixels, tokens)
            if self.units == "log_odds":
                values = answer_log_odds(*what).double().cpu()
            else:
                values = answer_log_probs(*what).double().exp().cpu()
            self.bar.update(len(batch))
            yield from zip(batch, values, strict=True)


def perturbed_versions(
    maps: Sequence[tuple[Tensor, ...]],
    sample: Sample,
    pictures: PerturbableImages,
    n_chosen: int,
    sizes: Sequence[int],
    seed: int | None = None,
) -> Iterator[Version]:
    """Every version between the ends of the curves.

    Args:
        maps: one map per image, for each chosen token or once for all.
        sample: the prompt with its images.
        pictures: changes them.
        n_chosen: number of chosen tokens.
        sizes: number of changed pixels after each step, the first and the last included.
        seed: of the order of ties, see :func:`pixel_ranks`.
    """
    for n, per_image in enumerate(maps):
        ranks = pixel_ranks(per_image, sample.grids, seed)
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


def ends(sample: Sample, pictures: PerturbableImages, n_chosen: int) -> list[Version]:
    """The whole images, and those that are replaced everywhere.

    Args:
        sample: the prompt with its images.
        pictures: changes them.
        n_chosen: number of chosen tokens, all of which are read.
    """
    everyone = tuple(range(n_chosen))
    return [Version(pictures, all_masks(sample, replaced), everyone) for replaced in (False, True)]


def named_attributions(attributions: Any) -> dict[str, Any]:
    """What is scored, by name: a mapping as it is, one attribution as ``"attribution"``.

    Args:
        attributions: a result, tensors, or a mapping from names to those.

    Raises:
        ArgumentError: an empty mapping.
    """
    if not isinstance(attributions, Mapping):
        return {"attribution": attributions}
    if not attributions:
        raise ArgumentError("attributions", "is empty: give at least one, e.g. {'msea': result}.")
    return {str(name): one for name, one in attributions.items()}


def read_named_maps(
    attributions: Any, sample: Sample, answer: Tensor, chosen: Sequence[int]
) -> dict[str, list[tuple[Tensor, ...]]]:
    """:func:`read_maps` of every attribution.

    Args:
        attributions: see :func:`named_attributions`.
        sample: the prompt with its images.
        answer: ids of the answer.
        chosen: positions in it.
    """
    named = named_attributions(attributions)
    called = {
        name: f"attributions[{name!r}]" if isinstance(attributions, Mapping) else "attributions"
        for name in named
    }
    return {
        name: read_maps(one, sample.grids, answer, chosen, called[name])
        for name, one in named.items()
    }


def check_settings(baseline: Any, **whole: Any) -> None:
    """Check a baseline, and arguments that are whole numbers of at least 1.

    Args:
        baseline: one of `BASELINES`.
        whole: the others, by name.

    Raises:
        ArgumentError: names the argument.
    """
    check_choice("baseline", baseline, BASELINES)
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(name, f"must be a whole number of at least 1, got {value!r}.")


def check_seed(seed: Any) -> None:
    """Check that a seed is a whole number from 0.

    Args:
        seed: the argument.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError("seed", f"must be a whole number of at least 0, got {seed!r}.")
