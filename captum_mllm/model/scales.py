"""The images at other scales: sizes, windows of models of one size, mirrored views, their maps.

The only module that knows how a scale reaches the model: a model that takes other sizes sees the
whole image resized, one prefix forward per view; a model of one size sees an enlarged image through
windows of its own size. The pixels come from the given pixel tensor, or again from the original
pictures.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from captum_mllm.adapters import Adapter
from captum_mllm.functional import (
    Aggregation,
    Box,
    adaptive_weights,
    aggregate,
    join_windows,
    rank_correlation,
    upsample,
    window_boxes,
)
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.forward import captured_forward, evaluating, full_logits
from captum_mllm.model.inputs import Sample, append_answer, cut, rescaled_inputs
from captum_mllm.model.runner import Run, Runner, RunOptions
from captum_mllm.model.trace import TokenTrace
from captum_mllm.validation import check_choice

SCALE_WEIGHTS = ("equal", "adaptive")
_TOLERANCE = 0.2  # mean difference of pixels, in their standard deviations


@dataclass(frozen=True, eq=False)
class ScaleViews:
    """The maps of one sample at every scale, before they are aggregated; runs no model.

    Args:
        base: the evidence at scale 1.
        maps: per view, per image (classes, rows, cols) as in :class:`TokenTrace`.
        scales: achieved scale of each view; a mirrored one follows the scale's own.
        mirrored: whether each view is mirrored (its maps are mirrored back).
        consistency: per view how far the model still predicts the same answer, or None.
    """

    base: TokenTrace
    maps: tuple[tuple[Float[Tensor, "classes ..."], ...], ...]
    scales: tuple[float, ...]
    mirrored: tuple[bool, ...]
    consistency: tuple[float, ...] | None = None

    def select(self, views: Sequence[int]) -> "ScaleViews":
        """Some of the views, by their numbers.

        Args:
            views: places in ``maps``, in the order that they are to have.

        Returns:
            The same run with those views alone.
        """
        agreed = self.consistency
        return ScaleViews(
            self.base,
            tuple(self.maps[view] for view in views),
            tuple(self.scales[view] for view in views),
            tuple(self.mirrored[view] for view in views),
            None if agreed is None else tuple(agreed[view] for view in views),
        )

    def agreement(self) -> Float[Tensor, "views classes"]:
        """Rank correlation of each view's maps with scale 1's, over the cells of all images.

        The maps are compared on scale 1's grid. A mirrored view counts as its scale does: that it
        orders the cells differently is its purpose.

        Raises:
            ValueError: a scale of which there is a mirrored view only.
        """
        base = self.base.cells
        per_scale: dict[float, Tensor] = {}
        for scale, view, flip in zip(self.scales, self.maps, self.mirrored, strict=True):
            if not flip:
                pairs = zip(view, self.base.maps, strict=True)
                near = [upsample(m, (there.shape[-2], there.shape[-1])) for m, there in pairs]
                per_scale[scale] = rank_correlation(TokenTrace.pack_cells(near), base)
        if alone := [scale for scale in self.scales if scale not in per_scale]:
            raise ValueError(
                f"views hold scales {alone} mirrored only, whose agreement is that of the plain "
                f"view: select that one too, or take scale_weights='equal'."
            )
        return torch.stack([per_scale[scale] for scale in self.scales])

    def merged(
        self,
        aggregation: Aggregation = "mean",
        scale_weights: str = "equal",
    ) -> TokenTrace:
        """Aggregate the views, each brought to the finest grid among them.

        Args:
            aggregation: see :class:`~captum_mllm.MSEA`.
            scale_weights: see :class:`~captum_mllm.MSEA`; default "equal" here.

        Returns:
            The evidence at scale 1 with aggregated maps.
        """
        check_choice("scale_weights", scale_weights, SCALE_WEIGHTS)
        weights = None
        if scale_weights == "adaptive" and len(self.maps) > 1:
            agreed = self.consistency
            weights = adaptive_weights(
                self.agreement(), None if agreed is None else torch.tensor(agreed)
            )
        merged = []
        for image in range(len(self.base.maps)):
            maps = [view[image] for view in self.maps]
            finest = (max(m.shape[-2] for m in maps), max(m.shape[-1] for m in maps))
            stack = torch.stack([upsample(m, finest) for m in maps])
            merged.append(aggregate(stack, aggregation, weights))
        distinct = [i for i, s in enumerate(self.scales) if s not in self.scales[:i]]
        agreed = self.consistency
        return replace(
            self.base,
            maps=tuple(merged),
            scales=tuple(self.scales[i] for i in distinct),
            consistency=None if agreed is None else tuple(agreed[i] for i in distinct),
        )


def achieved_scale(base: Sequence[ImageGrid], scaled: Sequence[ImageGrid]) -> float:
    """Square root of the ratio of grid areas, over all images."""
    return sqrt(sum(grid.cells for grid in scaled) / sum(grid.cells for grid in base))


def gather_views(
    runner: Runner,
    inputs: Mapping[str, Any],
    target: Any = None,
    *,
    scales: Sequence[float],
    mirrored: bool,
    consistency: bool,
    top_k: int | None = None,
    label: str = "views",
    **options: Unpack[RunOptions],
) -> ScaleViews:
    """Run the model at its own scale, then once per further view, and gather the maps.

    Args:
        runner: runs the model.
        inputs: the processor's mapping.
        target: the answer, or None to generate it.
        scales: factors of the images' height and width.
        mirrored: whether each scale is also seen mirrored, left to right.
        consistency: whether the text runs at each scale too, to compare the answer.
        top_k: depth of the rankings, or None (default) for none.
        label: name of the progress bar.
        options: see :class:`~captum_mllm.model.runner.RunOptions`.

    Returns:
        The maps of every view.
    """
    run = runner.run(inputs, target, top_k=top_k, **options)
    base = run.sample.grids
    if runner.adapter.fixed_size:
        scales = _without_small(scales)
    grids = {
        scale: base
        if scale == 1.0
        else tuple(runner.adapter.scaled_grid(grid, scale) for grid in base)
        for scale in scales
    }
    kept = distinct_scales(scales, [grids[scale] for scale in scales])
    views = [(scale, flip) for scale in kept for flip in ((False, True) if mirrored else (False,))]
    maps, agreements = [], []
    silent = not options.get("show_progress", False)
    for scale, flip in tqdm(views, desc=label, disable=silent):
        if grids[scale] == base and not flip:
            view, agreement = run.trace.maps, 1.0
        else:
            view, agreement = maps_at(
                runner,
                run,
                grids[scale],
                images=options.get("images"),
                consistency=consistency and not flip,
                mirrored=flip,
            )
        maps.append(view)
        # Mirrored, "left" is rightly "right": a view counts as its scale does.
        agreements.append(agreements[-1] if flip else agreement)
    return ScaleViews(
        run.trace,
        tuple(maps),
        tuple(achieved_scale(base, grids[scale]) for scale, _ in views),
        tuple(flip for _, flip in views),
        tuple(agreements) if consistency else None,
    )


def distinct_scales(scales: Sequence[float], shapes: Sequence[Any]) -> list[float]:
    """Drop, with a warning, scales that come out at the same size as an earlier one.

    Args:
        scales: the factors.
        shapes: the size at each factor, anything comparable.

    Returns:
        The scales that are left.
    """
    kept: list[float] = []
    sizes: list[Any] = []
    for scale, shape in zip(scales, shapes, strict=True):
        if shape in sizes:
            twin = kept[sizes.index(shape)]
            warnings.warn(
                f"scale {scale} comes out at the same size as scale {twin} and is dropped.",
                stacklevel=2,
            )
        else:
            kept.append(scale)
            sizes.append(shape)
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
    mirrored: bool = False,
) -> tuple[tuple[Float[Tensor, "classes ..."], ...], float | None]:
    """Maps of a run's classes with the images on other grids: one prefix forward.

    For a model of one input size: one prefix forward for each of several windows.

    Args:
        runner: runs the model.
        run: the run at scale 1.
        grids: the grids to reach, one per image.
        images: original pictures to start from, or None to resize the pixel tensor.
        consistency: also run the text after it.
        mirrored: show the images mirrored, and mirror the maps back.

    Returns:
        One tensor (classes, rows, cols) per image; the scale's consistency or None.

    Raises:
        ValueError: ``consistency`` with a model of one input size; pictures that are not
            those of the inputs.
    """
    adapter, sample = runner.adapter, run.sample
    if adapter.fixed_size:
        if consistency:
            raise ValueError(
                "consistency=True: this model takes images of one size only, so larger scales "
                "are seen through windows, none of which shows the whole image: there is no "
                "answer to compare. Leave consistency out."
            )
        return _through_windows(runner, run, grids, images, mirrored), None
    pixels = scaled_inputs(adapter, runner.processor, sample, grids, images)
    # With consistency the text runs too; maps do not see it.
    tokens = append_answer(sample, run.answer_ids, adapter)
    if not consistency:
        tokens = cut(tokens, sample.prefix_length, adapter)
    scaled = rescaled_inputs(tokens, sample, grids, pixels, adapter)
    if mirrored:
        flipped = adapter.mirrored(scaled.kwargs, scaled.grids)
        scaled = replace(scaled, kwargs={**scaled.kwargs, **flipped})
    length = len(scaled.prompt_ids)
    n_rows = len(run.answer_ids) if consistency else 0
    rows = torch.arange(length - 1 - n_rows, length - 1, device=scaled.prompt_ids.device)
    with evaluating(adapter):
        captured = captured_forward(
            adapter, scaled.kwargs, scaled.grids, rows=rows, layer=runner.layer
        )
        maps = runner.lens_maps(scaled, captured.lens_hidden, run.trace.class_ids)
        if mirrored:
            maps = tuple(image.flip(-1) for image in maps)
        if not consistency:
            return maps, None
        logits = full_logits(adapter, captured.final_hidden[rows])
    log_probs = logits.log_softmax(-1).gather(1, run.answer_ids[:, None])[:, 0]
    drop = (log_probs - run.answer_log_probs).clamp(max=0)
    return maps, float(drop.mean().exp())


def _through_windows(
    runner: Runner, run: Run, grids: Sequence[ImageGrid], images: Any, mirrored: bool
) -> tuple[Float[Tensor, "classes ..."], ...]:
    """Maps on the grids of an enlarged image, seen through windows of the model's own size."""
    adapter, sample = runner.adapter, run.sample
    pairs = list(zip(sample.grids, grids, strict=True))
    n = max(
        ceil(new / old) for g, big in pairs for old, new in zip(g.shape, big.shape, strict=True)
    )
    boxes = [window_boxes((g.rows, g.cols), (big.rows, big.cols), n) for g, big in pairs]
    windows = []
    tokens = cut(sample.kwargs, sample.prefix_length, adapter)
    for window in zip(*boxes, strict=True):
        shown = dict(tokens)  # one window is the image as it is
        if n > 1:
            shown |= window_inputs(adapter, runner.processor, sample, window, images)
        if mirrored:
            shown |= adapter.mirrored(shown, sample.grids)
        with evaluating(adapter):
            captured = captured_forward(
                adapter, shown, sample.grids, rows=sample.prompt_ids[:0], layer=runner.layer
            )
            maps = runner.lens_maps(sample, captured.lens_hidden, run.trace.class_ids)
            windows.append(tuple(image.flip(-1) for image in maps) if mirrored else maps)
    per_image = zip(zip(*windows, strict=True), boxes, pairs, strict=True)
    return tuple(
        join_windows(
            list(maps), [adapter.window_canvas(g, box) for box in image_boxes], (big.rows, big.cols)
        )
        for maps, image_boxes, (g, big) in per_image
    )


