from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsift.operators.errors import SHARD_PROBLEMS
from tarsift.operators.tar import Member, TarDamage, end_archive, walk_tar
from tests.operators.tars import FORMATS, archive, by_tarfile, header, member, padded, pax, record, with_checksum


def everything(name: str, size: int) -> int:
    return size


def walk(data: bytes) -> list[Member]:
    return list(walk_tar(io.BytesIO(data), keep=everything))


def damage(data: bytes) -> tuple[list[Member], TarDamage]:
    members = []
    with pytest.raises(TarDamage) as caught:  # noqa: PT012 (what came before the damage counts)
        for found in walk_tar(io.BytesIO(data), keep=everything):
            members.append(found)
    assert caught.value.problem in SHARD_PROBLEMS
    return members, caught.value


NAMES = ["a.jpg", "d/e.f/a.b00.jpg", "x" * 100, "dir/" * 30 + "n.txt", "ü/日本.png", "long" * 70 + ".txt", "y" * 120]


@pytest.mark.parametrize("format", FORMATS)
def test_agrees_with_tarfile_on_every_format(format: str):
    files = [(name, bytes([i]) * (i * 300)) for i, name in enumerate(NAMES)]
    if format == "ustar":  # it cannot hold the others
        files = [(name, payload) for name, payload in files if len(name) <= 130 and not name.startswith(("y", "dir"))]
        files.append(("p" * 90 + "/" + "q" * 60, b"prefix"))
    data = by_tarfile(files, format)
    members = walk(data)
    assert [(m.name, m.payload) for m in members] == files
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.size, m.offset) for m in members] == [(i.name, i.size, i.offset_data) for i in tar]
    for m in members:
        assert data[m.header_offset : m.offset] == m.headers


def test_members_are_the_archive_byte_for_byte():
    data = by_tarfile([(name, b"1" * i) for i, name in enumerate(NAMES)], "gnu")
    copied = b"".join(m.headers + padded(m.payload or b"") for m in walk(data))
    assert data == copied + end_archive(len(copied))


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar program here")
@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_agrees_with_the_tar_program(tmp_path: Path, format: str):
    version = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=False).stdout
    if "GNU tar" not in version:
        pytest.skip("the tar program here is not GNU tar")
    names = ["a.jpg", "sub/b.txt"] + (["l" * 150 + ".txt"] if format in ("oldgnu", "gnu", "posix") else [])
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x" * 700 * i)
    (tmp_path / "in" / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "in" / "hard.jpg").hardlink_to(tmp_path / "in" / "a.jpg")
    out = tmp_path / "out.tar"
    listed = [*names, "link.jpg", "hard.jpg", "sub"]
    subprocess.run(["tar", "-cf", out, f"--format={format}", "-C", tmp_path / "in", *listed], check=True)
    members = [(m.name.rstrip("/"), m.type, m.payload) for m in walk(out.read_bytes())]
    files = [(name, "file", b"x" * 700 * i) for i, name in enumerate(names)]
    assert members[: len(names)] == files
    assert members[len(names) : len(names) + 2] == [("link.jpg", "symlink", None), ("hard.jpg", "link", None)]
    assert ("sub", "directory", None) in members


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar program here")
@pytest.mark.parametrize("format", ["oldgnu", "gnu", "posix"])
def test_incremental_archives_of_the_tar_program(tmp_path: Path, format: str):
    names = ["a.jpg", "a.txt", "sub/" + "l" * 150 + ".txt"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    (tmp_path / "in" / "link.jpg").symlink_to("a.jpg")
    out = tmp_path / "out.tar"
    command = ["tar", "-cf", out, f"--format={format}", "--incremental", "-C", tmp_path / "in", "."]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the tar program here is not GNU tar")
    data = out.read_bytes()
    # Old headers have the times of a file where USTAR has a prefix.
    assert (data[345:346] != b"\0") == (format != "posix")
    found = walk(data)
    assert {m.name: m.payload for m in found if m.type == "file"} == {f"./{n}": n.encode() for n in names}
    assert {m.name for m in found if m.type == "symlink"} == {"./link.jpg"}


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar program here")
@pytest.mark.parametrize("format", [["--format=oldgnu"], ["--format=posix", "--sparse-version=1.0"]])
def test_sparse_files_are_told_and_skipped(tmp_path: Path, format: list[str]):
    holes = tmp_path / "holes.jpg"
    with open(holes, "wb") as file:
        for i in range(40):  # more pieces than a header has room for
            file.seek(i * 100_000)
            file.write(b"piece")
    (tmp_path / "after.txt").write_bytes(b"after")
    out = tmp_path / "out.tar"
    command = ["tar", "-cSf", out, *format, "-C", tmp_path, "holes.jpg", "after.txt"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the tar program here cannot make sparse members")
    members = walk(out.read_bytes())
    if members[0].size == 40 * 100_000 - 100_000 + 5:
        pytest.skip("no holes on this file system")
    assert [(m.name, m.type) for m in members] == [("holes.jpg", "sparse"), ("after.txt", "file")]
    assert members[1].payload == b"after"


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("aé/._ü", min_size=1, max_size=130), st.binary(max_size=1100)), max_size=5))
def test_agrees_with_tarfile_on_any_names(files: list[tuple[str, bytes]]):
    data = by_tarfile(files, "pax")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(i.name, i.size, i.offset_data) for i in tar]
    # tarfile drops slashes that end a name; a name of old type that ends so would be a folder
    assert [(m.name.rstrip("/") or m.name[:0], m.size, m.offset) for m in walk(data)] == [
        (name.rstrip("/"), size, offset) for name, size, offset in expected
    ]


