"""Is a shard whole, and does what lies beside it agree? `AuditShard` looks at one shard, without an encoder.

What is checked beyond what `ReadShard` notices: digests that a sample's json states, the counts and
keys that img2dataset leaves beside a shard (`00000_stats.json`, `00000.parquet`), and identifiers.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, UInt64
from pydantic import BaseModel, ConfigDict

from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig, UnusableImage, decode_image, strict_pillow
from tarsift.operators.errors import REASONS, SHARD_PROBLEMS, AccessError, StoreError
from tarsift.operators.isolation import HANG_IMAGES, IsolatedDecoder, killed_after
from tarsift.operators.retry import take_repeated
from tarsift.operators.shards import ReadConfig, Sample, Shard, ShardCounts, read_samples, unreadable
from tarsift.operators.streams import open_shard

# What an audit can find: problems of a whole shard, of its samples, and these.
PROBLEMS: dict[str, str] = {
    **SHARD_PROBLEMS,
    **REASONS,
    "no_samples": "the shard holds no sample at all",
    "digest_mismatch": "the image is not the one whose digest its json states",
    "stats_mismatch": "the `_stats.json` beside the shard counts another number of samples",
    "parquet_mismatch": "the `.parquet` beside the shard lists other samples",
    "sidecar_unreadable": "what lies beside the shard cannot be read",
    "reader_died": "the process that read the shard was killed, again and again",
    "repeated_uid": "another sample of the dump has the same uid",
    "forged_uid": "the json states the uid of another sample, one that has none of its own and is named by its place",
}
DIGESTS = ("sha256", "sha512", "md5")  # fields of img2dataset's `compute_hash`
# A run ends where it cannot reach a shard; an audit says so of that shard and looks at the others.
UNREACHED = (OSError, StoreError, AccessError)
EXAMPLES = 5
MAX_STATS_BYTES = 64 << 20
MAX_LISTED = 10_000_000  # rows of a `.parquet`; img2dataset puts 10,000 samples into a shard
MAX_KEY_BYTES = 4096


class Problem(BaseModel):
    """A code of PROBLEMS, how often it was found in a shard, and the first few places."""

    model_config = ConfigDict(frozen=True)

    problem: str
    count: int
    examples: tuple[str, ...] = ()


class ShardAudit(BaseModel):
    """What there is to say of one shard; `sha256` and `bytes` are of the file as it is stored.

    `repeated_requests` to the store were tried again, with success.
    """

    model_config = ConfigDict(frozen=True)

    shard: str
    url: str
    samples: int
    members: int
    bytes: int
    sha256: str
    compressed: bool
    digests_checked: int
    problems: tuple[Problem, ...] = ()
    repeated_requests: int = 0

    @property
    def whole(self) -> bool:
        return not self.problems


class AuditShard:
    """Look at every byte of a shard and at what lies beside it.

    Args:
        decode: decode every image as well; without it a damaged image is not noticed.
        isolated: decode in a process of its own; an image that kills it is `decoder_died`, and no more is lost.
        key: of the hashes of uids; the same for all shards of an audit, and a secret of that audit, so that
            nobody can make two uids collide.
    """

    def __init__(
        self,
        *,
        decode: bool = False,
        isolated: bool = False,
        read: ReadConfig | None = None,
        images: ImageConfig | None = None,
        key: bytes | None = None,
    ) -> None:
        self.decode, self.isolated = decode, isolated
        self.read = read or ReadConfig()
        self.images = images or ImageConfig()
        self.key = key or secrets.token_bytes(16)

    def apart(self) -> AuditShard:
        """Return the same audit with a decoder in a process of its own."""
        return AuditShard(decode=self.decode, isolated=True, read=self.read, images=self.images, key=self.key)

    def __call__(self, shard: Shard) -> tuple[ShardAudit, UInt64[np.ndarray, " samples"]]:
        """Return what there is to say of `shard`, and what `shared_uids` compares with other shards.

        That is a keyed hash of the uid of every sample, whose lowest bit says whether a json states the uid; it is
        0 for a sample that repeats a key and has no uid but that.
        """
        found, counts = Findings(), ShardCounts()
        sha256, size, compressed = "", 0, False
        uids = array("Q")
        parquet = _beside(shard.url, ".parquet")
        keys: set[int] | None = set() if _there(parquet, found) else None
        digests = _StatedDigests()
        try:
            with open_shard(shard.url) as source, self._decoder() as decode:
                compressed = source.compressed
                for sample in read_samples(source, self.read, counts):
                    fields = sample.finish(shard.name, self.read)
                    counts.rows += 1
                    if fields.error:
                        found.add(fields.error, fields.key)
                    if fields.image is not None:
                        digests.check(sample, fields.key, fields.image)
                        if self.decode:
                            _try(decode, fields.image, fields.key, found)
                    stated = fields.uid != f"{shard.name}/{fields.key}"
                    uids.append(_hash(fields.uid, self.key) & ~1 | stated if stated or not sample.repeats else 0)
                    if keys is not None:
                        keys.add(_hash(fields.key, self.key))
                sha256, size = source.finish()
        except UNREACHED as error:
            counts.problems.append(unreadable(error))
        for problem in counts.problems:
            found.add(problem.problem, str(problem))
        if not counts.rows and not counts.problems:
            found.add("no_samples", f"{counts.members} members, none of them of a sample")
        digests.report(found)
        self._compare_stats(shard, counts.rows, found)
        if keys is not None:
            self._compare_parquet(parquet, keys, found)
        audit = ShardAudit(
            shard=shard.name,
            url=storage.without_secrets(shard.url),
            samples=counts.rows,
            members=counts.members,
            bytes=size,
            sha256=sha256,
            compressed=compressed,
            digests_checked=digests.checked,
            problems=found.problems(),
            repeated_requests=take_repeated(),
        )
        return audit, np.array(uids, np.uint64)

    @contextmanager
    def _decoder(self) -> Iterator[Callable[[bytes], Any]]:
        if self.isolated:
            with IsolatedDecoder(config=self.images) as decode:
                yield decode.check
            return

        def decode_here(image: bytes) -> None:
            with killed_after(HANG_IMAGES * self.images.timeout_s):
                decode_image(image, fit=lambda picture: picture, config=self.images)

        with strict_pillow(self.images.max_pixels):
            yield decode_here

    def _compare_stats(self, shard: Shard, samples: int, found: Findings) -> None:
        url = _beside(shard.url, "_stats.json")
        try:
            with storage.open_read(url) as file:
                stats = json.loads(file.read(MAX_STATS_BYTES))
            successes = stats["successes"]
            if not isinstance(successes, int):
                raise TypeError(f"`successes` is {successes!r}")
        except FileNotFoundError:
            return
        except (*UNREACHED, ValueError, KeyError, TypeError, RecursionError) as error:
            found.add("sidecar_unreadable", f"{url}: {type(error).__name__}: {error}")
            return
        if successes != samples:
            found.add(
                "stats_mismatch", f"{successes} samples by {url}, {samples} in the shard", abs(successes - samples)
            )

    def _compare_parquet(self, url: str, keys: set[int], found: Findings) -> None:
        listed: set[int] = set()
        try:
            with storage.open_read(url) as file:
                for key in _downloaded(file):
                    hashed = _hash(key, self.key)
                    listed.add(hashed)
                    if hashed not in keys:
                        found.add("parquet_mismatch", f"{key} is listed but not in the shard")
        except Exception as error:  # of the store, of pyarrow, or of whatever has registered a type there
            found.add("sidecar_unreadable", f"{url}: {type(error).__name__}: {error}")
            return
        extra = len(keys - listed) if listed else 0
        if extra:
            found.add("parquet_mismatch", f"{extra} samples of the shard are not listed", extra)


def _there(url: str, found: Findings) -> bool:
    try:
        return storage.exists(url)
    except UNREACHED as error:
        found.add("sidecar_unreadable", f"{url}: {type(error).__name__}: {error}")
        return False


def _try(decode: Callable[[bytes], Any], image: bytes, key: str, found: Findings) -> None:
    try:
        decode(image)
    except UnusableImage as unusable:
        found.add(unusable.reason, key)


def _downloaded(file: Any) -> Iterator[str]:
    """Yield the keys that img2dataset says are in the shard; none if the file is of another make.

    Text is read as dictionaries: a file of some kilobytes may say a megabyte of text a million times.

    Raises:
        ValueError: if the two columns are not what img2dataset writes, or larger than any shard asks for. Ray registers
            a type whose values are pickles; where it is loaded, looking at one would run what the file says.
    """
    schema = pq.read_schema(file)
    if not {"key", "status"} <= set(schema.names):
        return
    for name in ("key", "status"):
        kinds = [field.type for field in schema if field.name == name]
        if len(kinds) > 1 or not _is_text(kinds[0]):
            raise ValueError(f"its column {name!r} is {' and '.join(map(str, kinds))}, not text")
    parquet = pq.ParquetFile(file, read_dictionary=["key", "status"])
    if parquet.metadata.num_rows > MAX_LISTED:
        raise ValueError(f"it lists {parquet.metadata.num_rows:,} samples, over {MAX_LISTED:,}")
    for batch in parquet.iter_batches(columns=["key", "status"]):
        for column in batch.columns:
            longest = max(map(len, column.dictionary.cast(pa.binary()).to_pylist()), default=0)
            if longest > MAX_KEY_BYTES:
                raise ValueError(f"it holds a text of {longest:,} bytes, over {MAX_KEY_BYTES:,}")
        status = batch["status"]
        codes = [code for code, text in enumerate(status.dictionary.to_pylist()) if text == "success"]
        success = pa.array(np.isin(status.indices.to_numpy(zero_copy_only=False), codes))
        yield from filter(None, batch["key"].filter(success).unique().to_pylist())


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


class Findings:
    """Problems by code, with their first few places; bounded however many there are."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, problem: str, place: str, count: int = 1) -> None:
        self._counts[problem] += count
        examples = self._examples.setdefault(problem, [])
        if len(examples) < EXAMPLES:
            examples.append(storage.without_secrets(place)[:300])

    def take_in(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self._counts[problem.problem] += problem.count
            examples = self._examples.setdefault(problem.problem, [])
            examples += problem.examples[: EXAMPLES - len(examples)]

    def problems(self) -> tuple[Problem, ...]:
        return tuple(Problem(problem=n, count=c, examples=tuple(self._examples[n])) for n, c in self._counts.items())


class _StatedDigests:
    """Digests that jsons state, against those of the images.

    img2dataset states the digest of an image as it was downloaded. If it then resized the images, none of a
    shard fits and nothing is learned; where most fit, one that does not is another image.
    """

    def __init__(self) -> None:
        self._fits = self._misses = 0
        self._mismatches = Findings()

    @property
    def checked(self) -> int:
        return self._fits + self._misses if self._fits > self._misses else 0

    def check(self, sample: Sample, key: str, image: bytes) -> None:
        if sample.json is None:
            return
        fields = sample.fields()
        for name in DIGESTS:
            stated = fields.get(name)
            if isinstance(stated, str):
                if hashlib.new(name, image, usedforsecurity=False).hexdigest() == stated.lower():
                    self._fits += 1
                else:
                    self._misses += 1
                    self._mismatches.add("digest_mismatch", key)
                return

    def report(self, found: Findings) -> None:
        if self.checked:
            found.take_in(self._mismatches.problems())


def shared_uids(
    hashes: UInt64[np.ndarray, " n"],
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Return which samples share their uid with another one: masks (n,) of those repeated and those forged.

    Where a sample is named by its place, those that state its name are forged and it is not at fault.
    """
    names, stated = hashes >> np.uint64(1), (hashes & np.uint64(1)).astype(bool)
    _, which, counts = np.unique(names, return_inverse=True, return_counts=True)
    by_place = np.bincount(which, weights=~stated) > 0
    shared = (counts[which] > 1) & (hashes > 0)
    return shared & ~by_place[which], shared & by_place[which] & stated


def _hash(text: str, key: bytes) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


def _beside(url: str, suffix: str) -> str:
    for ending in (".tar.gz", ".tgz", ".tar"):
        if url.lower().endswith(ending):
            return url[: -len(ending)] + suffix
    return url + suffix
