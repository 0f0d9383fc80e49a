from __future__ import annotations

import errno
import gzip
import hashlib
import io
import tracemalloc
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarsift.operators import storage
from tarsift.operators.errors import AccessError, ChangedError, ConservationError, StoreError, UsageError
from tarsift.operators.samples import Placed, scan_members
from tarsift.operators.shards import ReadConfig, ReadShard, Shard, ShardEnd, fetch_member
from tarsift.operators.tar import end_archive
from tarsift.operators.writer import SplitResult, split_shard
from tests.operators.tars import FORMATS, archive, breaking, by_tarfile, header, member, padded, pax, put, sample

HOMES = ("clean", "removed", "errored")


def outputs(root: Path | str, name: str = "s") -> dict[str, str]:
    return {home: f"{root}/{home}/{name}.tar" for home in HOMES}


def split(shard: Shard, homes: list[str], root: Path | str, **options) -> tuple[SplitResult, dict[str, bytes]]:
    """Split and return the result and the bytes of each home's file, having checked that they agree."""
    urls = outputs(root)
    result = split_shard(shard, homes, urls, **options)
    files = {}
    for home, url in urls.items():
        files[home] = storage.read_bytes(url) if storage.exists(url) else b""
        told = result.homes[home]
        assert told.bytes == len(files[home])
        assert told.sha256 == (hashlib.sha256(files[home]).hexdigest() if files[home] else "")
        assert told.samples == homes.count(home)
    tail = f"{root}/errored/s.tail"
    files["tail"] = storage.read_bytes(tail) if storage.exists(tail) else b""
    assert result.tail_bytes == len(files["tail"])
    return result, files


def ends(data: bytes) -> bytes:
    return data + end_archive(len(data))


