"""Execute notebooks, single files or all of a folder; a failing cell or a warning is an error.

Usage: run_notebooks.py PATH [PATH ...] [--write] (--write saves the outputs into the notebooks).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def notebooks(places: Sequence[str]) -> list[Path]:
    """The files among the places, and those of the folders among them."""
    found: list[Path] = []
    for place in map(Path, places):
        own = [place] if place.is_file() else sorted(place.glob("*.ipynb"))
        if not own:
            sys.exit(f"no notebooks in {place}")
        found += own
    return found


def warned(notebook: nbformat.NotebookNode) -> str:
    """What the cells wrote to stderr: warnings, those of logging too."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def main(places: Sequence[str], write: bool) -> None:
    for path in notebooks(places):
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            record_timing=False,  # outputs are committed: no time stamps in them
            coalesce_streams=True,
        )
        client.execute()
        told = warned(notebook)
        if told:
            sys.exit(f"{path} warns: {told}")
        if write:
            nbformat.write(notebook, path)
        print(f"{path}: {len(notebook.cells)} cells run")


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--write"]
    if not given:
        sys.exit(__doc__)
    main(given, "--write" in sys.argv)
