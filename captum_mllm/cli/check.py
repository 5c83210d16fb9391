"""``captum-mllm check``: what explanations of a model rest on, measured on the model itself."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_mllm.cli.arguments import (
    SHIPPED,
    UsageError,
    WriteError,
    add_max_pixels,
    add_model,
    load,
    print_progress,
    printable,
    read_pictures,
    text,
    usage_error,
)
from captum_mllm.cli.explain import demo_scene

if TYPE_CHECKING:
    from captum_mllm.checking import Finding

_FLAGS = ("--image", "--prompt", "--model", "--dtype", "--device", "--max-new-tokens", "--only")


def add_check(commands: Any) -> None:
    """Add the command to the parser.

    Args:
        commands: returned by ``add_subparsers``.
    """
    parser = commands.add_parser(
        "check",
        help="measure on a model what its explanations rest on",
        description="Check a model and its processor on this machine: where the image tokens lie "
        "(by repainting cells of the picture), whether the lens is the model's head, whether one "
        "forward gives what generate computed, and so on. Prints a line for each with its figures, "
        "a verdict (passed, failed, not tried) and what to do. Exit code 0: nothing failed; 1: "
        "something failed; 2: it could not start.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--image", type=Path, metavar="FILE",
        help="a picture of the kind that you want to explain; default: a drawn scene")  # fmt: skip
    add_max_pixels(add)
    add("--prompt", type=text, metavar="TEXT",
        help="what to ask about it; default: what is in the picture?")  # fmt: skip
    add("--only", type=_names, metavar="NAME,NAME,...",
        help="check these lines only; default: all; a wrong name lists all")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    add("--out", type=Path, metavar="PAGE.html", help="also write the report as one page")
    add_model(parser)
    parser.set_defaults(max_new_tokens=24)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: of the command line.

    Returns:
        Exit code: 0 if nothing failed, else 1.

    Raises:
        UsageError: a mistake of the user: the check could not start.
        WriteError: the report can't be written.
    """
    from captum_mllm.checking import check

    for flag, path in (("--json", args.json), ("--out", args.out)):
        _check_file(flag, path)
    picture, prompt = _picture(args), args.prompt
    if args.model is None and picture is None:  # the shipped model knows drawn scenes: its own kind
        picture, question = demo_scene()
        prompt = prompt or question
    model, processor, note = load(args)
    if note:
        print_progress(note)
    try:
        report = check(
            model,
            processor,
            picture,
            prompt,
            max_new_tokens=args.max_new_tokens,
            only=args.only,
            on_line=_print_line,
        )
    except (ValueError, TypeError) as error:
        raise usage_error(error, _FLAGS, "--model") from error
    print(printable(f"{args.model or SHIPPED}\n{report}", sys.stdout))
    for flag, path, write in (
        ("--json", args.json, report.save),
        ("--out", args.out, report.to_html),
    ):
        if path is None:
            continue
        try:
            write(path)
        except OSError as error:
            raise WriteError(f"{flag} {path} can't be written ({error})") from error
        print_progress(f"wrote {path}")
    return 0 if report.passed else 1


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _print_line(finding: "Finding") -> None:
    print_progress(f"{finding.name}: {finding.verdict} ({finding.seconds:.1f} s)")


def _picture(args: argparse.Namespace) -> Any:
    if args.image is None:
        return None
    (picture,), notes = read_pictures([args.image], args.max_pixels)
    for line in notes:
        print_progress(line)
    return picture


def _check_file(flag: str, path: Path | None) -> None:
    """Raise before anything runs if a file can't be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(
            f"argument {flag}: {path} must be a file in a folder that exists; make the folder first"
        )
