"""Does the model need what a map marks? Insertion, deletion, comprehensiveness, sufficiency."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from tqdm import tqdm

from captum_mllm.metrics.log_odds import relative_log_odds
from captum_mllm.metrics.perturbation import (
    Run,
    Version,
    check_seed,
    check_settings,
    ends,
    perturbed_versions,
    read_maps,
    step_sizes,
)
from captum_mllm.model.baselines import Baseline, PerturbableImages, black_pixel, mask_shape
from captum_mllm.model.forward import evaluating
from captum_mllm.model.targets import chosen_tokens, read_question
from captum_mllm.validation import check_choice, check_number

Units = Literal["probability", "log_odds"]
Ties = Literal["order", "random"]
AREAS = (0.01, 0.05, 0.1, 0.2, 0.5)


def curve_auc(curve: Float[Tensor, "*targets points"]) -> Float[Tensor, "*targets"]:
    """Area under a curve over the share of area, by the trapezoid rule.

    Args:
        curve: values at equal steps of area from 0 to 1, at least two.

    Returns:
        The area: the mean height of the curve.

    Raises:
        ValueError: fewer than two points.

    Reference:
        Petsiuk et al., "RISE", BMVC 2018.

    Example:
        >>> float(curve_auc(torch.tensor([0.0, 1.0, 1.0])))
        0.75
    """
    if curve.shape[-1] < 2:
        raise ValueError(f"curve must have at least two points, got shape {tuple(curve.shape)}.")
    return ((curve[..., 1:] + curve[..., :-1]) / 2).mean(-1)


def curve_at(curve: Float[Tensor, "*targets points"], area: float) -> Float[Tensor, "*targets"]:
    """A curve's value at a share of area, linear between its points.

    Args:
        curve: values at equal steps of area from 0 to 1.
        area: share of the area in [0, 1].

    Returns:
        One value per curve.

    Raises:
        ValueError: ``area`` outside [0, 1].

    Reference:
        Ours: comprehensiveness and sufficiency at any share of area.

    Example:
        >>> float(curve_at(torch.tensor([0.0, 1.0, 1.0]), 0.25))
        0.5
    """
    place = check_number("area", area, "between 0 and 1", lambda a: 0 <= a <= 1)
    place = place * (curve.shape[-1] - 1)
    low = min(int(place), curve.shape[-1] - 2)
    rest = place - low
    return (1 - rest) * curve[..., low] + rest * curve[..., low + 1]


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """The curves of :func:`insertion_deletion`; all tensors on the CPU, float64.

    Args:
        insertion: (targets, steps + 1): p of each target with the best-ranked share 0, 1/steps,
            ..., 1 of the area shown and the rest replaced.
        deletion: (targets, steps + 1): p with that share replaced and the rest shown.
        probs: (targets,): p given the whole image.
        black_probs: (targets,): p given a black image, whatever the baseline.
        tokens: position of each target in the answer.
        baseline: what replaces pixels.
        areas: shares of area of the two dictionaries.
        sensitive_above: drop of p from which on a target is visually sensitive.
        units: "probability" (default): the curves hold p, as described; "log_odds": they hold
            :func:`relative_log_odds` in place of p, NaN for a target whose log-odds the whole
            image does not raise above the baseline's.
    """

    insertion: Float64[Tensor, "targets points"]
    deletion: Float64[Tensor, "targets points"]
    probs: Float64[Tensor, " targets"]
    black_probs: Float64[Tensor, " targets"]
    tokens: tuple[int, ...]
    baseline: str
    areas: tuple[float, ...] = AREAS
    sensitive_above: float = 0.2
    units: Units = "probability"

    @property
    def full(self) -> Float64[Tensor, " targets"]:
        """Value of each curve where everything is shown: p(full), or 1 in log-odds."""
        return self.insertion[:, -1]

    @property
    def insertion_auc(self) -> Float64[Tensor, " targets"]:
        """Area under each insertion curve; higher is better."""
        return curve_auc(self.insertion)

    @property
    def deletion_auc(self) -> Float64[Tensor, " targets"]:
        """Area under each deletion curve; lower is better."""
        return curve_auc(self.deletion)

    @property
    def difference(self) -> Float64[Tensor, " targets"]:
        """Insertion minus deletion of each target; higher is better."""
        return self.insertion_auc - self.deletion_auc

    @property
    def comprehensiveness(self) -> dict[float, Float64[Tensor, " targets"]]:
        """Per share of area: p(full) - p(that share replaced), in units; higher is better."""
        return {area: self.full - curve_at(self.deletion, area) for area in self.areas}

    @property
    def sufficiency(self) -> dict[float, Float64[Tensor, " targets"]]:
        """Per share of area: p(full) - p(only that share shown), in units; lower is better."""
        return {area: self.full - curve_at(self.insertion, area) for area in self.areas}

    @property
    def sensitive(self) -> Bool[Tensor, " targets"]:
        """Whether p(full) - p(black) > ``sensitive_above``: whether the image matters at all."""
        return self.probs - self.black_probs > self.sensitive_above

    def means(self, sensitive_only: bool = False) -> dict[str, float]:
        """Every score as one number: the mean over the targets, as EAGLE reports them.

        Args:
            sensitive_only: only visually sensitive targets count, default False.

        Returns:
            "insertion", "deletion", "difference", "comprehensiveness@0.1", ...; NaN where no
            target is sensitive. Targets whose curves are NaN are left out.
        """
        scores = {
            "insertion": self.insertion_auc,
            "deletion": self.deletion_auc,
            "difference": self.difference,
        }
        scores |= {f"comprehensiveness@{area:g}": v for area, v in self.comprehensiveness.items()}
        scores |= {f"sufficiency@{area:g}": v for area, v in self.sufficiency.items()}
        keep = self.sensitive if sensitive_only else torch.ones_like(self.sensitive)
        keep = keep & ~self.full.isnan()
        return {name: float(values[keep].mean()) for name, values in scores.items()}


def insertion_deletion(
    model: Any,
    inputs: Mapping[str, Any],
    target: Any,
    attribution: Any,
    *,
    processor: Any,
    tokens: Sequence[int] | None = None,
    baseline: Baseline = "black",
    steps: int = 64,
    areas: Sequence[float] = AREAS,
    sensitive_above: float = 0.2,
    units: Units = "probability",
    ties: Ties = "order",
    seed: int = 0,
    perturbations_per_eval: int = 1,
    show_progress: bool = False,
) -> Faithfulness:
    r"""Probability of an answer's tokens as its images appear or vanish in a map's order.

    The answer stays fixed; its tokens' probabilities are teacher-forced, given the changed image,
    the prompt and the true tokens before each. All pixels of all images are ranked by the map,
    upsampled to the model's canvas bilinearly; by default ties keep the order of the images, then
    go row by row from the upper left, so that a constant map scans from the top. The model is left
    unchanged.

    Where a model sees an image twice (tiles and an overview: thumbnail, global or base image), the
    overview changes by the resized change of the tiles' image. Even where everything is replaced
    it keeps a trace of the image: the difference between the processor's resizing and ours.

    Where any patch of black already reduces the probability to almost 0, both curves lie near 0
    and don't distinguish maps: compare ``means()`` for "mean" or "blur" in addition to "black".

    Args:
        model: a transformers model of a registered family.
        inputs: the processor's mapping for one sample, of any number of images or videos.
        target: the answer that was explained: token ids, or a string.
        attribution: what ranks the pixels: a result of ``attribute``; or a tensor for one image,
            or a tuple of one tensor per image, of (rows, cols) for all tokens together or
            (tokens, rows, cols) for each token, on any grid; for a video with a frames axis.
        processor: the model's processor; gives the value of black after normalisation.
        tokens: positions in the answer that are scored; default all. Maps of a result whose
            answer has more tokens are chosen accordingly.
        baseline: what replaces pixels: "black" (of the picture, default), "mean" (each image's
            mean colour) or "blur" (gaussian, its standard deviation a tenth of the image's shorter
            side).
        steps: equal steps of area, default 64.
        areas: shares of area for comprehensiveness and sufficiency, read from the curves
            (linear between steps), default 1, 5, 10, 20 and 50 %.
        sensitive_above: a token is visually sensitive if p(full) - p(black) lies above,
            default 0.2.
        units: "probability" (default), or "log_odds": the curves hold the log-odds of p between
            those of the baseline (0) and of the whole image (1), which don't saturate once an
            object is roughly covered; see :func:`relative_log_odds`.
        ties: "order" (default): see above; "random": tied pixels go cell by cell of the model's
            grid, in random order, so that a constant map is as good as a random one.
        seed: of that order, default 0; the same for all maps.
        perturbations_per_eval: perturbed versions in one forward, default 1.
        show_progress: progress bar over the versions, default False. There are
            ``2 (steps - 1)`` of them per map, and two or three more.

    Returns:
        :class:`Faithfulness`. Insertion begins at p(baseline) and ends at p(full), deletion the
        other way round.

    Raises:
        TypeError: a missing target, or arguments of another kind.
        ValueError: bad input; the message names the argument and how to fix it.

    Reference:
        Petsiuk et al., "RISE", BMVC 2018; the score of a token sequence and the protocol as EAGLE
        (CVPR 2026) has them. DeYoung et al., "ERASER", ACL 2020, for comprehensiveness and
        sufficiency. The width of the blur and the threshold 0.2 are ours.

    Example:
        >>> from captum_mllm import MSEA
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, masks = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> attr = MSEA(model, processor).attribute(inputs, target="there is a dog")
        >>> scores = insertion_deletion(model, inputs, attr.output_ids, attr, processor=processor,
        ...     tokens=[3], steps=8, perturbations_per_eval=8)
        >>> scores.insertion.shape, sorted(scores.means())[-1]
        (torch.Size([1, 9]), 'sufficiency@0.5')
    """
    check_settings(baseline, steps=steps, perturbations_per_eval=perturbations_per_eval)
    _check(areas, units, ties, seed)
    adapter, sample, answer = read_question(model, inputs, target, processor)
    chosen = chosen_tokens(tokens, len(answer))
    maps = read_maps(attribution, sample.grids, answer, chosen)
    shown = PerturbableImages(adapter, sample, baseline, black_pixel(processor))
    versions = ends(sample, shown, len(chosen))
    if baseline != "black":
        dark = PerturbableImages(adapter, sample, "black", black_pixel(processor))
        versions.append(ends(sample, dark, len(chosen))[1])
    total = len(versions) + 2 * (steps - 1) * len(maps)
    with (
        evaluating(adapter),
        tqdm(total=total, desc="versions", disable=not show_progress) as bar,
    ):
        run = Run(adapter, sample, answer, chosen, perturbations_per_eval, bar, units)
        full, base, *others = (values for _, values in run.values(versions))
        sizes = step_sizes(sum(prod(mask_shape(grid)) for grid in sample.grids), steps)
        order = None if ties == "order" else seed
        between = perturbed_versions(maps, sample, shown, len(chosen), sizes, order)
        curves = _curves(full, base, run.values(between), steps)
    black = others[0] if others else base
    if units == "log_odds":
        curves = [relative_log_odds(curve, full, base) for curve in curves]
        full, black = full.sigmoid(), black.sigmoid()
    scored, shares = tuple(chosen), tuple(areas)
    return Faithfulness(
        curves[0], curves[1], full, black, scored, baseline, shares, sensitive_above, units
    )


def _curves(
    full: Tensor, base: Tensor, between: Iterable[tuple[Version, Tensor]], steps: int
) -> list[Tensor]:
    """Insertion and deletion from the values of all versions."""
    insertion = torch.empty(len(full), steps + 1, dtype=torch.float64)
    insertion[:, 0], insertion[:, -1] = base, full
    deletion = insertion.flip(1)
    for version, values in between:
        curve = deletion if version.deletes else insertion
        curve[list(version.rows), version.step] = values
    return [insertion, deletion]


def _check(areas: Sequence[float], units: Any, ties: Any, seed: Any) -> None:
    for area in areas:
        check_number("areas", area, "between 0 and 1", lambda a: 0 <= a <= 1)
    check_choice("units", units, ("probability", "log_odds"))
    check_choice("ties", ties, ("order", "random"))
    check_seed(seed)
