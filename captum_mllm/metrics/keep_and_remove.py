"""Is the best part of a map, as large as the object, enough, and is it missed?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm import tqdm

from captum_mllm.metrics.log_odds import relative_log_odds
from captum_mllm.metrics.perturbation import (
    Run,
    Version,
    check_seed,
    check_settings,
    ends,
    pixel_ranks,
    read_maps,
    read_named_maps,
)
from captum_mllm.model.baselines import Baseline, PerturbableImages, black_pixel, mask_shape
from captum_mllm.model.forward import evaluating
from captum_mllm.model.inputs import Sample
from captum_mllm.model.targets import chosen_tokens, read_question
from captum_mllm.validation import ArgumentError

Maps = list[tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class KeepAndRemove:
    """What :func:`keep_and_remove` gives; all tensors on the CPU, float64.

    Args:
        keep: per attribution, (targets,): :func:`relative_log_odds` given only the map's best
            pixels, as many as the mask has. Higher is better.
        remove: per attribution, (targets,): the same with only those replaced. Lower is better.
        full: (targets,): log-odds given the whole images.
        blank: (targets,): log-odds given the baseline alone.
        pixels: (targets,): pixels of the mask, of all images together.
        tokens: position of each target in the answer.
        baseline: what replaces pixels.
    """

    keep: dict[str, Float64[Tensor, " targets"]]
    remove: dict[str, Float64[Tensor, " targets"]]
    full: Float64[Tensor, " targets"]
    blank: Float64[Tensor, " targets"]
    pixels: Float64[Tensor, " targets"]
    tokens: tuple[int, ...]
    baseline: str

    @property
    def scores(self) -> dict[str, Float64[Tensor, " targets"]]:
        """Per attribution, keep minus remove of each target, in [-1, 1]; higher is better."""
        return {name: values - self.remove[name] for name, values in self.keep.items()}

    def means(self) -> dict[str, float]:
        """Mean score of each attribution.

        Returns:
            A value in [-1, 1] per name, over the targets that have one; NaN without any.
        """
        return {name: float(values.nanmean()) for name, values in self.scores.items()}


def keep_and_remove(
    model: Any,
    inputs: Mapping[str, Any],
    target: Any,
    attributions: Any,
    masks: Any,
    *,
    processor: Any,
    tokens: Sequence[int] | None = None,
    baseline: Baseline = "mean",
    seed: int = 0,
    perturbations_per_eval: int = 1,
    show_progress: bool = False,
) -> KeepAndRemove:
    r"""Log-odds of a word with only a map's best pixels, and without them, at the object's area.

    Of a map only its best ``|mask|`` pixels count, those of all images in one order. Shown alone
    they should say the word (keep), and hidden they should be missed (remove); the score is keep
    minus remove, in log-odds between those of the baseline (0) and of the whole images (1). A map
    that is shifted or too large fails both, where insertion and deletion saturate. Tied pixels go
    cell by cell of the model's grid, in random order.

    The forwards of the whole images and of the baseline are shared by all attributions.

    Args:
        model: a transformers model of a registered family; left unchanged.
        inputs: the processor's mapping for one sample, of any number of images or videos.
        target: the answer that was explained: token ids, or a string.
        attributions: one attribution as in :func:`captum_mllm.metrics.insertion_deletion`, or a
            mapping from names to several; see :func:`captum_mllm.methods.control_maps`.
        masks: of the objects, in the form of an attribution: bool or shares in [0, 1] over the
            model's canvas, on any grid, e.g. a result of the method "mask". Only their area counts.
        processor: the model's processor.
        tokens: positions in the answer that are scored, default all; those of the objects' words.
        baseline: what replaces pixels: "mean" (default; each image's mean colour), "black" or
            "blur". Where a patch of black alone already takes the word away, black separates
            nothing.
        seed: of the order of ties, default 0; the same for all maps.
        perturbations_per_eval: versions in one forward, default 1.
        show_progress: progress bar over the versions, default False. There are two per map, and
            two more.

    Returns:
        :class:`KeepAndRemove`; a single attribution has the name "attribution". A target is NaN
        where its mask is empty or covers everything, or where the whole images don't raise its
        log-odds above those of the baseline.

    Raises:
        TypeError: a missing target, or arguments of another kind.
        ValueError: bad input; the message names the argument and how to fix it.

    Reference:
        Ours; sufficiency and comprehensiveness (DeYoung et al., "ERASER", ACL 2020) at the one
        area that is right, in log-odds.

    Example:
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, masks = render_pil(make_scene(1), 112)
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> maps = {"mask": masks[0].float(), "upside down": masks[0].float().flip(0)}
        >>> found = keep_and_remove(model, inputs, "there is a dog", maps, masks[0],
        ...     processor=processor, tokens=[3], perturbations_per_eval=4)
        >>> sorted(found.means())
        ['mask', 'upside down']
    """
    check_settings(baseline, perturbations_per_eval=perturbations_per_eval)
    check_seed(seed)
    adapter, sample, answer = read_question(model, inputs, target, processor)
    chosen = chosen_tokens(tokens, len(answer))
    maps = read_named_maps(attributions, sample, answer, chosen)
    areas = _areas(read_maps(masks, sample.grids, answer, chosen, "masks"), sample)
    shown = PerturbableImages(adapter, sample, baseline, black_pixel(processor))
    plans = list(_plan(maps, areas, len(chosen), sum(prod(mask_shape(g)) for g in sample.grids)))
    odds = torch.full((2, len(maps), len(chosen)), torch.nan, dtype=torch.float64)
    with (
        evaluating(adapter),
        tqdm(total=2 + 2 * len(plans), desc="versions", disable=not show_progress) as bar,
    ):
        run = Run(adapter, sample, answer, chosen, perturbations_per_eval, bar, "log_odds")
        full, blank = (values for _, values in run.values(ends(sample, shown, len(chosen))))
        for version, values in run.values(_versions(plans, sample, shown, seed)):
            odds[int(version.deletes), version.step, list(version.rows)] = values
    keep, remove = (
        {name: relative_log_odds(row, full, blank) for name, row in zip(maps, of_kind, strict=True)}
        for of_kind in odds
    )
    pixels = torch.tensor(areas, dtype=torch.float64).expand(len(chosen)).clone()
    return KeepAndRemove(keep, remove, full, blank, pixels, tuple(chosen), baseline)


def _areas(masks: Maps, sample: Sample) -> list[int]:
    """Pixels of each target's mask, or of the one for all."""
    values = torch.cat([mask.flatten().double() for masks_ in masks for mask in masks_])
    if bool(((values < 0) | (values > 1)).any()):
        raise ArgumentError(
            "masks",
            f"must be bool or shares in [0, 1], got values from {float(values.min()):g} to "
            f"{float(values.max()):g}; pass masks > 0 instead.",
        )
    return [
        round(
            sum(
                float(mask.double().mean()) * prod(mask_shape(grid))
                for mask, grid in zip(per_image, sample.grids, strict=True)
            )
        )
        for per_image in masks
    ]


Plan = tuple[int, tuple[int, ...], tuple[Tensor, ...], int]  # method, its rows, maps, pixels


def _plan(maps: Mapping[str, Maps], areas: list[int], n: int, total: int) -> Iterator[Plan]:
    """Each map once: alone for its target, or for all targets where all share map and area."""
    shared = len(areas) == 1 and all(len(own) == 1 for own in maps.values())
    groups = [tuple(range(n))] if shared else [(row,) for row in range(n)]
    for method, own in enumerate(maps.values()):
        for rows in groups:
            area = areas[rows[0]] if len(areas) > 1 else areas[0]
            if 0 < area < total:
                yield method, rows, own[rows[0]] if len(own) > 1 else own[0], area


def _versions(
    plans: Sequence[Plan], sample: Sample, shown: PerturbableImages, seed: int
) -> Iterator[Version]:
    """Only the best pixels, and all but those, of every plan; its method stands for a step."""
    for method, rows, per_image, area in plans:
        best = [places < area for places in pixel_ranks(per_image, sample.grids, seed)]
        yield Version(shown, [~mask for mask in best], rows, False, method)
        yield Version(shown, best, rows, True, method)
