"""The images at other scales: sizes, windows of models of one size, flipped views, their maps.

The only module that knows how a scale reaches the model: a model that takes other sizes sees the
whole image resized, one forward per view (over the prefix for the lens, over the answer too where
the maps read the context); a model of one size sees an enlarged image through windows of its own
size. The pixels come from the given pixel tensor, or again from the original pictures.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from captum_mllm.adapters.hooks import unchanged
from captum_mllm.functional import join_windows, window_boxes
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.direct import image_maps, recorded_contributions
from captum_mllm.model.discovery import discover_scales
from captum_mllm.model.forward import captured_forward, evaluating, full_logits
from captum_mllm.model.inputs import Sample, append_answer, cut, moved_positions, rescaled_inputs
from captum_mllm.model.rescaling import scaled_inputs, window_inputs
from captum_mllm.model.runner import Run, Runner, RunOptions
from captum_mllm.model.trace import TokenTrace
from captum_mllm.model.views import ScaleViews
from captum_mllm.model.write_paths import write_paths

Flip = Literal["none", "horizontal", "half_turn"]
"""How the second view of each scale is turned: not at all (no such view), mirrored left to right,
or turned by 180 degrees."""

FLIPS: dict[str, tuple[int, ...]] = {"none": (), "horizontal": (-1,), "half_turn": (-2, -1)}
"""The axes that each :data:`Flip` reverses."""

Maps = tuple[Float[Tensor, "maps ..."], ...]


@dataclass(frozen=True)
class ViewPlan:
    """Which views of the images are read, and what is read from each.

    Args:
        lens: scales at which the logit lens is read.
        flip: how a second view of each of these scales is turned; "none" (default): there is none.
        direct: scales at which direct logit attribution is read; never flipped, because a flipped
            picture changes what the answer should be ("left" becomes "right").
        consistency: whether the text runs at each scale, to compare the answer.
    """

    lens: tuple[float, ...] = ()
    flip: Flip = "none"
    direct: tuple[float, ...] = ()
    consistency: bool = False


@dataclass(frozen=True, eq=False)
class GatheredViews:
    """The maps of every view of a plan.

    Args:
        lens: those of the logit lens, one per class.
        direct: those of direct logit attribution, one per text token, each brought to scale 1's
            mean; None if none were wanted, or the model has no attention to read.
    """

    lens: ScaleViews
    direct: ScaleViews | None


@dataclass(frozen=True, eq=False)
class ViewMaps:
    """The maps of one view.

    Args:
        lens: per image (classes, rows, cols).
        direct: per image (text tokens, rows, cols), or None.
        consistency: how far the model still predicts the same answer, or None.
    """

    lens: Maps
    direct: Maps | None
    consistency: float | None


def achieved_scale(base: Sequence[ImageGrid], scaled: Sequence[ImageGrid]) -> float:
    """Square root of the ratio of grid areas, over all images."""
    return sqrt(sum(grid.cells for grid in scaled) / sum(grid.cells for grid in base))


def direct_trace(runner: Runner, run: Run) -> TokenTrace:
    """The trace of direct logit attribution at scale 1.

    Args:
        runner: ran the model.
        run: made with ``direct=True``.

    Returns:
        The trace with one map per text token, and on the text side what the attention wrote from
        each earlier text token; the lens's trace where the model has no attention to read.
    """
    trace, written = run.trace, run.contributions
    if written is None:
        return trace
    at = trace.text_positions - run.sample.padding
    return replace(
        trace,
        maps=image_maps(runner.adapter, run.sample, written.positive),
        text_scores=torch.where(trace.is_earlier, written.positive[trace.targets][:, at], 0.0),
        per_token=True,
    )


def gather_views(
    runner: Runner,
    inputs: Mapping[str, Any],
    target: Any,
    plan: ViewPlan,
    *,
    top_k: int | None = None,
    label: str = "views",
    **options: Unpack[RunOptions],
) -> GatheredViews:
    """Run the model at its own scale, then once per further view, and gather the maps.

    Args:
        runner: runs the model.
        inputs: the processor's mapping.
        target: the answer, or None to generate it.
        plan: the views.
        top_k: depth of the rankings, or None (default) for none.
        label: name of the progress bar.
        options: see :class:`~captum_mllm.model.runner.RunOptions`.

    Returns:
        The maps of every view.
    """
    with unchanged(runner.adapter.model):  # once for all views
        return _gathered(runner, inputs, target, plan, top_k, label, options)


def _gathered(
    runner: Runner,
    inputs: Mapping[str, Any],
    target: Any,
    plan: ViewPlan,
    top_k: int | None,
    label: str,
    options: RunOptions,
) -> GatheredViews:
    """The maps of every view of a model that is put back afterwards."""
    run = runner.run(inputs, target, top_k=top_k, direct=bool(plan.direct), **options)
    if plan.direct and run.contributions is None:  # no attention to read: the lens in its place
        plan = replace(plan, lens=tuple(dict.fromkeys((*plan.lens, *plan.direct))), direct=())
    base = run.sample.grids
    discover_scales(runner.adapter, run.sample, (*plan.lens, *plan.direct))
    plan, grids = _sized(runner, base, plan)
    if FLIPS[plan.flip] and not runner.adapter.can_flip(base, FLIPS[plan.flip]):
        warnings.warn(
            f"flip={plan.flip!r} becomes 'none': the processor pads or crops these pictures on one "
            f"side, so a flipped picture does not lie on the same cells.",
            stacklevel=4,
        )
        plan = replace(plan, flip="none")
    flips = (False, True) if FLIPS[plan.flip] else (False,)
    of_lens = [(scale, flip) for scale in plan.lens for flip in flips]
    of_direct = [(scale, False) for scale in plan.direct]
    views: dict[tuple[float, bool], ViewMaps] = {}
    silent = not options.get("show_progress", False)
    for scale, flip in tqdm(dict.fromkeys((*of_lens, *of_direct)), desc=label, disable=silent):
        view = (scale, flip)
        if grids[scale] == base and not flip:
            direct = direct_trace(runner, run).maps if plan.direct else None
            views[view] = ViewMaps(run.trace.maps, direct, 1.0)
            continue
        views[view] = maps_at(
            runner,
            run,
            grids[scale],
            images=options.get("images"),
            consistency=plan.consistency and not flip,
            flip=plan.flip if flip else "none",
            direct=view in of_direct,
        )
    achieved = {scale: achieved_scale(base, grids[scale]) for scale, _ in views}
    lens = _scale_views(run.trace, of_lens, views, achieved, plan)
    if not plan.direct:
        return GatheredViews(lens, None)
    trace = direct_trace(runner, run)
    leveled = {view: _leveled(views[view], trace.maps) for view in of_direct}
    return GatheredViews(lens, _scale_views(trace, of_direct, leveled, achieved, plan))


def _scale_views(
    trace: TokenTrace,
    wanted: Sequence[tuple[float, bool]],
    views: Mapping[tuple[float, bool], ViewMaps],
    achieved: Mapping[float, float],
    plan: ViewPlan,
) -> ScaleViews:
    """Some of the views in their order; flipped, "left" is rightly "right": it counts as plain."""
    agreed = [views[scale, False].consistency or 0.0 for scale, _ in wanted]
    return ScaleViews(
        trace,
        tuple(views[view].lens for view in wanted),
        tuple(achieved[scale] for scale, _ in wanted),
        tuple(flip for _, flip in wanted),
        tuple(agreed) if plan.consistency else None,
    )


def _leveled(view: ViewMaps, base: Maps) -> ViewMaps:
    """A view's direct maps, times a factor each that gives them the mean of scale 1's.

    Contributions are sums over positions: twice the cells share the same sum.
    """
    maps = view.direct or ()
    here, there = (TokenTrace.pack_cells(m).mean(1) for m in (maps, base))
    factor = torch.where(here > 0, there / torch.where(here > 0, here, 1.0), 0.0)
    scaled = tuple(factor.reshape(-1, *[1] * (m.ndim - 1)) * m for m in maps)
    return replace(view, lens=scaled)


def _sized(
    runner: Runner, base: tuple[ImageGrid, ...], plan: ViewPlan
) -> tuple[ViewPlan, dict[float, tuple[ImageGrid, ...]]]:
    """The plan without scales that the model can't see or that fall together, and the grids."""
    lens, direct = plan.lens, plan.direct
    if runner.adapter.fixed_size:
        lens = _without_small(lens) if lens else lens
        if direct and not lens and direct != (1.0,):
            warnings.warn(
                f"scales {list(direct)} become 1.0: this model takes images of one size only, and "
                f"a window of an enlarged image does not show what was asked about, so direct "
                f"logit attribution is read at scale 1.",
                stacklevel=4,
            )
        direct = (1.0,) if direct else direct
    grids = {
        scale: base
        if scale == 1.0
        else tuple(runner.adapter.scaled_grid(grid, scale) for grid in base)
        for scale in (*lens, *direct)
    }
    kept = [
        distinct_scales(scales, [grids[scale] for scale in scales], silent=silent)
        for scales, silent in ((lens, False), (direct, bool(lens)))
    ]
    return replace(plan, lens=tuple(kept[0]), direct=tuple(kept[1])), grids


