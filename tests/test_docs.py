"""Every Python block of README and CONTRIBUTING runs, in order, in one namespace per file."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.S | re.M)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    from captum_mllm.adapters import registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    found = blocks(name)
    assert found
    namespace: dict = {}
    try:
        for number, code in enumerate(found):
            exec(compile(code, f"{name}, block {number + 1}", "exec"), namespace)
    finally:
        plt.close("all")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_local_links_exist(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [link for link in links if not link.startswith("http")]
    missing = [link for link in local if not (ROOT / link).exists()]
    assert not missing


def test_commands_named_in_readme_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)`?", text)):
        assert f"\n{target}:" in makefile, target
    for module in set(re.findall(r"python -m (captum_mllm[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_readme_table_of_sets_is_the_recorded_one():
    """The three families' means, to the digits that README gives."""
    record = json.loads((ROOT / "captum_mllm/studies/records/sets.json").read_text())["measured"]
    text = (ROOT / "README.md").read_text()
    columns = ("average_precision", "obj_iou", "func_iou", "removed", "read")
    for name in record["llava"]:
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", text, re.M)
        cells = row.split(" | ")
        shown = [cells[0], cells[2], cells[4], cells[5], cells[6].removesuffix(" %")]
        for metric, cell in zip(columns, shown, strict=True):
            for family, value in zip(("llava", "qwen2vl", "internvl"), cell.split(), strict=True):
                values = np.concatenate([row[metric] for row in record[family][name]["rows"]])
                mean = values.mean() * (100 if metric == "read" else 1)
                digits = len(value.split(".")[1]) if "." in value else 0
                assert float(value) == pytest.approx(mean, abs=0.51 * 10**-digits), (name, metric)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_nothing_is_left_to_fill_in(name):
    assert not re.findall(r"[A-Z]+_PLACE|TODO|FIXME|XXX", (ROOT / name).read_text())


def test_readme_table_of_results_is_made_of_the_record():
    from captum_mllm.studies.quality import RECORDS
    from captum_mllm.studies.quality_table import readme_table

    record = json.loads((RECORDS / "quality.json").read_text())
    assert readme_table(record) in (ROOT / "README.md").read_text()
