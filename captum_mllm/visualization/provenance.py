"""Where a page's maps come from: what an audit needs to make them again."""

import datetime
import hashlib
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("captum_mllm", "captum", "torch", "transformers")

_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Provenance:
    """Facts about how maps were made, as (name, value) in the order of the page.

    Args:
        facts: name -> value; empty values are left out.
    """

    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", {k: v for k, v in self.facts.items() if v})


def describe(
    model: Any = None,
    *,
    name: str = "",
    folder: str | Path | None = None,
    images: Iterable[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    command: Sequence[str] = (),
) -> Provenance:
    """Gather what is known of model, files, settings and versions.

    Args:
        model: the model, for its class, revision and dtype; default None.
        name: how the user calls it: hub id or folder; default what its config says.
        folder: with its weights, whose sha256 is taken; default None: the weights are not read.
        images: the picture files, whose sha256 is taken.
        settings: of the method.
        command: the command line.

    Returns:
        The facts, with today's date (UTC) and the versions of the packages.

    Raises:
        OSError: a file that can't be read.

    Example:
        >>> facts = describe(name="llava", settings={"scales": (1.0, 2.0)}).facts
        >>> facts["model"], facts["settings"]
        ('llava', 'scales=(1.0, 2.0)')
    """
    config = getattr(model, "config", None)
    known = {
        "model": name or getattr(config, "_name_or_path", ""),
        "class": type(model).__name__ if model is not None else "",
        "revision": str(getattr(config, "_commit_hash", None) or ""),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "weights sha256": _weights(folder),
        "image files": "\n".join(f"{Path(path).name} sha256 {sha256(path)}" for path in images),
        "settings": ", ".join(f"{key}={value}" for key, value in (settings or {}).items()),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
        + f", Python {platform.python_version()}",
        "command": shlex.join(command),
    }
    return Provenance(known)


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal.

    Args:
        path: the file.
    """
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _weights(folder: str | Path | None) -> str:
    """One sum per file of weights."""
    if folder is None or not Path(folder).is_dir():
        return ""
    files = sorted(path for kind in _WEIGHTS for path in Path(folder).glob(kind))
    return "\n".join(f"{path.name} {sha256(path)}" for path in files)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
