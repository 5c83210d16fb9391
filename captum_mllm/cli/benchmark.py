"""``captum-mllm benchmark``: methods scored on annotated pictures, in a run that can go on."""

import argparse
import ast
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_mllm.cli.arguments import (
    SHIPPED,
    UsageError,
    add_model,
    positive_int,
    printable,
    say,
    text,
)
from captum_mllm.model.loading import PROMPT, load_model

if TYPE_CHECKING:
    from captum_mllm.benchmark import Settings
    from captum_mllm.data.coco import CocoDataset
    from captum_mllm.data.label_maps import LabelMapDataset


def add_benchmark(commands: Any) -> None:
    """Add the command to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
    """
    parser = commands.add_parser(
        "benchmark",
        help="score methods on annotated pictures",
        description="Explain a model's answers about annotated pictures with several methods, "
        "score the maps against the masks and the model, and write a table with 95 % intervals. "
        "Each result is on the disk before the next is begun: the same command goes on where it "
        "was stopped.",
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
        "anno.json (label images, as TAM's GranDf and OpenPSG)",
    )
    add("--images", type=Path, metavar="DIR", help="COCO's format in other places: pictures")
    add("--instances", type=Path, metavar="FILE", help="likewise: masks")
    add("--captions", type=Path, metavar="FILE", help="likewise: captions; may be left out")
    add("--limit", type=positive_int, metavar="N", help="only the first N pictures")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; made if missing")


def _add_measures(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--methods", type=_names, default=("lens", "tam", "msea+arc"), metavar="NAME,NAME,...",
        help="default: lens,tam,msea+arc; a wrong name lists all")  # fmt: skip
    add("--metrics", type=_names, default=("obj_iou", "func_iou", "f1_iou"),
        metavar="NAME,NAME,...",
        help="default: obj_iou,func_iou,f1_iou; a wrong name lists all")  # fmt: skip
    add("--against", metavar="NAME", help="method to subtract from others; default: the first")
    add("--option", type=_option, action="append", default=[], metavar="METHOD.NAME=VALUE",
        help="an option of a method, e.g. msea+arc.scales=1,1.5; may be repeated")  # fmt: skip
    add("--prompt", type=text, default=PROMPT, metavar="TEXT",
        help=f"what to ask about every picture; default: {PROMPT!r}")  # fmt: skip
    add("--answers", choices=("own", "captions"), default="own",
        help="explain the model's own answer (default) or the first caption")  # fmt: skip
    add("--categories", choices=("auto", "coco", "data", "picture"), default="auto",
        help="what words may name; default: coco if the data's names are COCO's")  # fmt: skip
    add("--parity", action="store_true", help="reproduce known defects of TAM's evaluation")
    add("--steps", type=positive_int, default=64, metavar="N",
        help="steps of insertion and deletion; default: 64")  # fmt: skip
    add("--baseline", choices=("black", "mean", "blur"), default="black",
        help="what removed pixels show; default: black")  # fmt: skip
    add("--scored-tokens", choices=("objects", "all"), default="objects",
        help="tokens that insertion and its like score; default: objects")  # fmt: skip
    add("--perturbations-per-eval", type=positive_int, default=1, metavar="N",
        help="changed pictures in one forward; default: 1")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of methods that draw; default: 0")
    add("--retry-failed", action="store_true", help="do samples again that failed before")


def _names(given: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in given.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between, got {given!r}")
    return names


def _option(given: str) -> tuple[str, str, Any]:
    """Method, name and value; a value that is no Python literal is taken as text."""
    place, equals, value = given.partition("=")
    method, dot, name = place.partition(".")
    if not (equals and dot and method and name and value):
        raise argparse.ArgumentTypeError(f"must be METHOD.NAME=VALUE, got {given!r}")
    try:
        return method, name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return method, name, value


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Args:
        args: of the command line.

    Raises:
        UsageError: a mistake of the user.
        KeyboardInterrupt: with a line on how to go on.
    """
    from captum_mllm.benchmark import run_benchmark
    from captum_mllm.files import check_folder

    settings = _settings(args)
    data = _data(args)
    try:
        check_folder(args.out)
    except OSError as error:
        raise UsageError(f"argument --out: {error}; choose another folder") from error
    say(f"loading {args.model or SHIPPED} ...")
    model, processor, note = load_model(args.model, args.dtype, args.device)
    if note:
        say(note)
    about = {
        "model": args.model or "shipped",
        "paths": {
            name: str(value)
            for name in ("data", "images", "instances", "captions")
            if (value := getattr(args, name)) is not None
        },
    }
    try:
        found = run_benchmark(
            model, processor, data, args.out, settings,
            about=about, retry_failed=args.retry_failed, show_progress=True,
        )  # fmt: skip
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(
            f"but what is done is in {args.out}: the same command goes on from there"
        ) from stopped
    except ImportError as error:
        raise UsageError(f"argument --metrics: {error}") from error
    except OSError as error:
        raise UsageError(f"argument --out: can't write there ({error})") from error
    except ValueError as error:
        raise _named(error, "--out") from error
    print(printable(found.table, sys.stdout), end="")
    say(f"wrote benchmark.json, benchmark.md and samples.jsonl in {args.out}")


def _settings(args: argparse.Namespace) -> "Settings":
    from captum_mllm.benchmark import Settings

    options: dict[str, dict[str, Any]] = {}
    for method, name, value in args.option:
        options.setdefault(method, {})[name] = value
    taken = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    try:
        return Settings(**taken, options=options)
    except ValueError as error:
        raise _named(error, "--methods") from error


def _named(error: ValueError, otherwise: str) -> UsageError:
    """The library's message begins with the argument's name; the line with the flag's."""
    first = str(error).split("=")[0].split(":")[0].split(" ")[0]
    flags = {"options": "--option", "out": "--out", "data": "--data", "limit": "--limit"}
    known = ("methods", "metrics", "against", "categories", "prompt", "steps")
    flags |= {name: f"--{name}" for name in known}
    return UsageError(f"argument {flags.get(first, otherwise)}: {error}")


def _data(args: argparse.Namespace) -> "CocoDataset | LabelMapDataset":
    from captum_mllm.data.coco import CocoDataset
    from captum_mllm.data.label_maps import FILE, LabelMapDataset

    parts = [args.images, args.instances, args.captions]
    if (args.data is not None) == any(parts) or (args.data is None and not all(parts[:2])):
        raise UsageError(
            "arguments --data or, for COCO, --images and --instances: give one of both"
        )
    flag = "--data" if args.data is not None else "--images, --instances or --captions"
    try:
        if args.data is None:
            return CocoDataset(*(path for path in parts if path is not None))
        if (args.data / FILE).is_file():
            return LabelMapDataset(args.data)
        said = args.data / "captions.json"
        files = [args.data / "images", args.data / "instances.json"]
        if not files[1].is_file():
            raise FileNotFoundError(
                f"{str(args.data)!r} holds neither instances.json nor {FILE}; give a folder that "
                "does, or --images and --instances"
            )
        return CocoDataset(*files, *([said] if said.is_file() else []))
    except ImportError as error:
        raise UsageError(str(error)) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"argument {flag}: {error}") from error
