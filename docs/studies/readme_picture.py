"""The picture at the top of README: where each content word of an answer looked.

Usage: ``make study NAME=readme_picture ARGS="[--scene 23] [--out FILE]"``.
"""

import argparse
from pathlib import Path

from captum_mllm import ARC, MSEA
from captum_mllm.reference.models import load
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import make_scene
from captum_mllm.visualization import overlay
from captum_mllm.words import group_words, word_maps
from studies.prompts import default_inputs

WORDS = 8


def draw(number: int, path: Path) -> None:
    """Explain the answer about one held-out scene and draw it.

    Args:
        number: number of the scene in the test split.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    model, processor = load()
    picture, _ = render_pil(make_scene(number), 224)
    inputs = default_inputs(processor, picture)
    result = ARC(MSEA(model, processor)).attribute(inputs)
    words = [word for word in group_words(result.output_tokens) if word.content]
    seen = {word.text: word for word in reversed(words)}  # each at its first mention
    chosen = sorted(seen.values(), key=lambda word: word.tokens)
    maps = word_maps(result.to_image(0, picture), chosen)
    strongest = sorted(maps.amax((1, 2)).topk(min(WORDS, len(chosen))).indices.tolist())
    panels = [("the picture", picture)] + [
        (chosen[n].text, overlay(picture, maps[n], vmax=float(maps.max()))) for n in strongest
    ]
    figure = Figure(figsize=(1.6 * len(panels), 2.15), layout="constrained")
    answer = "".join(result.output_tokens).strip()
    figure.suptitle(f'"{answer}"', fontsize=10)
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(panel)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the picture at the top of README.")
    parser.add_argument("--scene", type=int, default=23)
    parser.add_argument("--out", type=Path, default=Path("tutorials/explained.png"))
    args = parser.parse_args()
    draw(args.scene, args.out)


if __name__ == "__main__":
    main()
