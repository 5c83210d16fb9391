"""The third drawing style: OpenMoji, of which no model saw a picture. It is not shipped.

Its artwork is under CC-BY-SA-4.0, so it is in neither the repository nor the wheel. It is made by
the user, for evaluation only, from the npm package that carries it:

    pip install "captum-mllm[openmoji]"
    python -m captum_mllm.reference.openmoji --download

fetches the package (4 MB), checks it and writes 64 pictures of 64 x 64 px; with
`--archive openmoji-15.1.0.tgz` in place of `--download` it takes what `npm pack openmoji@15.1.0`
fetched. They go to `$CAPTUM_MLLM_DATA/openmoji.npz`, else to `captum_mllm/openmoji.npz` in the
user's cache (`$XDG_CACHE_HOME` or `~/.cache`), where `render` finds them when a scene is in the
style "openmoji"; the licence is written beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import importlib
import io
import os
import tarfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from captum_mllm.reference.sprites import CATEGORIES, CODE_POINTS, SPRITE_SIZE

URL = "https://registry.npmjs.org/openmoji/-/openmoji-15.1.0.tgz"
SHA256 = "0d63158a7c68dce9dcaea16d1c8c62da72086b79da07678a20894119049f0dde"
LICENSE = "CC-BY-SA-4.0"
LICENSE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"
NOTICE = f"""# Artwork in openmoji.npz

`openmoji.npz` holds 64 pictures of OpenMoji, the open-source emoji and icon project,
https://openmoji.org, taken from the npm package openmoji 15.1.0 ({URL}).

Licence: {LICENSE}, {LICENSE_URL}

