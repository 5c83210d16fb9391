"""The command line: ``captum-mllm explain``, ``captum-mllm benchmark`` and ``captum-mllm check``.

Everything that the package prints is printed by this folder: progress on stderr, tables on stdout.
Mistakes of the user end with one line on stderr that names the argument, and exit code 2; what
can't be written, as when the disk is full, ends with one line and exit code 1.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from captum_mllm import __version__
from captum_mllm.cli.arguments import UsageError, WriteError, print_progress, printable
from captum_mllm.cli.benchmark import add_benchmark
from captum_mllm.cli.check import add_check
from captum_mllm.cli.explain import add_explain


class _Parser(argparse.ArgumentParser):
    """Prints a mistake as one line, which a usage text of ten lines would hide."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; default those of the process.

    Returns:
        Exit code: 0, or 1 where a check failed, nothing was measured or something can't be
        written, 2 for a mistake in the arguments, 130 if interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()  # while a failure still has an exit code
    except UsageError as error:
        _print_error(args, error)
        return 2
    except WriteError as error:
        _print_error(args, error)
        return 1
    except OSError as error:  # of standard output, as all files are written above
        _print_error(args, error)
        _drop_output()
        return 1
    except KeyboardInterrupt as stopped:
        print_progress(f"interrupted, {stopped or 'nothing was written'}")
        return 130
    return code or 0


def _print_error(args: argparse.Namespace, error: Exception) -> None:
    line = " ".join(str(error).split())
    print(printable(f"captum-mllm {args.command}: error: {line}", sys.stderr), file=sys.stderr)


def _drop_output() -> None:
    """Let what was printed and can't be written not fail once more when the interpreter ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="captum-mllm", description="Explain multimodal large language models.")
    parser.add_argument("--version", action="version", version=f"captum-mllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_explain(commands)
    add_benchmark(commands)
    add_check(commands)
    return parser
