"""How far a map should fall below its peak, and the weights of the product, on validation scenes.

Usage: ``make study NAME=calibration ARGS="[--trainings NAME ...] [--examples N] [--workers N]
[--traces DIR] [--out DIR]"``; writes ``calibration.json.xz`` (every scene's values) and
``calibration.md``. The model runs once per scene, and all settings read what it left: rules of
calibration for the product of lens and direct attribution, its weight ``beta`` and its floor, and
the same rules for the methods that it is compared with. Nothing here sees a test scene.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_mllm import ARC, JointNormalization, LogitLens, TokenActivationMap
from captum_mllm.functional import calibrate, product_of_experts, upsample
from captum_mllm.metrics import otsu_threshold
from captum_mllm.model.scales import ViewPlan, gather_views
from captum_mllm.model.trace import TokenTrace
from captum_mllm.reference.render import render_pil
from studies.calibration_table import BASE, tables
from studies.choose import weights_of
from studies.direct import DEPTH, SCALES, twins, words_of
from studies.evidence import SIDE, TRAININGS, Values, examples, lens_of, read_saved, score
from studies.prompts import answer_ids, conversation_inputs
from studies.records import write_record

RECORDS = Path(__file__).parent / "records"
SETS = ("plain", "twins")
BETAS, FLOORS = (1.0, 1.5, 2.0), (0.0025, 0.01, 0.04)
TAUS, MEANS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5), (0.3, 0.35, 0.375, 0.4, 0.45, 0.5)
SHARES, QUARTILES, OWN = (0.1, 0.12, 0.14), (0.35, 0.4, 0.45), (0.45, 0.5, 0.55)
CHUNK = 5
Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """Some validation scenes of one set for one training.

    Args:
        training: of ``studies.evidence.TRAININGS``.
        set_name: "plain" or "twins".
        numbers: of the scenes.
        traces: folder of what the model left; what it holds is not run again. None: no folder.
    """

    training: str
    set_name: str
    numbers: tuple[int, ...]
    traces: Path | None


# ---- rules -------------------------------------------------------------------------------------


def fallen(maps: Tensor, spread: Tensor) -> Tensor:
    """Each map with ``peak * exp((M - peak) / spread)``; constant maps stay as they are.

    Args:
        maps: (maps, cells).
        spread: (maps, 1).
    """
    peak = maps.amax(1, keepdim=True)
    safe = torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, peak * ((maps - peak) / safe).exp(), maps)


def by_mean(maps: Tensor, share: float) -> Tensor:
    """The spread is a share of the peak's height above the mean."""
    return fallen(maps, share * (maps.amax(1, keepdim=True) - maps.mean(1, keepdim=True)))


def by_quartile(maps: Tensor, share: float) -> Tensor:
    """The spread is a share of the peak's height above the third quartile of the cells."""
    low = maps.quantile(0.75, dim=1, keepdim=True)
    return fallen(maps, share * (maps.amax(1, keepdim=True) - low))


def by_threshold(maps: Tensor, share: float) -> Tensor:
    """The spread is a share of the peak's height above the map's own Otsu threshold."""
    low = torch.as_tensor(otsu_threshold(maps), dtype=maps.dtype).reshape(-1, 1)
    return fallen(maps, share * (maps.amax(1, keepdim=True) - low))


def by_mass(maps: Tensor, share: float) -> Tensor:
    """The spread that leaves a map the same mean, as a share of its peak, as every other map."""
    peak = maps.amax(1, keepdim=True)
    low, high = 1e-4 * peak, 50 * peak
    for _ in range(40):  # bisection: the mean grows with the spread
        middle = (low * high).sqrt()
        dark = ((maps - peak) / middle.clamp(min=1e-12)).exp().mean(1, keepdim=True) < share
        low, high = torch.where(dark, middle, low), torch.where(dark, high, middle)
    return fallen(maps, (low * high).sqrt() * (maps.amin(1, keepdim=True) < peak))


def _rules() -> dict[str, Rule]:
    """Every rule, by name; the first is the fixed one that was the default."""
    return {
        **{f"tau {t:g}": partial(calibrate, tau=t) for t in TAUS},
        **{f"mean {c:g}": partial(by_mean, share=c) for c in MEANS},
        **{f"third quartile {c:g}": partial(by_quartile, share=c) for c in QUARTILES},
        **{f"own threshold {c:g}": partial(by_threshold, share=c) for c in OWN},
        **{f"mass {c:g}": partial(by_mass, share=c) for c in SHARES},
    }


# ---- maps --------------------------------------------------------------------------------------