Changes: the drawings were cut to their outlines, centred in a square and rasterised at 64 x 64 px.
Pictures in which they are drawn, and what else is made of them, fall under the same licence. The
pictures are given without warranty; no endorsement by the OpenMoji project is implied.
"""
FILL = 62 / 64  # share of the sprite's side that the drawing's longer side takes
_VIEW = 'viewBox="0 0 72 72"'  # every drawing's own square
_MEASURED_AT = 576  # side in pixels at which a drawing's outline is measured
_FAINT = 25  # alpha up to which a pixel counts as empty there
_TRIES, _WAIT = 4, 2.0
_AGAIN = "make it anew with python -m captum_mllm.reference.openmoji --download"


class Built(NamedTuple):
    """The file with the third style: another one, or one that was written anew, is not equal."""

    path: Path
    modified: int
    size: int


def openmoji_path() -> Path:
    """Where the third style is looked for, whether or not it is there.

    Returns:
        `$CAPTUM_MLLM_DATA/openmoji.npz`, else `captum_mllm/openmoji.npz` in the user's cache.

    Example:
        >>> openmoji_path().name
        'openmoji.npz'
    """
    folder = os.environ.get("CAPTUM_MLLM_DATA")
    if folder:
        return Path(folder).expanduser() / "openmoji.npz"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return home / "captum_mllm" / "openmoji.npz"


def built() -> Built:
    """The file with the third style.

    Raises:
        FileNotFoundError: It is not there; the message says how to make it.
    """
    path = openmoji_path()
    try:
        state = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the style 'openmoji' is not shipped (its licence is {LICENSE}) and {path} is not "
            'there. Make it: pip install "captum-mllm[openmoji]", then '
            "python -m captum_mllm.reference.openmoji --download"
        ) from error
    return Built(path, state.st_mtime_ns, state.st_size)


def load_openmoji(path: Path | None = None) -> np.ndarray:
    """The third style's sprites.

    Args:
        path: The file. Default: `openmoji_path()`.

    Returns:
        uint8 array (categories, 64, 64, 4), as `sprites.load_sprites` has for each style.

    Raises:
        FileNotFoundError: It is not there; the message says how to make it.
        RuntimeError: The file is damaged, or was made for other categories.
    """
    path = built().path if path is None else path
    try:
        with np.load(path, allow_pickle=False) as archive:
            names, sprites = archive["categories"].tolist(), archive["sprites"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RuntimeError(f"{path} cannot be read ({error}): {_AGAIN}") from error
    shape = (len(CATEGORIES), SPRITE_SIZE, SPRITE_SIZE, 4)
    if names != list(CATEGORIES) or sprites.shape != shape or sprites.dtype != np.uint8:
        raise RuntimeError(f"{path} does not fit this version's categories: {_AGAIN}")
    return sprites


def rasterise(archive: bytes) -> np.ndarray:
    """Draw the sprites from the npm package.

    Args:
        archive: The package (.tgz).

    Returns:
        uint8 array (categories, 64, 64, 4); colour is zero where alpha is.

    Raises:
        FileNotFoundError: The package lacks a picture.
        ImportError: resvg-py is missing.
    """
    sprites = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        for category, points in CODE_POINTS.items():
            name = f"package/color/svg/{points.upper().replace('-FE0F', '')}.svg"
            try:
                member = package.extractfile(name)
            except KeyError:
                member = None
            if member is None:
                raise FileNotFoundError(f"the archive has no picture of {category!r}: {name}")
            sprites.append(_sprite(member.read().decode(), category))
    return np.stack(sprites)


def _sprite(svg: str, category: str) -> np.ndarray:
    """One drawing, its margin cut off, centred in its square."""
    if svg.count(_VIEW) != 1:
        raise ValueError(f"the drawing of {category!r} has no {_VIEW}: not OpenMoji 15.1's")
    seen = _draw(svg, _MEASURED_AT)[..., 3] > _FAINT
    if not seen.any():
        raise ValueError(f"the drawing of {category!r} is empty")
    (top, bottom), (left, right) = (
        np.flatnonzero(seen.any(axis))[[0, -1]] + (0, 1) for axis in (1, 0)
    )
    side = max(bottom - top, right - left) / FILL
    unit = 72 / _MEASURED_AT
    x, y = ((low + high - side) / 2 * unit for low, high in ((left, right), (top, bottom)))
    view = f'viewBox="{x:.4f} {y:.4f} {side * unit:.4f} {side * unit:.4f}"'
    view += f' width="{SPRITE_SIZE}" height="{SPRITE_SIZE}"'  # else resvg rounds the box's size
    pixels = _draw(svg.replace(_VIEW, view), SPRITE_SIZE)
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def _draw(svg: str, side: int) -> np.ndarray:
    """Rasterise a square drawing: uint8 (side, side, 4)."""
    png = _resvg().svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _resvg() -> Any:
    try:
        return importlib.import_module("resvg_py")
    except ImportError as error:
        raise ImportError(
            'drawing OpenMoji needs resvg-py: pip install "captum-mllm[openmoji]".'
        ) from error


def download(wait: float = _WAIT) -> bytes:
    """Fetch the npm package.

    Args:
        wait: Seconds before the second try; doubled before each further one. Default: 2.

    Returns:
        The package, whose sha256 is `SHA256`.

    Raises:
        ConnectionError: It could not be fetched in 4 tries.
    """
    for again in range(_TRIES):
        if again:
            time.sleep(wait * 2 ** (again - 1))
        try:
            with urllib.request.urlopen(URL, timeout=60) as answer:
                archive = answer.read()
        except (OSError, EOFError, http.client.HTTPException) as error:  # URLError is an OSError
            problem = f"{type(error).__name__}: {error}"
            continue
        if hashlib.sha256(archive).hexdigest() == SHA256:
            return archive
        problem = f"what came is not the package ({len(archive)} bytes)"
    raise ConnectionError(
        f"{URL} could not be fetched ({problem}). Where there is no network, bring the file that "
        "`npm pack openmoji@15.1.0` fetches and name it with --archive."
    )


def build(archive: bytes, out: Path) -> None:
    """Write the sprites and, beside them, their licence.

    Args:
        archive: The npm package (.tgz).
        out: The npz file to write; folders on the way to it are made.

    Raises:
        ValueError: The archive is not openmoji 15.1.0.
    """
    found = hashlib.sha256(archive).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"the archive is not openmoji-15.1.0.tgz: its sha256 is {found}, not {SHA256}. Fetch "
            "it with `npm pack openmoji@15.1.0`."
        )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, sprites=rasterise(archive), categories=np.array(CATEGORIES))
    out.parent.mkdir(parents=True, exist_ok=True)
    notice = out.with_name(f"{out.stem}.NOTICE.md")
    for path, data in ((notice, NOTICE.encode()), (out, buffer.getvalue())):
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """Make the third style.

    Args:
        arguments: Of the command line. Default: the process's own.
    """
    parser = argparse.ArgumentParser(
        description=f"Make the third style from OpenMoji ({LICENSE}), for evaluation only."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", type=Path, help="openmoji-15.1.0.tgz, as npm pack fetches it")
    source.add_argument("--download", action="store_true", help="fetch the archive from npm")
    parser.add_argument("--out", type=Path, help=f"file to write; default: {openmoji_path()}")
    args = parser.parse_args(arguments)
    out = args.out or openmoji_path()
    try:
        build(download() if args.download else args.archive.read_bytes(), out)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{out}: 64 pictures, {out.stat().st_size / 1e3:.0f} kB, {LICENSE}")
    if out.resolve() != openmoji_path().resolve():
        print(f"`render` looks for them at {openmoji_path()}; $CAPTUM_MLLM_DATA names its folder.")


if __name__ == "__main__":
    main()
