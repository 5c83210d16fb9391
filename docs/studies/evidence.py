"""Evidence of one example at many scales, gathered once; settings that read it without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from captum_mllm import ARC, MSEA, JointNormalization, LogitLens, TokenActivationMap
from captum_mllm.attr import PostProcessor
from captum_mllm.attr.base import TokenAttribution
from captum_mllm.functional import upsample
from captum_mllm.geometry import ImageGeometry, ImageGrid, Preprocessing, maps_to_picture
from captum_mllm.metrics import (
    auc,
    average_precision,
    energy_in_mask,
    func_iou,
    is_function_word,
    obj_iou,
    oracle_iou,
    pointing_game,
)
from captum_mllm.model.baselines import blurred
from captum_mllm.model.trace import ReleasedCodeDeviations, TokenTrace
from captum_mllm.model.views import ScaleViews
from captum_mllm.reference.captions import Conversation, Turn, Word
from captum_mllm.reference.models import load
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import Scene, SceneObject
from captum_mllm.reference.sets import Example, make_example
from captum_mllm.result import MLLMAttributionResult
from studies.prompts import answer_ids, conversation_inputs, script_columns, whole_nouns
from studies.retired import merged, rank_filtered

SIDE, DEPTH = 112, 200
HALF_CELLS = tuple((down, right) for down in (0, -1, 1) for right in (0, -1, 1))
WEIGHTS = Path("docs/studies/weights")  # further trainings, in a checkout of the repository
TRAININGS = ("llava", "llava-seed1", "llava-seed2", "qwen2vl", "internvl", "llava-one-size")
METRICS = {
    "obj_iou": obj_iou,
    "average_precision": average_precision,
    "oracle_iou": oracle_iou,
    "auc": auc,
    "pointing_game": pointing_game,
    "energy_in_mask": energy_in_mask,
}
Values = dict[str, list[float]]


def training_path(name: str) -> Path | None:
    """Folder of a training that isn't shipped; None for a shipped model."""
    return WEIGHTS / name if "-" in name else None


def load_training(name: str) -> tuple[Any, Any]:
    """Model and processor of one of `TRAININGS`.

    Args:
        name: of a shipped model, or of a further LLaVA in `WEIGHTS`.
    """
    return load(name.split("-")[0], folder=training_path(name))


@dataclass(frozen=True, eq=False)
class Evidence:
    """One example as a model sees it, its reference answer teacher-forced.

    Args:
        views: the maps at every scale, one view after another; on the CPU.
        asked: (scale, mirrored) of each view as asked for.
        nouns: object and tokens (counted from the answer's first) of each noun of the answer.
        functions: tokens of each function word.
        masks: bool (objects, side, side).
        shifted: the mean map over moves by half cells, on half cells, if asked for.
    """

    views: ScaleViews
    asked: tuple[tuple[float, bool], ...]
    nouns: tuple[tuple[int, tuple[int, ...]], ...]
    functions: tuple[tuple[int, ...], ...]
    masks: Tensor
    shifted: Tensor | None = None

    def at(self, scales: Sequence[float], mirrored: bool) -> ScaleViews:
        """The views of some scales."""
        wanted = [(s, flip) for s in scales for flip in ((False, True) if mirrored else (False,))]
        return self.views.select([self.asked.index(view) for view in wanted])


def read_saved(path: Path) -> Any:
    """What a study left by ``torch.save``: tensors and the classes listed here, nothing else.

    Args:
        path: the file.

    Raises:
        pickle.UnpicklingError: the file names other classes, whose code is not run.
    """
    classes: list[Any] = [ImageGrid, Preprocessing, ReleasedCodeDeviations, TokenTrace, ScaleViews]
    classes += [Conversation, Turn, Word, Scene, SceneObject, Example, Evidence]
    with torch.serialization.safe_globals(classes):
        return torch.load(path, weights_only=True)