def scaled_inputs(
    adapter: Adapter, processor: Any, sample: Sample, grids: Sequence[ImageGrid], images: Any
) -> dict[str, Tensor]:
    """The inputs that hold or describe pixels, on other grids.

    Args:
        adapter: the model's adapter.
        processor: the model's processor, or None.
        sample: the prompt at its own scale.
        grids: the grids to reach, one per image.
        images: original pictures to start from, or None to resize the pixel tensor.

    Raises:
        TypeError: paths instead of pictures.
        ValueError: ``images`` that can't be used, or are not those of the inputs.
    """
    if images is None:
        return adapter.rescale_pixels(sample.kwargs, grids)
    pictures, settings = _pictures(adapter, processor, sample, images)
    return _to_sample(sample, adapter.pixels_from_pictures(pictures, settings, grids))


def window_inputs(
    adapter: Adapter, processor: Any, sample: Sample, boxes: Sequence[Box], images: Any
) -> dict[str, Tensor]:
    """The inputs that hold pixels, at the model's own size, of a box of each image.

    Args:
        adapter: the model's adapter.
        processor: the model's processor, or None.
        sample: the prompt at its own scale.
        boxes: per image, (left, upper, right, lower) in fractions of it.
        images: original pictures to start from, or None to resize the pixel tensor.

    Raises:
        TypeError: paths instead of pictures.
        ValueError: ``images`` that can't be used, or are not those of the inputs.
    """
    if images is None:
        return adapter.window_pixels(sample.kwargs, sample.grids, boxes)
    pictures, settings = _pictures(adapter, processor, sample, images)
    cuts = []
    for picture, (left, upper, right, lower) in zip(pictures, boxes, strict=True):
        wide, high = picture.size
        edges = (left * wide, upper * high, right * wide, lower * high)
        cuts.append(picture.crop(tuple(round(edge) for edge in edges)))
    return _to_sample(sample, adapter.pixels_from_pictures(cuts, settings, sample.grids))


