"""Time of the post-processing against its slow twin and against one prefix forward.

Post-processing: 64 maps of 24 x 24 cells, 128 text tokens, ARC subtraction with its relevance,
joint normalisation, rank filter, and upsampling to 336 px. Interleaved, medians, ratios within
one run. Usage: ``make study NAME=postprocessing ARGS="[--out DIR]"``.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from captum_mllm import LogitLens
from captum_mllm.functional import (
    arc_subtract,
    context_weights,
    joint_min_max,
    rank_biased_overlap,
    rank_gaussian_filter,
    upsample,
)
from captum_mllm.model.forward import captured_forward, evaluating
from captum_mllm.model.inputs import cut, read_sample, rescaled_inputs
from captum_mllm.reference import load, make_scene, render_pil
from studies.prompts import default_inputs
from tests.oracle import formulas as twin

TARGETS, TOKENS, CELLS, SIDE, TOP_K = 64, 128, 24, 336, 50


def evidence() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    rankings = torch.stack([torch.randperm(32000, generator=generator) for _ in range(TOKENS)])
    columns = torch.arange(TOKENS)
    return {
        "maps": rand(TARGETS, CELLS * CELLS),
        "context": rand(TOKENS, CELLS * CELLS),
        "scores": rand(TARGETS, TOKENS),
        "rankings": rankings[:, :TOP_K],
        "earlier": columns[None] < torch.arange(TOKENS - TARGETS, TOKENS)[:, None],
    }


def post_process(f, data: dict[str, torch.Tensor]) -> dict[str, float]:
    """Run all steps with the functions of ``f``; seconds per step."""
    seconds, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[name] = now - start
        start = now

    relevance = f.rank_biased_overlap(data["rankings"][-TARGETS:], data["rankings"], 0.9)
    relevance = torch.as_tensor(relevance).to(data["maps"])
    lap("relevance")
    weights = torch.as_tensor(f.context_weights(data["scores"], data["earlier"]))
    weights = weights.to(data["maps"])
    cleaned = f.arc_subtract(data["maps"], data["context"], weights, relevance)
    cleaned = torch.as_tensor(cleaned).to(data["maps"])
    lap("subtraction")
    unit, _ = f.joint_min_max(cleaned, data["scores"], data["earlier"])
    unit = torch.as_tensor(unit).to(data["maps"]).reshape(TARGETS, CELLS, CELLS)
    lap("normalisation")
    filtered = torch.as_tensor(f.rank_gaussian_filter(unit)).to(unit)
    lap("rank filter")
    f.upsample(filtered, (SIDE, SIDE))
    lap("upsampling")
    return seconds


class Fast:
    arc_subtract = staticmethod(arc_subtract)
    context_weights = staticmethod(context_weights)
    joint_min_max = staticmethod(joint_min_max)
    rank_biased_overlap = staticmethod(rank_biased_overlap)
    rank_gaussian_filter = staticmethod(rank_gaussian_filter)
    upsample = staticmethod(upsample)


class Twin:
    """The slow twins of tests/reference.py, which filter and resize one map at a time."""

    arc_subtract = staticmethod(twin.arc_subtract)
    context_weights = staticmethod(twin.context_weights)
    joint_min_max = staticmethod(twin.joint_min_max)
    rank_biased_overlap = staticmethod(twin.rank_biased_overlap)

    @staticmethod
    def rank_gaussian_filter(maps):
        return torch.stack([torch.as_tensor(twin.rank_gaussian_filter(m)) for m in maps])

    @staticmethod
    def upsample(maps, size):
        return torch.cat([torch.as_tensor(twin.upsample(m[None], size)) for m in maps])


def prefix_forward(side: int):
    """One prefix forward of the shipped model at that side, as MSEA runs it."""
    model, processor = load()
    runner = LogitLens(model, processor).runner
    picture, _ = render_pil(make_scene(0), 112)
    sample = read_sample(default_inputs(processor, picture), runner.adapter)
    grids = tuple(runner.adapter.scaled_grid(grid, side / grid.height) for grid in sample.grids)
    pixels = runner.adapter.rescale_pixels(sample.kwargs, grids)
    tokens = cut(sample.kwargs, sample.prefix_length, runner.adapter)
    prefix = rescaled_inputs(tokens, sample, grids, pixels, runner.adapter)

    def forward() -> float:
        start = time.perf_counter()
        with evaluating(runner.adapter):
            rows = prefix.prompt_ids[:0]
            captured_forward(runner.adapter, prefix.kwargs, prefix.grids, rows=rows)
        return time.perf_counter() - start

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(2)
    data = evidence()
    native, large = prefix_forward(112), prefix_forward(192)
    for _ in range(5):
        post_process(Fast, data), native(), large()
    ours, at_native, at_large = [], [], []
    for _ in range(args.repeats):  # interleaved, so that load falls on all alike
        ours.append(post_process(Fast, data))
        at_native.append(native())
        at_large.append(large())
    start = time.perf_counter()
    post_process(Twin, data)
    slow = time.perf_counter() - start
    steps = {name: statistics.median(run[name] for run in ours) * 1e3 for name in ours[0]}
    total = statistics.median(sum(run.values()) for run in ours) * 1e3
    forward = statistics.median(at_native) * 1e3
    forward_large = statistics.median(at_large) * 1e3
    figures = {
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "post_processing_ms": round(total, 2),
        "steps_ms": {name: round(value, 2) for name, value in steps.items()},
        "twin_ms": round(slow * 1e3, 1),
        "prefix_forward_112px_ms": round(forward, 2),
        "prefix_forward_192px_ms": round(forward_large, 2),
        "ratio_to_twin": round(total / (slow * 1e3), 5),
        "ratio_to_prefix_forward_112px": round(total / forward, 3),
        "ratio_to_prefix_forward_192px": round(total / forward_large, 3),
    }
    print(json.dumps(figures, indent=2))
    if args.out:
        (args.out / "postprocessing.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
