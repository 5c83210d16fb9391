"""The noise floor: how much the figures of one recipe differ between training seeds.

Usage: ``make study NAME=seeds ARGS="[--scenes 200] [--out DIR] DIR DIR"``, with the folders
of two more LLaVAs (``docs/studies/weights`` has them), trained by ``make study
NAME=training.train ARGS="--compile --seed N --out DIR"`` for N = 1 and 2; writes ``seeds.json``
and ``seeds.md``, after each training anew; what ``seeds.json`` holds already, of the same weights
and scenes, is kept. The shipped LLaVA is the first of the three. Needs the extra ``metrics``.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captum_mllm.files import nan_to_none
from captum_mllm.metrics import paired_bootstrap
from captum_mllm.reference.models import model_path
from studies.compare import compare
from studies.training.evaluate_model import evaluate
from studies.training.models import sha256

SEED, BASE = 0, "LogitLens"
METRICS = {"average_precision": "AP", "obj_iou": "Obj-IoU"}


def measure(folder: Path, scenes: int, evaluated: int) -> dict[str, Any]:
    """One training's figures.

    Args:
        folder: its weights and figures.json.
        scenes: scenes of the comparison of methods.
        evaluated: scenes on which answers and the plain lens are judged.

    Returns:
        ``sha256``, ``seed``, ``steps``, ``exact_objects``, ``lens_auc``, and ``methods`` as
        :func:`studies.compare.compare` gives them.
    """
    figures = json.loads((folder / "figures.json").read_text())
    judged = evaluate(folder, evaluated, ways=("native",))
    native = judged["ways"]["native"]
    return {
        "sha256": judged["sha256"],
        "seed": figures["settings"]["seed"],
        "steps": [figures["training"][stage]["steps"] for stage in ("vision", "answers")],
        "exact_objects": native["exact_objects"],
        "lens_auc": native["lens_auc"],
        "methods": compare(scenes, folder=folder)["methods"],
    }


def spread(values: Sequence[float]) -> str:
    """A cell: the standard deviation over trainings, and the distance of the extremes."""
    return f"{statistics.stdev(values):.3f} ({max(values) - min(values):.3f})"


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: every method's mean per training, and its gain over the plain lens.

    Args:
        runs: from :func:`measure`.
    """
    names = [f"seed {run['seed']}" for run in runs]
    lines = []
    for metric, label in METRICS.items():
        head = ["method", *names, "sd (range)", *(f"gain, {name}" for name in names), "sd (range)"]
        lines += [f"**{label}**", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for method in runs[0]["methods"]:
            values = [run["methods"][method][metric] for run in runs]
            bases = [run["methods"][BASE][metric] for run in runs]
            means = [paired_bootstrap(v, seed=SEED).mean for v in values]
            cells = [method, *(f"{mean:.3f}" for mean in means), spread(means)]
            if method == BASE:
                cells += ["-"] * (len(runs) + 1)
            else:
                gains = [
                    paired_bootstrap(v, b, seed=SEED) for v, b in zip(values, bases, strict=True)
                ]
                cells += [f"{g.mean:+.3f} [{g.low:+.3f}, {g.high:+.3f}]" for g in gains]
                cells.append(spread([g.mean for g in gains]))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def heading(runs: Sequence[Mapping[str, Any]], scenes: int) -> str:
    """What was trained and how well each reads.

    Args:
        runs: from :func:`measure`.
        scenes: scenes of the comparison.
    """
    lines = [
        '`make study NAME=seeds ARGS="docs/studies/weights/llava-seed1 '
        'docs/studies/weights/llava-seed2"`: trainings of the reference LLaVA by '
        '`make study NAME=training.train ARGS="--compile --seed N --out DIR"`, alike but for the '
        "seed; seed 0, the shipped one, took as many steps by an earlier version of the program, "
        f"its learning rate following the clock; methods on {scenes} test scenes as in compare.md. "
        "Small models of synthetic scenes.",
        "",
        "| seed | steps | exact objects | 95 % | lens AUC | 95 % | sha256 |",
        "|" + " --- |" * 7,
    ]
    for run in runs:
        exact, auc = run["exact_objects"], run["lens_auc"]
        lines.append(
            f"| {run['seed']} | {run['steps'][0]} + {run['steps'][1]} | "
            f"{exact['right']} of {exact['of']} | "
            f"{exact['interval_95'][0]:.1%} to {exact['interval_95'][1]:.1%} | "
            f"{auc['macro_mean']:.4f} | "
            f"{auc['interval_95'][0]:.4f} to {auc['interval_95'][1]:.4f} | `{run['sha256']}` |"
        )
    return "\n".join(lines)


def known(out: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an earlier run has measured on the same scenes: hash of the weights -> figures.

    Args:
        out: folder of the record.
        settings: numbers of scenes.
    """
    path = out / "seeds.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    if any(record.get(name) != value for name, value in settings.items()):
        return {}
    return {run["sha256"]: _with_nan(run) for run in record["runs"]}


def _with_nan(run: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`captum_mllm.files.nan_to_none`."""
    for scores in run["methods"].values():
        for name, values in scores.items():
            scores[name] = [float("nan") if value is None else value for value in values]
    return run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Figures of several training seeds.")
    parser.add_argument("folders", type=Path, nargs="+", help="of further trainings")
    parser.add_argument("--scenes", type=int, default=200, help="for the methods")
    parser.add_argument("--evaluated", type=int, default=1000, help="for answers and plain lens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"scenes": args.scenes, "evaluated": args.evaluated}
    found, runs, text = known(args.out, settings), [], ""
    for folder in (model_path("llava"), *args.folders):
        weights = sha256(folder / "model.safetensors")
        runs.append(found.get(weights) or measure(folder, args.scenes, args.evaluated))
        text = (
            f"{heading(runs, args.scenes)}\n\n{table(runs) if len(runs) > 1 else ''}"
            "sd (range): over the trainings. Gain: over LogitLens, 95 % interval by a paired "
            "bootstrap over scenes within one training. A difference between methods that is "
            "smaller than the range of its gain says as much about the seed as about the methods.\n"
        )
        record = nan_to_none({**settings, "runs": runs})
        (args.out / "seeds.json").write_text(json.dumps(record) + "\n")
        (args.out / "seeds.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
