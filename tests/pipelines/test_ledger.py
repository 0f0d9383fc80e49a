"""The ledger: an entry counts whole, under its fingerprint, or not at all."""

import pytest

from tarsift.operators.errors import UsageError
from tarsift.pipelines.ledger import Ledger, RunFile, fingerprint


def test_fingerprint_depends_on_values_not_on_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


@pytest.mark.parametrize("root", ["{tmp}", "memory://ledger-test"])
def test_entries_round_trip_with_sub_folders(tmp_path, root):
    out = root.format(tmp=tmp_path)
    ledger = Ledger(out, "score", "f1")
    assert ledger.entries() == {}
    ledger.commit("00000", {"rows": 3})
    ledger.commit("part/00001", {"rows": 4})
    assert {name: e["rows"] for name, e in ledger.entries().items()} == {"00000": 3, "part/00001": 4}
    assert set(ledger.entries(["00000"])) == {"00000"}
    assert Ledger(out, "score", "f2").entries() == {}


def test_a_pass_that_begins_removes_the_entries_of_other_fingerprints(tmp_path):
    before, after = (Ledger(str(tmp_path), "write", name) for name in ("f1", "f2"))
    for shard in ("a", "b/c", "d"):
        before.commit(shard, {"rows": 3})
    after.commit("a", {"rows": 4})
    assert after.begin(["a", "b/c"]).keys() == {"a"}
    assert before.entries().keys() == {"d"}  # no shard of that run


def test_an_entry_cut_off_by_a_crash_is_none(tmp_path):
    ledger = Ledger(str(tmp_path), "score", "f")
    ledger.commit("a", {"rows": 3})
    path = tmp_path / "ledger" / "score" / "a.json"
    for size in range(len(path.read_bytes())):
        path.write_bytes(path.read_bytes()[:size])
        assert ledger.entries() == {}
        ledger.commit("a", {"rows": 3})


def test_run_file_adds_up_the_time_of_a_continued_pass(tmp_path):
    run = RunFile(str(tmp_path))
    run.record_pass("embed", {"fingerprint": "f", "samples": 100, "elapsed_s": 2.0})
    run.record_pass("embed", {"fingerprint": "f", "samples": 100, "elapsed_s": 3.0})
    assert RunFile.load(str(tmp_path)).content["passes"]["embed"]["samples_per_s"] == 20.0
    run.record_pass("embed", {"fingerprint": "other", "samples": 100, "elapsed_s": 1.0})
    assert run.content["passes"]["embed"]["elapsed_s"] == 1.0


def test_a_folder_without_run_json_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds no run\.json"):
        RunFile.load_or_refuse(str(tmp_path))
