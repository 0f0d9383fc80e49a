"""Which members of a shard are one sample: the one grouping that reader and writer share.

Key and part. The key of a member is its folder and its name without the extension; members of one
key are one sample. webdataset ends the key at the *first* dot of the name, which merges `a.b00.jpg`
and `a.b01.jpg` into one sample and loses one of them. Here the extension begins at the *last* dot,
and takes in what is before it where that is a known role or stands under a compression:
`0001.seg.png` is the part `seg.png` of the sample `0001`, `0001.npy.gz` its part `npy.gz`. Keys
differ from webdataset's only for names with two and more dots. Parts are compared in lower case.

Rows. A sample's row is its rank by first member. Members of a sample usually stand together, and
need not: a sample stays open for later members until `SETTLED_RUNS` whole samples (an image and a
`.txt` or `.json` side by side) have passed since its last member, or until `LOOKAHEAD_BYTES` of the
archive lie behind its first one. So in an ordinary shard a sample without a caption holds nothing
back, while a shard with all images before all captions is joined as far as the look-ahead reaches.
A member whose part is there already, or whose sample is no longer open, begins a new row that
repeats a key. The rule sees names and sizes only, never payloads or settings: every reading of a
shard gives the same rows.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from tarsift.operators.tar import Member, TarDamage, no_payload, walk_tar

# In the order in which open_clip's loader looks for the image of a sample that has several.
IMAGE_ORDER = ("jpg", "png", "jpeg", "webp")
IMAGE_PARTS = frozenset(IMAGE_ORDER)
CAPTION_PARTS = frozenset({"txt", "json"})
USED_PARTS = IMAGE_PARTS | CAPTION_PARTS

# Middle parts of a name that tell what a member is for, as in `0001.seg.png`; others belong to the key.
ROLES = frozenset(
    {"seg", "segmentation", "mask", "depth", "normal", "edge", "edges", "canny", "pose", "cond"}
    | {"control", "input", "output", "source", "target", "thumb", "meta"}
)
COMPRESSIONS = frozenset({"gz", "bz2", "xz", "zst", "lz4"})

# Fixed, not settings: rows must be the same in every later reading.
SETTLED_RUNS = 16
LOOKAHEAD_BYTES = 64 << 20
REMEMBERED_KEYS = 1 << 19
MAX_PARTS = 256

# Members of these types hold no sample's data; of the others only plain files can be used.
NEVER_IN_SAMPLE = frozenset({"directory", "global"})


class Placed(NamedTuple):
    """A member and the sample it belongs to."""

    row: int | None  # None: it belongs to no sample
    key: str
    part: str  # its extension, in lower case
    repeats: bool  # an earlier row has this row's key
    closed: int  # no further member comes to rows below this
    cut: bool  # the shard ends inside this member
    member: Member


@lru_cache(maxsize=4)
def split_name(name: str) -> tuple[str, str]:
    """Return key and part of a member's name; both empty if it cannot belong to a sample.

    That are names without an extension and hidden files (`.DS_Store`, `._0001.jpg`). But `folder/.jpg` and
    `folder/.txt` are image and caption of the sample `folder/`, since webdataset trains on them.
    """
    name = name.rstrip("/")  # as tarfile does with the names of PAX
    slash = name.rfind("/") + 1
    stem, dot, part = name[slash:].rpartition(".")
    part = part.lower()
    if not stem or not part or stem[0] == ".":
        return (name[:slash], part) if dot and slash and not stem and part in USED_PARTS else ("", "")
    if "." in stem:
        stem, part = _take_in_roles(stem, part)
    return name[:slash] + stem, part


def _take_in_roles(stem: str, part: str) -> tuple[str, str]:
    pieces = stem.split(".")
    kept, compressed = len(pieces), part in COMPRESSIONS
    while kept > 1 and pieces[kept - 1] and (compressed or pieces[kept - 1].lower() in ROLES):
        kept, compressed = kept - 1, False
    return ".".join(pieces[:kept]), ".".join([*(piece.lower() for piece in pieces[kept:]), part])


def scan_members(
    stream: BinaryIO, *, keep: Callable[[str, int], int] = no_payload, lookahead_bytes: int = LOOKAHEAD_BYTES
) -> Iterator[Placed]:
    """Yield every member of an archive, in order, with the row of its sample.

    A member in which the archive ends comes last, with `cut` set: its row counts like any other.

    Raises:
        TarDamage: after the last member, if anything is wrong with the archive.
    """
    samples = _Samples(lookahead_bytes)
    try:
        for member in walk_tar(stream, keep=keep):
            yield samples.place(member)
    except TarDamage as damage:
        if damage.member is not None:
            yield samples.place(damage.member, cut=True)
        raise


class _Sample:
    __slots__ = ("digest", "key", "offset", "parts", "repeats", "row", "runs")

    def __init__(self, row: int, key: str, digest: bytes, repeats: bool, offset: int) -> None:
        self.row, self.key, self.digest, self.repeats, self.offset = row, key, digest, repeats, offset
        self.parts: set[str] = set()
        self.runs = 0  # whole runs that had passed at its last member

    def takes(self, part: str) -> bool:
        return part not in self.parts and len(self.parts) < MAX_PARTS


class _Samples:
    """The samples that are open, in row order, and the keys of those that were."""

    def __init__(self, lookahead_bytes: int) -> None:
        self._lookahead_bytes = lookahead_bytes
        self._open: deque[_Sample] = deque()
        self._latest: dict[str, _Sample] = {}  # the open sample of a key that takes its next member
        self._seen: set[bytes] = set()  # two generations: what is older than both is forgotten
        self._seen_before: set[bytes] = set()
        self._rows = self._closed = 0
        self._current: _Sample | None = None
        self._run_has_image = self._run_has_caption = False
        self._whole_runs = 0

    def place(self, member: Member, *, cut: bool = False) -> Placed:
        key, part = split_name(member.name)
        if not key or member.type in NEVER_IN_SAMPLE:
            return Placed(None, "", "", False, self._closed, cut, member)
        sample = self._current
        if sample is None or sample.key != key or not sample.takes(part):
            sample = self._change_run(key, part, member.header_offset)
        sample.parts.add(part)
        sample.runs = self._whole_runs
        if part in IMAGE_PARTS:
            self._run_has_image = True
        elif part in CAPTION_PARTS:
            self._run_has_caption = True
        return Placed(sample.row, key, part, sample.repeats, self._closed, cut, member)

    def _change_run(self, key: str, part: str, offset: int) -> _Sample:
        if self._run_has_image and self._run_has_caption:
            self._whole_runs += 1
        self._run_has_image = self._run_has_caption = False
        self._close(offset)
        sample = self._latest.get(key)
        if sample is None or not sample.takes(part):
            digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            repeats = sample is not None or digest in self._seen or digest in self._seen_before
            sample = _Sample(self._rows, key, digest, repeats, offset)
            self._rows += 1
            self._open.append(sample)
            self._latest[key] = sample
        self._current = sample
        return sample

    def _close(self, offset: int) -> None:
        while self._open:
            sample = self._open[0]
            settled = self._whole_runs - sample.runs > SETTLED_RUNS
            if not settled and offset - sample.offset <= self._lookahead_bytes:
                return
            self._open.popleft()
            self._closed = sample.row + 1
            if self._latest.get(sample.key) is sample:
                del self._latest[sample.key]
            if len(self._seen) >= REMEMBERED_KEYS:
                self._seen_before, self._seen = self._seen, set()
            self._seen.add(sample.digest)
