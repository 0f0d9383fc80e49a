"""A shard in, rows out: `ReadShard` is the source operator, `fetch_member` gets one picture back.

A shard that is cut or damaged gives the rows before that point, and says so when it ends.
"""

from __future__ import annotations

import codecs
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from tarsift.operators import storage
from tarsift.operators.access import unread
from tarsift.operators.errors import END_OF_SHARD, IMAGE_USABLE, ShardError, TarsiftError
from tarsift.operators.listing import Shard, list_shards
from tarsift.operators.retry import take_repeated
from tarsift.operators.samples import IMAGE_ORDER, IMAGE_PARTS, Placed, scan_members, split_name
from tarsift.operators.schema import SAMPLE_SCHEMA
from tarsift.operators.streams import GZIP_MAGIC, ShardStream, open_shard
from tarsift.operators.tar import TarDamage

__all__ = [
    "ReadConfig",
    "ReadShard",
    "Shard",
    "ShardEnd",
    "ShardProblem",
    "fetch_member",
    "fetch_members",
    "list_shards",
    "scan_members",
    "shard_problem",
]


LABEL_PART, LABEL_BYTES = "cls", 24  # as webdataset writes a class: its number, as text


class ReadConfig(BaseModel):
    """What is read of a sample, and the bounds of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    captions: str = Field(default="txt", pattern=r"^(txt|json:.+)$", description="`txt`, or `json:FIELD`")
    batch_rows: int = Field(default=256, ge=1, description="rows of a table, at most")
    max_batch_bytes: int = Field(default=32 << 20, ge=1, description="bytes at which a table is closed")
    max_image_bytes: int = Field(default=64 << 20, ge=1, description="an image of more bytes is not read")
    max_caption_bytes: int = Field(default=64 << 10, ge=1, description="a caption of more bytes is cut")
    max_json_bytes: int = Field(default=1 << 20, ge=1, description="a json of more bytes is not read")


class ShardProblem(BaseModel):
    """Something that is wrong with a shard: a code of SHARD_PROBLEMS, where in the archive, and what."""

    model_config = ConfigDict(frozen=True)

    problem: str
    offset: int | None
    detail: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.detail}" + ("" if self.offset is None else f" (byte {self.offset})")


class ShardEnd(BaseModel):
    """What a reader reports when it has read a shard; `sha256` and `bytes` are of the file as it is stored.

    `repeated` requests to the store were tried again meanwhile.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    members: int
    sha256: str
    bytes: int
    problems: tuple[ShardProblem, ...] = ()
    repeated: int = 0


class ReadShard:
    """Read a shard and yield its samples as tables with the columns of SAMPLE_SCHEMA.

    A sample that cannot be used is a row with an `error`; it has no image unless the reason is one of
    IMAGE_USABLE. With `receipts`, the last table is one row with `row` -1, `error` END_OF_SHARD and the
    JSON text of a `ShardEnd` as `key`; without, a warning tells of a damaged shard.

    Raises:
        StoreError: if the shard is gone, or its store or this machine cannot read it now.
        AccessError: if reading it is refused.

    Example:
        >>> for shard in list_shards("shards/"):  # doctest: +SKIP
        ...     for table in ReadShard()(shard):
        ...         print(table["key"][0], table["caption"][0])
    """

    def __init__(self, config: ReadConfig | None = None, *, receipts: bool = False) -> None:
        self.config = config or ReadConfig()
        self.receipts = receipts

    def __call__(self, shard: Shard) -> Iterator[pa.Table]:
        config, counts = self.config, ShardCounts()
        sha256, size = "", 0
        with ExitStack() as stack:
            try:
                source = stack.enter_context(open_shard(shard.url))
            except FileNotFoundError as error:
                raise unread(shard.url, error) from error
            except IsADirectoryError as error:
                counts.problems.append(unreadable(error))
            else:
                batch: list[tuple[Any, ...]] = []
                held = 0
                for sample in read_samples(source, config, counts):
                    batch.append((shard.name, counts.rows, *sample.finish(shard.name, config)))
                    counts.rows += 1
                    held += sample.held()
                    if len(batch) >= config.batch_rows or held >= config.max_batch_bytes:
                        yield _table(batch)
                        batch, held = [], 0
                if batch:
                    yield _table(batch)
                if self.receipts:
                    sha256, size = source.finish()
        if self.receipts:
            end = ShardEnd(
                rows=counts.rows,
                members=counts.members,
                sha256=sha256,
                bytes=size,
                problems=tuple(counts.problems),
                repeated=take_repeated(),
            )
            yield _table([(shard.name, -1, end.model_dump_json(), *[None] * (len(SAMPLE_SCHEMA) - 4), END_OF_SHARD)])
        elif counts.problems:
            told = "; ".join(map(str, counts.problems))
            warnings.warn(f"{shard.url}: {counts.rows} samples read, then {told}", RuntimeWarning, stacklevel=2)


