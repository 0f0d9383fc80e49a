"""Passwords and signatures inside URLs: in nothing that leaves the program, whichever way it leaves."""

from __future__ import annotations

import io
import shutil
from types import SimpleNamespace

import fsspec
import pytest
from rich.console import Console

from tarsift.operators import storage
from tarsift.operators.audit import AuditShard
from tarsift.operators.shards import Shard
from tarsift.operators.verify import Fault, verify_shard
from tarsift.pipelines import doctor, json_log, printing
from tarsift.pipelines import status as status_recipe
from tarsift.pipelines.audit import Audit
from tarsift.pipelines.clean import CleanResult
from tarsift.pipelines.evaluate import Evaluation
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.progress import Event, JsonLines, PlainLines, RichBars
from tarsift.pipelines.report import write_report
from tarsift.pipelines.status import Status
from tarsift.pipelines.verify import Proof
from tests.pipelines.results import campaign, make_result
from tests.pipelines.test_cli import run

SECRET = "hunter2"
SIGNED = f"http://user:{SECRET}@store.example/dump/00000.tar?X-Amz-Signature={SECRET}"
STORE = f"memory://store?X-Amz-Signature={SECRET}"  # read and written; what follows belongs to the query
OUT = f"{STORE}/out"


@pytest.fixture(autouse=True)
def _clean_store():
    yield
    memory = fsspec.filesystem("memory")
    for folder in memory.ls("/", detail=False):
        if SECRET in folder:
            memory.rm(folder, recursive=True)


def shown(value, show, capsys) -> str:
    """What a command writes of a value, for people and as JSON."""
    printing.answer(value, show, as_json=False)
    printing.answer(value, show, as_json=True)
    return capsys.readouterr().out


def of_an_audit(capsys, **_) -> str:
    shard = Shard("00000", f"{STORE}/00000.tar", 0)
    storage.put_bytes(shard.url, bytes(1024))
    storage.put_bytes(f"{STORE}/00000_stats.json", b"{")
    storage.put_bytes(f"{STORE}/00000.parquet", b"PAR")
    found, _ = AuditShard()(shard)
    assert [p.problem for p in found.problems] == ["no_samples", "sidecar_unreadable"]
    audit = Audit(shards=(found,), decoded=False, elapsed_s=1)
    return shown(audit.to_json(), lambda c: printing.print_audit(audit, c), capsys) + repr(audit)


def of_a_proof(capsys, **_) -> str:
    outputs = {home: f"{STORE}/{home}/00000.tar" for home in ("clean", "removed", "errored")}
    shard, digests = Shard("00000", f"{STORE}/00000.tar", 0), dict.fromkeys(outputs, "ab")
    gone = verify_shard(shard, [], outputs, source_sha256="ab", output_sha256=digests)
    assert {fault.fault for fault in gone.faults} == {"output_unreadable", "source_unreadable"}
    long = Fault(fault="keep_list_differs", detail="x" * 280 + SIGNED)
    proof = Proof(out=OUT, shards=(gone,), with_shards=True, faults=(long,), elapsed_s=1)
    told = shown(proof.to_json(), lambda c: printing.print_proof(proof, c), capsys)
    return told + repr([*gone.faults, long])


def of_the_doctor(capsys, **_) -> str:
    storage.put_bytes(f"{STORE}/x", b"")
    urls = (STORE, f"{STORE}/nothing", SIGNED.replace("http", "nosuch"), OUT)
    findings = [f for url in urls for f in doctor.places([url])]
    assert {f.state for f in findings} == {doctor.OK, doctor.WARNING, doctor.BROKEN}
    values = [finding.model_dump() for finding in findings]
    return shown(values, lambda c: printing.print_findings(findings, c), capsys) + repr(findings)


def of_a_dry_run(monkeypatch, capsys, dump, encoder, **_) -> str:
    arguments = ["clean", str(dump), "--out", OUT, "--encoder", f"detect={encoder}", "--reference", SIGNED, "--dry-run"]
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "reference:" in out
    return out + err


