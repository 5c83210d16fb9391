"""The command line: ``captum-mllm explain`` and ``captum-mllm benchmark``.

Everything that the package prints is printed here: progress on stderr, the table on stdout.
Mistakes of the user end with one line on stderr that names the argument, and exit code 2.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from captum_mllm import __version__
from captum_mllm.cli.arguments import (
    SHIPPED,
    UsageError,
    add_model,
    positive,
    printable,
    say,
    text,
)
from captum_mllm.cli.benchmark import add_benchmark
from captum_mllm.model.loading import load_model, prepare_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from captum_mllm.attr import TokenAttribution
    from captum_mllm.result import MLLMAttributionResult
from captum_mllm.cli.explain import DEMO_SCENE, METHODS, PRESET_NAMES


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; a usage text of ten lines hides it."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; default those of the process.

    Returns:
        Exit code: 0, or 2 for a mistake in the arguments, 130 if interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except UsageError as error:
        line = " ".join(str(error).split())
        print(printable(f"captum-mllm {args.command}: error: {line}", sys.stderr), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        say(f"interrupted, {stopped or 'nothing was written'}")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="captum-mllm", description="Explain multimodal large language models.")
    parser.add_argument("--version", action="version", version=f"captum-mllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="show where each word of an answer looked, and which words led to it",
        description="Ask a multimodal model about a picture and write, for every word of its "
        "answer, where in the picture it looked and which words led to it. Writes index.html, an "
        "overlay per content word (PNG), a text heat map (HTML, PNG) and a table; prints the "
        "table.",
    )
    explain.set_defaults(run=_explain)
    _add_inputs(explain)
    _add_method(explain)
    add_benchmark(commands)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--image",
        type=Path,
        metavar="FILE",
        nargs="+",
        action="extend",
        help="the picture, or several",
    )
    add(
        "--prompt",
        type=text,
        metavar="TEXT",
        help="what to ask; the model's chat template is put around it",
    )
    add("--demo", action="store_true", help="a held-out scene of the shipped model; no --image")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; made if missing")
    add(
        "--target",
        type=text,
        metavar="TEXT",
        help="explain this answer instead of the model's own",
    )
    add_model(parser)


def _add_method(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--method", choices=METHODS, default="msea+arc", help="default: msea+arc")
    add(
        "--scales",
        type=_scales,
        metavar="S,S,...",
        help="sizes of the picture that msea looks at, e.g. 1,1.5; default: the preset's",
    )
    add(
        "--layer", type=int, default=-1, metavar="N", help="LM layer to read; default: -1, the last"
    )
    add(
        "--alpha-max",
        type=positive,
        metavar="A",
        help="bound of how strongly tam and arc subtract context; default: the preset's, tam none",
    )
    add(
        "--preset",
        choices=PRESET_NAMES,
        help="options of msea and arc that are left out: measured (default; what did best on "
        "validation scenes) or paper (the plain published idea)",
    )
    add("--save-result", action="store_true", help="also write result.safetensors")


def _scales(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"must be positive numbers like 1,1.25,1.5, got {text!r}")
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"must be distinct, got {text!r}")
    return values


def _explain(args: argparse.Namespace) -> None:
    from captum_mllm.files import check_folder

    if args.demo and (args.image or args.prompt or args.model):
        raise UsageError("argument --demo: brings its own picture, prompt and model; leave it out")
    if not args.demo and not (args.image and args.prompt):
        raise UsageError("arguments --image and --prompt are both needed (or --demo alone)")
    if args.scales and "msea" not in args.method:
        raise UsageError("argument --scales: only msea and msea+arc look at several scales")
    if args.preset and args.method in ("lens", "tam"):
        raise UsageError("argument --preset: only msea, arc and msea+arc have presets")
    if args.alpha_max is not None and args.method in ("lens", "msea"):
        raise UsageError("argument --alpha-max: only tam, arc and msea+arc subtract context")
    try:
        check_folder(args.out)
    except OSError as error:
        raise UsageError(f"argument --out: {error}; choose another folder") from error
    if args.demo:
        picture, prompt = _demo_scene()
        pictures = [picture]
    else:
        pictures, prompt = [_picture(path) for path in args.image], args.prompt
    say(f"loading {args.model or SHIPPED} ...")
    model, processor, note = load_model(args.model, args.dtype, args.device)
    inputs, assumed = prepare_inputs(processor, pictures, prompt)
    notes = [line for line in (note, assumed) if line]
    for line in notes:
        say(line)
    result = _attribute(args, model, processor, inputs)
    _write(args, result, pictures, prompt, [f"Model: {args.model or SHIPPED}.", *notes])


def _write(
    args: argparse.Namespace,
    result: "MLLMAttributionResult",
    pictures: "Sequence[Image]",
    prompt: str,
    notes: Sequence[str],
) -> None:
    """One picture: a report in the folder. Several: one each in image-1, image-2, ..."""
    from captum_mllm.files import filled_folder
    from captum_mllm.visualization import answer_text, format_table, write_report

    several = len(pictures) > 1
    say("drawing ...")
    summaries = []
    try:
        with filled_folder(args.out) as folder:
            for n, picture in enumerate(pictures):
                own = folder / f"image-{n + 1}" if several else folder
                own.mkdir(exist_ok=True)
                about = [f"Picture {n + 1} of {len(pictures)}: {args.image[n]}."] if several else []
                lines = [*about, *notes]
                seen = replace(result, grid_attr=(result.grid_attr[n],), grids=(result.grids[n],))
                summaries.append(write_report(own, seen, picture, prompt=prompt, notes=lines))
            if args.save_result:
                result.save(folder / "result.safetensors")
    except OSError as error:
        raise UsageError(f"argument --out: can't write there ({error})") from error
    lines = f"prompt: {prompt}\nanswer: {answer_text(result)}\n"
    for n, summary in enumerate(summaries):
        title = f"image {n + 1}: {args.image[n]}\n" if several else ""
        lines += f"\n{title}{format_table(summary)}\n"
    print(printable(lines, sys.stdout))
    if any(summary.assumed for summary in summaries):
        say("assumed: the model saw the whole picture (the processor's crop is not known)")
    files = sum(path.is_file() for path in args.out.rglob("*"))
    pages = args.out / ("image-1" if several else "") / "index.html"
    say(f"wrote {pages} and {files - 1} files beside it")


def _demo_scene() -> "tuple[Image, str]":
    from captum_mllm.reference.captions import DEFAULT_QUESTION
    from captum_mllm.reference.render import render_pil
    from captum_mllm.reference.scenes import make_scene

    scene = make_scene(DEMO_SCENE, "test")
    say(f"demo: scene {DEMO_SCENE} of the test split, held out: {', '.join(scene.categories)}")
    return render_pil(scene)[0], DEFAULT_QUESTION


def _picture(path: Path) -> "Image":
    from captum_mllm.data.pictures import open_picture

    try:
        return open_picture(path)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"argument --image: {error}") from error


def _attribute(
    args: argparse.Namespace, model: Any, processor: Any, inputs: Any
) -> "MLLMAttributionResult":
    say(f"explaining with {args.method} ...")
    try:
        return _attributor(args, model, processor).attribute(
            inputs.to(model.device, model.dtype),
            args.target,
            gen_args={"max_new_tokens": args.max_new_tokens},
            show_progress=True,
        )
    except ValueError as error:  # the library's messages begin with the argument's name
        name = re.match(r"(scales|layer|target|input_ids)\b", str(error))
        named = {"input_ids": "prompt"}
        flag = f"--{named.get(name[1], name[1])}" if name else "--model or --prompt"
        raise UsageError(f"argument {flag}: {error}") from error


def _attributor(args: argparse.Namespace, model: Any, processor: Any) -> "TokenAttribution":
    from captum_mllm import ARC, MSEA, LogitLens, TokenActivationMap

    lens = LogitLens(model, processor, args.layer)
    multi: dict[str, Any] = {"preset": args.preset or "measured"}
    arc: dict[str, Any] = {"preset": args.preset or "measured"}
    if args.scales is not None:
        multi["scales"] = args.scales
    if args.alpha_max is not None:
        arc["alpha_max"] = args.alpha_max
    found: dict[str, TokenAttribution] = {
        "lens": lens,
        "tam": TokenActivationMap(lens, alpha_max=args.alpha_max),
        "msea": MSEA(lens, **multi),
        "arc": ARC(lens, **arc),
        "msea+arc": ARC(MSEA(lens, **multi), **arc),
    }
    return found[args.method]
