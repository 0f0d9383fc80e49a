"""Execute notebooks in a folder of their own, and write them back with what they printed and showed.

python examples/execute.py [NOTEBOOK ...]    # all of this folder where none is named
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 1800  # of a cell


def execute(notebook: Path, folder: Path) -> Any:
    """Return a notebook as it is after all cells have run in a folder; warnings of packages are left out.

    Raises:
        CellExecutionError: in a cell.
    """
    nb = nbformat.read(notebook, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(nb, timeout=TIMEOUT_S, kernel_name="python3", resources=place).execute()
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return nb


def main(names: list[str]) -> None:
    for notebook in [Path(name) for name in names] or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(notebook, Path(folder)), notebook)
        print(f"executed {notebook}")


if __name__ == "__main__":
    main(sys.argv[1:])
