"""Execute every notebook of a folder; a failing cell or a warning is an error.

Usage: run_notebooks.py DIR [--write] (--write saves the outputs into the notebooks).
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(folder: str, write: bool) -> None:
    paths = sorted(Path(folder).glob("*.ipynb"))
    if not paths:
        sys.exit(f"no notebooks in {folder}")
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
        if write:
            nbformat.write(notebook, path)
        print(f"{path}: {len(notebook.cells)} cells run")


if __name__ == "__main__":
    main(sys.argv[1], "--write" in sys.argv)