def gather(
    model: Any,
    processor: Any,
    example: Example,
    scales: Sequence[float],
    *,
    mirrored: bool = True,
    consistency: bool = True,
    shifts: bool = False,
) -> Evidence:
    """Run a model over an example at every scale.

    Args:
        model: of `load_training`, on any device.
        processor: its processor.
        example: of a test set.
        scales: 1 first; all must fall on different grids.
        mirrored: see also each scale mirrored.
        consistency: see ``MSEA``.
        shifts: run :func:`shifted_maps` too.
    """
    picture, masks = render_pil(example.scene, SIDE)
    inputs = conversation_inputs(processor, picture, example.talk).to(model.device)
    answer = answer_ids(processor, example.talk).to(model.device)
    lens = LogitLens(model, processor)
    msea = MSEA(
        lens, scales=scales, flip="horizontal" if mirrored else "none", consistency=consistency
    )
    depth = min(DEPTH, msea.runner.adapter.vocabulary)
    views = on_cpu(msea.views(inputs, answer, top_k=depth))
    if len(views.maps) != len(scales) * (1 + mirrored):
        raise ValueError(f"scales {scales} fall onto too few grids: achieved {views.scales}.")
    trace = views.base
    start = trace.n_prompt
    words = [
        (word, [column - start for column in columns])
        for word, columns in script_columns(trace, example.talk)
        if columns[0] >= start
    ]
    return Evidence(
        views,
        tuple((s, flip) for s in scales for flip in ((False, True) if mirrored else (False,))),
        tuple((word.obj, tuple(tokens)) for word, tokens in whole_nouns(words)),
        tuple(tuple(tokens) for word, tokens in words if is_function_word(word.text)),
        masks,
        shifted_maps(lens, inputs, answer).cpu() if shifts else None,
    )


def shifted_maps(lens: LogitLens, inputs: Any, answer: Tensor) -> Float[Tensor, "classes r c"]:
    """As many views as a range of scales takes, none of another scale: moves by half a cell.

    Args:
        lens: of a model whose picture is one frame.
        inputs: the prompt with one picture.
        answer: ids of the answer.

    Returns:
        The mean over the picture and its eight moves, each map where its cells lie, on half cells;
        classes as in the trace.
    """
    adapter = lens.runner.adapter
    run = lens.runner.run(inputs, answer, explain="answer", gen_args=None, top_k=None)
    grid, kwargs = run.sample.grids[0], run.sample.kwargs
    frame = adapter.canvases(kwargs, run.sample.grids)[0]
    half = grid.height // grid.rows // 2
    padded = F.pad(frame, (half,) * 4, mode="reflect")
    size = (2 * grid.rows, 2 * grid.cols)
    total, classes = torch.zeros(()), run.trace.class_ids
    for down, right in HALF_CELLS:
        top, left = half * (1 - down), half * (1 - right)
        moved = padded[..., top : top + frame.shape[-2], left : left + frame.shape[-1]]
        pixels = adapter.with_canvases(kwargs, run.sample.grids, [moved])
        trace = lens.trace({**inputs, **pixels}, answer)
        rows = torch.searchsorted(trace.class_ids, classes).clamp(max=len(trace.class_ids) - 1)
        known = (trace.class_ids[rows] == classes)[:, None, None]  # the parity classes may differ
        maps = torch.where(known, trace.maps[0][rows], 0.0)
        box = float(-right), float(-down), float(size[1] - right), float(size[0] - down)
        both = torch.cat([maps, torch.ones_like(maps[:1])])  # the maps and what they cover
        total = total + maps_to_picture(both.cpu(), ImageGeometry(box), size)
    return total[:-1] / total[-1:]


def on_cpu(views: ScaleViews) -> ScaleViews:
    """The same views on the CPU."""

    def moved(value: Any) -> Any:
        return value.cpu() if isinstance(value, Tensor) else value

    base = views.base
    fields = {name: moved(value) for name, value in vars(base).items()}
    released_code_deviations = replace(
        base.released_code_deviations,
        first_scores=moved(base.released_code_deviations.first_scores),
    )
    fields |= {
        "maps": tuple(map(moved, base.maps)),
        "released_code_deviations": released_code_deviations,
    }
    maps = tuple(tuple(map(moved, view)) for view in views.maps)
    return replace(views, base=TokenTrace(**fields), maps=maps)


