"""``captum-mllm benchmark``: methods scored on annotated pictures, in resumable runs."""

import argparse
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_mllm.cli.arguments import (
    UsageError,
    WriteError,
    add_max_pixels,
    add_model,
    add_out,
    check_out,
    load,
    option,
    positive_int,
    print_progress,
    printable,
    text,
    usage_error,
)
from captum_mllm.model.loading import PROMPT

if TYPE_CHECKING:
    from captum_mllm.benchmark import Benchmark, Settings
    from captum_mllm.data import CocoDataset, LabelMapDataset


_FLAGS = (
    *("--methods", "--metrics", "--against", "--option", "--prompt", "--answers", "--categories"),
    *("--steps", "--baseline", "--scored-tokens", "--perturbations-per-eval", "--seed", "--limit"),
    *("--data", "--out", "--max-new-tokens"),
)


def add_benchmark(commands: Any) -> None:
    """Add the command to the parser.

    Args:
        commands: returned by ``add_subparsers``.
    """
    parser = commands.add_parser(
        "benchmark",
        help="score methods on annotated pictures",
        description="Explain a model's answers about annotated pictures with several methods, "
        "score the maps against the masks and the model, and write a table with 95 % intervals. "
        "Each result is written to disk before the next is computed: after an interruption, re-run "
        "the same command to resume.",
    )
    parser.set_defaults(run=run)
    _add_data(parser)
    add_model(parser)
    _add_measures(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with images/, instances.json, captions.json (COCO's format), or with "
        "anno.json (label images, as in TAM's GranDf and OpenPSG)",
    )
    add("--images", type=Path, metavar="DIR", help="COCO's format elsewhere: the pictures")
    add("--instances", type=Path, metavar="FILE", help="likewise: the masks")
    add("--captions", type=Path, metavar="FILE", help="likewise: the captions; optional")
    add("--limit", type=positive_int, metavar="N", help="only the first N pictures")
    add_max_pixels(add)
    add("--max-outline", type=positive_int, metavar="N",
        help="COCO's format: refuse annotations whose polygons are longer, in pixels; default: "
        "1000000")  # fmt: skip
    add("--max-mask-pixels", type=positive_int, metavar="N",
        help="refuse pictures all of whose masks together have more pixels; default: "
        "2000000000")  # fmt: skip
    add("--allow-outside", action="store_true",
        help="read pictures that an annotation file names outside their folder (absolute names, "
        "'..', links); off by default")  # fmt: skip
    add_out(parser)


def _add_measures(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--methods", type=_names, default=("lens", "tam", "msea+arc"), metavar="NAME,NAME,...",
        help="default: lens,tam,msea+arc; a wrong name lists all")  # fmt: skip
    add("--metrics", type=_names, default=("obj_iou", "func_iou", "f1_iou"),
        metavar="NAME,NAME,...",
        help="default: obj_iou,func_iou,f1_iou; a wrong name lists all")  # fmt: skip
    add("--against", metavar="NAME", help="method to compare the others with; default: the first")
    add("--option", type=_method_option, action="append", default=[],
        metavar="METHOD.NAME=VALUE", help="an option of a method, e.g. msea+arc.scales=1,1.5; "
        "may be repeated; a wrong name lists all")  # fmt: skip
    add("--prompt", type=text, default=PROMPT, metavar="TEXT",
        help=f"what to ask about every picture; default: {PROMPT!r}")  # fmt: skip
    add("--answers", choices=("own", "captions"), default="own",
        help="explain the model's own answer (default) or the first caption")  # fmt: skip
    add("--categories", choices=("auto", "coco", "data", "picture"), default="auto",
        help="what words may name; default: coco if the data's names are COCO's")  # fmt: skip
    add("--parity", action="store_true", help="reproduce known defects of TAM's evaluation")
    add("--steps", type=positive_int, default=64, metavar="N",
        help="steps of the insertion and deletion curves; default: 64")  # fmt: skip
    add("--baseline", choices=("black", "mean", "blur"), default="black",
        help="what replaces removed pixels; default: black")  # fmt: skip
    add("--scored-tokens", choices=("objects", "all"), default="objects",
        help="tokens that insertion, deletion and the like score; default: objects")  # fmt: skip
    add("--perturbations-per-eval", type=positive_int, default=1, metavar="N",
        help="perturbed images in one forward; default: 1")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the random methods; default: 0")
    add("--retry-failed", action="store_true", help="compute samples that failed before again")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between, got {text!r}")
    return names


def _method_option(text: str) -> tuple[str, str, Any]:
    method, name, value = option(text)
    if not method:
        raise argparse.ArgumentTypeError(f"must be METHOD.NAME=VALUE, got {text!r}")
    return method, name, value


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: of the command line.

    Returns:
        Exit code: 0, or 1 if nothing was measured.

    Raises:
        UsageError: a mistake of the user.
        WriteError: the folder can't be written.
        KeyboardInterrupt: with a line on how to resume.
    """
    settings = _settings(args)
    data = _data(args)
    check_out(args.out)
    model, processor, note = load(args)
    if note:
        print_progress(note)
    benchmark = _benchmark(args, model, processor, data, settings)
    print(printable(benchmark.table, sys.stdout), end="")
    print_progress(f"wrote benchmark.json, benchmark.md and samples.jsonl in {args.out}")
    if benchmark.values:
        return 0
    reason = (
        "see the failures below the table"
        if benchmark.failures
        else "no word of an answer names a category of the data; the answers are in samples.jsonl"
    )
    print_progress(f"nothing was measured: {reason}")
    return 1


def _benchmark(
    args: argparse.Namespace, model: Any, processor: Any, data: Any, settings: "Settings"
) -> "Benchmark":
    from captum_mllm.benchmark import run_benchmark

    paths = ("data", "images", "instances", "captions")
    given = {name: getattr(args, name) for name in paths}
    about = {
        "model": args.model or "shipped",
        "paths": {name: str(path) for name, path in given.items() if path is not None},
    }
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return run_benchmark(
                model, processor, data, args.out, settings,
                about=about, retry_failed=args.retry_failed, show_progress=True,
            )  # fmt: skip
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(
            f"but all finished results are in {args.out}: re-run the same command to resume"
        ) from stopped
    except ImportError as error:
        raise UsageError(f"argument --metrics: {error}") from error
    except OSError as error:
        raise WriteError(
            f"{args.out} can't be written ({error}); all finished results stay there: make room "
            "and re-run the same command to resume"
        ) from error
    except ValueError as error:
        raise usage_error(error, _FLAGS, "--out") from error


def _print_warning(message: Any, *_: Any, **__: Any) -> None:
    print_progress(f"warning: {message}")


def _settings(args: argparse.Namespace) -> "Settings":
    from captum_mllm.benchmark import Settings

    options: dict[str, dict[str, Any]] = {}
    for method, name, value in args.option:
        options.setdefault(method, {})[name] = value
    values = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    try:
        return Settings(**values, options=options)
    except ValueError as error:
        raise usage_error(error, _FLAGS, "--methods") from error


def _data(args: argparse.Namespace) -> "CocoDataset | LabelMapDataset":
    from captum_mllm.data import CocoDataset, LabelMapDataset
    from captum_mllm.data.label_maps import FILE

    parts = [args.images, args.instances, args.captions]
    if (args.data is not None) == any(parts) or (args.data is None and not all(parts[:2])):
        raise UsageError(
            "arguments --data or, for COCO, --images and --instances: give one of the two"
        )
    flag = "--data" if args.data is not None else "--images, --instances or --captions"
    names = ("max_pixels", "max_mask_pixels", "max_outline")
    limits = {name: value for name in names if (value := getattr(args, name)) is not None}
    limits["allow_outside"] = args.allow_outside
    try:
        if args.data is None:
            return CocoDataset(*(path for path in parts if path is not None), **limits)
        if (args.data / FILE).is_file():
            limits.pop("max_outline", None)
            return LabelMapDataset(args.data, **limits)
        captions = args.data / "captions.json"
        files = [args.data / "images", args.data / "instances.json"]
        if not files[1].is_file():
            raise FileNotFoundError(
                f"{str(args.data)!r} holds neither instances.json nor {FILE}; give a folder that "
                "does, or --images and --instances"
            )
        return CocoDataset(*files, *([captions] if captions.is_file() else []), **limits)
    except ImportError as error:
        raise UsageError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = str(error).replace("allow_outside=True", "--allow-outside")
        for name in names:
            reason = reason.replace(f"raise {name}", f"raise --{name.replace('_', '-')}")
        raise UsageError(f"argument {flag}: {reason}") from error
