"""Split a shard by verdict: every member is copied, as the raw blocks it is, to the home of its sample.

A shard whose members all have one home comes out identical, its last padding included (of a `.tar.gz`
its decompressed bytes). Members of no sample go to `clean`, except links, devices and the like, which
go to `errored`. Of a damaged shard, everything from the first byte that belongs to no whole member on
is kept as it is beside the errored samples, in `<shard>.tail`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, cast

from tarsift.operators import storage
from tarsift.operators.access import unread
from tarsift.operators.errors import ChangedError, ConservationError, UsageError
from tarsift.operators.samples import NEVER_IN_SAMPLE, Placed, scan_members
from tarsift.operators.shards import Shard, ShardProblem, shard_problem, unreadable
from tarsift.operators.streams import ShardStream, open_shard
from tarsift.operators.tar import TarDamage, end_archive

MEMORY_BYTES = 16 << 20


@dataclass(frozen=True)
class HomeResult:
    """What one home got of a shard; `sha256` is of its file, "" where there is none."""

    samples: int = 0
    members: int = 0
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class SplitResult:
    """Where the members of a shard went. Source = members of all homes + `tail_bytes` + end of archive."""

    homes: dict[str, HomeResult]
    source_sha256: str
    stray_members: int
    tail_bytes: int
    problem: ShardProblem | None


def split_shard(
    shard: Shard, homes: Sequence[str], outputs: Mapping[str, str | None], *, expect_sha256: str | None = None
) -> SplitResult:
    """Copy the members of row i of `shard` to the archive `outputs[homes[i]]`, in one pass and bounded memory.

    Files appear only if all went well; a home that gets nothing has none, and one left there by an
    earlier run is removed.

    Args:
        homes: a key of `outputs` for every row that ReadShard gives, among them "clean" and "errored".
        outputs: URL of the archive of each home; None: what goes there is counted, and written nowhere.
        expect_sha256: SHA-256 that the shard's file must have.

    Raises:
        ChangedError: if the shard has another digest.
        StoreError, AccessError: if it is gone, or cannot be read for what is no fault of its own.
        ConservationError: if it has not as many rows as `homes`.
        UsageError: if a home has no output, or an output is the shard itself.
    """
    _check_outputs(shard, homes, outputs)
    with ExitStack() as stack:
        archives = {home: _Archive(url, stack) for home, url in outputs.items()}
        errored = outputs["errored"]
        tail = _Archive(None if errored is None else tail_url(errored), stack)
        split = _Split(archives, tail, homes)
        try:
            source = stack.enter_context(open_shard(shard.url))
        except FileNotFoundError as error:
            raise unread(shard.url, error) from error
        except IsADirectoryError as error:
            problem = unreadable(error)
            sha256 = ""
        else:
            problem = split.copy(source)
            sha256 = source.finish()[0]
        if expect_sha256 is not None and sha256 != expect_sha256:
            raise ChangedError(
                f"{shard.url} has changed: its SHA-256 was {expect_sha256 or 'not to be read'} "
                f"and is {sha256 or 'not to be read'}; start anew with another output folder"
            )
        if split.rows != len(homes):
            raise ConservationError(f"{shard.url} has {split.rows} samples, but homes are given for {len(homes)}")
        result = SplitResult(
            homes={home: archive.result() for home, archive in archives.items()},
            source_sha256=sha256,
            stray_members=split.strays,
            tail_bytes=tail.bytes,
            problem=problem,
        )
    for archive in (*archives.values(), tail):
        if archive.url is not None and not archive.bytes and storage.exists(archive.url):
            storage.remove(archive.url)
    return result


class _Split:
    def __init__(self, archives: Mapping[str, _Archive], tail: _Archive, homes: Sequence[str]) -> None:
        self._archives, self._tail, self._homes = archives, tail, homes
        self.rows = self.strays = 0

    def copy(self, source: ShardStream) -> ShardProblem | None:
        record = Record(source.tar)
        damage = None
        try:
            for placed in scan_members(cast(BinaryIO, record)):
                archive = self._archive_of(placed)
                if not placed.cut:  # what is cut is part of the tail
                    archive.members += 1
                    archive.add(record.take())
        except TarDamage as error:
            damage = error
        problem = shard_problem(damage, source)
        used = [archive for archive in self._archives.values() if archive.bytes]
        if damage is None and len(used) == 1:
            used[0].add(record.take())  # the end of the archive as it was
            return problem
        for archive in used:
            archive.add([end_archive(archive.bytes)])
        if damage:
            self._tail.add(without_first(damage.offset - record.start, record.take()))
            while piece := source.tar.read(MEMORY_BYTES):
                self._tail.add([piece])
        return problem

    def _archive_of(self, placed: Placed) -> _Archive:
        home = home_of(placed, self._homes)
        if placed.row is None:
            self.strays += 1
        elif placed.row == self.rows:
            self.rows += 1
            self._archives[home].samples += 1
        return self._archives[home]


class _Archive:
    """An output file, opened when there is something to write."""

    def __init__(self, url: str | None, stack: ExitStack) -> None:
        self.url = url
        self._stack = stack
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self.samples = self.members = self.bytes = 0

    def add(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            if not piece:
                continue
            if self._file is None and self.url is not None:
                self._file = self._stack.enter_context(storage.open_write(self.url))
            if self._file is not None:
                self._file.write(piece)
            self._sha256.update(piece)
            self.bytes += len(piece)

    def result(self) -> HomeResult:
        sha256 = self._sha256.hexdigest() if self.bytes else ""
        return HomeResult(samples=self.samples, members=self.members, bytes=self.bytes, sha256=sha256)


class Record:
    """Pass a stream through and keep what was read since the last `take`, on disk where it is much."""

    def __init__(self, stream: BinaryIO, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._stream = stream
        self._memory_bytes = memory_bytes
        self._pieces: list[bytes] = []
        self._spill: BinaryIO | None = None
        self._held = 0
        self.start = 0  # offset of the first byte kept

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._held += len(data)
        if self._spill is None and self._held > self._memory_bytes:
            self._spill = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (closed by _drain)
            self._spill.writelines(self._pieces)
            self._pieces.clear()
        if self._spill is None:
            self._pieces.append(data)
        else:
            self._spill.write(data)
        return data

    def take(self) -> Iterable[bytes]:
        pieces, spill = self._pieces, self._spill
        self.start += self._held
        self._pieces, self._spill, self._held = [], None, 0
        return pieces if spill is None else _drain(spill)


def _drain(file: BinaryIO) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while piece := file.read(1 << 20):
            yield piece


def without_first(skip: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield `pieces` without their first `skip` bytes."""
    for piece in pieces:
        yield piece[skip:]
        skip = max(0, skip - len(piece))


def home_of(placed: Placed, homes: Sequence[str]) -> str:
    """Return where a member goes: with its sample, or to `clean` if it is a plain file of none."""
    if placed.row is None:
        kind = placed.member.type
        return "clean" if kind == "file" or kind in NEVER_IN_SAMPLE else "errored"
    return homes[placed.row] if placed.row < len(homes) else "errored"


def tail_url(errored: str) -> str:
    """Return the URL of what could not be read of a damaged shard, beside its errored samples."""
    return errored.removesuffix(".tar") + ".tail"


def _check_outputs(shard: Shard, homes: Sequence[str], outputs: Mapping[str, str | None]) -> None:
    unknown = sorted((set(homes) | {"clean", "errored"}) - set(outputs))
    if unknown:
        raise UsageError(f"no output is given for the homes {unknown}; outputs are {sorted(outputs)}")
    source = storage.filesystem(shard.url)
    for url in filter(None, outputs.values()):
        fs, path = storage.filesystem(url)
        if path == source[1] and type(fs) is type(source[0]):
            raise UsageError(f"the output {url} is the input shard itself; choose another output folder")
