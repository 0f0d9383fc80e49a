"""Shards to batches of image-text pairs for training, read by webdataset.

Pairs that fit in memory as pixels are read once (`PairCache`); others are streamed anew in every
epoch, through a shuffle buffer. Both yield batches without end, in an order that depends on the
seed alone.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64, UInt8
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import filters
from webdataset.tariterators import group_by_keys, tar_file_expander

from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.errors import TarsiftError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.samples import IMAGE_PARTS, split_name
from tarsift.operators.shards import Shard


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
    """Reads pairs from shards; a bad sample is skipped and counted by its reason.

    Images are decoded in a process of their own: one that kills it is a bad sample like others.
    """

    image_size: int
    interpolation: str
    resize_mode: str
    captions: str
    images: ImageConfig

    def __call__(self, shards: Iterable[Shard], skipped: Counter[str]) -> Iterator[Pair]:
        def skip(error: Exception) -> bool:
            # A damaged shard gives the pairs before the damage; its reader's receipt tells of it.
            if isinstance(error, TarsiftError):  # such as a store that is away: no damage of the shard
                raise error
            if "duplicate file name" in str(error):
                skipped["duplicate_key"] += 1
            return True

        members = tar_file_expander(_opened(shards, skip), handler=skip, select_files=self._selects)
        how = {"interpolation": self.interpolation, "resize_mode": self.resize_mode}
        with IsolatedDecoder(self.image_size, **how, config=self.images) as decode:
            samples = group_by_keys(members, keys=_key, handler=skip)
            for (_, caption, sample), pixels in decode.each(self._whole(samples, skipped), lambda whole: whole[0]):
                if isinstance(pixels, UnusableImage):
                    skipped[pixels.reason] += 1
                    continue
                assert pixels is not None  # each of them has an image
                key = sample["__key__"].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                yield Pair(pixels, caption, sample["__url__"], key)

    def _whole(
        self, samples: Iterable[dict[str, Any]], skipped: Counter[str]
    ) -> Iterator[tuple[bytes, str, dict[str, Any]]]:
        """Yield image, caption and all of the samples that have both."""
        for sample in samples:
            image = next((sample[part] for part in sample if part in IMAGE_PARTS), None)
            caption = self._caption(sample)
            if image is None or caption is None:
                skipped["missing_image" if image is None else "missing_caption"] += 1
                continue
            yield image, caption, sample

    def _selects(self, name: str) -> bool:
        part = split_name(name)[1]
        return part in IMAGE_PARTS or part == ("txt" if self.captions == "txt" else "json")

    def _caption(self, sample: dict[str, Any]) -> str | None:
        if self.captions == "txt":
            text = sample.get("txt", b"").decode("utf-8", "replace")
            return text if text.strip() else None
        return _json_caption(sample.get("json", b""), self.captions.removeprefix("json:"))


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
    for i, pair in enumerate(islice(reader(shards, skipped), most)):
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


def _opened(shards: Iterable[Shard], skip: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        try:
            file = storage.open_read(shard.url)
        except OSError as error:
            skip(error)
            continue
        with closing(file):
            yield {"url": shard.name, "stream": file}  # which webdataset hands on with every sample


def _key(name: str) -> tuple[str | None, str]:
    key, part = split_name(name)
    return (key or None), part


def _json_caption(data: bytes, field: str) -> str | None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    value = fields.get(field) if isinstance(fields, dict) else None
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, str)), None)
    return value if isinstance(value, str) and value.strip() else None
