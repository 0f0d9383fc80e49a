"""A corpus of traps: shards that try to run code, to write elsewhere, to fill memory, to lie to who reads them."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.operators.tars import archive, header, member, padded, pax

GB, MB = 1 << 30, 1 << 20
MAX_IMAGE_BYTES = 1 << 20  # to be given as `read.max_image_bytes`


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


# Names of files that are allowed, and that shells, pages, URLs and globs would take for something else.
SHARD_NAMES = (
    "<svg onload=alert(1)>",
    "$(touch tarsift-escape)",
    "%2e%2e%2fescape",
    "'; touch tarsift-escape '",
    "-rf",
)
REFUSED_NAMES = ("a\\b", "a::b", "esc\x1b]0;owned\x07", "two\nlines", "not\udcffutf8")


class Canary:
    """What leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@dataclass(frozen=True)
class Trap:
    """A sample, or a shard where `whole` is set, and how it is to be named: a reason, a problem, or None.

    It is `rows` samples to who reads it, of which the last one is named.
    """

    name: str
    content: bytes
    named: str | None
    whole: bool = False
    compressed: bool = False
    rows: int = 1


def png(width: int, height: int) -> bytes:
    """A PNG of few bytes that says to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(width // 8 + 1) * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def sample(name: str, image: bytes | None = None, caption: bytes = b"a photo of a thing", **more: bytes) -> bytes:
    parts = [member(f"{name}.jpg", jpeg(len(name)) if image is None else image), member(f"{name}.txt", caption)]
    return b"".join([*parts, *(member(f"{name}.{suffix}", data) for suffix, data in more.items())])


def traps(canary: Path) -> list[Trap]:
    """All traps; `canary` is a file that exists if one of them was executed."""
    pickled = pickle.dumps(Canary(canary))
    deep = b"[" * 200_000
    linked = header(b"l.jpg", 600, b"2") + padded(bytes(600))
    script = b"</script><script>fetch('//evil')</script><img src=x onerror=alert(1)>"
    long_name = "x" * 60_000
    return [
        # Code.
        Trap("pickles", sample("pickles", pyd=pickled, pkl=pickled, pickle=pickled, pth=pickled, npy=pickled), None),
        Trap("pickled-image", sample("pickled-image", pickled), "undecodable_image"),
        Trap("pickled-json", sample("pickled-json", json=pickled), "bad_json"),
        Trap("pickled-caption", sample("pickled-caption", caption=pickled), "caption_not_utf8"),
        # Too much.
        Trap("pixels", sample("pixels", png(60_000, 60_000)), "too_many_pixels"),
        Trap("long-strip", sample("long-strip", png(2_000_000, 8)), "too_many_pixels"),
        Trap("huge-image", sample("huge-image", bytes(2 * MAX_IMAGE_BYTES)), "image_too_large"),
        Trap("huge-caption", sample("huge-caption", caption=b"word " * 100_000), "caption_too_large"),
        Trap("deep-json", sample("deep-json", json=deep), "bad_json"),
        Trap("huge-json", sample("huge-json", json=b'{"uid": "' + b"u" * (2 << 20) + b'"}'), "bad_json"),
        Trap("huge-number", sample("huge-number", json=b'{"uid": ' + b"9" * 500_000 + b"}"), "bad_json"),
        Trap("long-name", pax(path=f"{long_name}.jpg") + member("y", jpeg(1)), "missing_caption"),
        Trap("sparse", pax(GNU__sparse__realsize=str(10 * GB)) + member("sparse.jpg", b""), "unsupported_member"),
        Trap("claims", sample("before") + header(b"claims.jpg", 10 * GB), "truncated", whole=True),
        Trap("zeros", archive([sample("zeros", bytes(20 * MAX_IMAGE_BYTES))]), None, whole=True, compressed=True),
        Trap("parts", sample("parts", **{f"p{i}": b"" for i in range(300)}), "scattered_sample", rows=2),
        # Elsewhere.
        Trap("dots", sample("../../escape"), None),
        Trap("absolute", sample("/tmp/tarsift-escape"), None),
        Trap("symlink", header(b"symlink.jpg", 0, b"2") + member("symlink.txt", b"etc"), "unsupported_member"),
        Trap("hardlink", header(b"hardlink.jpg", 0, b"1") + member("hardlink.txt", b"etc"), "unsupported_member"),
        Trap("device", header(b"device.jpg", 0, b"3") + member("device.txt", b"dev"), "unsupported_member"),
        Trap("fifo", header(b"fifo.jpg", 0, b"6") + member("fifo.txt", b"fifo"), "unsupported_member"),
        Trap("link-payload", archive([sample("ok"), linked]), "bad_header", whole=True),
        Trap("renamed", archive([pax(b"g", path="all.jpg"), sample("renamed")]), "bad_header", whole=True),
        # Lies to who reads.
        Trap("control", sample("con\x1b]0;owned\x07trol\n"), None),
        Trap("not-utf8", member(b"not\xff\xfeutf8.jpg", jpeg(2)) + member(b"not\xff\xfeutf8.txt", b"x"), None),
        Trap("html", sample("html", b"<!DOCTYPE html><html>404</html>"), "undecodable_image"),
        Trap("script", sample("script", caption=script), None),
        Trap("escapes", sample("escapes", caption=b"\x1b[2J\x1b]8;;http://evil\x07 click \xe2\x80\xae gpj.exe"), None),
        Trap("nul", sample("nul", caption=b"a\0b\0c"), None),
        Trap("latin1", sample("latin1", caption="caf\xe9".encode("latin-1")), "caption_not_utf8"),
        Trap("forged", sample("forged", json=json.dumps({"uid": "good-0/00000"}).encode()), None),
        Trap("empty-image", sample("empty-image", b""), "undecodable_image"),
        Trap("text", b"this is no tar at all, it is a text of some length " * 200, "bad_header", whole=True),
        Trap("nothing", b"", "no_end_marker", whole=True),
        Trap("sidecars", archive([sample("sidecars")]), None, whole=True),
        *(Trap(name, archive([sample("named")]), None, whole=True) for name in SHARD_NAMES),
    ]  # fmt: skip


def make_traps(folder: Path, canary: Path, *, good: int = 3, samples: int = 60) -> list[Trap]:
    """Write the traps as shards below `folder`, beside good shards; return them."""
    folder.mkdir(parents=True)
    made = traps(canary)
    for number in range(good):
        said = [f"a photo of thing {i % 7}" for i in range(samples)]
        rows = [
            sample(f"{i:05d}", jpeg(1000 * number + i), text.encode(), json=json.dumps({"caption": text}).encode())
            for i, text in enumerate(said)
        ]
        (folder / f"good-{number}.tar").write_bytes(archive(rows))
    (folder / "traps.tar").write_bytes(archive([trap.content for trap in made if not trap.whole]))
    for trap in made:
        if trap.whole:
            data = gzip.compress(trap.content, 1) if trap.compressed else trap.content
            (folder / f"{trap.name}.tar{'.gz' if trap.compressed else ''}").write_bytes(data)
    (folder / "sidecars_stats.json").write_bytes(b"[" * 200_000)
    (folder / "sidecars.parquet").write_bytes(pickle.dumps(Canary(canary)))
    assert not tarfile.is_tarfile(folder / "text.tar")
    return made


def gzip_bomb(path: Path, size: int) -> None:
    """Write a shard of one sample whose image is `size` zeros, a thousandth of that as it is stored."""
    with gzip.open(path, "wb", 1) as file:
        file.write(header(b"bomb.jpg", size))
        for _ in range(size // MB):
            file.write(bytes(MB))
        file.write(member("bomb.txt", b"a photo of nothing") + bytes(1024))


def member_bomb(path: Path, members: int) -> None:
    """Write a shard of empty members, every one of another sample."""
    with gzip.open(path, "wb", 1) as file:
        block = np.frombuffer(header(b"0000000.txt"), np.uint8)
        for first in range(0, members, 10_000):
            blocks = np.tile(block, (10_000, 1))
            numbers = [b"%07d" % i for i in range(first, first + 10_000)]
            blocks[:, :7] = np.frombuffer(b"".join(numbers), np.uint8).reshape(-1, 7)
            blocks[:, 148:156] = ord(" ")
            sums = [b"%06o\0 " % total for total in blocks.sum(axis=1, dtype=np.int64)]
            blocks[:, 148:156] = np.frombuffer(b"".join(sums), np.uint8).reshape(-1, 8)
            file.write(blocks.tobytes())
        file.write(bytes(1024))
