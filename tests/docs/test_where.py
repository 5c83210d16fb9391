"""The table "Where is what" of CONTRIBUTING.md names files and definitions that there are."""

import ast
import re
from pathlib import Path

import captum_mllm
from tests.architecture import FOLDERS

PACKAGE = Path(captum_mllm.__file__).parent
TEXT = (PACKAGE.parent / "CONTRIBUTING.md").read_text()


def rows(text: str) -> list[list[str]]:
    """Cells of the table's rows."""
    section = text.split("## Where is what\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def defined(path: Path) -> set[str]:
    """Names that a file defines itself, those of its classes as ``Class.name``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        parts = [node, *(node.body if isinstance(node, ast.ClassDef) else [])]
        for part in parts:
            targets = part.targets if isinstance(part, ast.Assign) else [part]
            targets = [part.target] if isinstance(part, ast.AnnAssign) else targets
            names = [getattr(t, "name", getattr(t, "id", None)) for t in targets]
            prefix = f"{node.name}." if part is not node else ""
            found |= {f"{prefix}{name}" for name in names if name}
    return found


def problems(text: str) -> list[str]:
    """One line per row that leads nowhere."""
    found = []
    for term, file, names in rows(text):
        path = PACKAGE / file.strip("`")
        listed = re.findall(r"`([^`]+)`", names)
        if not path.is_file():
            found.append(f"{term}: no file {file}")
        elif not listed or set(listed) - defined(path):
            found.append(f"{term}: {file} does not define {sorted(set(listed) - defined(path))}")
    return found


def test_every_row_leads_to_code():
    assert problems(TEXT) == []


def test_every_folder_has_a_row():
    assert {file.strip("`").split("/")[0] for _, file, _ in rows(TEXT)} >= FOLDERS


def test_wrong_rows_are_found():
    head = "## Where is what\n| term | file | defined there |\n| --- | --- | --- |\n"
    lines = [
        "| a | `functional/lens.py` | `lens_logits` |",
        "| b | `functional/nothing.py` | `lens_logits` |",
        "| c | `functional/lens.py` | `Tensor` |",
        "| d | `attr/arc.py` | `RankCorrelationDenoiser.denoise`, `ARC.nothing` |",
    ]
    assert [line.split(":")[0] for line in problems(head + "\n".join(lines))] == ["b", "c", "d"]