def _to_sample(sample: Sample, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the sample's device; in the dtype of its inputs where it has them."""
    device = sample.prompt_ids.device
    return {name: x.to(device, sample.kwargs.get(name, x).dtype) for name, x in pixels.items()}


def _pictures(
    adapter: Adapter, processor: Any, sample: Sample, images: Any
) -> tuple[list[Any], Any]:
    """The checked pictures, and the image processor."""
    pictures = list(images) if isinstance(images, list | tuple) else [images]
    for picture in pictures:
        if not hasattr(picture, "convert"):
            raise TypeError(
                f"images= takes PIL pictures, not {type(picture).__name__}: open paths by "
                f"PIL.Image.open(path), make arrays pictures by PIL.Image.fromarray(array)."
            )
    settings = getattr(processor, "image_processor", None)
    if settings is None:
        raise ValueError("images= needs a processor: make the attributor with one.")
    if any(grid.steps for grid in sample.grids):
        raise ValueError("images= can't hold a video: leave it out to resize its frames.")
    if len(pictures) != len(sample.grids):
        raise ValueError(
            f"images= holds {len(pictures)} pictures, inputs have {len(sample.grids)}."
        )
    again = adapter.pixels_from_pictures(pictures, settings, sample.grids)["pixel_values"]
    pixels = sample.kwargs["pixel_values"].to(again)
    # Resizing differs a little between ways of resampling; another picture differs much.
    close = again.shape == pixels.shape and float((again - pixels).abs().mean()) <= (
        _TOLERANCE * float(pixels.std().clamp(min=1e-3))
    )
    if not close:
        raise ValueError(
            f"images= through the processor's settings are not the pixels of inputs (shapes "
            f"{tuple(again.shape)} and {tuple(pixels.shape)}): are they other pictures, in another "
            f"order, or was the processor called with other settings? Leave images out to resize "
            f"the pixel tensor."
        )
    return pictures, settings
