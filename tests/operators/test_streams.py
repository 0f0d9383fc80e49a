from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
from pathlib import Path

import pytest

from tarsift.operators import storage
from tarsift.operators.errors import AccessError, StoreError
from tarsift.operators.streams import ShardStream, open_shard
from tests.operators.tars import breaking, put


def read_all(stream: ShardStream, size: int = 70_001) -> bytes:
    pieces = []
    while piece := stream.tar.read(size):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_digest_and_size_are_those_of_the_file(tmp_path: Path, name: str):
    data = os.urandom(1_500_000) + bytes(1_500_000)
    shard = put(tmp_path / name, data)
    stored = (tmp_path / name).read_bytes()
    for read in (False, True):  # whether or not anything was read before
        with open_shard(shard.url) as stream:
            assert stream.compressed == name.endswith("gz")
            if read:
                assert read_all(stream) == data
            assert stream.finish() == (hashlib.sha256(stored).hexdigest(), len(stored))
            assert stream.problem is None


def test_gzip_is_told_by_its_first_bytes_not_by_the_name(tmp_path: Path):
    (tmp_path / "s.tar").write_bytes(gzip.compress(b"hello"))
    with open_shard(str(tmp_path / "s.tar")) as stream:
        assert read_all(stream) == b"hello"


def test_gzip_members_one_after_the_other_and_zeros_behind_them(tmp_path: Path):
    parts = [os.urandom(50_000), b"", bytes(100_000), b"end"]
    data = b"".join(map(gzip.compress, parts))
    for behind in (b"", bytes(5), bytes(100_000)):
        stream = ShardStream(io.BytesIO(data + behind))
        assert read_all(stream) == b"".join(parts)
        assert stream.problem is None


def test_data_behind_the_gzip_stream_is_damage():
    stream = ShardStream(io.BytesIO(gzip.compress(b"hello") + b"not gzip"))
    assert read_all(stream) == b"hello"
    assert stream.problem is not None
    assert stream.problem[0] == "gzip_damage"


def test_every_cut_of_a_gzip_stream_is_noticed():
    data = b"".join(b"%d," % i for i in range(800))
    packed = gzip.compress(data)
    for cut in range(3, len(packed)):
        stream = ShardStream(io.BytesIO(packed[:cut]))
        assert data.startswith(read_all(stream))
        assert stream.problem is not None, cut
        assert stream.problem[0] == "gzip_damage"


def test_damage_ends_every_reading_at_the_same_byte():
    packed = bytearray(gzip.compress(os.urandom(300_000) + b"text " * 60_000, 1))
    packed[len(packed) // 2] ^= 0xFF
    lengths = {len(read_all(ShardStream(io.BytesIO(packed)), size)) for size in (512, 4096, 100_000, 1 << 22)}
    assert len(lengths) == 1


def test_a_gzip_bomb_is_read_in_pieces():
    bomb = gzip.compress(bytes(30_000_000))
    stream = ShardStream(io.BytesIO(bomb))
    assert len(stream.tar.read(1000)) == 1000
    assert stream._digesting.bytes <= len(bomb)
    assert len(read_all(stream, 1 << 20)) == 30_000_000 - 1000


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(errno.EIO, "Input/output error"), StoreError, "see to its disk"),
        (OSError(errno.ESTALE, "Stale file handle"), StoreError, "network file system"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), StoreError, "mount"),
        (OSError(errno.EMFILE, "Too many open files"), StoreError, "ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied"), AccessError, "let this user read it"),
        (FileNotFoundError(errno.ENOENT, "No such key"), StoreError, "is gone; put it back"),
    ],
)
def test_a_file_that_cannot_be_read_on_does_not_pass_for_a_shorter_one(monkeypatch, name, error, kind, says):
    data = os.urandom(3_000_000)
    stored = gzip.compress(data) if name.endswith("gz") else data
    monkeypatch.setattr(storage, "open_read", lambda url: breaking(stored[:2_000_000], error))
    with (
        open_shard(f"dump/{name}") as stream,
        pytest.raises(kind, match=rf"^cannot read the shard dump/{name}: .*{says}"),
    ):
        read_all(stream)
    with open_shard(f"dump/{name}") as stream, pytest.raises(kind):
        stream.finish()
    assert kind.exit_code == (75 if kind is StoreError else 1)


def test_a_file_that_cannot_be_opened(monkeypatch, tmp_path: Path):
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    with pytest.raises(StoreError, match=r"loop\.tar: .*symbolic links.*run the same command again"):
        open_shard(str(tmp_path / "loop.tar")).__enter__()
    with pytest.raises(FileNotFoundError):  # whether that is a fault is up to who reads
        open_shard(str(tmp_path / "gone.tar")).__enter__()

    def denied(url):
        raise PermissionError(errno.EACCES, "Permission denied", url)

    monkeypatch.setattr(storage, "open_read", denied)
    with pytest.raises(AccessError, match=r"dump/x\.tar: PermissionError: .*let this user read it"):
        open_shard("dump/x.tar").__enter__()
