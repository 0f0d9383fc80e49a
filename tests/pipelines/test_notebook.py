"""Notebooks: one table that is brought up to date, results as tables, and text by strangers that does nothing."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from tarsift.operators.verify import Fault, ShardProof
from tarsift.pipelines.audit import Audit
from tarsift.pipelines.clean import CleanResult
from tarsift.pipelines.evaluate import Evaluation
from tarsift.pipelines.export import Exported
from tarsift.pipelines.notebook import PassTable, html_table, notebook_progress
from tarsift.pipelines.poison import PoisonSummary
from tarsift.pipelines.pretrain import PretrainSummary
from tarsift.pipelines.progress import Event, PlainLines
from tarsift.pipelines.repair import RepairResult
from tarsift.pipelines.select import Selection
from tarsift.pipelines.trace import TraceResult
from tarsift.pipelines.verify import Proof

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>\u202e\x1b[31m"
COUNTS = {"read": 1200, "kept": 1100, "removed": 60, "errored": 40, "errors": {"bad_json": 40}}
FIGURES = ("auroc", "average_precision", "recall_at_0.01", "recall_at_0.05", "recall_at_0.1", "clean_lost_at_0.05")
FLAGGED = {"flagged": 45, "recall": 1.0, "precision": 0.2, "clean_lost": 36}
FAULTY = ShardProof(shard=HOSTILE, members={}, bytes=0, faults=(Fault(fault="source_missing", detail=HOSTILE),) * 30)


class Elements(HTMLParser):
    """The elements and attributes of a page, and whether each is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page: str) -> Elements:
    found = Elements(page)
    assert found.open == []
    assert {tag for tag, _ in found.seen} <= {"b", "table", "tr", "th", "td", "div", "a", "code"}
    assert {name for _, attributes in found.seen for name in attributes} <= {"style", "href", "target"}
    assert not re.search("[\u202e\x1b]", page)
    return found


def test_strangers_text_does_nothing():
    page = html_table(HOSTILE, [(HOSTILE, HOSTILE, 1_234_567), (HOSTILE,)], {HOSTILE: f"/tmp/{HOSTILE}"})
    checked(page)
    assert "&lt;script&gt;" in page
    assert "1,234,567" in page


@pytest.mark.parametrize(
    ("target", "href"),
    [
        ("out/report.html", "out/report.html"),  # of the notebook's folder
        ("HERE/a b/report.html", "a%20b/report.html"),
        ("/elsewhere/report.html", "file:///elsewhere/report.html"),
        ("https://store.example/r.html", "https://store.example/r.html"),
        ("s3://bucket/r.html", None),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),  # a file of that name
        ("javascript://x", None),
        (None, None),
    ],
)
def test_links(target, href, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    target = target and target.replace("HERE", str(tmp_path))
    page = html_table("t", [], {"report": target})
    assert [attributes["href"] for tag, attributes in checked(page).seen if tag == "a"] == ([href] if href else [])
    assert (target or "") in page


RESULTS = [
    (
        CleanResult(f"/{HOSTILE}", COUNTS | {"errors": {HOSTILE: 40}}, {}, "/o/report.html", 9.0),
        ["1,100", "/o/report.html"],
    ),
    (
        PretrainSummary(f"/{HOSTILE}.pt", 12, 99, 3318, 0.25, {HOSTILE: 2}, 61.0, "ab"),
        ["3,318", "0.250", "1 min 1 s"],
    ),
    (
        TraceResult("n", HOSTILE, 500, 9000, 21, "/o/samples.parquet", "/o/trace.html", "r", 3.0),
        ["21 of 500", "/o/trace.html"],
    ),
    (
        RepairResult("/o/f.pt", "eu", 21, f"/{HOSTILE}", {"queries": 1.0}, {"queries": 0.0}, HOSTILE, "k", 3.0),
        ["100.0%", "0.0%", "/o/f.pt"],
    ),
    (
        Evaluation(900, 9, note=HOSTILE, scores={HOSTILE: dict.fromkeys(FIGURES, 0.5)}, flagged=FLAGGED),
        ["0.500", "flagged 45"],
    ),
    (Evaluation(900, 0, note=HOSTILE), ["0 of 900"]),
    (Audit(shards=(), decoded=False, elapsed_s=1.0), ["whole"]),
    (Proof(out="/o", shards=(FAULTY,), with_shards=True, faults=(), elapsed_s=1.0), ["30 faults", "source_missing"]),
    (Selection(100, 2000, 3, 5.0, 0.99, f"/{HOSTILE}", None), ["100 of 2,000"]),
    (Exported("datacomp", 1100, {HOSTILE: 3}, "/o/x.npy", ("/o/x.npy",), 1.0), ["1,100 samples", "/o/x.npy"]),
    (PoisonSummary(1200, 12, [], f"/{HOSTILE}", {HOSTILE: 4}), ["1,200", "12"]),
]


@pytest.mark.parametrize(("result", "words"), RESULTS, ids=lambda value: type(value).__name__)
def test_a_result_shows_counts_and_where_it_is(result, words):
    page = result._repr_html_()
    checked(page)
    assert all(word in page for word in words)
    assert len(page) < 8000


def test_of_many_faults_some_are_shown():
    proof = next(result for result, _ in RESULTS if isinstance(result, Proof))
    assert proof._repr_html_().count("<tr>") == 20


class Shown:
    """Stands in for IPython: what was displayed, and how often it was brought up to date."""

    def __init__(self):
        self.made, self.updates = [], []

    def display(self, data, **how):
        assert how == {"raw": True, "display_id": True}
        self.made.append(data)
        return SimpleNamespace(update=lambda data, raw: self.updates.append(data))


def test_one_display_is_brought_up_to_date(monkeypatch):
    shown = Shown()
    monkeypatch.setattr("IPython.display.display", shown.display)
    told = PassTable(every_s=1000)
    for done in range(5):
        told(Event("embed.detect", done, 4, done * 1000, errors={"bad_json": done}, finished=done == 4, note=HOSTILE))
    told(Event("write", 0, 2))
    told(Event("write", 2, 2, finished=True))
    assert len(shown.made) == 1
    assert len(shown.updates) == 2  # the ends of the two passes
    last = shown.updates[-1]
    checked(last["text/html"])
    assert last["text/html"].count("<tr>") == 2
    for word in ("embed.detect", "done", "4 of 4 shards", "4,000 samples", "4 with an error", "write"):
        assert word in last["text/html"]
        assert word in last["text/plain"]


def test_elsewhere_than_in_a_notebook_lines_are_plain():
    assert isinstance(notebook_progress(), PlainLines)


def test_in_a_real_notebook_there_is_one_output():
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    code = (
        "from tarsift import notebook_progress\n"
        "from tarsift.pipelines.progress import Event\n"
        "from tarsift.pipelines.clean import CleanResult\n"
        "told = notebook_progress(every_s=0)\n"
        "for done in range(4):\n"
        "    told(Event('embed.detect', done, 3, done * 10, finished=done == 3))\n"
        "counts = {'read': 3, 'kept': 3, 'removed': 0, 'errored': 0, 'errors': {}}\n"
        "CleanResult('/o', counts, {}, '/o/report.html', 1.0)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120).execute()
    progress, result = (out for out in notebook.cells[0].outputs if out["output_type"] != "stream")
    assert progress["output_type"] == "display_data"
    assert "3 of 3 shards" in progress["data"]["text/html"]
    assert "3 of 3 shards" in progress["data"]["text/plain"]
    assert result["output_type"] == "execute_result"
    assert "/o/report.html" in result["data"]["text/html"]
