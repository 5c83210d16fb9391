"""``captum-mllm explain``: one answer about a picture, explained word by word in a folder."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_mllm.cli.arguments import (
    SHIPPED,
    UsageError,
    WriteError,
    add_max_pixels,
    add_model,
    add_out,
    check_out,
    load,
    option,
    positive,
    print_progress,
    printable,
    read_pictures,
    text,
    usage_error,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from captum_mllm.result import MLLMAttributionResult


DEMO_SCENE = 23  # three objects, among them a noun of two words; fixed before training


_SHORT = ("scales", "layer", "alpha_max")  # options with a flag of their own


_ALWAYS = ("seed", "steps")  # arguments of methods.explain that any method accepts


_FLAGS = (
    *("--image", "--prompt", "--target", "--model", "--dtype", "--device", "--max-new-tokens"),
    *("--method", "--scales", "--layer", "--alpha-max", "--option"),
)


def add_explain(commands: Any) -> None:
    """Add the command to the parser.

    Args:
        commands: returned by ``add_subparsers``.
    """
    parser = commands.add_parser(
        "explain",
        help="show which image regions support each word of an answer, and which words led to it",
        description="Ask a multimodal model about a picture and write, for every word of its "
        "answer, which image regions support it and which words led to it. Writes index.html, one "
        "page that can be mailed as it is, words.json and a table; prints the table.",
    )
    parser.set_defaults(run=run)
    _add_inputs(parser)
    _add_method(parser)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image", type=Path, metavar="FILE", nargs="+", action="extend",
        help="the picture, or several")  # fmt: skip
    add_max_pixels(add)
    add("--prompt", type=text, metavar="TEXT",
        help="what to ask; the model's chat template is applied to it")  # fmt: skip
    add("--demo", action="store_true",
        help="explain a held-out scene of the shipped model; takes no --image")  # fmt: skip
    add_out(parser)
    add("--force", action="store_true",
        help="replace files in --out that no report of captum-mllm wrote")  # fmt: skip
    add("--target", type=text, metavar="TEXT",
        help="explain this answer instead of the model's own")  # fmt: skip
    add_model(parser)


def _add_method(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--method", default="msea+arc", metavar="NAME",
        help="default: msea+arc; a wrong name lists all")  # fmt: skip
    add("--scales", type=_scales, metavar="S,S,...",
        help="short form of an option: image sizes to aggregate over, e.g. 1,1.5")  # fmt: skip
    add("--layer", type=int, metavar="N",
        help="short form of an option: the language model's layer to read, e.g. -1")  # fmt: skip
    add("--alpha-max", type=positive, metavar="A",
        help="short form of an option: bound on how strongly context is subtracted")  # fmt: skip
    add("--option", type=option, action="append", default=[], metavar="NAME=VALUE",
        help="an option of the method, e.g. top_k=20 (or msea+arc.top_k=20, as for benchmark); "
        "may be repeated; a wrong name lists all")  # fmt: skip
    add("--compare", type=_names, default=("lens", "random"), metavar="NAME,NAME,...",
        help="further methods to switch to on the page, or none; default: lens,random")  # fmt: skip
    add("--save-result", action="store_true", help="also write result.safetensors")


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


def _scales(text: str) -> tuple[float, ...]:
    from captum_mllm.validation import MAX_SCALE

    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"must be positive numbers like 1,1.25,1.5, got {text!r}")
    if max(values) > MAX_SCALE:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_SCALE:g}, got {text!r}")
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"must be distinct, got {text!r}")
    return values


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Args:
        args: of the command line.

    Raises:
        UsageError: a mistake of the user.
        WriteError: the folder can't be written.
    """
    from captum_mllm.model.loading import prepare_inputs

    if args.demo and (args.image or args.prompt or args.model):
        raise UsageError("argument --demo: brings its own picture, prompt and model; leave it out")
    if not args.demo and not (args.image and args.prompt):
        raise UsageError("arguments --image and --prompt are both needed (or --demo alone)")
    options = _options(args)
    _check_compared(args.compare)
    check_out(args.out)
    _check_foreign(args)
    if args.demo:
        picture, prompt = demo_scene()
        pictures, changed = [picture], []
    else:
        (pictures, changed), prompt = read_pictures(args.image, args.max_pixels), args.prompt
    model, processor, note = load(args)
    try:
        inputs, assumed = prepare_inputs(processor, pictures, prompt)
    except ValueError as error:
        raise usage_error(error, _FLAGS, "--prompt") from error
    notes = [line for line in (*changed, note, assumed) if line]
    for line in notes:
        print_progress(line)
    results = _attribute(args, model, processor, inputs, pictures, options)
    print_progress("drawing ...")
    _write(args, results, pictures, prompt, notes, _facts(args, model, options))


def _check_foreign(args: argparse.Namespace) -> None:
    from captum_mllm.files import check_foreign

    try:
        check_foreign(args.out, force=args.force)
    except FileExistsError as error:
        raise UsageError(
            f"argument --out: {error}; name another folder, or add --force to replace them"
        ) from error


def _check_compared(names: Sequence[str]) -> None:
    from captum_mllm.methods.registry import find_method

    for name in names:
        try:
            needs = find_method(name).needs
        except ValueError as error:
            raise UsageError(f"argument --compare: {error}") from error
        if needs is not None:
            raise UsageError(f"argument --compare: {name} needs {needs}")


