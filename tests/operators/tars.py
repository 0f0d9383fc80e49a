"""Archives for tests: by tarfile where the format is the point, block by block where damage is."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from tarsift.operators.shards import Shard
from tarsift.operators.tar import end_archive

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def header(name: bytes, size: int | bytes = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """Make a header block; `size` as bytes is put into its field as it is."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    return with_checksum(bytes(block))


def with_checksum(block: bytes, *, signed: bool = False) -> bytes:
    blank = block[:148] + b" " * 8 + block[156:]
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in blank)
    return block[:148] + b"%06o\0 " % total + block[156:]


def member(name: str | bytes, payload: bytes = b"", kind: bytes = b"0") -> bytes:
    name = name.encode() if isinstance(name, str) else name
    return header(name, len(payload), kind) + padded(payload)


def padded(payload: bytes) -> bytes:
    return payload + bytes(-len(payload) % 512)


def pax(kind: bytes = b"x", **records: str | bytes) -> bytes:
    """Make a PAX header that holds `records`."""
    data = b""
    for key, value in records.items():
        data += record(key.replace("__", ".").encode(), value.encode() if isinstance(value, str) else value)
    return member("PaxHeader", data, kind)


def record(key: bytes, value: bytes) -> bytes:
    """Make a record of a PAX header."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def archive(members: Iterable[bytes]) -> bytes:
    body = b"".join(members)
    return body + end_archive(len(body))


def sample(key: str, *, image: bytes | None = None, caption: str | None = None) -> list[bytes]:
    image = f"image of {key}".encode() * 7 if image is None else image
    caption = f"a photo of {key}" if caption is None else caption
    return [member(f"{key}.jpg", image), member(f"{key}.txt", caption.encode())]


def by_tarfile(files: Iterable[tuple[str, bytes]], format: str = "pax") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format]) as tar:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def put(path: Path, data: bytes, *, name: str = "s") -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith("gz") else data)
    return Shard(name, str(path), path.stat().st_size)


def breaking(data: bytes, error: Exception) -> BinaryIO:
    """Return a file that gives `data` and then cannot be read on."""

    class Breaking(io.BytesIO):
        def readinto(self, buffer) -> int:
            count = super().readinto(buffer)
            if not count:
                raise error
            return count

    return Breaking(data)
