"""`doctor`: what it tells of a machine, of the nodes of a cluster, and of places to read and write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from tarsift.operators import storage
from tarsift.pipelines import doctor
from tests.pipelines.test_cli import run


def test_this_machine_is_well(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    findings = {f.name: f for f in doctor.examine([str(tmp_path)])}
    assert {"python", "tarsift", "import names", "torch", "faiss", "ray", "space", "cpus"} <= findings.keys()
    assert not [f for f in findings.values() if f.state == doctor.BROKEN]
    assert findings[str(tmp_path)].state == doctor.OK
    code, out, _ = run(monkeypatch, capsys, "doctor", "--write", str(tmp_path))
    assert code == 0
    assert "faiss" in out
    assert "can be written" in out


def test_what_is_broken_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requires", lambda _: ["ray>=2.59", "nosuch>=1; python_version>'3'"])
    monkeypatch.setattr(doctor, "version", lambda _: "1.0")
    assert [f.name for f in doctor._guarded(doctor._packages) if f.state == doctor.BROKEN] == ["ray"]

    def broken():
        raise ImportError("libtorch.so is missing")
        yield

    [told] = doctor._guarded(broken)
    assert told.state == doctor.BROKEN
    assert "libtorch" in told.detail
    monkeypatch.undo()
    code, out, _ = run(monkeypatch, capsys, "doctor", "nosuch://bucket/x", str(tmp_path / "not-yet"))
    assert code == 1
    assert "nothing is there" in out


@pytest.mark.parametrize(
    ("builds", "state", "words"),
    [
        ({"faiss-cpu": "1.12"}, doctor.OK, "faiss-cpu 1.12"),
        ({"faiss-cpu": "1.12", "faiss-gpu-cu12": "1.9"}, doctor.BROKEN, "faiss-cpu 1.12 and faiss-gpu-cu12 1.9"),
        ({}, doctor.WARNING, "torch searches instead"),
    ],
)
def test_one_build_of_faiss_is_enough(builds, state, words, monkeypatch):
    monkeypatch.setattr(doctor, "providers", lambda module: builds if module == "faiss" else {})
    [told] = doctor._guarded(doctor._faiss)
    assert told.state == state
    assert words in told.detail


def test_a_package_of_ones_own_in_the_way_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "shadows", lambda: [("numpy", Path("/home/me/numpy.py"))])
    warning, _ = doctor._guarded(doctor._import_names)
    assert warning.state == doctor.WARNING
    assert "`import numpy` finds /home/me/numpy.py" in warning.detail
    assert "PYTHONPATH" in warning.remedy


def test_every_node_of_the_cluster_is_asked(ray_session, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "joined-already")
    [told] = doctor._guarded(doctor._ray)
    assert told.state == doctor.OK
    assert "at joined-already: 1 node, 2 CPUs" in told.detail
    [(_, versions)] = doctor._ask_nodes()
    assert versions == doctor._version_teller()()
    monkeypatch.setattr(doctor, "_ask_nodes", lambda: [("10.0.0.4", {**versions, "tarsift": "not installed"})])
    _, told = doctor._guarded(doctor._ray)
    assert told.state == doctor.BROKEN


def test_nodes_with_other_versions_are_named_together():
    here = {"Python": "3.11", "ray": "2.60.0", "tarsift": "0.1.0"}
    other = {**here, "Python": "3.12", "tarsift": "not installed"}
    told = [("10.0.0.1", here), ("10.0.0.2", other), ("10.0.0.3", other), ("10.0.0.4", "no answer within 30 s")]
    versions, silent = doctor._compare_nodes(told, here)
    assert versions.detail == "10.0.0.2, 10.0.0.3: Python 3.12 (here 3.11), tarsift not installed (here 0.1.0)"
    assert "constraints.txt" in versions.remedy
    assert silent.detail == "10.0.0.4: no answer within 30 s"
    [many] = doctor._compare_nodes([(f"10.0.0.{n}", other) for n in range(8)], here)
    assert "10.0.0.4 and 3 more: " in many.detail


def test_a_node_without_tarsift_can_still_be_asked():
    cloudpickle = pytest.importorskip("ray").cloudpickle
    code = "import sys; sys.modules['tarsift'] = None; import ray, pickle; print(pickle.load(sys.stdin.buffer)())"
    sent = cloudpickle.dumps(doctor._version_teller())
    told = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, timeout=120, check=True)
    assert "'tarsift': " in told.stdout.decode()


def test_nothing_is_written_unasked_and_nothing_stays(tmp_path, monkeypatch):
    written = []
    put = storage.put_bytes
    monkeypatch.setattr(storage, "put_bytes", lambda url, data: (written.append(url), put(url, data)))
    doctor.places([str(tmp_path), "memory://doctor/out"])
    assert written == []
    not_yet = tmp_path / "not" / "yet"
    for url in (str(not_yet), "memory://doctor/out"):
        told = doctor.places([url], write=True)[-1]
        assert told.state == doctor.OK
        assert "can be written" in told.detail
    assert len(written) == 2
    for shards in (str(tmp_path / "0.tar"), "memory://doctor/{00..11}.tar", "memory://doctor/*"):
        assert doctor.places([shards], write=True)[-1].detail == "names shards: not written to"
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []
    assert fsspec.filesystem("memory").find("/doctor") == []


def test_a_place_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuse(url, data):
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(storage, "put_bytes", refuse)
    *_, told = doctor.places([str(tmp_path)], write=True)
    assert told.state == doctor.BROKEN
    assert "AccessDenied" in told.detail


def test_room_is_told_where_the_folder_is_or_would_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "FREE_BYTES", 1 << 60)
    told = [f for f in doctor.places([str(tmp_path / "not" / "yet"), "memory://x"]) if f.name == "space"]
    assert [f.state for f in told] == [doctor.WARNING]
    assert told[0].detail.endswith(f"free in {tmp_path}")