@dataclass(frozen=True)
class Setting:
    """A method with all of its options: what is chosen.

    Args:
        method: "lens" (joint normalisation alone), "tam" (ECI) or "arc".
        scales: default: one.
        mirrored: see ``MSEA``.
        aggregation: see ``MSEA``.
        scale_norm: see :mod:`studies.retired`.
        scale_weights: "equal", "adaptive" (agreement alone) or "adaptive, consistency".
        alpha_max: see ``ARC``.
        strength: of "arc".
        top_k: of "arc".
        rbo_p: of "arc".
        rank_filter: TAM's filter, on any method.
        upsampling: see ``ARC``.
        calibration: see ``ARC``.
        smoothing: standard deviation in cells of a Gaussian blur of the raw maps; 0 for none.
        shifted: read `Evidence.shifted` in place of scales.
    """

    method: str = "lens"
    scales: tuple[float, ...] = (1.0,)
    mirrored: bool = False
    aggregation: Any = "mean"
    scale_norm: Any = "none"
    scale_weights: str = "equal"
    alpha_max: float | None = None
    strength: float = 1.0
    top_k: int = 50
    rbo_p: float = 0.9
    rank_filter: bool = False
    upsampling: int = 1
    calibration: float | None = None
    smoothing: float = 0.0
    shifted: bool = False

    def trace(self, evidence: Evidence) -> TokenTrace:
        """The evidence of this setting's scales, aggregated."""
        if self.shifted:
            if evidence.shifted is None:
                raise ValueError("evidence was gathered without shifts=True.")
            return replace(evidence.views.base, maps=(evidence.shifted,))
        merged = self._merged(evidence)
        if not self.smoothing:
            return merged
        return replace(merged, maps=tuple(blurred(own, self.smoothing) for own in merged.maps))

    def _merged(self, evidence: Evidence) -> TokenTrace:
        views = evidence.at(self.scales, self.mirrored)
        weights, _, consistency = self.scale_weights.partition(", ")
        if not consistency:
            views = replace(views, consistency=None)
        return merged(views, self.aggregation, self.scale_norm, weights)

    def attributor(self, model: TokenAttribution) -> TokenAttribution:
        """What reads a trace as this setting says.

        Args:
            model: any attributor of the same model; run only where the one returned is.
        """
        finish: dict[str, Any] = {"upsampling": self.upsampling, "calibration": self.calibration}
        if self.method == "tam":
            return TokenActivationMap(
                model, rank_filter=self.rank_filter, alpha_max=self.alpha_max, **finish
            )
        method: PostProcessor = JointNormalization(model, **finish)
        if self.method == "arc":
            method = ARC(
                model,
                top_k=self.top_k,
                rbo_p=self.rbo_p,
                strength=self.strength,
                alpha_max=self.alpha_max,
                **finish,
            )
        return rank_filtered(method) if self.rank_filter else method

    def read(self, trace: TokenTrace, model: TokenAttribution) -> MLLMAttributionResult:
        """What the method makes of it.

        Args:
            trace: of :meth:`trace`.
            model: any attributor of the same model; it is not run.
        """
        return self.attributor(model).attribute_trace(trace)


def score(
    maps: Tensor, evidence: Evidence, metrics: Sequence[str] = ("obj_iou", "average_precision")
) -> Values:
    """Values of the maps of one answer.

    Args:
        maps: (tokens, rows, cols) in [0, 1].
        evidence: knows the words and masks.
        metrics: of `METRICS`.

    Returns:
        Per metric one value per noun that names a visible object (of its tokens the best counts);
        "func_iou": one per function word.
    """
    size = (evidence.masks.shape[-2], evidence.masks.shape[-1])
    pixels = upsample(maps, size)
    values: Values = {name: [] for name in metrics}
    for obj, tokens in evidence.nouns:
        if obj < 0 or not evidence.masks[obj].any():
            continue
        own = pixels[list(tokens)]
        truth = evidence.masks[obj].expand_as(own)
        for name in metrics:
            values[name].append(float(np.max(METRICS[name](own, truth))))
    values["func_iou"] = []
    if evidence.nouns and evidence.functions:
        nouns = [list(tokens) for _, tokens in evidence.nouns]
        dark = [list(tokens) for tokens in evidence.functions]
        values["func_iou"] = func_iou(maps, nouns, dark, size).tolist()
    return values


def examples(set_name: str, split: str, numbers: Sequence[int]) -> list[Example]:
    """Examples of a test set by their numbers."""
    return [make_example(set_name, number, split) for number in numbers]


@cache
def lens_of(name: str, device: str = "cpu") -> tuple[LogitLens, Any]:
    """A training's lens and its processor, the model on a device."""
    model, processor = load_training(name)
    return LogitLens(model.to(device), processor), processor
