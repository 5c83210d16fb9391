"""What the commands share: arguments of the model and methods, printing, and mistakes of users."""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


SHIPPED = "the small model shipped with captum_mllm (it knows synthetic scenes only)"


# The flag of each argument of the library whose name differs from the flag's.
_FLAGS = {
    "name": "--model",
    "processor": "--model",
    "pictures": "--image",
    "input_ids": "--prompt",
    "options": "--option",
    "gen_args": "--max-new-tokens",
}


class UsageError(Exception):
    """A mistake of the user, as one line that names the flag."""


class WriteError(Exception):
    """Results that can't be written, e.g. because the disk is full: one line, exit code 1."""


def usage_error(error: Exception, flags: Sequence[str], otherwise: str) -> UsageError:
    """A library's error as a mistake of the user.

    Args:
        error: the library's; its ``argument``, if it has one, tells the flag.
        flags: the command's flags.
        otherwise: the flags that may be to blame if the error names no argument.
    """
    argument = getattr(error, "argument", None)
    problem = str(error).replace("trust_remote_code=True", "--trust-remote-code")
    if argument is None:
        return UsageError(f"argument {otherwise}: {problem}")
    flag = _FLAGS.get(argument, f"--{argument.replace('_', '-')}")
    if flag not in flags:
        return UsageError(f"argument --option: {problem}")
    return UsageError(f"argument {flag}: {problem.removeprefix(argument).lstrip()}")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the model, its device and the length of its answers.

    Args:
        parser: the command's parser.
    """
    add = parser.add_argument
    add("--model", metavar="ID_OR_PATH", help=f"hub id or folder; default: {SHIPPED}")
    add("--max-new-tokens", type=positive_int, default=128, metavar="N",
        help="length of the generated answer at most; default: 128")  # fmt: skip
    add("--dtype", choices=DTYPES, default="auto", help="default: auto, the checkpoint's own")
    add("--device", metavar="NAME", help="e.g. cpu, cuda:1; default: cuda if there is one")
    add("--trust-remote-code", action="store_true",
        help="DANGEROUS: run Python files that the model's folder or repository brings; they can "
        "do all that you can do. Off by default: such models are refused")  # fmt: skip


def add_max_pixels(add: Any) -> None:
    """Add the argument that bounds the size of pictures.

    Args:
        add: the parser's ``add_argument``.
    """
    add("--max-pixels", type=positive_int, metavar="N",
        help="refuse pictures of more pixels, height times width; default: Pillow's limit, "
        "89478485")  # fmt: skip


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the folder to write.

    Args:
        parser: the command's parser.
    """
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder to write; created if it is missing",
    )  # fmt: skip


def option(text: str) -> tuple[str, str, Any]:
    """Method ("" if it is left out), name and value of ``METHOD.NAME=VALUE``.

    A value that is not a Python literal is taken as text.

    Args:
        text: the argument.
    """
    place, equals, value = text.partition("=")
    method, dot, name = place.rpartition(".")
    if not (equals and name and value) or (dot and not method):
        raise argparse.ArgumentTypeError(f"must be METHOD.NAME=VALUE, got {text!r}")
    try:
        return method, name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return method, name, value


def text(value: str) -> str:
    """A text that is not empty, and UTF-8 as the terminal gave it.

    Args:
        value: the argument.
    """
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = value.encode("utf-8", "backslashreplace").decode("utf-8")
        raise argparse.ArgumentTypeError(f"is not UTF-8 text: {shown!r}") from error
    return value


def positive_int(text: str) -> int:
    """A whole number of at least 1.

    Args:
        text: the argument.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0.

    Args:
        text: the argument.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def check_out(folder: Path) -> None:
    """Raise unless a folder can be written.

    Args:
        folder: the argument ``--out``.

    Raises:
        UsageError: it can't.
    """
    from captum_mllm.files import check_folder

    try:
        check_folder(folder)
    except OSError as error:
        raise UsageError(f"argument --out: {error}; choose another folder") from error


def load(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The model and processor that the arguments name, and a note on how they were loaded, or "".

    Args:
        args: with those of :func:`add_model`.

    Raises:
        UsageError: they can't be loaded.
    """
    from captum_mllm.model.loading import load_model

    if args.trust_remote_code:
        print_progress(
            f"WARNING: --trust-remote-code: Python files of {args.model or SHIPPED} are run with "
            "all your rights; stop now unless you have read them"
        )
    print_progress(f"loading {args.model or SHIPPED} ...")
    name, dtype = args.model, args.dtype
    if name is None:
        from captum_mllm.reference.models import model_path

        name = str(model_path())
        dtype = "float32" if dtype == "auto" else dtype  # its weights are stored as float16
    try:
        return load_model(name, dtype, args.device, trust_remote_code=args.trust_remote_code)
    except (ValueError, OSError) as error:
        raise usage_error(error, ("--model", "--dtype", "--device"), "--model") from error


def read_pictures(paths: Sequence[Path], max_pixels: int | None) -> tuple[list[Any], list[str]]:
    """The pictures of ``--image``, and sentences on what was left out or changed.

    Args:
        paths: the files.
        max_pixels: the argument ``--max-pixels``.

    Raises:
        UsageError: a file can't be read; the error names it.
    """
    from captum_mllm.pictures import read_picture

    pictures, notes = [], []
    for path in paths:
        try:
            picture, more = read_picture(path, max_pixels)
        except (OSError, ValueError) as error:
            reason = str(error).replace("max_pixels", "--max-pixels")
            raise UsageError(f"argument --image: {reason}") from error
        pictures.append(picture)
        notes += more
    return pictures, notes


def print_progress(line: str) -> None:
    """Print a line on stderr.

    Args:
        line: the line.
    """
    print(printable(f"captum-mllm: {line}", sys.stderr), file=sys.stderr, flush=True)


def printable(text: str, stream: Any) -> str:
    """Text that the stream's encoding can show; the rest as escapes.

    Args:
        text: to print.
        stream: where to.
    """
    encoding = getattr(stream, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)