def distinct_scales(
    scales: Sequence[float], shapes: Sequence[Any], *, silent: bool = False
) -> list[float]:
    """Drop, with a warning, scales that come out at the same size as an earlier one.

    Args:
        scales: the factors.
        shapes: the size at each factor, anything comparable.
        silent: whether there is no warning, default False.

    Returns:
        The scales that are left.
    """
    kept: list[float] = []
    sizes: list[Any] = []
    for scale, shape in zip(scales, shapes, strict=True):
        if shape not in sizes:
            kept.append(scale)
            sizes.append(shape)
        elif not silent:
            twin = kept[sizes.index(shape)]
            warnings.warn(
                f"scale {scale} comes out at the same size as scale {twin} and is dropped.",
                stacklevel=2,
            )
    return kept


def _without_small(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales that a model of one input size can see; scale 1 if there are none."""
    small = [scale for scale in scales if scale < 1]
    if small:
        warnings.warn(
            f"scales {small} are dropped: this model takes images of one size only, and its "
            f"windows show larger scales, not smaller ones.",
            stacklevel=3,
        )
    return tuple(scale for scale in scales if scale >= 1) or (1.0,)


def maps_at(
    runner: Runner,
    run: Run,
    grids: Sequence[ImageGrid],
    *,
    images: Any = None,
    consistency: bool = False,
    flip: Flip = "none",
    direct: bool = False,
) -> ViewMaps:
    """Maps of a run with the images on other grids: one forward.

    For a model of one input size: one prefix forward for each of several windows.

    Args:
        runner: runs the model.
        run: the run at scale 1.
        grids: the grids to reach, one per image.
        images: original pictures to start from, or None to resize the pixel tensor.
        consistency: also run the text after it.
        flip: show the images flipped, and flip the maps back.
        direct: also run the text after it, and read direct logit attribution.

    Returns:
        The maps; the scale's consistency if it is wanted.

    Raises:
        ValueError: ``consistency`` with a model of one input size; pictures that are not
            those of the inputs.
    """
    adapter, sample = runner.adapter, run.sample
    if adapter.fixed_size:
        _refuse_consistency(consistency)
        return ViewMaps(_through_windows(runner, run, grids, images, flip), None, None)
    pixels = scaled_inputs(adapter, runner.processor, sample, grids, images)
    tokens = append_answer(sample, run.answer_ids, adapter)
    if not (consistency or direct):  # maps of the lens do not see the text
        tokens = cut(tokens, sample.prefix_length, adapter)
    scaled = rescaled_inputs(tokens, sample, grids, pixels, adapter)
    if FLIPS[flip]:
        flipped = adapter.flipped(scaled.kwargs, scaled.grids, FLIPS[flip])
        scaled = replace(scaled, kwargs={**scaled.kwargs, **flipped})
    length = len(scaled.prompt_ids)
    n_rows = len(run.answer_ids) if consistency else 0
    rows = torch.arange(length - 1 - n_rows, length - 1, device=scaled.prompt_ids.device)
    with evaluating(adapter):
        recording = _recording(runner, run, scaled) if direct else nullcontext([None])
        with recording as found:
            captured = captured_forward(
                adapter, scaled.kwargs, scaled.grids, rows=rows, layer=runner.layer
            )
        lens = runner.lens_maps(scaled, captured.lens_hidden, run.trace.class_ids)
        lens = tuple(image.flip(FLIPS[flip]) for image in lens) if FLIPS[flip] else lens
        (written,) = found
        read = None if written is None else image_maps(adapter, scaled, written.positive)
        if not consistency:
            return ViewMaps(lens, read, None)
        logits = full_logits(adapter, captured.final_hidden[rows])
    log_probs = logits.log_softmax(-1).gather(1, run.answer_ids[:, None])[:, 0]
    drop = (log_probs - run.answer_log_probs).clamp(max=0)
    return ViewMaps(lens, read, float(drop.mean().exp()))


def _recording(runner: Runner, run: Run, scaled: Sample) -> Any:
    """Record the contributions to the run's text tokens, where they stand at another scale."""
    trace = run.trace
    at = moved_positions(run.sample, scaled, trace.text_positions - run.sample.padding)
    paths = write_paths(runner.adapter)
    return recorded_contributions(runner.adapter, paths, at - 1, trace.text_ids)


def _refuse_consistency(consistency: bool) -> None:
    if consistency:
        raise ValueError(
            "consistency=True: this model takes images of one size only, so larger scales "
            "are seen through windows, none of which shows the whole image: there is no "
            "answer to compare. Leave consistency out."
        )


def _through_windows(
    runner: Runner, run: Run, grids: Sequence[ImageGrid], images: Any, flip: Flip
) -> Maps:
    """Maps on the grids of an enlarged image, seen through windows of the model's own size."""
    adapter, sample = runner.adapter, run.sample
    pairs = list(zip(sample.grids, grids, strict=True))
    n = max(
        ceil(new / old) for g, big in pairs for old, new in zip(g.shape, big.shape, strict=True)
    )
    boxes = [window_boxes((g.rows, g.cols), (big.rows, big.cols), n) for g, big in pairs]
    windows = []
    tokens = cut(sample.kwargs, sample.prefix_length, adapter)
    axes = FLIPS[flip]
    for window in zip(*boxes, strict=True):
        shown = dict(tokens)  # one window is the image as it is
        if n > 1:
            shown |= window_inputs(adapter, runner.processor, sample, window, images)
        if axes:
            shown |= adapter.flipped(shown, sample.grids, axes)
        with evaluating(adapter):
            captured = captured_forward(
                adapter, shown, sample.grids, rows=sample.prompt_ids[:0], layer=runner.layer
            )
            maps = runner.lens_maps(sample, captured.lens_hidden, run.trace.class_ids)
            windows.append(tuple(image.flip(axes) for image in maps) if axes else maps)
    per_image = zip(zip(*windows, strict=True), boxes, pairs, strict=True)
    return tuple(
        join_windows(
            list(maps), [adapter.window_canvas(g, box) for box in image_boxes], (big.rows, big.cols)
        )
        for maps, image_boxes, (g, big) in per_image
    )
