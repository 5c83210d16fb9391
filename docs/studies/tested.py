"""The shipped models checked with the installed versions, which are then recorded as tested.

Writes ``captum_mllm/checking/tested.json``, from which ``check`` knows whether the installed
versions are newer than any that were checked, and the record that docs/guarantees.md shows. With
an older transformers, add ``--versions-only``: the record stays that of the newest.

Usage: ``make study NAME=tested ARGS="[--versions-only] [--out DIR]"``.
"""

import argparse
from pathlib import Path

from captum_mllm import check
from captum_mllm.checking.tested import installed_versions, record_tested
from captum_mllm.cli.explain import demo_scene
from captum_mllm.reference.models import load

RECORDS = Path(__file__).parent / "records"
MODELS = ("llava", "qwen2vl", "internvl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions-only", action="store_true")
    parser.add_argument("--out", type=Path, default=RECORDS)
    args = parser.parse_args()
    reports = {}
    for name in MODELS:
        print(name, flush=True)
        asked = demo_scene() if name == "llava" else (None, None)
        reports[name] = check(*load(name), *asked)
        print(reports[name], flush=True)
    record_tested(reports)
    if not args.versions_only:
        versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
        text = (
            f"`make study NAME=tested`; {versions}; on a CPU.\n\n```text\n{reports['llava']}\n```\n"
        )
        (args.out / "check.md").write_text(text)


if __name__ == "__main__":
    main()
