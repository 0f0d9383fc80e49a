"""Proof that nothing of a shard was lost, changed or written twice: its members against those of the outputs.

The source is walked once more, and every member, as the raw blocks it is, must be the next one of the
archive that its sample's verdict names. Nothing is taken from the writer but the verdicts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, BinaryIO, cast

from pydantic import AfterValidator, BaseModel, ConfigDict

from tarsift.operators import storage
from tarsift.operators.retry import take_repeated
from tarsift.operators.samples import scan_members
from tarsift.operators.shards import Shard
from tarsift.operators.streams import ShardStream, open_shard
from tarsift.operators.tar import TarDamage, walk_tar
from tarsift.operators.writer import home_of, tail_url

# What can be wrong with the outputs of a shard.
FAULTS: dict[str, str] = {
    "source_changed": "the shard is not the one that was embedded: its SHA-256 is another",
    "source_unreadable": "the shard cannot be opened",
    "source_missing": "no shard of that name is among those given",
    "unknown_shard": "the shard was not part of the run",
    "not_written": "the shard has no commit record of the pass `write`",
    "output_unreadable": "a shard that was written is gone or damaged",
    "output_changed": "a shard that was written is not the one that was committed: its SHA-256 is another",
    "member_missing": "a member of the source is not where its sample's verdict says",
    "surplus_member": "an output holds a member that the source has not, or has once less",
    "tail_differs": "what follows the last whole member of a damaged shard was not kept as it is",
    "verdicts_unreadable": "the flags of the shard are gone or damaged: what became of its samples cannot be told",
    "rows_differ": "the verdicts are not one per sample of the shard",
    "keep_list_differs": "keep.parquet does not list the samples whose verdict is `clean`",
    "counts_differ": "run.json does not count what the verdicts say",
}


def _told(detail: str) -> str:
    return storage.without_secrets(detail)[:300]


class Fault(BaseModel):
    """A code of FAULTS and where, without the passwords and signatures of URLs."""

    model_config = ConfigDict(frozen=True)

    fault: str
    detail: Annotated[str, AfterValidator(_told)]


class ShardProof(BaseModel):
    """What was compared of one shard: members by where they went, and what is wrong, if anything.

    `repeated_requests` to the store were tried again, with success.
    """

    model_config = ConfigDict(frozen=True)

    shard: str
    members: dict[str, int]
    bytes: int
    faults: tuple[Fault, ...] = ()
    repeated_requests: int = 0


def verify_shard(
    shard: Shard,
    homes: Sequence[str],
    outputs: Mapping[str, str],
    *,
    source_sha256: str,
    output_sha256: Mapping[str, str],
) -> ShardProof:
    """Compare every member of `shard` with those of its outputs; stops at the first that is not in its place.

    Args:
        homes: the verdict on every row: a key of `outputs`.
        outputs: URL of the archive of each home.
        source_sha256: of the shard's file when it was embedded.
        output_sha256: of each archive when it was committed, "" where there was to be none.
    """
    faults: list[Fault] = []
    counts = dict.fromkeys(outputs, 0)
    size = rows = 0
    lost = False

    def fault(code: str, detail: str) -> None:
        faults.append(Fault(fault=code, detail=detail))

    with ExitStack() as stack:
        written = {}
        for home, url in outputs.items():
            if output_sha256.get(home):
                try:
                    written[home] = _Written(stack.enter_context(open_shard(url)))
                except OSError as error:
                    fault("output_unreadable", f"{url}: {error}")
        try:
            source = stack.enter_context(open_shard(shard.url))
        except OSError as error:
            fault("source_unreadable", f"{shard.url}: {error}")
            return ShardProof(shard=shard.name, members=counts, bytes=0, faults=tuple(faults))
        stream = _Hashing(source.tar)
        damage = None
        try:
            for placed in scan_members(cast(BinaryIO, stream)):
                home = home_of(placed, homes)
                rows = max(rows, 0 if placed.row is None else placed.row + 1)
                if placed.cut or lost:
                    continue  # what is cut is part of the tail
                digest = stream.take()
                lost = home not in written or written[home].next() != digest
                if lost:
                    fault("member_missing", f"{placed.member.name!r} at byte {placed.member.header_offset} in {home}")
                else:
                    counts[home] += 1
        except TarDamage as error:
            damage = error
        sha256, size = source.finish()
        if sha256 != source_sha256:
            fault("source_changed", f"{shard.url}: {source_sha256} when it was embedded, {sha256} now")
        if rows != len(homes):
            fault("rows_differ", f"{rows} samples, {len(homes)} verdicts")
        for home, archive in written.items():
            if not lost and archive.next() is not None:
                fault("surplus_member", f"after {counts[home]} members of {outputs[home]}")
            if archive.finish() != output_sha256[home]:
                fault("output_changed", outputs[home])
    for home, url in outputs.items():
        if not output_sha256.get(home) and storage.exists(url):
            fault("surplus_member", f"{url} should not be there")
    if damage and not _same_tail(shard, damage.offset, tail_url(outputs["errored"])):
        fault("tail_differs", f"{tail_url(outputs['errored'])}, from byte {damage.offset} of {shard.url}")
    return ShardProof(
        shard=shard.name, members=counts, bytes=size, faults=tuple(faults), repeated_requests=take_repeated()
    )


class _Hashing:
    """Pass a stream through, with the SHA-256 of what was read since the last `take`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._sha256.update(data)
        return data

    def take(self) -> bytes:
        digest = self._sha256.digest()
        self._sha256 = hashlib.sha256()
        return digest


class _Written:
    """The members of an archive that was written, as digests in order."""

    def __init__(self, source: ShardStream) -> None:
        self._source = source
        self._digests = self._walk(_Hashing(source.tar))

    def _walk(self, stream: _Hashing) -> Iterator[bytes]:
        try:
            for _ in walk_tar(cast(BinaryIO, stream)):
                yield stream.take()
        except TarDamage:
            return  # its digest is another, too

    def next(self) -> bytes | None:
        return next(self._digests, None)

    def finish(self) -> str:
        return self._source.finish()[0]


def _same_tail(shard: Shard, offset: int, tail: str) -> bool:
    """Tell whether `tail` holds the bytes of the shard's archive from `offset` on; no file stands for none."""
    with open_shard(shard.url) as source:
        while offset and (skipped := source.tar.read(min(offset, 1 << 20))):
            offset -= len(skipped)
        wanted = _sha256_of(source.tar)
    if not storage.exists(tail):
        return wanted == hashlib.sha256().digest()
    with storage.open_read(tail) as file:
        return _sha256_of(file) == wanted


def _sha256_of(file: BinaryIO) -> bytes:
    sha256 = hashlib.sha256()
    while piece := file.read(1 << 20):
        sha256.update(piece)
    return sha256.digest()
