"""Check a built wheel: size, models and notices inside; no OpenMoji, no study, no training code.

Usage: check_wheel.py DIR (what ``make wheel`` built).
"""

import io
import re
import sys
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

LIMIT_MB = 30
SPRITES = "captum_mllm/reference/data/sprites.npz"  # the one archive of artwork, of two styles
NEEDED = (
    "captum_mllm/py.typed",
    SPRITES,
    *(f"captum_mllm/visualization/page.{kind}" for kind in ("html.jinja", "css", "js")),
    *(
        f"captum_mllm/reference/models/{name}/{file}"
        for name in ("llava", "qwen2vl", "internvl", "biased")
        for file in ("model.safetensors", "README.md")
    ),
)
NOTICES = ("LICENSE", "Apache", "CC-BY")
ONLY_MEASURES = {"studies", "training", "records", "weights", "tests", "docs", "tutorials"}
TRAINS = re.compile(  # code that needs the studies, or that changes weights
    rb"^\s*(?:from|import) studies\b|torch\.optim\b|\.backward\(|\boptimizer\b", re.MULTILINE
)


def share_alike(archive: zipfile.ZipFile) -> list[str]:
    """Files that hold artwork of OpenMoji (CC-BY-SA), or artwork that is not known to be other."""
    names = [name for name in archive.namelist() if ".dist-info/" not in name]
    found = [n for n in names if "openmoji" in n.lower() and not n.endswith(".py")]
    found += [n for n in names if n.endswith((".npz", ".svg", ".tgz")) and n != SPRITES]
    if SPRITES in names:
        with np.load(io.BytesIO(archive.read(SPRITES))) as sprites:
            found += [SPRITES] if len(sprites["sprites"]) != 2 else []
    return sorted(set(found))


def not_the_product(archive: zipfile.ZipFile) -> list[str]:
    """Files outside the package, of measurements or tests, or with code that trains."""
    names = [name for name in archive.namelist() if ".dist-info/" not in name]
    found = [name for name in names if not name.startswith("captum_mllm/")]
    found += [name for name in names if ONLY_MEASURES & set(PurePosixPath(name).parts)]
    found += [n for n in names if n.endswith(".py") and TRAINS.search(archive.read(n))]
    return sorted(set(found))


def main(folder: str) -> None:
    (wheel,) = Path(folder).glob("*.whl")
    size = wheel.stat().st_size / 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        texts = [archive.read(n).decode() for n in names if "dist-info/licenses/" in n]
        stray, other = share_alike(archive), not_the_product(archive)
    missing = [name for name in NEEDED if name not in names]
    unsaid = [word for word in NOTICES[1:] if not any(word in text for text in texts)]
    if size > LIMIT_MB or missing or unsaid or not texts:
        sys.exit(f"{wheel.name}: {size:.1f} MB (limit {LIMIT_MB}), missing {missing}, {unsaid}")
    if stray:
        sys.exit(f"{wheel.name} must hold no artwork but noto's and twemoji's: {stray}")
    if other:
        sys.exit(f"{wheel.name} must hold no study, test or training code: {other}")
    print(f"{wheel.name}: {size:.1f} MB, {len(names)} files, notices inside")


if __name__ == "__main__":
    main(sys.argv[1])
