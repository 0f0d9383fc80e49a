"""What webdataset reads from the original shards, less what was flagged, is what it reads from the cleaned ones."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from tarsift.operators.errors import ChangedError, UsageError
from tarsift.operators.kept import SkipFlagged, Verdicts, drop_flagged, read_by
from tarsift.operators.shards import ReadShard, Shard
from tarsift.operators.writer import split_shard
from tests.operators.tars import archive, member, put, sample

# webdataset leaves the shards it has read open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def judged(folder: Path, members: list[bytes], homes: str, *, name: str = "s") -> tuple[Verdicts, Shard]:
    """Write a shard, and the flags and cleaned shards of a run over it; `homes` has a letter (c, r, e) per row."""
    shard = put(folder / "dump" / f"{name}.tar", archive(members), name=name)
    table = pa.concat_tables(ReadShard()(shard)).select(["shard", "row", "key", "uid"])
    named = [{"c": "clean", "r": "removed", "e": "errored"}[home] for home in homes]
    flags = folder / "out" / "flags" / f"{name}.parquet"
    flags.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.append_column("home", pa.array(named)), flags)
    split_shard(
        shard, named, {home: str(folder / "out" / home / f"{name}.tar") for home in ("clean", "removed", "errored")}
    )
    return Verdicts(str(folder / "out"), [shard]), shard


def read(path, *stages, handler=wds.reraise_exception) -> list[dict]:
    """Read by webdataset; without the URLs, which differ."""
    dataset = wds.WebDataset([str(path)], shardshuffle=False, handler=handler).compose(*stages)
    where = ("__url__", "__local_path__")
    return [{name: value for name, value in found.items() if name not in where} for found in dataset]


LAYOUTS = {
    "in order": ([m for i in range(6) for m in sample(f"{i:03d}")], "crccec"),
    "all kept": ([m for i in range(3) for m in sample(f"{i:03d}")], "ccc"),
    "folders": ([*sample("a/000"), *sample("b/000"), *sample("b.c/000")], "crc"),
    "key again": ([*sample("000"), *sample("001"), *sample("000"), *sample("000.x")], "ccer"),
    "key again, only the later one kept": ([*sample("000"), *sample("001"), *sample("000")], "rcc"),
    "images before captions": (
        [member(f"{i}.jpg", b"i%d" % i) for i in range(4)] + [member(f"{i}.txt", b"c%d" % i) for i in range(4)],
        "crrc",
    ),
    "dots in names": ([*sample("a.b00"), *sample("a.b01"), *sample("www.example.com"), *sample("x")], "rcrc"),
    "capitals": ([member("A.B00.JPG", b"1"), member("A.B01.JPG", b"2"), member("0.Seg.PNG", b"3")], "crc"),
    "members of no sample": ([member("README", b"x"), *sample("0"), member("d/._0.jpg", b"y"), *sample("1")], "rc"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_is_what_the_cleaned_shard_holds(layout, tmp_path):
    members, homes = LAYOUTS[layout]
    verdicts, shard = judged(tmp_path, members, homes)
    found = read(shard.url, SkipFlagged(verdicts))
    assert found == read(tmp_path / "out" / "clean" / "s.tar")
    assert len(found) > 0


def test_every_pass_over_a_shard_counts_anew(tmp_path):
    verdicts, shard = judged(tmp_path, *LAYOUTS["key again"])
    twice = wds.WebDataset([shard.url, shard.url], shardshuffle=False).compose(SkipFlagged(verdicts))
    assert [found["__key__"] for found in twice] == ["000", "001"] * 2
    stage = pickle.loads(pickle.dumps(SkipFlagged(verdicts)))
    for _ in range(2):
        assert [found["__key__"] for found in read(shard.url, stage)] == ["000", "001"]


def test_samples_that_cannot_be_told_apart_are_told_of(tmp_path):
    members = [*sample("000"), *sample("000"), *sample("001"), *sample("000")]  # webdataset skips the second
    verdicts, shard = judged(tmp_path, members, "crcr")
    with pytest.warns(RuntimeWarning, match="3 samples of the shard s have the key '000'.* 2 of them came"):
        read(shard.url, SkipFlagged(verdicts), handler=wds.ignore_and_continue)
    verdicts, shard = judged(tmp_path / "more", [*sample("001"), *sample("000"), *sample("001")], "ccr")
    samples = list(wds.WebDataset([shard.url], shardshuffle=False))
    with pytest.raises(UsageError, match=r"2 samples of the shard s have the key '001'.*one more"):
        list(SkipFlagged(verdicts)([samples[0], samples[2], *samples]))


def test_shards_are_found_where_they_lie_now_and_others_refused(tmp_path):
    verdicts, shard = judged(tmp_path, LAYOUTS["in order"][0], "crccec", name="a/s")
    stage = SkipFlagged(verdicts)
    moved = tmp_path / "elsewhere" / "a" / "s.tar"
    moved.parent.mkdir(parents=True)
    moved.write_bytes(Path(shard.url).read_bytes())
    wanted = read(shard.url, stage)
    assert read(moved, stage) == wanted
    assert read(f"pipe:cat {moved}", stage) == wanted
    assert read(f"file:{moved}", stage) == wanted
    alone = tmp_path / "elsewhere" / "s.tar"
    alone.write_bytes(moved.read_bytes())
    with pytest.raises(UsageError, match=r"was made from no shard like .*elsewhere/s\.tar"):
        read(alone, stage)
    moved.write_bytes(archive(sample("zzz")))
    with pytest.raises(ChangedError, match=r"has 10240 bytes.* had 20480"):
        read(moved, stage)


def test_a_sample_that_the_run_did_not_see_is_refused(tmp_path):
    verdicts, shard = judged(tmp_path, sample("000"), "c")
    with pytest.raises(ChangedError, match="no sample with the key '001'"):
        list(SkipFlagged(verdicts)([{"__url__": shard.url, "__key__": "001", "jpg": b""}]))
    with pytest.raises(UsageError, match="right behind the WebDataset"):
        list(SkipFlagged(verdicts)([{"jpg": b""}]))


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("s3://b/00000.tar", "s3://b/00000.tar"),
        ("pipe:aws s3 cp 's3://b/00000.tar' -", "s3://b/00000.tar"),
        ("pipe:curl -s -L https://h/x.tar.gz", "https://h/x.tar.gz"),
        ("pipe:true", "pipe:true"),
        ("file:///a/0.tar", "/a/0.tar"),
        ("file:a/0.tar", "a/0.tar"),
    ],
)
def test_what_a_url_reads(url, path):
    assert read_by(url) == path


def test_rows_are_dropped_by_identity_and_what_does_not_agree_is_refused(tmp_path):
    verdicts, shard = judged(tmp_path, LAYOUTS["key again"][0], "ccer")
    table = pa.concat_tables(ReadShard()(shard))
    kept = drop_flagged(table.take([3, 2, 1, 0]), verdicts=verdicts)
    assert kept["row"].to_pylist() == [1, 0]
    assert kept.schema == table.schema
    assert drop_flagged(table.slice(0, 0), verdicts=verdicts).num_rows == 0
    with pytest.raises(ChangedError, match="does not know row 4 of the shard s"):
        drop_flagged(pa.table({"shard": ["s"], "row": [4]}), verdicts=verdicts)
    with pytest.raises(ChangedError, match="by the key '007'"):
        drop_flagged(pa.table({"shard": ["s"], "row": [0], "key": ["007"]}), verdicts=verdicts)
    with pytest.raises(UsageError, match="was not made from the shard 't'"):
        drop_flagged(pa.table({"shard": ["t"], "row": [0]}), verdicts=verdicts)


def test_no_more_than_a_few_shards_are_held(tmp_path, monkeypatch):
    shards = []
    for i in range(5):
        _, shard = judged(tmp_path, sample("000"), "c", name=f"{i}")
        shards.append(shard)
    monkeypatch.setattr("tarsift.operators.kept.HELD_SHARDS", 2)
    verdicts = Verdicts(str(tmp_path / "out"), shards)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for shard in shards:
                assert len(read(shard.url, SkipFlagged(verdicts))) == 1
    assert len(verdicts._held) == 2
