"""`verify` over a whole result: shards that moved, results that were tampered with, lists and counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import UsageError
from tarsift.pipelines.clean import clean
from tarsift.pipelines.config import load_config
from tarsift.pipelines.verify import verify
from tests.conftest import make_dump
from tests.pipelines.test_cli import run

pytestmark = pytest.mark.usefixtures("ray_session")
SMALL = ["suspicion.published_ks=[8]", "suspicion.reference_size=64"]


@pytest.fixture(scope="module")
def cleaned(ray_session, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    make_dump(folder / "dump", shards=3, samples=60)
    clean(str(folder / "dump"), str(folder / "out"), config=load_config(settings=SMALL), encoder=encoder)
    return folder


@pytest.fixture
def copy(cleaned, tmp_path) -> Path:
    shutil.copytree(cleaned / "out", tmp_path / "out")
    return tmp_path / "out"


def faults(out: Path, *shards: str) -> list[str]:
    proof = verify(str(out), list(shards) or None)
    return sorted(f.fault for f in [*proof.faults, *(f for shard in proof.shards for f in shard.faults)])


def test_a_result_holds_wherever_the_dump_lies_now(cleaned, copy, tmp_path, monkeypatch, capsys):
    proof = verify(str(copy))
    assert proof.holds
    assert sum(proof.members.values()) == 2 * 180 - 1
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(cleaned / "dump", moved)
    assert verify(str(copy), str(moved)).holds
    code, out, _ = run(monkeypatch, capsys, "verify", str(copy), str(moved))
    assert code == 0
    assert "holds: 3 shards" in out


def test_tampering_is_named_and_the_exit_code_is_4(copy, monkeypatch, capsys):
    shard = copy / "clean" / "00001.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    code, out, _ = run(monkeypatch, capsys, "verify", str(copy), "--json")
    told = json.loads(out)
    assert code == 4
    assert [f["fault"] for s in told["shards"] for f in s["faults"]] == ["member_missing", "output_changed"]
    code, out, _ = run(monkeypatch, capsys, "verify", str(copy))
    assert code == 4
    assert "00001: output_changed" in out


def test_lists_and_counts_must_agree_with_the_verdicts(copy):
    keep = copy / "keep.parquet"
    table = pq.read_table(keep)
    pq.write_table(table.slice(1), keep)
    assert faults(copy) == ["keep_list_differs"]
    keep.unlink()
    assert faults(copy) == ["keep_list_differs"]
    pq.write_table(table, keep)
    about = json.loads((copy / "run.json").read_text())
    about["counts"]["kept"] += 1
    (copy / "run.json").write_text(json.dumps(about))
    assert faults(copy) == ["counts_differ"]


def test_flags_that_are_gone_or_damaged_are_a_fault_of_their_shard(copy, monkeypatch, capsys):
    (copy / "flags" / "00000.parquet").unlink()
    (copy / "flags" / "00001.parquet").write_bytes(b"PAR1 no more")
    code, out, err = run(monkeypatch, capsys, "verify", str(copy), "--json")
    told = json.loads(out)
    assert code == 4, err
    assert [[f["fault"] for f in shard["faults"]] for shard in told["shards"]] == [["verdicts_unreadable"]] * 2 + [[]]
    assert told["faults"] == []  # counts and list have nothing to be compared with


def test_shards_that_are_missing_or_unknown(cleaned, copy, tmp_path):
    some = tmp_path / "some"
    shutil.copytree(cleaned / "dump", some)
    (some / "00001.tar").rename(some / "00007.tar")
    assert faults(copy, str(some)) == ["source_missing", "unknown_shard"]
    (copy / "ledger" / "write" / "00000.json").unlink()
    assert faults(copy) == ["not_written"]


def test_a_result_that_is_not_complete(cleaned, copy, encoder, tmp_path):
    about = json.loads((copy / "run.json").read_text())
    del about["passes"]["write"]
    (copy / "run.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match="never done"):
        verify(str(copy))
    with pytest.raises(UsageError, match=r"run\.json"):
        verify(str(tmp_path / "nothing"))


def test_lists_only(cleaned, encoder, tmp_path):
    out = tmp_path / "lists"
    config = load_config(settings=[*SMALL, "write.shards=false"])
    clean(str(cleaned / "dump"), str(out), config=config, encoder=encoder)
    proof = verify(str(out))
    assert proof.holds
    assert not proof.with_shards
    (out / "flags" / "00000.parquet").unlink()
    assert faults(out) == ["verdicts_unreadable"]