def of_a_report(tmp_path, **_) -> str:
    made = make_result(tmp_path, campaign())
    made.run["inputs"][0]["url"] = SIGNED
    made.run["config"] |= {"reference": {"path": SIGNED}}
    made.run["encoders"]["detect"]["spec"] = f"RN50:{SIGNED}"
    made.run["reference"]["coverage"] = f"by {SIGNED}"
    problem = {"problem": "unreadable", "offset": 0, "detail": f"403 for {SIGNED}"}
    made.run["counts"]["shard_problems"] = {made.run["inputs"][0]["name"]: [problem]}
    made.save_run()
    fsspec.filesystem("memory").put(str(made.out), storage.filesystem(OUT)[1], recursive=True)
    shutil.rmtree(made.out)
    page = storage.read_bytes(write_report(OUT)).decode()
    assert "403 for http://***@store.example/dump/00000.tar?***" in page
    return page


def of_closing_lines(capsys, **_) -> str:
    counts = {"read": 1, "kept": 1, "removed": 0, "errored": 0, "errors": {}}
    result = SimpleNamespace(
        counts=counts, elapsed_s=1, clean_shards=f"{OUT}/clean", out=OUT, passes={}, report=f"{OUT}/report.html"
    )
    status = Status(out=OUT, state="outdated", holder="", passes=(), stale=("report",), report=f"{OUT}/report.html")
    summary = SimpleNamespace(
        samples=9, poisoned=0, removed=1, accuracy_before=1, accuracy_after=1, elapsed_s=1, report=f"{OUT}/report.html"
    )
    printing.print_result(result, printing.Screen())
    printing.print_demo(summary, OUT, printing.Screen())
    printing.say(f"1 sample kept in {OUT}/clean", quiet=False)
    return shown(status.model_dump(mode="json"), lambda c: printing.print_status(status, c), capsys)


def of_an_evaluation(capsys, **_) -> str:
    evaluation = Evaluation(1, 1, note=f"no score in {OUT}", out=OUT, truth=SIGNED)
    return shown(evaluation.to_json(), lambda c: printing.print_evaluation(evaluation, c), capsys)


def of_progress(**_) -> str:
    lines, bars = io.StringIO(), io.StringIO()
    event = Event("pretrain", 1, 2, note=f"goes on from {OUT}", finished=True)
    PlainLines(stream=lines)(event)
    JsonLines(stream=lines)(event)
    with RichBars(Console(file=bars, force_terminal=True, width=400)) as listener:
        listener(event)
    assert "goes on" in bars.getvalue()
    return lines.getvalue() + bars.getvalue()


def of_errors(monkeypatch, capsys, **_) -> str:
    foreseen = run(monkeypatch, capsys, "status", OUT)

    def unforeseen(out: str) -> None:
        raise RuntimeError(f"403, message='\x1b[31mForbidden', url='{SIGNED}'")

    monkeypatch.setattr(status_recipe, "status", unforeseen)
    code, out, err = run(monkeypatch, capsys, "status", "out")
    assert (foreseen[0], code) == (2, 1)
    assert "Traceback" in err
    assert "?[31mForbidden" in err
    return f"{foreseen}{out}{err}"


def of_a_json_log(monkeypatch, capsys, **_) -> str:
    monkeypatch.setenv("TARSIFT_LOG", "json")
    monkeypatch.setattr(json_log, "take_warnings", lambda: None)
    printing.sum_up({"out": OUT, "files": [SIGNED], SIGNED: {"why": OSError(SIGNED)}}, lambda _: None)
    printing.say(f"1 sample kept in {OUT}/clean", quiet=False)
    said = capsys.readouterr().err
    foreseen = run(monkeypatch, capsys, "status", OUT)[2]
    monkeypatch.setattr(status_recipe, "status", lambda out: printing.write_json({}[SIGNED]))
    unforeseen = run(monkeypatch, capsys, "status", "out")[2]
    assert "Traceback" in unforeseen
    return said + foreseen + unforeseen


def of_a_notebook(**_) -> str:
    result = CleanResult(OUT, {"read": 1, "kept": 1, "removed": 0, "errored": 0, "errors": {}}, {}, SIGNED, 1.0)
    assert "http://***@store.example/dump/00000.tar?***" in result._repr_html_()
    return result._repr_html_() + html_table(SIGNED, [(SIGNED, SIGNED)], {SIGNED: OUT})


WAYS = [
    of_an_audit, of_a_proof, of_the_doctor, of_a_dry_run, of_a_report, of_closing_lines, of_an_evaluation, of_progress,
    of_errors, of_a_json_log, of_a_notebook,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_password_and_no_signature_leaves_the_program(way, tmp_path, monkeypatch, capsys, dump, encoder):
    monkeypatch.setenv("COLUMNS", "400")
    text = way(tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys, dump=dump, encoder=encoder)
    assert "***" in text
    assert SECRET not in text
