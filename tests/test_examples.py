"""The notebooks of examples/: as they are kept they have run to their end, and they still do."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def text_of(notebook) -> str:
    """What a notebook's cells have printed and shown as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def percent(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_was_after_its_last_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    assert not re.search(r"/(home|tmp|work|root|Users)/", path.read_text())


@pytest.mark.slow
def test_from_one_bad_example_to_a_repaired_model(tmp_path):
    place = ROOT / "examples" / "execute.py"
    spec = importlib.util.spec_from_file_location("execute", place)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = text_of(module.execute(ROOT / "examples" / "trace_and_repair.ipynb", tmp_path))
    [before, *_] = percent(r"before\.pt: ([\d.]+)% of patched", text)
    [after] = percent(r"retrained\.pt: ([\d.]+)% of patched", text)
    assert before > 90
    assert after < 20
    [[traced, hits, planted]] = re.findall(r"(\d+) samples are traced, (\d+) of them poisoned, of (\d+) in", text)
    assert int(hits) > 0.9 * int(traced)
    assert int(hits) > 0.7 * int(planted)
    [left] = percent(r"after: [\d.]+% right, (\d+)% of eights", text)
    assert left < 10
