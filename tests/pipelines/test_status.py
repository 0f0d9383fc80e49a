"""`status`: what it tells of a result folder."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.pipelines import lock
from tarsift.pipelines.clean import clean, embed_step
from tarsift.pipelines.config import load_config
from tarsift.pipelines.run import open_run
from tarsift.pipelines.status import status
from tests.conftest import make_dump
from tests.pipelines.test_cli import run

SMALL = ["suspicion.published_ks=[8]", "suspicion.reference_size=64"]


@pytest.fixture(scope="module")
def folder(ray_session, encoder, tmp_path_factory):
    """A dump, a run that stopped after its first pass, and one that is complete."""
    folder = tmp_path_factory.mktemp("status")
    make_dump(folder / "dump", shards=3, samples=60)
    config = load_config(settings=[*SMALL, f"encoders.detect.spec={encoder}"])
    begun = open_run(str(folder / "dump"), str(folder / "begun"), config)
    with begun.working():
        embed_step(begun)
    clean(str(folder / "dump"), str(folder / "done"), config=config)
    return folder


def test_of_runs_that_stopped_and_are_complete(folder, monkeypatch, capsys):
    begun = status(str(folder / "begun"))
    assert begun.state == "stopped"
    assert [(p.done, p.samples) for p in begun.passes] == [(3, 180), (0, 0), (0, 0), (0, 0), (0, 0)]
    done = status(str(folder / "done"))
    assert done.state == "complete"
    assert {p.done for p in done.passes} == {3}
    assert done.report
    code, out, _ = run(monkeypatch, capsys, "status", str(folder / "done"))
    assert code == 0
    assert "complete" in out
    code, out, _ = run(monkeypatch, capsys, "status", str(folder / "begun"), "--json")
    assert json.loads(out)["state"] == "stopped"
    with pytest.raises(UsageError, match=r"run\.json"):
        status(str(folder))


def test_a_report_from_before_a_pass_that_was_done_anew_is_out_of_date(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "done"
    shutil.copytree(folder / "done", out)
    run(monkeypatch, capsys, "flag", str(out), "--fraction", "0.2", "-q")
    flagged = status(str(out))
    assert (flagged.state, flagged.stale) == ("outdated", ("write", "report"))
    run(monkeypatch, capsys, "write", str(out), "-q")
    written = status(str(out))
    assert (written.state, written.stale) == ("outdated", ("report",))
    code, text, _ = run(monkeypatch, capsys, "status", str(out))
    assert code == 0
    assert "complete" not in text
    assert f"out of date: report; redo with tarsift report {out}" in text
    run(monkeypatch, capsys, "report", str(out), "-q")
    assert status(str(out)).state == "complete"


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"pid": os.getpid(), "started": lock._start_of(os.getpid())}, "running"),
        ({"pid": 2**22 + 1, "started": "1"}, "died"),
        ({"host": "elsewhere", "at": "now"}, "running"),
        ({"host": "elsewhere", "at": "2020-01-01T00:00:00+00:00"}, "silent"),
    ],
)
def test_of_runs_that_did_not_release_their_lock(folder, changes, state):
    out = str(folder / "begun")
    before = lock.last_holder(out)
    assert before
    if changes.get("at") == "now":
        changes = changes | {"at": lock._now()}
    holder = lock.Holder(**{**before.__dict__, "number": 99, "released": False, **changes})
    storage.put_bytes(lock._url(out, 99), lock._bytes(holder))
    try:
        assert status(out).state == state
    finally:
        storage.remove(lock._url(out, 99))
