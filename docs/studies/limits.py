"""The pictures of docs/limits.md: where maps mislead, on the shipped reference models.

Usage: ``make study NAME=limits ARGS="[--only NAME ...] [--out docs/images]"``; writes one
small picture per limit (:data:`PICTURES`). Two are drawn from records of this folder, the others
by running the models: some minutes on one core. Needs the extra ``metrics``.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from captum_mllm import ARC, MSEA, LogitLens
from captum_mllm.attr.base import TokenAttribution
from captum_mllm.metrics import average_precision
from captum_mllm.reference.models import load
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import make_scene
from captum_mllm.reference.sets import make_example
from captum_mllm.reference.sprites import CATEGORIES
from captum_mllm.result import MLLMAttributionResult
from captum_mllm.visualization import overlay
from captum_mllm.words import Word, group_words, word_maps
from studies.limits_plots import black, consistency, faithfulness, seams, seeds, wake
from studies.prompts import answer_words, default_inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 112  # the reference models' own size
DRAWN = 224  # at which pictures are shown
DPI = 150

Panel = tuple[str, Image.Image]


def panels(items: Sequence[Panel], columns: int) -> "Figure":
    """Pictures beside each other, large enough for a phone.

    Args:
        items: title and picture of each, row by row.
        columns: pictures in a row.
    """
    from matplotlib.figure import Figure

    rows = -(-len(items) // columns)
    side = 4.6 / columns
    figure = Figure(figsize=(4.6, rows * (side + 0.22)), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, picture) in zip(grid, items, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=8)
    return figure


def large(picture: Image.Image) -> Image.Image:
    """A picture at the size at which it is shown."""
    return picture.resize((DRAWN, DRAWN), Image.Resampling.BICUBIC)


def heat(picture: Image.Image, result: MLLMAttributionResult, word: Word, vmax: float) -> Any:
    """A word's map on its picture; one ``vmax`` for all that are compared."""
    shown = large(picture)
    return overlay(shown, word_maps(result.to_image(0, shown), [word])[0], vmax=vmax)


def marked(picture: Image.Image, mask: Tensor) -> Image.Image:
    """The picture with all but the mask faded."""
    faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.75)
    shape = Image.fromarray(mask.numpy().astype("uint8") * 255).resize(faded.size)
    return large(Image.composite(picture, faded, shape))


def top(*results: MLLMAttributionResult) -> float:
    """The largest value of some results' first images."""
    return max(float(result.grid_attr[0].max()) for result in results)


def nouns(result: MLLMAttributionResult) -> list[Word]:
    """The answer's words that are categories of one word, in order."""
    return [word for word in group_words(result.output_tokens) if word.text in CATEGORIES]


def mentions(result: MLLMAttributionResult, noun: str) -> list[Word]:
    """The answer's words that are that noun, in order."""
    return [word for word in group_words(result.output_tokens) if word.text == noun]


def twins(number: int = 16) -> "Figure":
    """Two of a kind: one raw map for both mentions.

    Args:
        number: example of the set *twins*; its scene has two objects of one kind.
    """
    example = make_example("twins", number)
    model, processor = load()
    picture, masks = render_pil(example.scene, SIDE)
    inputs = default_inputs(processor, picture)
    lens = LogitLens(model, processor).attribute(inputs)
    both = ARC(MSEA(model, processor)).attribute(inputs, target=lens.output_ids)
    names = example.scene.categories
    noun = next(name for name in names if names.count(name) == 2)
    objects = [n for n, name in enumerate(names) if name == noun]
    items = []
    for count, obj, word in zip(("first", "second"), objects, mentions(lens, noun), strict=True):
        before = lens.output_tokens[word.tokens[0] - 1].strip()
        items += [
            (f'"{before} {noun}"', marked(picture, masks[obj])),
            (f"{count} mention: lens", heat(picture, lens, word, top(lens))),
            ("MSEA+ARC", heat(picture, both, word, top(both))),
        ]
    return panels(items, 3)


def made_up(number: int = 14) -> "Figure":
    """A word for something that is not there has a map like any other.

    Args:
        number: example of the set *biased* that breaks the planted rule.
    """
    example = make_example("biased", number)
    model, processor = load("biased")
    picture, _ = render_pil(example.scene, SIDE)
    inputs = default_inputs(processor, picture)
    result = ARC(MSEA(model, processor)).attribute(inputs)
    items = [("the picture", large(picture))]
    cause, absent = example.planted or ("", "")
    seen = [name for name in example.scene.categories if name != cause]
    for noun in (*seen, absent):
        for word in mentions(result, noun):
            p = float(result.output_probs[list(word.tokens)].prod())
            what = "made up" if noun == absent else "seen"
            items.append(
                (f'"{noun}", {what}, p = {p:.2f}', heat(picture, result, word, top(result)))
            )
    return panels(items, 2)


