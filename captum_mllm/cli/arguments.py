"""What the commands share: arguments of the model, kinds of arguments, and how things are said."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


DTYPES = ("auto", "float32", "bfloat16", "float16")


SHIPPED = "the small model that comes with captum_mllm (it knows synthetic scenes only)"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model runs, where, and for how long.

    Args:
        parser: of the command.
    """
    add = parser.add_argument
    add("--model", metavar="ID_OR_PATH", help=f"hub id or folder; default: {SHIPPED}")
    add("--max-new-tokens", type=positive_int, default=128, metavar="N", help="default: 128")
    add("--dtype", choices=DTYPES, default="auto", help="default: auto, the checkpoint's own")
    add("--device", metavar="NAME", help="e.g. cpu, cuda:1; default: cuda if there is one")


def text(given: str) -> str:
    """A text that is not empty.

    Args:
        given: the argument.
    """
    if not given.strip():
        raise argparse.ArgumentTypeError("is empty")
    return given


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


def say(text: str) -> None:
    """A line on stderr.

    Args:
        text: what to say.
    """
    print(printable(f"captum-mllm: {text}", sys.stderr), file=sys.stderr, flush=True)


def printable(text: str, stream: Any) -> str:
    """Text that the stream's encoding can show; the rest as escapes.

    Args:
        text: to print.
        stream: where to.
    """
    encoding = getattr(stream, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class UsageError(Exception):
    """A mistake of the user, as one line."""
