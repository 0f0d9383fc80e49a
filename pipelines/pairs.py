"""Shards to batches of image-text pairs for training.

Pairs that fit in memory as pixels are read once (`PairCache`); others are streamed anew in every
epoch, through webdataset's shuffle buffer. Both yield batches without end, in an order that depends on the
seed alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64, UInt8
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import filters

from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.shards import ReadConfig, Shard, ShardCounts, read_samples
from tarsift.operators.streams import open_shard
from tarsift.pipelines.shard_digests import NO_PAIR


class Batch(NamedTuple):
    """Pixels and tokens of some pairs, and by reason the samples that were skipped on the way to them.

    From a `PairCache` also which of its pairs they are, and in which pass over it.
    """

    pixels: UInt8[torch.Tensor, "b size size 3"]
    tokens: Int64[torch.Tensor, "b length"]
    skipped: Counter[str]
    rows: Int64[torch.Tensor, " b"] | None = None
    epoch: int = 0


class Pair(NamedTuple):
    """A picture with its caption, and the sample that they come from."""

    pixels: UInt8[np.ndarray, "size size 3"]
    caption: str
    shard: str
    key: str


@dataclass(frozen=True)
class PairReader:
    """Reads pairs from shards, by the reader and within the bounds of the main job.

    A bad sample is skipped and counted by its reason. Images are decoded in a process of their own: one that kills it
    is a bad sample like others.
    """

    image_size: int
    interpolation: str
    resize_mode: str
    read: ReadConfig
    images: ImageConfig

    def __call__(self, shards: Iterable[Shard], skipped: Counter[str]) -> Iterator[Pair]:
        how = {"interpolation": self.interpolation, "resize_mode": self.resize_mode}
        with IsolatedDecoder(self.image_size, **how, config=self.images) as decode:
            for sample, pixels in decode.each(self._whole(shards, skipped), lambda whole: whole.image):
                if isinstance(pixels, UnusableImage):
                    skipped[pixels.reason] += 1
                    continue
                assert pixels is not None  # each of them has an image
                yield Pair(pixels, sample.caption, sample.shard, sample.key)

    def _whole(self, shards: Iterable[Shard], skipped: Counter[str]) -> Iterator[_Whole]:
        """Yield the samples that have both a picture and a caption."""
        for shard in shards:
            try:
                with open_shard(shard.url) as source:
                    # A damaged shard gives the pairs before the damage; the receipt of its digest tells of it.
                    for sample in read_samples(source, self.read, ShardCounts()):
                        fields = sample.finish(shard.name, self.read)
                        if fields.image is None or fields.caption is None or fields.error in NO_PAIR:
                            skipped[fields.error or "missing_image"] += 1
                            continue
                        yield _Whole(fields.image, fields.caption, shard.name, fields.key)
            except OSError:  # it cannot be opened, of which the receipt tells as well
                continue


class _Whole(NamedTuple):
    image: bytes
    caption: str
    shard: str
    key: str


@dataclass(frozen=True)
class PairReaderWithout(PairReader):
    """Reads pairs as `PairReader` does, and leaves some out; these count as `left_out`."""

    left_out: frozenset[tuple[str, str]] = frozenset()

    def __call__(self, shards: Iterable[Shard], skipped: Counter[str]) -> Iterator[Pair]:
        for pair in super().__call__(shards, skipped):
            if (pair.shard, pair.key) in self.left_out:
                skipped["left_out"] += 1
            else:
                yield pair


@dataclass(frozen=True)
class PairCache:
    """All pairs of a dump in memory: pixels, each distinct caption's tokens, and which caption a pair has.

    `names` has the columns `shard` and `key`, a row per pair.
    """

    pixels: UInt8[torch.Tensor, "n size size 3"]
    captions: Int64[torch.Tensor, " n"]
    tokens: Int64[torch.Tensor, "distinct length"]
    skipped: Counter[str]
    names: pa.Table


def load_pairs(
    reader: PairReader, shards: Iterable[Shard], tokenizer: Callable[[list[str]], torch.Tensor], *, most: int
) -> PairCache:
    """Read all pairs of `shards`, at most `most`, into memory."""
    size = reader.image_size
    pixels = np.empty((most, size, size, 3), np.uint8)
    skipped: Counter[str] = Counter()
    distinct: dict[str, int] = {}
    captions, found, keys = [], [], []
    for i, pair in enumerate(reader(shards, skipped)):  # to its end: what is skipped there counts as well
        if i == most:
            break
        pixels[i] = pair.pixels
        captions.append(distinct.setdefault(pair.caption, len(distinct)))
        found.append(pair.shard)
        keys.append(pair.key)
    tokens = tokenizer(list(distinct)) if distinct else torch.zeros((0, 1), dtype=torch.long)
    names = pa.table({"shard": pa.array(found, pa.string()), "key": pa.array(keys, pa.string())})
    return PairCache(torch.from_numpy(pixels[: len(captions)]), torch.tensor(captions), tokens, skipped, names)


def cached_batches(
    cache: PairCache, *, batch_size: int, seed: int, rank: int = 0, world: int = 1, start: int = 0
) -> Iterator[Batch]:
    """Yield batches from memory without end: one permutation per epoch, what is over at its end left out.

    Every rank gets its own `batch_size` pairs of each joint batch. The first `start` batches are passed over.
    """
    n = len(cache.captions)
    joint = batch_size * world
    if n < joint:
        raise ValueError(f"a batch of {joint} pairs needs as many, got {n}: lower `batch_size`.")
    order = None
    for number in count(start):
        epoch, place = divmod(number, n // joint)
        if order is None or place == 0:
            order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))
        first = place * joint + rank * batch_size
        rows = order[first : first + batch_size]
        yield Batch(cache.pixels[rows], cache.tokens[cache.captions[rows]], Counter(), rows, epoch)


@dataclass(frozen=True)
class PairStream(IterableDataset):
    """Batches streamed from shards without end; ranks and decoding processes share the shards out among them.

    With `start`, the epochs that were seen before (2.5 is the middle of the third), it begins at about that
    place: at a shard, and with a shuffle of its own, so that some pairs come twice or not at all in that epoch.
    """

    reader: PairReader
    shards: Sequence[Shard]
    tokenizer: Callable[[list[str]], torch.Tensor]
    batch_size: int
    seed: int
    shuffle: int
    rank: int = 0
    world: int = 1
    start: float = 0.0

    def __iter__(self) -> Iterator[Batch]:
        process = get_worker_info()
        mine, of = (process.id, process.num_workers) if process else (0, 1)
        share = self.rank * of + mine
        if len(self.shards) < self.world * of:
            raise ValueError(
                f"{self.world * of} readers need as many shards, got {len(self.shards)}: lower `workers` or `decoders`."
            )
        skipped: Counter[str] = Counter()
        rng = random.Random(f"{self.seed} {share} {self.start}" if self.start else f"{self.seed} {share}")
        pairs = filters.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(
            self._epochs(share, self.world * of, skipped)
        )
        while chunk := list(islice(pairs, self.batch_size)):
            pixels = torch.from_numpy(np.stack([pair.pixels for pair in chunk]))
            lost, _ = Counter(skipped), skipped.clear()
            yield Batch(pixels, self.tokenizer([pair.caption for pair in chunk]), lost)

    def _epochs(self, share: int, of: int, skipped: Counter[str]) -> Iterator[Pair]:
        for epoch in count(int(self.start)):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))[share::of]
            passed = int(max(0.0, self.start - epoch) * len(order))
            found = 0
            for pair in self.reader([self.shards[i] for i in order[passed:]], skipped):
                found += 1
                yield pair
            if not found and not passed:
                raise ValueError(f"no usable pair in an epoch of shards; skipped were {dict(skipped)}.")


def streamed_batches(stream: PairStream, *, decoders: int = 0) -> Iterator[Batch]:
    """Yield the batches of a stream, decoded in this process or in `decoders` others."""
    return iter(DataLoader(stream, batch_size=None, num_workers=decoders, collate_fn=_as_it_is))


def _as_it_is(batch: Any) -> Any:
    return batch