def test_old_archives_without_magic():
    block = with_checksum(header(b"old.txt", 3, b"\0", b"\0" * 8))
    folder = with_checksum(header(b"folder/", 0, b"\0", b"\0" * 8))
    assert [(m.name, m.type) for m in walk(archive([block, padded(b"abc"), folder]))] == [
        ("old.txt", "file"),
        ("folder/", "directory"),
    ]


def test_signed_checksums_are_taken():
    name = "ü.txt".encode("latin-1")
    block = with_checksum(header(name, 3), signed=True)
    assert block != header(name, 3)
    assert walk(archive([block, padded(b"abc")]))[0].name == "\udcfc.txt"


def test_base_256_sizes():
    block = header(b"a.txt", b"\x80" + (3).to_bytes(11, "big"))
    assert walk(archive([block, padded(b"abc")]))[0].payload == b"abc"
    _, told = damage(archive([header(b"a.txt", b"\xff" * 12)]))
    assert (told.problem, told.offset) == ("bad_header", 0)
    _, told = damage(archive([header(b"a.txt", b"\x80" + b"\xff" * 11)]))
    assert told.problem == "bad_header"


def test_pax_path_and_size_go_before_the_header():
    block = pax(path="real/name.txt", size="5") + header(b"short", 0) + padded(b"12345")
    found = walk(archive([block, member("b", b"2")]))
    assert [(m.name, m.size, m.payload, m.header_offset) for m in found] == [
        ("real/name.txt", 5, b"12345", 0),
        ("b", 1, b"2", len(block)),
    ]


def test_long_names_of_gnu_and_of_two_headers_the_first_counts_as_in_tarfile():
    data = archive([member("././@LongLink", b"gnu.txt\0", b"L"), pax(path="pax.txt"), member("plain.txt", b"1")])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [m.name for m in walk(data)] == tar.getnames() == ["gnu.txt"]


def test_global_headers_are_members_of_their_own():
    data = archive([pax(b"g", comment="0123abc"), *[member("a.txt", b"1")]])
    assert [(m.name, m.type) for m in walk(data)] == [("PaxHeader", "global"), ("a.txt", "file")]


def with_field(at: int, value: bytes, kind: bytes = b"0") -> bytes:
    block = header(b"a.jpg", 0, kind)
    return with_checksum(block[:at] + value + block[at + len(value) :])


