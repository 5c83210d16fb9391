"""Rebuild `data/sprites.npz` from the two npm packages that carry the artwork.

npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
make study NAME=training.build_sprites ARGS="--noto emoji-datasource-google-16.0.0.tgz
        --twemoji emoji-datasource-twitter-16.0.0.tgz --out captum_mllm/reference/data/sprites.npz"
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from captum_mllm.reference.sprites import CATEGORIES, CODE_POINTS, SPRITE_SIZE

FOLDERS = {"noto": "google", "twemoji": "twitter"}


def read_style(archive: Path, style: str) -> np.ndarray:
    """Read one style's sprites from its npm package.

    Args:
        archive: The package as `npm pack` fetches it (.tgz).
        style: "noto" or "twemoji".

    Returns:
        uint8 array (categories, 64, 64, 4). Colour is set to zero where alpha is zero.
    """
    sprites = []
    folder = f"package/img/{FOLDERS[style]}/64"
    with tarfile.open(archive) as package:
        for category in CATEGORIES:
            member = package.extractfile(f"{folder}/{CODE_POINTS[category]}.png")
            if member is None:
                raise FileNotFoundError(f"{archive} has no picture of {category!r} in {folder}")
            image = Image.open(io.BytesIO(member.read())).convert("RGBA")
            if image.size != (SPRITE_SIZE, SPRITE_SIZE):
                raise ValueError(f"{category!r} in {archive} is {image.size}, wanted 64 x 64 px")
            pixels = np.array(image)
            pixels[pixels[..., 3] == 0] = 0
            sprites.append(pixels)
    return np.stack(sprites)


def main() -> None:
    """Read both packages and write the npz."""
    parser = argparse.ArgumentParser(description="Rebuild sprites.npz.")
    parser.add_argument("--noto", type=Path, required=True)
    parser.add_argument("--twemoji", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sprites = np.stack([read_style(args.noto, "noto"), read_style(args.twemoji, "twemoji")])
    np.savez_compressed(args.out, sprites=sprites, categories=np.array(CATEGORIES))
    print(f"{args.out}: {sprites.shape}, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