def unreadable(error: Exception) -> ShardProblem:
    """Return what is wrong with a shard that cannot be opened or read."""
    told = str(error) if isinstance(error, TarsiftError) else f"{type(error).__name__}: {error}"
    detail = storage.without_secrets(told)
    return ShardProblem(problem="unreadable", offset=None, detail=detail)


def shard_problem(damage: TarDamage | None, source: ShardStream) -> ShardProblem | None:
    """Return what is wrong with a shard that was walked; what ended its bytes goes before what that led to."""
    if source.problem:
        code, detail = source.problem
        return ShardProblem(problem=code, offset=damage.offset if damage else None, detail=detail)
    if damage:
        return ShardProblem(problem=damage.problem, offset=damage.offset, detail=damage.detail)
    return None


def fetch_member(shard: Shard, offset: int, size: int) -> bytes:
    """Return the payload at `image_offset`, `image_size` of a shard; of a `.tar.gz` everything before it is read.

    Raises:
        ShardError: if the shard is shorter than that.
        OSError: if it cannot be opened.
    """
    return fetch_members(shard, [(offset, size)])[0]


def fetch_members(shard: Shard, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of several (offset, size) of a shard, in their order, in one pass over the file."""
    found: dict[tuple[int, int], bytes] = {}
    with storage.open_read(shard.url) as file:
        compressed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        stream = ShardStream(file).tar if compressed else file
        at = 0
        for offset, size in sorted(set(ranges)):
            if offset < at or size < 0:
                raise ValueError(f"member ranges must not overlap: got offset {offset}, size {size} after byte {at}")
            if not compressed:
                stream.seek(offset)
            while compressed and at < offset and (skipped := stream.read(min(offset - at, 1 << 20))):
                at += len(skipped)
            data = stream.read(size)
            if len(data) < size:
                raise ShardError(f"{shard.url} ends before byte {offset + size}: it was changed since it was read")
            found[offset, size] = data
            at = offset + size
    return [found[offset, size] for offset, size in ranges]


class ShardCounts:
    """What has been read of a shard so far, and what is wrong with it."""

    def __init__(self) -> None:
        self.rows = self.members = 0
        self.problems: list[ShardProblem] = []


class SampleFields(NamedTuple):
    """The columns of SAMPLE_SCHEMA after `row`."""

    key: str
    uid: str
    image_offset: int | None
    image_size: int | None
    image: bytes | None
    caption: str | None
    label: int | None
    error: str | None


class Sample:
    """What has been read of one sample."""

    __slots__ = (
        *("caption", "caption_size", "image", "image_part", "json", "json_size", "label"),
        *("key", "offset", "repeats", "several", "size", "state"),
    )

    def __init__(self, key: str, repeats: bool) -> None:
        self.key, self.repeats = key, repeats
        self.image: bytes | None = None
        self.image_part = ""
        self.several = False  # there is more than one image
        self.offset: int | None = None
        self.size: int | None = None
        self.caption: bytes | None = None
        self.caption_size = -1
        self.json: bytes | None = None
        self.json_size = -1
        self.label: bytes | None = None
        self.state: str | None = None  # a reason that goes before all others

    def add(self, placed: Placed) -> None:
        member = placed.member
        if placed.cut:
            self.state = "truncated_member"
        elif member.type != "file":
            self.state = self.state or "unsupported_member"
        elif placed.part in IMAGE_PARTS:
            self.several = self.offset is not None
            # Of several images the one that open_clip's loader trains on is scored.
            if not self.several or IMAGE_ORDER.index(placed.part) < IMAGE_ORDER.index(self.image_part):
                self.image, self.offset, self.size = member.payload, member.offset, member.size
                self.image_part = placed.part
        elif placed.part == "txt":
            self.caption, self.caption_size = member.payload, member.size
        elif placed.part == "json":
            self.json, self.json_size = member.payload, member.size
        elif placed.part == LABEL_PART:
            self.label = member.payload

    def is_whole(self, config: ReadConfig) -> bool:
        has_caption = self.caption_size >= 0 if config.captions == "txt" else self.json_size >= 0
        return self.offset is not None and has_caption

    def held(self) -> int:
        return len(self.image or b"") + len(self.caption or b"") + len(self.json or b"") + len(self.key)

    def fields(self) -> dict[str, Any]:
        """Return what its json says; empty where there is none that can be read."""
        return _parse_json(self.json, self.json_size)[0]

    def finish(self, shard: str, config: ReadConfig) -> SampleFields:
        """Return what the sample's row says of it."""
        key = _printable(self.key.encode("utf-8", "surrogateescape"))
        fields, fault = _parse_json(self.json, self.json_size)
        if config.captions == "txt":
            caption, reason = _text(self.caption, self.caption_size)
            reason = reason or fault
        elif fault:
            caption, reason = None, fault
        else:
            caption, reason = caption_of(fields.get(config.captions.removeprefix("json:")), config.max_caption_bytes)
        uid = fields.get("uid")
        named = isinstance(uid, str | int) and not isinstance(uid, bool) and uid != ""
        uid = _printable(str(uid).encode("utf-8", "replace")) if named else f"{shard}/{key}"
        error = self._fault(config) or reason
        image = self.image if error is None or error in IMAGE_USABLE else None
        return SampleFields(key, uid, self.offset, self.size, image, caption, _label(self.label), error)

    def _fault(self, config: ReadConfig) -> str | None:
        if self.state:
            return self.state
        if self.offset is None:
            return "scattered_sample" if self.repeats else "missing_image"
        if self.image is None and self.size:
            return "image_too_large"
        if self.several:
            return "several_images"
        return "duplicate_key" if self.repeats else None


def read_samples(source: ShardStream, config: ReadConfig, counts: ShardCounts) -> Iterator[Sample]:
    """Yield the samples of a shard in row order, each when no member of it can follow; note damage in `counts`."""
    waiting: deque[Sample] = deque()
    first = 0  # row of waiting[0]
    last: Sample | None = None
    damage = None
    try:
        for placed in scan_members(source.tar, keep=_wanted(config)):
            counts.members += not placed.cut
            while first < placed.closed:
                first += 1
                yield waiting.popleft()
            if placed.row is None:
                continue
            if placed.row == first + len(waiting):
                waiting.append(Sample(placed.key, placed.repeats))
            last = waiting[placed.row - first]
            last.add(placed)
    except TarDamage as error:
        damage = error
        # Nobody knows whether more of the sample that was being read would have followed.
        if last and damage.problem != "trailing_data" and not last.is_whole(config):
            last.state = "truncated_member"
    problem = shard_problem(damage, source)
    if problem:
        counts.problems.append(problem)
    yield from waiting


def _wanted(config: ReadConfig) -> Callable[[str, int], int]:
    reads_txt = config.captions == "txt"

    def wanted(name: str, size: int) -> int:
        part = split_name(name)[1]
        if part in IMAGE_PARTS:
            return size if size <= config.max_image_bytes else 0
        if part == "txt" and reads_txt:
            return config.max_caption_bytes
        if part == "json" and size <= config.max_json_bytes:
            return size
        return LABEL_BYTES if part == LABEL_PART else 0

    return wanted


def _text(data: bytes | None, size: int) -> tuple[str | None, str | None]:
    """Return a caption of `size` bytes, of which `data` are the first, and what is wrong with it."""
    if not data:
        return None, "missing_caption"
    cut = len(data) < size
    try:
        text = codecs.utf_8_decode(data, "strict", not cut)[0]  # what is cut may end inside a character
        reason = "caption_too_large" if cut else None
    except UnicodeDecodeError:
        text, reason = data.decode("utf-8", "replace"), "caption_not_utf8"
    if not text.strip():
        return None, "missing_caption"
    return text, reason


def caption_of(value: Any, max_bytes: int) -> tuple[str | None, str | None]:
    """Return the caption that a value is, or the first string of a list, and the reason code of what is wrong."""
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, str)), None)
    if not isinstance(value, str):
        return None, "missing_caption"
    # JSON can hold halves of surrogate pairs, which are no text.
    data = value.encode("utf-8", "surrogatepass")
    return _text(data[:max_bytes], len(data))


def _parse_json(data: bytes | None, size: int) -> tuple[dict[str, Any], str | None]:
    if size < 0:
        return {}, None
    try:
        fields = json.loads(data or b"")
    except (ValueError, RecursionError):
        return {}, "bad_json"
    return (fields, None) if isinstance(fields, dict) else ({}, "bad_json")


def _label(data: bytes | None) -> int | None:
    digits = (data or b"").strip()
    number = int(digits) if digits.isdigit() and len(digits) < LABEL_BYTES else -1
    return number if 0 <= number < 2**31 else None


def _printable(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SAMPLE_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SAMPLE_SCHEMA)
