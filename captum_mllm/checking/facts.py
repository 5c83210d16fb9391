"""Lines on the model's class, its adapter and the installed versions."""

from collections.abc import Mapping

from captum_mllm.adapters import DiscoveredAdapter, registered_classes
from captum_mllm.checking.report import Finding
from captum_mllm.checking.subject import Subject
from captum_mllm.checking.tested import installed_versions, tested_versions, version_key


def check_class(subject: Subject) -> Finding:
    """Which adapter serves the model's class, written by hand or not.

    Args:
        subject: the model under check.
    """
    adapter = subject.adapter
    kind = type(adapter.model)
    name, own = kind.__name__, type(adapter).__name__
    if isinstance(adapter, DiscoveredAdapter):
        found = (
            f"{name}: no adapter of its own; the layout of its image tokens is found by probing."
        )
        return Finding("class", "passed", found)
    registered = [base.__name__ for base in kind.__mro__ if base.__name__ in registered_classes()]
    text = f"{name}: adapter {own}"
    if registered and registered[0] != name:
        text += f", registered for its base class {registered[0]}"
    return Finding("class", "passed", f"{text}.", figures={"layers": len(adapter.layers)})


def check_versions(subject: Subject) -> Finding:
    """Whether the installed versions are within those that were checked.

    Args:
        subject: the model under check.
    """
    del subject
    installed, tested = installed_versions(), tested_versions()
    newer = [
        name
        for name, version in installed.items()
        if name in tested and _later(version, tested[name]["newest"])
    ]
    ranges = ", ".join(
        f"{name} {version} (checked: {_range(tested.get(name))})"
        for name, version in installed.items()
    )
    if not newer:
        return Finding("versions", "passed", f"{ranges}.", figures=installed)
    return Finding(
        "versions",
        "not tried",
        f"Warning: {', '.join(newer)} newer than the newest that was checked. {ranges}.",
        "The other lines tell whether it works here; a failed one may be due to the new version.",
        installed,
    )


def _range(versions: Mapping[str, str] | None) -> str:
    if not versions:
        return "none yet"
    return " to ".join(dict.fromkeys((versions["oldest"], versions["newest"])))


def _later(version: str, newest: str) -> bool:
    """Whether a version is a later minor version; patches don't count."""
    return version_key(version)[:2] > version_key(newest)[:2]