def with_prefix(prefix: bytes, magic: bytes, name: bytes = b"a.jpg", kind: bytes = b"0") -> bytes:
    block = header(name, 0, kind, magic)
    return with_checksum(block[:345] + prefix + block[345 + len(prefix) :])


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ([pax(b"g", path="all.jpg")], "global header sets 'path'"),
        ([pax(b"g", size="0")], "global header sets 'size'"),
        ([pax(path="x"), pax(b"g", comment="1")], "between"),
        ([pax(path=b"a\0b")], "NUL"),
        ([pax(size="-1")], "size in a PAX header"),
        ([pax(size="9" * 30)], "size in a PAX header"),
        ([member("p", b"11 path=abc\n", b"x")], "wrong length"),
        ([member("p", b"99 path=a\n", b"x")], "wrong length"),
        ([member("p", b"no number\n", b"x")], "wrong length"),
        ([member("p", b"6 abc\n", b"x")], "no key"),
        ([member("p", bytes(2 << 20), b"x")], "too large"),
        ([header(b"a.jpg", b"0000000019\0")], "out of range"),
        ([header(b"a.jpg", b"-0000000001")], "out of range"),
        ([header(b"a.jpg", b"1_0")], "out of range"),
        ([header(b"a.jpg", 0, magic=b"cpio\0\0")], "magic"),
        ([member("link.jpg", b"smuggled", b"2")], "disagree"),
        ([member("folder/", b"smuggled", b"5")], "disagree"),
        ([header(b"a.jpg", b"\x000000000001\0")], "out of range"),
        ([header(b"a.jpg", b"0\x000000000001")], "out of range"),
        ([header(b"P", 14, b"x") + padded(b"14 path=a.jpg\n14 path=b.jpg\n")], "padding of an extended header"),
        ([header(b"P", 13, b"g") + padded(b"13 comment=1\n14 path=b.jpg\n")], "padding of an extended header"),
        ([header(b"P", 5, b"L") + padded(b"a.jpg.txt")], "padding of an extended header"),
        ([pax(path="README") + member("x/", b"smuggled", b"\0")], "folder by one of its names"),
        ([pax(path="x/") + member("README", b"smuggled", b"\0")], "folder by one of its names"),
        ([member("L", b"README", b"L") + member("x/", b"smuggled", b"\0")], "folder by one of its names"),
        ([with_prefix(b"p", b"ustar\x0000", b"", b"\0")], "folder by its prefix"),
        ([with_prefix(b"p", b"ustar  \0")], "prefix of the name"),
        ([with_prefix(b"p", b"\0" * 8)], "prefix of the name"),
        ([with_prefix(b"14712345670", b"ustar  \0", b".jpg")], "prefix of the name"),
        ([member("g", record(b"GNU.sparse.\xff", b"1"), b"g")], "global header sets"),
        ([pax(GNU__sparse__realsize="0") + member("l.jpg", b"smuggled", b"2")], "disagree"),
        ([pax(GNU__sparse__realsize="0", size="8") + member("l.jpg", b"smuggled")], "sparse member with a size"),
        ([pax(size="8", GNU__sparse__realsize="0") + member("README", b"smuggled", b"V")], "sparse member with a size"),
        ([member("K", bytes(1 << 20), b"K")] * 4, "headers of a member"),
        ([member(b"\x1f\x8b\x08.jpg", b"1")], "compressed"),
        ([member(b"BZh91AY&SY.jpg", b"1")], "compressed"),
        ([member(b"]\0\0\x80", b"1")], "compressed"),
        ([with_field(136, b"garbage_____")], "where a number should be"),
        ([with_field(108, b"-9\0")], "where a number should be"),
        ([with_field(329, b"0x0\0")], "where a number should be"),
        ([with_field(386, b"sparse", b"S")], "where a number should be"),
        ([b"<html>" + b"x" * 506], "checksum"),
        ([b"\xfd7zXZ" + b"x" * 507], "xz"),
    ],
)
def test_bad_headers_are_damage_at_the_members_first_byte(blocks: list[bytes], says: str):
    members, told = damage(archive([*blocks, member("after.txt", b"1")]))
    assert (told.problem, told.offset) == ("bad_header", 0)
    assert says in told.detail
    assert not members
    if b"xz" not in blocks[0][:6].lower():
        _, told = damage(archive([member("before.txt", b"1"), *blocks, member("after.txt", b"1")]))
        assert (told.problem, told.offset) == ("bad_header", 1024)


def test_numbers_that_tarfile_reads_are_taken():
    fields = [b"\x80\xff644\0\0\0", b"\xff" * 8, b" 644 \0\0\0", b"\0garbage", b"-7\0", b" " * 8, b"644\0junk"]
    data = archive(with_field(at, field) for at in (100, 108, 116, 136, 329, 337) for field in fields)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert len(walk(data)) == len(tar.getnames()) == 6 * len(fields)


def test_an_extended_header_needs_a_member():
    _, told = damage(archive([member("a.txt"), pax(path="x")]))
    assert (told.problem, told.offset) == ("bad_header", 512)


SMALL = by_tarfile([("a.jpg", b"\xff" * 700), ("é" * 60 + ".txt", b"caption"), ("b.jpg", b"")], "pax")
END = len(SMALL.rstrip(b"\0")) // 512 * 512 + 512  # of the last member, an empty file


