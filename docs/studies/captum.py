"""Time and memory of captum's methods for one token, beside MSEA+ARC's for all tokens.

The reference LLaVA at 112 px (14 x 14 image tokens) and its own answer; captum's methods over
``TokenLogProb`` in batches of 8, with captum's defaults for the number of steps and samples where
not said in the record. Interleaved, medians, ratios within one run; memory is what the process
(the device) holds at most, above what it held before. Shapley values are of 4 x 4 segments.
Usage: ``make study NAME=captum ARGS="[--repeats N] [--device cuda] [--out DIR]"``.
"""

import argparse
import ctypes
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum import attr

from captum_mllm import LogitLens, TokenLogProb
from captum_mllm.functional import grid_mask
from captum_mllm.reference import load, make_scene, render_pil
from studies.prompts import default_inputs
from tests.oracle.published import ARC, MSEA

SIDE, BATCH, STEPS, SAMPLES = 112, 8, 50, 10
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def methods(f: TokenLogProb) -> dict[str, Callable[[], Any]]:
    """Each of captum's methods for the last token of the answer."""
    last = len(f.output_ids) - 1
    cells = grid_mask((SIDE, SIDE), 14, 14)[None, None].to(f.pixels.device)
    coarse = grid_mask((SIDE, SIDE), 4, 4)[None, None].to(f.pixels.device)
    together = {"target": last, "perturbations_per_eval": BATCH}
    steps = {"target": last, "n_steps": STEPS, "internal_batch_size": BATCH}
    window = {"sliding_window_shapes": (3, 16, 16), "strides": (3, 8, 8)}
    x = f.pixels
    return {
        "Saliency": lambda: attr.Saliency(f).attribute(x, target=last),
        "InputXGradient": lambda: attr.InputXGradient(f).attribute(x, target=last),
        "IntegratedGradients": lambda: attr.IntegratedGradients(f).attribute(x, **steps),
        "NoiseTunnel(Saliency)": lambda: attr.NoiseTunnel(attr.Saliency(f)).attribute(
            x, nt_samples=SAMPLES, nt_samples_batch_size=BATCH, stdevs=0.1, target=last
        ),
        "LayerGradCam": lambda: attr.LayerGradCam(f, f.layer()).attribute(x, target=last),
        "LayerIntegratedGradients": lambda: attr.LayerIntegratedGradients(f, f.layer()).attribute(
            x, **steps
        ),
        "Occlusion": lambda: attr.Occlusion(f).attribute(x, **window, **together),
        "FeatureAblation": lambda: attr.FeatureAblation(f).attribute(
            x, feature_mask=cells, **together
        ),
        "ShapleyValueSampling": lambda: attr.ShapleyValueSampling(f).attribute(
            x, feature_mask=coarse, n_samples=SAMPLES, **together
        ),
        "KernelShap": lambda: attr.KernelShap(f).attribute(x, feature_mask=coarse, **together),
    }


def measured(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds, and MiB held at most above what was held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR.write_text("5")  # the high-water mark begins anew
        before = kib("VmRSS") * 1024
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    most = torch.cuda.max_memory_allocated() if device.type == "cuda" else kib("VmHWM") * 1024
    return seconds, max(0, most - before) / 2**20


def kib(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
    model, processor = load()
    model = model.to(device)
    picture, _ = render_pil(make_scene(0), SIDE)
    inputs = default_inputs(processor, picture)
    f = TokenLogProb(model, inputs, None, processor)
    ours = ARC(MSEA(model, processor))
    runs: dict[str, Callable[[], Any]] = {
        "MSEA+ARC, all tokens": lambda: ours.attribute(inputs, f.answer_ids),
        "LogitLens, all tokens": lambda: LogitLens(model).attribute(inputs, f.answer_ids),
        **methods(f),
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for name in ("MSEA+ARC, all tokens", "LogitLens, all tokens", "Saliency"):
        runs[name]()
    for _ in range(args.repeats):  # interleaved, so that load falls on all alike
        for name, run in runs.items():
            seen[name].append(measured(run, device))
    base = seen["MSEA+ARC, all tokens"]
    rows = {}
    for name, values in seen.items():
        ratios = [value[0] / own[0] for value, own in zip(values, base, strict=True)]
        rows[name] = {
            "seconds": round(statistics.median(value[0] for value in values), 3),
            "ratio_to_msea_arc": round(statistics.median(ratios), 2),
            "peak_mib": round(statistics.median(value[1] for value in values), 1),
        }
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "tokens": len(f.output_ids),
        "pixels": [SIDE, SIDE],
        "batch": BATCH,
        "steps": STEPS,
        "samples_of_noise_and_shapley": SAMPLES,
        "features": {"FeatureAblation": 196, "ShapleyValueSampling": 16, "KernelShap": 16},
        "methods": rows,
    }
    print(json.dumps(figures, indent=2))
    if args.out:
        (args.out / "captum.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
