"""verify_shard: what the writer wrote is proven, and every way to lose, change or double a member is found."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from tarsift.operators.errors import TarsiftError
from tarsift.operators.shards import ReadShard, Shard
from tarsift.operators.verify import FAULTS, ShardProof, verify_shard
from tarsift.operators.writer import SplitResult, split_shard
from tests.operators.tars import archive, member, sample

HOMES = ("clean", "removed", "errored", "clean", "clean", "removed")


def parts() -> list[bytes]:
    made = [member("a folder/", kind=b"5")]
    for i in range(len(HOMES)):
        made += sample(f"{i:04d}")
    return made


class Written:
    """A shard split by verdict in a folder."""

    def __init__(self, folder: Path, data: bytes, homes=HOMES, name: str = "s.tar") -> None:
        path = folder / name
        path.write_bytes(data)
        self.shard = Shard("s", str(path), len(data))
        self.homes = list(homes)
        self.outputs = {home: str(folder / home / "s.tar") for home in ("clean", "removed", "errored")}
        self.result: SplitResult = split_shard(self.shard, self.homes, self.outputs)

    def proof(self, shard: Shard | None = None, **changes) -> ShardProof:
        given = {
            "source_sha256": self.result.source_sha256,
            "output_sha256": {home: written.sha256 for home, written in self.result.homes.items()},
        }
        proof = verify_shard(shard or self.shard, self.homes, self.outputs, **{**given, **changes})
        assert {fault.fault for fault in proof.faults} <= FAULTS.keys()
        return proof

    def faults(self, *args, **changes) -> set[str]:
        return {fault.fault for fault in self.proof(*args, **changes).faults}

    def path(self, home: str) -> Path:
        return Path(self.outputs[home])


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path, archive(parts()))


def test_a_split_shard_holds(written: Written):
    proof = written.proof()
    assert not proof.faults
    assert proof.members == {"clean": 7, "removed": 4, "errored": 2}


@pytest.mark.parametrize("homes", [["clean"] * 6, ["removed"] * 6, ["errored"] * 6])
def test_all_to_one_home(tmp_path: Path, homes: list[str]):
    assert not Written(tmp_path, archive(parts()), homes).proof().faults


def test_gzip_damage_and_tail(tmp_path: Path):
    data = gzip.compress(archive(parts()), mtime=0)
    assert not Written(tmp_path, data, name="s.tar.gz").proof().faults
    cut = archive(parts())[:-11_000]
    for length in (len(cut), len(cut) - 300, len(cut) - 700):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "t.tar").write_bytes(cut[:length])
        rows = sum(map(len, ReadShard(receipts=True)(Shard("t", str(folder / "t.tar"), length)))) - 1
        damaged = Written(folder, cut[:length], HOMES[:rows])
        assert damaged.result.problem
        assert not damaged.proof().faults
        tail = folder / "errored" / "s.tail"
        if tail.exists():
            tail.write_bytes(tail.read_bytes()[:-1])
            assert damaged.faults() == {"tail_differs"}


def test_every_changed_byte_of_an_output_is_noticed(written: Written):
    for home in written.outputs:
        path = written.path(home)
        data = path.read_bytes()
        for at in range(0, len(data), 397):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert "output_changed" in written.faults(), (home, at)
        path.write_bytes(data)
    assert not written.faults()


def test_a_record_that_lies_does_not_help(written: Written):
    """With the digests of the record made to fit, the members still tell."""
    path, rows = written.path("removed"), [sample(f"{i:04d}") for i in range(6)]

    def faults_with(*members: bytes) -> set[str]:
        path.write_bytes(archive(members))
        digests = {home: written.result.homes[home].sha256 for home in written.outputs}
        return written.faults(output_sha256=digests | {"removed": hashlib.sha256(path.read_bytes()).hexdigest()})

    assert faults_with(*rows[1], *rows[5]) == set()
    assert faults_with(*rows[1]) == {"member_missing"}
    assert faults_with(*rows[5], *rows[1]) == {"member_missing"}
    assert faults_with(*rows[1], *rows[5], *rows[5]) == {"surplus_member"}
    assert faults_with(*rows[1], *rows[4]) == {"member_missing"}
    assert faults_with(*rows[1], *sample("0005", caption="another")) == {"member_missing"}


def test_outputs_that_are_gone_or_should_not_be_there(tmp_path: Path):
    written = Written(tmp_path, archive(parts()), ["clean"] * 5 + ["removed"])
    written.path("errored").parent.mkdir(exist_ok=True)
    written.path("errored").write_bytes(archive(sample("x")))
    assert written.faults() == {"surplus_member"}
    written.path("errored").unlink()
    written.path("removed").unlink()
    assert written.faults() == {"output_unreadable", "member_missing"}


def test_another_source(written: Written, tmp_path: Path):
    other = tmp_path / "other.tar"
    changed = parts()
    changed[3] = member("0001.jpg", b"another picture")
    other.write_bytes(archive(changed))
    assert "source_changed" in written.faults(Shard("s", str(other), 0))
    other.write_bytes(archive(parts()) + bytes(512))  # more padding: the members are all there
    assert written.faults(Shard("s", str(other), 0)) == {"source_changed"}
    assert written.faults(Shard("s", str(tmp_path / "gone.tar"), 0)) == {"source_unreadable"}


def test_verdicts_for_other_rows(written: Written):
    written.homes.append("clean")
    assert written.faults() == {"rows_differ"}
    with pytest.raises(TarsiftError):
        split_shard(written.shard, written.homes, written.outputs)
