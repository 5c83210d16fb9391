"""The versions that were checked, and their file: read by the check, written by one function."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from captum_mllm.checking.report import TrustReport
from captum_mllm.files import write_atomic

FILE = Path(__file__).parent / "tested.json"
PACKAGES = ("transformers", "torch", "captum")


def installed_versions() -> dict[str, str]:
    """The installed versions of the packages that decide what is computed."""
    return {name: metadata.version(name) for name in PACKAGES}


def tested_versions() -> dict[str, Any]:
    """What the file says: per package the oldest and the newest version that passed."""
    return json.loads(FILE.read_text())["packages"]


def version_key(version: str) -> tuple[int, ...]:
    """A version for comparisons, without what follows its numbers.

    Args:
        version: as a package gives it.

    Example:
        >>> version_key("2.13.0+cpu") < version_key("2.14.0.dev1")
        True
    """
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def record_tested(reports: dict[str, TrustReport], path: Path = FILE) -> None:
    """Add the installed versions to the file: the only writer of it.

    Args:
        reports: of the shipped models, by name, made in this environment.
        path: the file, default the package's own.

    Raises:
        ValueError: a report with a failed line: these versions did not pass.
    """
    failed = [name for name, report in reports.items() if not report.passed]
    if failed or not reports:
        raise ValueError(
            f"reports must have passed to be recorded; failed: {', '.join(failed) or 'no reports'}."
        )
    known: dict[str, Any] = {"packages": {}, "models": []}
    known |= json.loads(path.read_text()) if path.exists() else {}
    packages: dict[str, Any] = known["packages"]
    for name, version in installed_versions().items():
        plain = ".".join(map(str, version_key(version)))
        versions = [*packages.get(name, {}).values(), plain]
        ordered = sorted(versions, key=version_key)
        packages[name] = {"oldest": ordered[0], "newest": ordered[-1]}
    classes = {report.about["model class"] for report in reports.values()}
    known["models"] = sorted({*known["models"], *classes})
    write_atomic(path, (json.dumps(known, indent=2) + "\n").encode())