def _panel_of(
    picture: Image.Image, mask: Tensor, name: str, method: TokenAttribution, asked: Any, token: int
) -> Panel:
    """One method's map of a token, its average precision in the title."""
    result = method.attribute(*asked)
    pixels = result.to_image(0, picture)[token]
    found = float(average_precision(pixels, mask))
    word = Word("", (token,), True)
    return f"{name}: AP {found:.2f}", heat(picture, result, word, float(pixels.max()))


def erased(number: int = 4, noun: str = "rocket") -> "Figure":
    """An unbounded alpha subtracts the object itself.

    Args:
        number: scene of the test split.
        noun: one of its objects.
    """
    model, processor = load()
    scene = make_scene(number)
    picture, masks = render_pil(scene, SIDE)
    lens = LogitLens(model, processor)
    trace = lens.trace(default_inputs(processor, picture))
    obj = scene.categories.index(noun)
    token = answer_words(trace, scene)[obj][0]
    asked = (default_inputs(processor, picture), trace.text_ids[trace.n_prompt :])
    methods = {
        "logit lens": lens,
        "published settings": ARC.paper(lens),
        "published, alpha_max=0.25": ARC.paper(lens, alpha_max=0.25),
    }
    items = [
        _panel_of(picture, masks[obj], name, method, asked, token)
        for name, method in methods.items()
    ]
    return panels([(f'"{noun}"', marked(picture, masks[obj])), *items], 2)


def small(number: int = 2, drawn: int = 5) -> "Figure":
    """An object of few cells that is not named, and a way of drawing never seen.

    Args:
        number: example of the set *small*.
        drawn: scene of the test split that is turned into a line drawing.
    """
    model, processor = load()
    example, scene = make_example("small", number), make_scene(drawn)
    picture, masks = render_pil(example.scene, SIDE)
    lines = render_pil(scene, SIDE)[0].convert("L").filter(ImageFilter.CONTOUR).convert("RGB")
    items: list[Panel] = []
    for shown, names, title in (
        (picture, example.scene.categories, "small objects"),
        (lines, scene.categories, f"a {scene.categories[0]} as lines"),
    ):
        result = ARC(MSEA(model, processor)).attribute(default_inputs(processor, shown))
        found = {word.text: word for word in reversed(nouns(result))}
        items.append((title, large(shown)))
        for noun, word in reversed(found.items()):
            p = float(result.output_probs[list(word.tokens)].prod())
            items.append((f'"{noun}" p = {p:.2f}', heat(shown, result, word, top(result))))
        for obj, name in enumerate(names):
            if shown is picture and name not in found:
                items.append((f"{name}: not named", marked(picture, masks[obj])))
    return panels(items, 3)


def mirrored() -> "Figure":
    """What the mirrored view shows where something is written."""
    picture = Image.new("RGB", (DRAWN, DRAWN), (40, 110, 70))
    pen = ImageDraw.Draw(picture)
    pen.text((22, 60), "EXIT", fill="white", font=ImageFont.load_default(72))
    pen.text((60, 140), "Gate 24", fill="white", font=ImageFont.load_default(30))
    views = [("as it is", picture), ("the mirrored view", ImageOps.mirror(picture))]
    return panels(views, 2)


PICTURES: dict[str, Callable[[], "Figure"]] = {
    "twins.jpg": twins,
    "made_up.jpg": made_up,
    "wake.jpg": wake,
    "erased.jpg": erased,
    "small.jpg": small,
    "mirrored.png": mirrored,
    "black.png": black,
    "consistency.png": consistency,
    "seams.jpg": seams,
    "seeds.png": seeds,
    "faithfulness.png": faithfulness,
}
"""File -> what draws it."""


def save(figure: "Figure", path: Path) -> None:
    """Write a figure; JPEG is for photographs of maps, PNG for lines.

    Args:
        figure: the figure.
        path: file to write, .jpg or .png.
    """
    options = {"quality": 75, "optimize": True} if path.suffix == ".jpg" else {"optimize": True}
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.04, pil_kwargs=options)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/limits.md.")
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), default=list(PICTURES))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        save(PICTURES[name](), args.out / name)
        print(f"{args.out / name}: {(args.out / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
