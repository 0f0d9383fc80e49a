"""What is in examples/: notebooks as they are kept have run to their end, and they still do; scripts run."""

import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest

from tarsift.clip_detect.triggers import ATTACKS
from tests.conftest import make_dump

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def text_of(notebook) -> str:
    """What a notebook's cells have printed and shown as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def html_of(notebook) -> str:
    """What a notebook's cells have shown as HTML."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("data", {}).get("text/html", "") for output in outputs)


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


def script(name: str):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Executes a notebook anew. All are in one folder, where what one has trained and cleaned is there for the next."""
    folder = tmp_path_factory.mktemp("notebooks")
    return lambda name: script("execute").execute(ROOT / "examples" / f"{name}.ipynb", folder)


@pytest.mark.slow
def test_from_one_bad_example_to_a_repaired_model(executed):
    text = text_of(executed("trace_and_repair"))
    [before, *_] = percent(r"enc\.pt: ([\d.]+)% of patched", text)
    [after] = percent(r"retrained\.pt: ([\d.]+)% of patched", text)
    assert before > 90
    assert after < 20
    [[traced, hits, planted]] = re.findall(r"(\d+) samples are traced, (\d+) of them poisoned, of (\d+) in", text)
    assert int(hits) > 0.9 * int(traced)
    assert int(hits) > 0.7 * int(planted)
    [left] = percent(r"after: [\d.]+% right, (\d+)% of eights", text)
    assert left < 10


@pytest.mark.slow
def test_a_dataset_of_ones_own_is_scored(executed):
    notebook = executed("score_a_dataset")
    text = text_of(notebook)
    [[found, planted, highest]] = re.findall(r"(\d+) of (\d+) poisoned pairs are among the (\d+) highest", text)
    assert int(found) > 0.7 * int(planted)
    assert int(highest) < 0.06 * 2000
    [both] = re.findall(rf"(\d+) of {planted} by suspicion\n", text)
    assert int(both) > 0.9 * int(planted)
    assert text.count("undecodable_image") == 2
    assert html_of(notebook).count("data:image/webp") >= 12


@pytest.mark.slow
def test_neighbours_and_groups_are_shown(executed):
    notebook = executed("neighbours_and_clusters")
    [[poisoned, beside]] = re.findall(r"(\d+) of the (\d+) neighbours are poisoned", text_of(notebook))
    assert int(poisoned) > 0.7 * int(beside)
    html = html_of(notebook)
    assert "flagged samples" in html
    assert "nearest kept" in html
    assert html.count("data:image/webp") > 40


@pytest.mark.slow
def test_thresholds_are_changed_without_encoding(executed):
    """The last one: it leaves `cleaned` with another verdict."""
    notebook = executed("thresholds")
    text = text_of(notebook)
    by_fraction = re.findall(r"policy fraction, value ([\d.]+), score suspicion: (\d+) removed, (\d+)% of", text)
    fractions, removed, recall = ([float(row[i]) for row in by_fraction[:5]] for i in range(3))
    assert removed == [round(2000 * fraction) for fraction in fractions]
    assert recall == sorted(recall)
    assert recall[-1] > 80
    assert html_of(notebook).count("<svg") >= 5


@pytest.fixture
def paper():
    return script("reproduce_cc3m")


def test_the_papers_cells_go_from_planting_to_a_line_of_the_table(paper, ray_session, tmp_path, encoder):
    """On a dump that no model has learned: the plumbing holds, whatever the figures say."""
    make_dump(tmp_path / "clean", shards=3, samples=100, flaws=False)
    scale = paper.Scale(reference=64, rate=0.03, templates=("a photo of a {}",), stand_in=True)
    cell = paper.CELLS["badnets"]
    record = paper.run_cell(cell, str(tmp_path / "clean"), tmp_path, encoder=encoder, scale=scale)
    assert (record["samples"], record["poisoned"], record["k"], record["reference"]) == (300, 9, 16, 64)
    assert list(record["scores"]) == [
        *(n for n in paper.SHOWN if not n.endswith("published") and n != "suspicion"),
        "suspicion",
        *(n for n in paper.SHOWN if n.endswith("published")),
    ]
    assert all(0 <= value <= 1 for figures in record["scores"].values() for value in figures.values())
    with pytest.raises(ValueError, match="the record of badnets is that of a stand-in"):
        paper.table([record])
    line = next(
        line
        for line in paper.table([{**record, "stand_in": False, "encoder": "published"}]).splitlines()
        if line.startswith("| badnets | 0.01% | published")
    )
    assert f" {record['scores']['dao_k16']['auroc']:.3f} " in line


def test_what_was_not_run_is_said_to_be_so(paper):
    page = (ROOT / "examples" / "reproduce_cc3m.md").read_text()
    assert page == paper.table(paper.recorded())
    if not paper.recorded():
        assert not re.search(r"0\.\d{3}", page)
        assert page.count("not run |") == page.count("\n| ") * len(paper.SHOWN) - len(paper.SHOWN)


def test_a_checkpoint_is_not_asked_for_a_trigger_that_it_has_not_learned(paper, tmp_path):
    for name, why in (("blend", "has learned another pattern"), ("multi_trigger", "no checkpoint is published")):
        with pytest.raises(SystemExit, match=why):
            paper._encoder(paper.CELLS[name], "published", "dump", tmp_path, paper.Scale())
    assert paper.CELLS["badnets"].checkpoint == "hf-hub:hanxunh/clip_backdoor_rn50_cc3m_badnets"
    assert {cell.attack for cell in paper.CELLS.values()} <= {*ATTACKS}
