"""Check a built wheel: size, the model inside, licences and notices. Usage: check_wheel.py DIR."""

import sys
import zipfile
from pathlib import Path

LIMIT_MB = 30
NEEDED = (
    "captum_mllm/py.typed",
    *(
        f"captum_mllm/reference/models/{name}/{file}"
        for name in ("llava", "qwen2vl", "internvl")
        for file in ("model.safetensors", "README.md")
    ),
)
NOTICES = ("LICENSE", "Apache", "CC-BY")


def main(folder: str) -> None:
    (wheel,) = Path(folder).glob("*.whl")
    size = wheel.stat().st_size / 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        texts = [archive.read(n).decode() for n in names if "dist-info/licenses/" in n]
    missing = [name for name in NEEDED if name not in names]
    unsaid = [word for word in NOTICES[1:] if not any(word in text for text in texts)]
    if size > LIMIT_MB or missing or unsaid or not texts:
        sys.exit(f"{wheel.name}: {size:.1f} MB (limit {LIMIT_MB}), missing {missing}, {unsaid}")
    print(f"{wheel.name}: {size:.1f} MB, {len(names)} files, notices inside")


if __name__ == "__main__":
    main(sys.argv[1])