def left_by_model(job: Job, number: int) -> dict[str, Any]:
    """Traces, nouns and example of one scene: run, or read from the job's folder.

    Args:
        job: says which training and set.
        number: of the scene.
    """
    path = job.traces and job.traces / f"{job.training}.{job.set_name}.{number}.pt"
    if path and path.exists():
        return read_saved(path)
    lens, processor = lens_of(job.training)
    (example,) = examples(job.set_name, "validation", (number,))
    picture, masks = render_pil(example.scene, SIDE)
    inputs = conversation_inputs(processor, picture, example.talk)
    answer = answer_ids(processor, example.talk)
    plan = ViewPlan(lens=SCALES, flip="half_turn", direct=SCALES)
    views = gather_views(lens.runner, inputs, answer, plan, top_k=DEPTH)
    assert views.direct is not None
    traces = {
        "base": views.lens.base,
        "turned": views.lens.merged("mean", "adaptive"),
        "direct": views.direct.merged("mean", "equal"),
    }
    found = {
        "traces": traces,
        "evidence": words_of(traces["base"], example, masks),
        "example": example,
    }
    if path:
        torch.save(found, path)
    return found


def product_of(traces: Mapping[str, TokenTrace], beta: float, floor: float) -> TokenTrace:
    """Lens times direct attribution.

    Args:
        traces: of :func:`left_by_model`.
        beta: of the product.
        floor: of the product.
    """
    lens, direct = traces["turned"], traces["direct"]
    sizes = [(m.shape[-2], m.shape[-1]) for m in lens.maps]
    brought = [upsample(m, size) for m, size in zip(direct.maps, sizes, strict=True)]
    both = lens.cells[lens.map_rows], TokenTrace.pack_cells(brought)
    cells = product_of_experts(*both, beta, floor)
    return replace(lens, maps=lens.unpack_cells(cells), per_token=True)


def maps_of(traces: Mapping[str, TokenTrace], lens: LogitLens) -> dict[str, Tensor]:
    """Maps in [0, 1] of every setting before calibration, (tokens, rows, cols).

    Args:
        traces: of :func:`left_by_model`.
        lens: any attributor of the model; it is not run.
    """
    plain = JointNormalization(lens, upsampling=2)
    tam = TokenActivationMap(lens, rank_filter=False, alpha_max=0.25, upsampling=2)
    readers: dict[str, tuple[TokenTrace, Any]] = {
        f"direct lens, beta {b:g}, floor {f:g}": (product_of(traces, b, f), plain)
        for b, f in product(BETAS, FLOORS)
    }
    readers |= {
        "lens": (traces["base"], plain),
        "TAM": (traces["base"], tam),
        "TAM over turned views": (traces["turned"], tam),
        "MSEA+ARC, turned views": (traces["turned"], ARC(lens, calibration=None)),
        "direct": (traces["direct"], plain),
    }
    return {n: way.attribute_trace(trace).grid_attr[0] for n, (trace, way) in readers.items()}


def measure(job: Job) -> list[dict[str, Values]]:
    """Values of each scene: "map; rule" -> metric -> one value per word.

    Args:
        job: what is measured.
    """
    torch.set_num_threads(1)
    lens, _ = lens_of(job.training)
    rules, found = _rules(), []
    few = {name: rules[name] for name in ("tau 1.5", "mean 0.4")}
    peers = {name: rule for name, rule in rules.items() if name.startswith(("tau", "mean"))}
    for number in job.numbers:
        left = left_by_model(job, number)
        evidence, example, rows = left["evidence"], left["example"], {}
        for name, maps in maps_of(left["traces"], lens).items():
            chosen = rules if name == BASE else few if name.startswith("direct lens") else peers
            for rule_name, rule in chosen.items():
                shown = rule(maps.flatten(1)).reshape(maps.shape)
                values = score(shown, evidence, ("obj_iou",))
                rows[f"{name}; {rule_name}"] = values | {"right": twins(shown, evidence, example)}
            rows[f"{name}; tau 1.5"] |= score(maps, evidence, ("average_precision",)) | {
                "func_iou": rows[f"{name}; tau 1.5"]["func_iou"]
            }
        found.append({row: _rounded(values) for row, values in rows.items()})
    return found


def _rounded(values: Values) -> Values:
    return {metric: [round(v, 4) for v in each] for metric, each in values.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ``arguments`` are the process's by default."""
    parser = argparse.ArgumentParser(description="Rules of calibration, weights of the product.")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--examples", type=int, default=30, help="per training and set")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--traces", type=Path, help="folder; what it holds is not run again")
    parser.add_argument("--out", type=Path, default=RECORDS)
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    for folder in filter(None, (args.traces, args.out)):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(training, one, tuple(range(at, min(at + CHUNK, args.examples))), args.traces)
        for training, one in product(args.trainings, SETS)
        for at in range(0, args.examples, CHUNK)
    ]
    measured: dict[str, Any] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        results = tqdm(pool.map(measure, jobs), total=len(jobs), mininterval=20)
        for job, rows in zip(jobs, results, strict=True):
            measured.setdefault(job.training, {}).setdefault(job.set_name, []).extend(rows)
    weights = {name: weights_of(name) for name in args.trainings}
    record = {"split": "validation", "weights": weights, "measured": measured}
    write_record(args.out / "calibration.json.xz", record)
    text = tables(record)
    (args.out / "calibration.md").write_text(text)
    print(f"{text}\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