def _facts(args: argparse.Namespace, model: Any, options: dict[str, Any]) -> Mapping[str, str]:
    """Where the maps come from, for the page's foot."""
    from captum_mllm.visualization import describe

    settings = {"method": args.method, "max_new_tokens": args.max_new_tokens, **options}
    return describe(
        model,
        name=args.model or SHIPPED,
        folder=getattr(model.config, "_name_or_path", None),
        images=args.image or (),
        settings=settings,
        command=["captum-mllm", *args.words],
    ).facts


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The method's options, each checked to be one that it takes."""
    from captum_mllm.methods.registry import check_options, find_method

    try:
        needs = find_method(args.method).needs
    except ValueError as error:
        raise usage_error(error, _FLAGS, "--method") from error
    if needs is not None:
        raise UsageError(
            f"argument --method: {args.method} needs {needs}, which only annotated pictures have; "
            f"use captum-mllm benchmark, or another method"
        )
    options: dict[str, Any] = {}
    short = {name: getattr(args, name) for name in _SHORT if getattr(args, name) is not None}
    flags = [(f"--{name.replace('_', '-')}", "", name, value) for name, value in short.items()]
    flags += [("--option", *one) for one in args.option]
    for flag, method, name, value in flags:
        if method not in ("", args.method):
            raise UsageError(
                f"argument {flag}: {method}.{name} is not an option of --method {args.method}"
            )
        if name in options:
            raise UsageError(f"argument {flag}: {name} is given twice")
        try:
            check_options(args.method, [name], always=_ALWAYS)
        except TypeError as error:
            raise UsageError(f"argument {flag}: {error}") from error
        options[name] = value
    return options


def _attribute(
    args: argparse.Namespace,
    model: Any,
    processor: Any,
    inputs: Any,
    pictures: "Sequence[Image]",
    options: dict[str, Any],
) -> "dict[str, MLLMAttributionResult]":
    """The result of the method, and of those to compare it with, of the same answer."""
    from captum_mllm.adapters import find_adapter
    from captum_mllm.methods import explain
    from captum_mllm.model.discovery import discover

    print_progress(f"explaining with {args.method} ...")
    # A wrong option may be of a wrong type; without options a TypeError is not the user's.
    errors = (ValueError, TypeError) if options else ValueError
    inputs = inputs.to(model.device, model.dtype)
    try:
        discover(find_adapter(model), processor, inputs, pictures)
        first = explain(
            args.method,
            model,
            processor,
            inputs,
            args.target,
            gen_args={"max_new_tokens": args.max_new_tokens},
            show_progress=True,
            **options,
        )
    except errors as error:
        raise usage_error(error, _FLAGS, _flags_to_blame(args)) from error
    results = {args.method: first}
    for name in args.compare:
        if name in results:
            continue
        print_progress(f"comparing with {name} ...")
        try:
            results[name] = explain(name, model, processor, inputs, first.output_ids)
        except (ValueError, RuntimeError) as error:  # the answer is explained: don't lose that
            line = " ".join(str(error).split())
            print_progress(f"{name} is left out of the comparison: {line}")
    return results


def _flags_to_blame(args: argparse.Namespace) -> str:
    """The flags that an error without the name of an argument may come from."""
    short = [f"--{name.replace('_', '-')}" for name in _SHORT if getattr(args, name) is not None]
    target = ["--target"] if args.target else []
    options = ["--option"] if args.option else []
    return f"{', '.join([*short, *options, *target, '--model'])} or --prompt"


def _write(
    args: argparse.Namespace,
    results: "Mapping[str, MLLMAttributionResult]",
    pictures: "Sequence[Image]",
    prompt: str,
    notes: Sequence[str],
    facts: Mapping[str, str],
) -> None:
    from captum_mllm.files import filled_folder
    from captum_mllm.pictures import shown_name
    from captum_mllm.visualization import answer_table, answer_text, write_report

    titles = [shown_name(path) for path in args.image or ()]
    result = results[args.method]
    try:
        with filled_folder(args.out, force=args.force) as folder:
            contents = write_report(
                folder, results, pictures, prompt=prompt, notes=notes, titles=titles, facts=facts
            )
            if args.save_result:
                result.save(folder / "result.safetensors")
    except OSError as error:
        raise WriteError(
            f"{args.out} can't be written ({error}); make room, or name another --out"
        ) from error
    some = any(word.content for word in contents.words)
    table = answer_table(result, pictures, titles, content_only=some)
    answer = f"prompt: {prompt}\nanswer: {answer_text(result)}\n\n{table}\n"
    print(printable(answer, sys.stdout))
    if any(picture.assumed for picture in contents.pictures):
        print_progress(
            "assumed: the model saw the whole picture (the processor's crop is not known)"
        )
    print_progress(f"wrote {args.out / 'index.html'}: one page, to be opened or mailed as it is")


def demo_scene() -> "tuple[Image, str]":
    """The picture of the demo, and what to ask about it."""
    from captum_mllm.reference.captions import DEFAULT_QUESTION
    from captum_mllm.reference.render import render_pil
    from captum_mllm.reference.scenes import make_scene

    scene = make_scene(DEMO_SCENE, "test")
    print_progress(
        f"demo: scene {DEMO_SCENE} of the test split, held out: {', '.join(scene.categories)}"
    )
    return render_pil(scene)[0], DEFAULT_QUESTION