def test_every_cut_is_noticed():
    whole = walk(SMALL)
    ends = [m.offset + len(padded(m.payload or b"")) for m in whole]
    assert ends[-1] == END
    for cut in range(len(SMALL)):
        if cut >= END + 1024:
            assert walk(SMALL[:cut]) == whole
            continue
        members, told = damage(SMALL[:cut])
        assert members == [m for m, end in zip(whole, ends, strict=True) if end <= cut]
        assert told.problem == ("no_end_marker" if cut >= END or cut in (0, *ends) else "truncated")
        assert told.offset == (cut if cut >= END else max([0, *[end for end in ends if end <= cut]]))


def test_a_cut_payload_names_its_member():
    members, told = damage(SMALL[: whole_offset(1) + 3])
    assert len(members) == 1
    assert told.member is not None
    assert (told.member.name, told.member.size, told.member.payload) == ("é" * 60 + ".txt", 7, None)


def whole_offset(index: int) -> int:
    return walk(SMALL)[index].offset


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_flipped_header_byte_is_noticed(flip: int):
    for m in walk(SMALL):
        for at in range(m.header_offset, m.header_offset + len(m.headers)):
            data = bytearray(SMALL)
            data[at] ^= flip
            if SMALL[m.header_offset + 156 : m.header_offset + 157] == b"x" and 512 <= at - m.header_offset < 1024:
                continue  # the payload of a PAX header has no checksum
            members, told = damage(bytes(data))
            assert (told.problem, told.offset) == ("bad_header", m.header_offset)
            assert [x.offset for x in members] == [x.offset for x in walk(SMALL) if x.offset < m.header_offset]


@pytest.mark.parametrize("extra", [0, 1, 511, 512, 100_000, 2_000_000])
def test_any_number_of_zeros_may_follow_and_nothing_else(extra: int):
    data = member("a.txt", b"1") + bytes(1024 + extra)
    assert len(walk(data)) == 1
    members, told = damage(data + b"x" + bytes(1000))
    assert len(members) == 1
    assert (told.problem, told.offset) == ("trailing_data", len(data))


def test_two_archives_in_one_file_are_trailing_data():
    _, told = damage(archive([member("a.txt")]) + archive([member("b.txt")]))
    assert (told.problem, told.offset) == ("trailing_data", 10240)


def test_a_lone_zero_block_ends_no_archive():
    members, told = damage(member("a.txt") + bytes(512) + member("b.txt") + bytes(1024))
    assert [m.name for m in members] == ["a.txt"]
    assert (told.problem, told.offset) == ("no_end_marker", 1024)


def test_types():
    kinds = {b"0": "file", b"7": "file", b"1": "link", b"2": "symlink", b"3": "device", b"4": "device"}
    kinds |= {b"5": "directory", b"6": "fifo", b"V": "other"}
    found = walk(archive(member(f"{kind!r}", b"", kind) for kind in kinds))
    assert [m.type for m in found] == list(kinds.values())
    assert walk(archive([member("V", b"label", b"V"), member("a")]))[1].name == "a"  # its payload is skipped


def test_as_much_of_a_payload_as_was_asked_for():
    data = archive([member("a", b"0123456789"), member("b", b"x" * 3_000_000), member("c", b"last")])
    kept = [m.payload for m in walk_tar(io.BytesIO(data), keep=lambda name, size: {"a": 4, "b": 5, "c": 0}[name])]
    assert kept == [b"0123", b"xxxxx", None]


class Slow(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 100))


def test_short_reads_are_no_end():
    assert list(walk_tar(Slow(SMALL), keep=everything)) == walk(SMALL)  # type: ignore[arg-type]


class Endless(io.RawIOBase):
    """A member of `size` zeros that are never all in memory."""

    def __init__(self, head: bytes, size: int) -> None:
        self._head, self._left = io.BytesIO(head), size

    def read(self, size: int = -1) -> bytes:
        if data := self._head.read(size):
            return data
        size = min(size, self._left)
        self._left -= size
        return bytes(size)


def test_a_huge_member_is_skipped_in_constant_memory():
    tracemalloc.start()
    try:
        stream = Endless(header(b"huge.jpg", 300_000_000), 200_000_000)
        with pytest.raises(TarDamage, match=r"inside the member 'huge\.jpg'"):
            list(walk_tar(stream))  # type: ignore[arg-type]
        claims = io.BytesIO(header(b"huge.jpg", b"\x80" + (10 << 30).to_bytes(11, "big")) + bytes(1000))
        with pytest.raises(TarDamage, match=r"inside the member 'huge\.jpg'"):
            list(walk_tar(claims, keep=lambda name, size: 1000))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_end_archive():
    for blocks in range(45):
        end = end_archive(blocks * 512)
        assert not end.strip(b"\0")
        assert len(end) >= 1024
        assert (blocks * 512 + len(end)) % 10240 == 0