def read_end(shard: Shard) -> ShardEnd:
    *_, last = ReadShard(receipts=True)(shard)
    return ShardEnd.model_validate_json(last["key"][0].as_py())


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
@pytest.mark.parametrize("trailer", [1024, 1025, 1536, 10240, 300_000, 20_000_000])
def test_a_shard_with_nothing_removed_is_identical(tmp_path: Path, name: str, trailer: int):
    data = b"".join([*sample("0"), member("README", b"r"), *sample("1")]) + bytes(trailer)
    result, files = split(put(tmp_path / name, data), ["clean"] * 2, tmp_path)
    assert files == {"clean": data, "removed": b"", "errored": b"", "tail": b""}
    assert result.source_sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert (result.stray_members, result.problem) == (1, None)
    assert not (tmp_path / "removed").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_headers_of_all_formats_are_kept_as_they_are(tmp_path: Path, format: str):
    names = ["a/0.jpg", "a/0.txt", "b/1.jpg", "b/1.txt"]
    if format != "ustar":
        names += ["ü" * 90 + ".jpg", "ü" * 90 + ".txt"]
    data = by_tarfile([(name, name.encode() * 100) for name in names], format)
    homes = ["clean"] * (len(names) // 2)
    assert split(put(tmp_path / "s.tar", data), homes, tmp_path)[1]["clean"] == data
    homes[1] = "removed"
    _, files = split(put(tmp_path / "s.tar", data), homes, tmp_path)
    pairs = [(name, name.encode() * 100) for name in names]
    assert files["clean"] == by_tarfile(pairs[:2] + pairs[4:], format)
    assert files["removed"] == by_tarfile(pairs[2:4], format)


def test_members_go_to_the_home_of_their_sample_in_the_order_of_the_source(tmp_path: Path):
    blocks = {name: member(name, name.encode()) for name in ("0.jpg", "1.jpg", "2.jpg", "0.txt", "1.txt", "2.txt")}
    strays = [member("d/", kind=b"5"), member("pipe", kind=b"6"), member("README"), pax(b"g", comment="1")]
    shard = put(tmp_path / "s.tar", archive([*strays, *blocks.values()]))
    result, files = split(shard, ["removed", "clean", "errored"], tmp_path)
    assert files["clean"] == ends(strays[0] + strays[2] + strays[3] + blocks["1.jpg"] + blocks["1.txt"])
    assert files["removed"] == ends(blocks["0.jpg"] + blocks["0.txt"])
    assert files["errored"] == ends(strays[1] + blocks["2.jpg"] + blocks["2.txt"])
    assert result.stray_members == 4
    assert {home: result.homes[home].members for home in HOMES} == {"clean": 5, "removed": 2, "errored": 3}


KEYS = st.sampled_from(["a", "b", "b.c", "d/a"])
PARTS = st.sampled_from(["jpg", "PNG", "txt", "json", "seg.png"])
NAMES = st.one_of(st.builds("{}.{}".format, KEYS, PARTS), st.sampled_from(["README", ".DS_Store", "d/"]))
MEMBERS = st.builds(member, NAMES, st.binary(max_size=1200), st.just(b"0")) | st.builds(
    member, NAMES, st.just(b""), st.sampled_from([b"1", b"2", b"3", b"5", b"6"])
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks=st.lists(MEMBERS, max_size=12), data=st.data())
def test_the_homes_hold_the_members_of_the_source_byte_for_byte(tmp_path: Path, blocks: list[bytes], data):
    shard = put(tmp_path / "s.tar", archive(blocks))
    rows = read_end(shard).rows
    homes = data.draw(st.lists(st.sampled_from(HOMES), min_size=rows, max_size=rows))
    result, files = split(shard, homes, tmp_path)
    placed = list(scan_members(io.BytesIO(archive(blocks))))
    for home in HOMES:
        body = b"".join(b for b, p in zip(blocks, placed, strict=True) if home == home_of(p, homes))
        assert files[home] == (ends(body) if body else b"")
    assert result.stray_members == sum(p.row is None for p in placed)
    # The samples of a home, read again, are those that were sent there.
    sources = [row for table in ReadShard()(shard) for row in table.to_pylist()]
    for home in HOMES:
        images = [r["image"] for r, h in zip(sources, homes, strict=True) if h == home and r["image"] is not None]
        again = [] if not files[home] else list(ReadShard()(Shard("s", f"{tmp_path}/{home}/s.tar", 0)))
        assert [r["image"] for table in again for r in table.to_pylist() if r["image"] is not None] == images


def home_of(placed: Placed, homes: list[str]) -> str:
    if placed.row is not None:
        return homes[placed.row]
    return "clean" if placed.member.type in ("file", "directory") else "errored"


SHARD = archive([*sample("0"), *sample("1"), member("README", b"r"), *sample("2")])


def test_of_a_cut_shard_whole_members_are_split_and_the_rest_is_the_tail(tmp_path: Path):
    for cut in [*range(0, 8 * 1024 + 700, 200), 512, 1024, 4096, len(SHARD) - 1]:
        shard = put(tmp_path / "s.tar", SHARD[:cut])
        rows = read_end(shard).rows
        homes = ["clean", "removed", "errored"][:rows]
        result, files = split(shard, homes, tmp_path)
        whole = min(cut // 1024, 7)
        home_of = ["clean", "clean", "removed", "removed", "clean", "errored", "errored"]
        for home in HOMES:
            body = b"".join(SHARD[i * 1024 : i * 1024 + 1024] for i in range(whole) if home_of[i] == home)
            assert files[home] == (ends(body) if body else b""), cut
        if cut < 8 * 1024:
            assert result.problem is not None
            tail = SHARD[whole * 1024 : cut]
            assert files["tail"] == (tail if tail.strip(b"\0") else b"")
        else:
            assert (result.problem, files["tail"]) == (None, b"")


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_what_follows_a_damaged_header_is_kept_whole(tmp_path: Path, name: str):
    data = SHARD[:2048] + b"\xff" * 512 + SHARD[2560:] + b"x" * 3_000_000
    result, files = split(put(tmp_path / name, data), ["clean"], tmp_path)
    assert files["clean"] == ends(SHARD[:2048])
    assert files["tail"] == data[2048:]
    assert result.problem is not None
    assert (result.problem.problem, result.problem.offset) == ("bad_header", 2048)


def test_trailing_data_is_the_tail(tmp_path: Path):
    _, files = split(put(tmp_path / "s.tar", SHARD + b"smuggled"), ["clean"] * 3, tmp_path)
    assert files["clean"] == SHARD
    assert files["tail"] == b"smuggled"


def test_reader_and_writer_agree_on_the_rows_of_damaged_gzip(tmp_path: Path):
    packed = bytearray(gzip.compress(SHARD))
    path = tmp_path / "s.tar.gz"
    problems = set()
    for at in range(10, len(packed), 3):
        packed[at] ^= 0xFF
        path.write_bytes(packed)
        packed[at] ^= 0xFF
        shard = Shard("s", str(path), 0)
        end = read_end(shard)
        result, _ = split(shard, ["removed"] * end.rows, tmp_path, expect_sha256=end.sha256)
        assert tuple(filter(None, [result.problem])) == end.problems
        problems |= {problem.problem for problem in end.problems}
    assert "gzip_damage" in problems


def test_a_changed_shard_is_refused_and_nothing_appears(tmp_path: Path):
    shard = put(tmp_path / "s.tar", SHARD)
    with pytest.raises(ChangedError, match="has changed"):
        split_shard(shard, ["clean"] * 3, outputs(tmp_path), expect_sha256="0" * 64)
    assert not list(tmp_path.rglob("*/s.*"))
    assert not list(tmp_path.rglob("*.tmp"))
    split_shard(shard, ["clean"] * 3, outputs(tmp_path), expect_sha256=hashlib.sha256(SHARD).hexdigest())


@pytest.mark.parametrize("homes", [["clean"] * 2, ["clean"] * 4, []])
def test_as_many_homes_as_rows(tmp_path: Path, homes: list[str]):
    with pytest.raises(ConservationError, match=f"has 3 samples, but homes are given for {len(homes)}"):
        split_shard(put(tmp_path / "s.tar", SHARD), homes, outputs(tmp_path))
    assert not list(tmp_path.rglob("*/s.*"))


def test_arguments_are_checked(tmp_path: Path):
    shard = put(tmp_path / "s.tar", SHARD)
    with pytest.raises(UsageError, match=r"the homes \['elsewhere'\]"):
        split_shard(shard, ["elsewhere"], outputs(tmp_path))
    with pytest.raises(UsageError, match=r"the homes \['errored'\]"):
        split_shard(shard, [], {"clean": "x"})
    with pytest.raises(UsageError, match="the input shard itself"):
        split_shard(shard, ["clean"] * 3, {**outputs(tmp_path), "clean": shard.url})


def test_what_an_earlier_run_left_is_replaced_or_removed(tmp_path: Path):
    shard = put(tmp_path / "s.tar", SHARD)
    split(shard, ["removed", "errored", "removed"], tmp_path)
    _, files = split(shard, ["clean"] * 3, tmp_path)
    assert files == {"clean": SHARD, "removed": b"", "errored": b"", "tail": b""}


def test_a_shard_that_is_a_folder_has_nothing(tmp_path: Path):
    (tmp_path / "folder.tar").mkdir()
    shard = Shard("s", str(tmp_path / "folder.tar"), 0)
    result, files = split(shard, [], tmp_path, expect_sha256="")
    assert not any(files.values())
    assert result.problem is not None
    assert result.problem.problem == "unreadable"
    with pytest.raises(ChangedError, match="not to be read"):
        split_shard(shard, [], outputs(tmp_path), expect_sha256="0" * 64)


def test_a_shard_that_cannot_be_reached_has_not_changed(tmp_path: Path, monkeypatch):
    homes, sha256 = ["clean", "clean", "removed"], hashlib.sha256(SHARD).hexdigest()
    with pytest.raises(StoreError, match=r"nothing\.tar: it was listed, and is gone"):
        split_shard(Shard("s", str(tmp_path / "nothing.tar"), 0), homes, outputs(tmp_path), expect_sha256=sha256)
    for error, kind in ((PermissionError("no"), AccessError), (OSError(errno.EIO, "broken"), StoreError)):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "open_read", lambda url, error=error: breaking(SHARD[:4096], error))
            with pytest.raises(kind, match=r"cannot read the shard dump/s\.tar"):
                split_shard(Shard("s", "dump/s.tar", len(SHARD)), homes, outputs(tmp_path), expect_sha256=sha256)
    assert not any(map(storage.exists, outputs(tmp_path).values()))


def test_remote_to_remote():
    root = f"memory://{uuid.uuid4().hex}"
    storage.put_bytes(f"{root}/in.tar.gz", gzip.compress(SHARD))
    _, files = split(Shard("s", f"{root}/in.tar.gz", 0), ["clean", "clean", "removed"], root)
    assert files["clean"] == ends(SHARD[: 5 * 1024])
    assert files["removed"] == ends(SHARD[5 * 1024 : 7 * 1024])


def test_memory_does_not_grow_with_a_member(tmp_path: Path):
    path = tmp_path / "s.tar"
    with open(path, "wb") as file:
        file.write(header(b"0.jpg", 120_000_000))
        file.seek(512 + len(padded(b"")) + 120_000_000 - 1)
        file.write(b"\1")
        file.seek(-(-120_000_000 // 512) * 512 + 512)
        file.write(bytes(1024))
    tracemalloc.start()
    try:
        result = split_shard(Shard("s", str(path), 0), ["clean"], outputs(tmp_path))
        assert result.homes["clean"].sha256 == result.source_sha256
        assert [t["error"][0].as_py() for t in ReadShard()(Shard("s", str(path), 0))] == ["image_too_large"]
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()


def test_webdataset_reads_what_is_written(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    names = [f"{i:04d}" for i in range(30)]
    data = archive(b for name in names for b in [*sample(name), member(f"{name}.json", b'{"uid": "u"}')])
    homes = ["clean" if i % 3 else "removed" for i in range(30)]
    split(put(tmp_path / "s.tar", data), homes, tmp_path)
    for home in ("clean", "removed"):
        url = f"{tmp_path}/{home}/s.tar"
        theirs = [(s["__key__"], s["jpg"], s["txt"].decode()) for s in webdataset.WebDataset(url, shardshuffle=False)]
        ours = [r for table in ReadShard(ReadConfig())(Shard("s", url, 0)) for r in table.to_pylist()]
        assert theirs == [(r["key"], r["image"], r["caption"]) for r in ours]
        assert [key for key, _, _ in theirs] == [n for n, h in zip(names, homes, strict=True) if h == home]
        last = ours[-1]
        assert fetch_member(Shard("s", url, 0), last["image_offset"], last["image_size"]) == last["image"]
