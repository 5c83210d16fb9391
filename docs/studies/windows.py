"""Larger scales for models of one input size: windows against native scales and shifts.

Usage: ``make study NAME=windows ARGS="[--scenes 200] [--out DIR]"``; writes
``windows.json`` (every scene's values) and ``windows.md`` (the tables). A run that was stopped goes
on from ``windows.progress.json``. Needs the extra ``metrics``.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import override

from captum_mllm import MSEA, LogitLens
from captum_mllm.adapters import LlavaAdapter
from captum_mllm.adapters.pixels import cut_window, enlarged
from captum_mllm.attr.base import raw_result
from captum_mllm.functional import Box, joint_min_max, upsample
from captum_mllm.geometry import ImageGeometry, ImageGrid, maps_to_picture
from captum_mllm.metrics import average_precision, obj_iou, paired_bootstrap
from captum_mllm.model.runner import Runner
from captum_mllm.model.scales import maps_at
from captum_mllm.model.trace import TokenTrace
from captum_mllm.reference.models import load, model_path
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import make_scene
from studies.prompts import answer_words, default_inputs

SIDE, SEED, FIRST = 112, 0, 1000
METRICS = {"average_precision": (average_precision, "AP"), "obj_iou": (obj_iou, "Obj-IoU")}
BASE, NATIVE, SHIFTS = "LogitLens (scale 1)", "MSEA, native scales", "8 half-cell shifts"
AGAINST = {BASE: "scale 1", NATIVE: "native", SHIFTS: "shifts"}
HALF_CELLS = tuple((down, right) for down in (0, -1, 1) for right in (0, -1, 1))
NOTE = (
    "A stand-in: no trained Gemma 3 or LLaVA-NeXT can be had here, so the shipped LLaVA, a small "
    "model of synthetic scenes that does take other sizes, is treated as a model of one size. What "
    "windows gain on large models and photographs was not measured."
)
Tracer = Callable[[Mapping[str, Any], Tensor | None], TokenTrace]


class FixedSizeLlava(LlavaAdapter):
    """The LLaVA as if it took one size only: larger scales through windows."""

    fixed_size = True

    @override
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        return enlarged(grid, scale)

    @override
    def window_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], boxes: Sequence[Box]
    ) -> dict[str, Tensor]:
        whole = zip(inputs["pixel_values"], grids, boxes, strict=True)
        cuts = [cut_window(own, box, (grid.height, grid.width)) for own, grid, box in whole]
        return {"pixel_values": torch.stack(cuts)}


class FixedSizeLens(LogitLens):
    """Logit lens through :class:`FixedSizeLlava`; the registry of adapters stays as it is."""

    @property
    @override
    def runner(self) -> Runner:
        return replace(super().runner, adapter=FixedSizeLlava(super().runner.adapter.model))


class ShiftedLlava(LlavaAdapter):
    """The LLaVA whose "rescaled" image is the image moved by halves of a cell, edges reflected.

    Args:
        model: the model.
        shift: (down, right) in half cells, each -1, 0 or 1.
    """

    def __init__(self, model: nn.Module, shift: tuple[int, int]) -> None:
        super().__init__(model)
        self.shift = shift

    @override
    def rescale_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        frame, half = grids[0], self.patch // 2
        padded = F.pad(inputs["pixel_values"], (half,) * 4, mode="reflect")
        top, left = (half * (1 - by) for by in self.shift)
        return {"pixel_values": padded[..., top : top + frame.height, left : left + frame.width]}


def shifted_trace(runner: Runner, inputs: Mapping[str, Any], answer: Tensor | None) -> TokenTrace:
    """The control: as many forwards as windows at 1.25 and 1.5 take, all of them at scale 1.

    Args:
        runner: runs the model at scale 1.
        inputs: the prompt.
        answer: ids of the answer.

    Returns:
        The trace; its map is the mean over the moves, each where its cells lie, on half cells.
    """
    run = runner.run(inputs, answer, explain="answer", gen_args=None, top_k=None)
    grid, placed = run.sample.grids[0], []
    size = (2 * grid.rows, 2 * grid.cols)
    for down, right in HALF_CELLS:
        moved = replace(runner, adapter=ShiftedLlava(runner.adapter.model, (down, right)))
        maps = maps_at(moved, run, (grid,)).lens if down or right else run.trace.maps
        box = float(-right), float(-down), float(size[1] - right), float(size[0] - down)
        both = torch.cat([maps[0], torch.ones_like(maps[0][:1])])  # the maps and what they cover
        placed.append(maps_to_picture(both, ImageGeometry(box), size))
    total = torch.stack(placed).sum(0)
    return replace(run.trace, maps=(total[:-1] / total[-1:],))


def variants(model: nn.Module, processor: Any) -> dict[str, tuple[int, Tracer]]:
    """What is compared: number of forwards, and what makes the evidence."""
    lens, fixed = LogitLens(model, processor), FixedSizeLens(model, processor)
    return {
        BASE: (1, lens.trace),
        NATIVE: (3, MSEA.paper(lens).trace),
        "MSEA, windows": (9, MSEA.paper(fixed).trace),
        "MSEA, windows (1, 1.5)": (5, MSEA.paper(fixed, scales=(1.0, 1.5)).trace),
        SHIFTS: (9, lambda inputs, answer: shifted_trace(lens.runner, inputs, answer)),
    }


def scores(trace: TokenTrace, words: Mapping[int, tuple[int, ...]], masks: Tensor) -> dict:
    """Mean of each metric over the named objects, on maps normalised as ``studies.compare`` does.

    Args:
        trace: the evidence.
        words: object -> its tokens in the answer, of which the best counts.
        masks: (objects, side, side).
    """
    raw = raw_result(trace, "LogitLens")
    cells = TokenTrace.pack_cells(raw.grid_attr)
    unit, _ = joint_min_max(cells, raw.token_attr, trace.is_earlier)
    pixels = upsample(trace.unpack_cells(unit)[0], (SIDE, SIDE))

    def mean(metric: Callable[[Tensor, Tensor], Any]) -> float:
        maps = [(pixels[list(tokens)], masks[obj]) for obj, tokens in words.items()]
        best = [float(np.max(metric(own, truth.expand_as(own)))) for own, truth in maps]
        return sum(best) / len(best) if best else float("nan")

    return {name: mean(metric) for name, (metric, _) in METRICS.items()}


def measure_scene(number: int, rows: Mapping[str, tuple[int, Tracer]], processor: Any) -> dict:
    """Metrics and seconds of each variant on one validation scene, for the greedy answer."""
    scene = make_scene(number, "validation")
    picture, masks = render_pil(scene, SIDE)
    inputs = default_inputs(processor, picture)
    single = rows[BASE][1](inputs, None)
    answer, words = single.text_ids[single.n_prompt :], answer_words(single, scene)
    measured = {}
    for name, (_, tracer) in rows.items():
        start = time.perf_counter()
        trace = tracer(inputs, answer)
        seconds = time.perf_counter() - start
        measured[name] = scores(trace, words, masks) | {"seconds": seconds}
    return measured


def measure(numbers: Sequence[int], progress: Path, sha256: str) -> dict[str, dict[str, Any]]:
    """Each variant's forwards, and its metrics and seconds on validation scenes.

    Args:
        numbers: the scenes.
        progress: file that is rewritten after each scene; scenes in it are not measured again.
        sha256: of the weights; what the file holds of others does not count.
    """
    model, processor = load()
    rows = variants(model, processor)
    done = json.loads(progress.read_text()).get(sha256, {}) if progress.exists() else {}
    for number in tqdm([n for n in numbers if str(n) not in done], desc="scenes"):
        done[str(number)] = measure_scene(number, rows, processor)
        partial = progress.with_suffix(".part")
        partial.write_text(json.dumps({sha256: done}))
        partial.replace(progress)  # at once: never half a file
    return {
        name: {"forwards": forwards}
        | {key: [done[str(n)][name][key] for n in numbers] for key in (*METRICS, "seconds")}
        for name, (forwards, _) in rows.items()
    }


def table(found: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """Markdown: means and paired differences with intervals, harmed scenes, cost."""

    def cell(name: str, other: str | None) -> str:
        against = None if other is None else found[other][metric]
        mean, low, high = paired_bootstrap(found[name][metric], against, seed=SEED)
        sign = "" if other is None else "+"
        return "-" if name == other else f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    title = METRICS[metric][1]
    heads = ["variant", title, *(f"{title} - {other}" for other in AGAINST.values())]
    heads += ["scenes harmed", "forwards", "time / scale 1"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, row in found.items():
        change = np.subtract(row[metric], found[BASE][metric])
        ratio = np.divide(row["seconds"], found[BASE]["seconds"])
        low, mid, high = np.percentile(ratio, [25, 50, 75])
        cells = [cell(name, other) for other in (None, *AGAINST)]
        cells += [f"{np.mean(change[~np.isnan(change)] < 0):.1%}", str(row["forwards"])]
        lines.append(f"| {name} | {' | '.join(cells)} | {mid:.1f} ({low:.1f}, {high:.1f}) |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="Windows for models of one input size.")
    parser.add_argument("--scenes", type=int, default=200, help="validation scenes, default 200")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    sha256 = json.loads((model_path() / "figures.json").read_text())["sha256"]
    scenes, progress = range(FIRST, FIRST + args.scenes), args.out / "windows.progress.json"
    found = measure(scenes, progress, sha256)
    command = f'make study NAME=windows ARGS="--scenes {args.scenes}"'
    text = (
        f"`{command}`: {args.scenes} scenes of the validation split (from number {FIRST}; windows "
        f"were chosen on its first 238), greedy answers of the shipped LLaVA at {SIDE} px, weights "
        f"{sha256[:12]}; 95 % intervals by a paired bootstrap over scenes (seed {SEED}, 2,000 "
        f"resamples). Scales, where not named: 1, 1.25, 1.5 (achieved on 14 x 14 tokens: 1, 1.29, "
        f"1.5). Windows: 2 x 2 of the model's own size per larger scale. Shifts: the image and its "
        f"8 moves by half a token. Harmed: the value is below that of scale 1. Time: median "
        f"(quartiles) over scenes of the ratio, the answer given, on a busy CPU.\n\n{NOTE}\n\n"
    ) + "\n\n".join(table(found, metric) for metric in METRICS)
    settings = {"command": command, "split": "validation", "scenes": list(scenes), "side": SIDE}
    settings |= {"weights_sha256": sha256, "bootstrap_seed": SEED, "note": NOTE}
    data = json.dumps(settings | {"variants": found}).replace("NaN", "null")
    (args.out / "windows.json").write_text(f"{data}\n")
    (args.out / "windows.md").write_text(f"{text}\n")
    progress.unlink()
    print(text)


if __name__ == "__main__":
    main()
