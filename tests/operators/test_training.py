"""No archive that tarsift calls whole holds a pair that webdataset trains on and tarsift does not score.

Archives are drawn from a small grammar of what tar readers are known to read differently.
"""

from __future__ import annotations

import io
import random
import tarfile
import uuid
from collections.abc import Callable

import fsspec

from tarsift.operators.samples import scan_members
from tarsift.operators.shards import Shard
from tarsift.operators.streams import ShardStream
from tarsift.operators.tar import TarDamage, walk_tar
from tarsift.operators.writer import split_shard
from tests.operators.tars import archive, header, member, padded, record, with_checksum
from tests.operators.trained import scored, trained, unscored

ARCHIVES = 3000
NAMES = [
    *[b"a.jpg", b"a.txt", b"b.JPG", b"d/c.png", b"d/c.json", b"x.y/e.webp", b"f.seg.png", b"README", b"folder/"],
    *[b"d/.jpg", b"d/.txt", b"d.e/.jpg", b".txt", b"._a.jpg", b"__MACOSX/g.jpg", b"__MACOSX/._g.jpg", b"h.jpg/"],
    *[b"", b"i\0j.jpg", b"\x1f\x8b\x08.jpg", b"BZh91AY&SY.txt", b"]\0\0\x80", b"n\xff.jpg", b"x/"],
]
PAIR = member("evil.jpg", b"EVIL") + member("evil.txt", b"an evil caption")
MAGICS = [b"ustar\x0000", b"ustar  \0", b"\0" * 8]
SIZES: list[Callable[[int], bytes]] = [
    lambda size: b"%11o " % size,
    lambda size: b"%o \0" % size,
    lambda size: b"\0%010o\0" % size,
    lambda size: b"%o\0%o" % (0, size),
    lambda size: b"\x80" + size.to_bytes(11, "big"),
]
PREFIXES = [b"p", b"p.q", b"k.jpg", b"14712345670\0" * 2]
NUMBERS = [b"garbage", b"        ", b"\0%o", b"\xff" * 8, b"-1", b"0000644\0", b"\x81"]


class Grammar:
    """Archives at random; of everything unusual there is a little."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def archive(self) -> bytes:
        return archive(self.member(i) for i in range(self.random.randint(1, 5)))

    def member(self, i: int) -> bytes:
        random = self.random
        before = b"".join(self.extension() for _ in range(random.choice([0, 0, 0, 1, 1, 2])))
        payload = random.choice([b"", b"picture %d" % i, PAIR, PAIR])
        kind = random.choice([*[b"0"] * 6, *[b"\0"] * 3, b"7", b"5", b"2", b"V", b"S"])
        return before + self.header(random.choice(NAMES), len(payload), kind) + padded(payload)

    def extension(self) -> bytes:
        random = self.random
        kind = random.choice([b"x", b"x", b"x", b"X", b"g", b"L", b"L", b"K"])
        if kind in b"LK":
            data = random.choice(NAMES) + random.choice([b"", b"\0"])
        else:
            data = b"".join(self.record() for _ in range(random.randint(0, 2)))
        hidden = random.choice([b"", b"", b"", b"\0z", self.record()])
        return self.header(b"header", len(data), kind) + padded(data + hidden)

    def record(self) -> bytes:
        random = self.random
        records = [
            (b"path", random.choice(NAMES)),
            (b"path", b"q.jpg"),
            (b"size", b"%d" % random.choice([0, len(PAIR)])),
        ]
        records += [(b"comment", b"1"), (b"mtime", b"1.5"), (b"GNU.sparse.\xff", b"1"), (b"GNU.sparse.realsize", b"0")]
        records += [(b"GNU.sparse.name", random.choice(NAMES)), (b"hdrcharset", b"BINARY")]
        return record(*random.choice(records))

    def header(self, name: bytes, size: int, kind: bytes) -> bytes:
        random = self.random
        block = bytearray(header(name, size, kind, random.choice([MAGICS[0], *MAGICS])))
        if random.random() < 0.1:
            block[124:136] = random.choice(SIZES)(size).ljust(12, b"\0")
        if random.random() < 0.06:
            prefix = random.choice(PREFIXES)
            block[345 : 345 + len(prefix)] = prefix
        if random.random() < 0.06:
            number, at = random.choice(NUMBERS), random.choice([100, 108, 116, 136, 329, 337, 386])
            block[at : at + 8] = number.ljust(8, b"\0")
        return with_checksum(bytes(block))


def payloads_by_tarfile(data: bytes) -> list[int] | None:
    """Return where the payloads of files are, as tarfile has it; None if it fails."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return [info.offset_data for info in tar if info.isreg()]
    except (tarfile.TarError, ValueError, RecursionError):
        return None


def clean_of(data: bytes, homes: list[str]) -> bytes:
    """Return what is in clean/ of a shard whose rows go to `homes`."""
    memory = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4().hex}"
    memory.pipe(f"{root}/s.tar", data)
    outputs = {home: f"memory:/{root}/{home}.tar" for home in ("clean", "removed", "errored")}
    split_shard(Shard("s", f"memory:/{root}/s.tar", len(data)), homes, outputs)
    clean = memory.cat(f"{root}/clean.tar") if memory.exists(f"{root}/clean.tar") else b""
    memory.rm(root, recursive=True)
    return clean


def test_nothing_that_is_trained_on_goes_unscored():
    whole = used = 0
    for seed in range(ARCHIVES):
        data = Grammar(seed).archive()
        ours = scored(data)
        if ours is None:
            continue
        whole += 1
        used += bool(trained(data))
        assert not unscored(data), seed
    # Enough of the archives are whole and hold something for this to mean something.
    assert whole > 400
    assert used > 200


def test_tarfile_finds_the_same_files_or_says_that_it_cannot_read_on():
    for seed in range(ARCHIVES):
        data = Grammar(seed).archive()
        try:
            ours = [member.offset for member in walk_tar(io.BytesIO(data)) if member.type in ("file", "sparse")]
        except TarDamage:
            continue
        theirs = payloads_by_tarfile(data)
        assert theirs is None or theirs == ours, seed


def test_what_is_in_clean_can_be_read_and_was_scored():
    for seed in range(ARCHIVES // 4):
        data = Grammar(seed).archive()
        rows = rows_of(data)
        if rows is None:
            continue
        assert not trained(clean_of(data, ["removed"] * rows)), seed
        # What is removed first leaves any member to begin the archive.
        clean = clean_of(data, ["removed", *["clean"] * (rows - 1)][:rows])
        assert not clean or rows_of(clean) is not None, seed
        assert not unscored(clean), seed


def rows_of(data: bytes) -> int | None:
    """Return how many samples a shard has; None if it is damaged."""
    source = ShardStream(io.BytesIO(data))
    try:
        placed = list(scan_members(source.tar))
    except TarDamage:
        return None
    return None if source.problem else len({p.row for p in placed} - {None})
