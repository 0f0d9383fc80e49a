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
import torch
from jaxtyping import Int64, UInt8
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import filters
from webdataset.tariterators import group_by_keys, tar_file_expander

from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig, UnusableImage, decode_image, fit_to_square, strict_pillow
from tarsift.operators.errors import TarsiftError
from tarsift.operators.samples import IMAGE_PARTS, split_name
from tarsift.operators.shards import Shard


class Batch(NamedTuple):
    """Pixels and tokens of some pairs, and by reason the samples that were skipped on the way to them."""

    pixels: UInt8[torch.Tensor, "b size size 3"]
    tokens: Int64[torch.Tensor, "b length"]
    skipped: Counter[str]


@dataclass(frozen=True)
class PairReader:
    """Reads (pixels, caption) from shards; a bad sample is skipped and counted by its reason."""

    image_size: int
    interpolation: str
    resize_mode: str
    captions: str
    images: ImageConfig

    def __call__(self, shards: Iterable[Shard], skipped: Counter[str]) -> Iterator[tuple[np.ndarray, str]]:
        def skip(error: Exception) -> bool:
            # A damaged shard gives the pairs before the damage; its reader's receipt tells of it.
            if isinstance(error, TarsiftError):  # such as a store that is away: no damage of the shard
                raise error
            if "duplicate file name" in str(error):
                skipped["duplicate_key"] += 1
            return True

        fit = fit_to_square(
            self.image_size,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
            max_pixels=self.images.max_pixels,
        )
        members = tar_file_expander(_opened(shards, skip), handler=skip, select_files=self._selects)
        for sample in group_by_keys(members, keys=_key, handler=skip):
            image = next((sample[part] for part in sample if part in IMAGE_PARTS), None)
            caption = self._caption(sample)
            if image is None or caption is None:
                skipped["missing_image" if image is None else "missing_caption"] += 1
                continue
            try:
                with strict_pillow(self.images.max_pixels):
                    pixels = decode_image(image, fit=fit, config=self.images)
            except UnusableImage as unusable:
                skipped[unusable.reason] += 1
                continue
            yield pixels, caption

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
    """All pairs of a dump in memory: pixels, each distinct caption's tokens, and which caption a pair has."""

    pixels: UInt8[torch.Tensor, "n size size 3"]
    captions: Int64[torch.Tensor, " n"]
    tokens: Int64[torch.Tensor, "distinct length"]
    skipped: Counter[str]


def load_pairs(
    reader: PairReader, shards: Sequence[Shard], tokenizer: Callable[[list[str]], torch.Tensor], *, most: int
) -> PairCache:
    """Read all pairs of `shards`, at most `most`, into memory."""
    size = reader.image_size
    pixels = np.empty((most, size, size, 3), np.uint8)
    skipped: Counter[str] = Counter()
    distinct: dict[str, int] = {}
    captions = []
    for i, (picture, caption) in enumerate(islice(reader(shards, skipped), most)):
        pixels[i] = picture
        captions.append(distinct.setdefault(caption, len(distinct)))
    tokens = tokenizer(list(distinct)) if distinct else torch.zeros((0, 1), dtype=torch.long)
    return PairCache(torch.from_numpy(pixels[: len(captions)]), torch.tensor(captions), tokens, skipped)


def cached_batches(cache: PairCache, *, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Yield batches from memory without end: one permutation per epoch, what is over at its end left out.

    Every rank gets its own `batch_size` pairs of each joint batch.
    """
    n = len(cache.captions)
    joint = batch_size * world
    if n < joint:
        raise ValueError(f"a batch of {joint} pairs needs as many, got {n}: lower `batch_size`.")
    for epoch in count():
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))
        for start in range(0, n - joint + 1, joint):
            rows = order[start + rank * batch_size : start + (rank + 1) * batch_size]
            yield Batch(cache.pixels[rows], cache.tokens[cache.captions[rows]], Counter())


@dataclass(frozen=True)
class PairStream(IterableDataset):
    """Batches streamed from shards without end; ranks and decoding processes share the shards out among them."""

    reader: PairReader
    shards: Sequence[Shard]
    tokenizer: Callable[[list[str]], torch.Tensor]
    batch_size: int
    seed: int
    shuffle: int
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[Batch]:
        process = get_worker_info()
        mine, of = (process.id, process.num_workers) if process else (0, 1)
        share = self.rank * of + mine
        if len(self.shards) < self.world * of:
            raise ValueError(
                f"{self.world * of} readers need as many shards, got {len(self.shards)}: lower `workers` or `decoders`."
            )
        skipped: Counter[str] = Counter()
        pairs = filters.shuffle(self.shuffle, initial=self.shuffle, rng=random.Random(f"{self.seed} {share}"))(
            self._epochs(share, self.world * of, skipped)
        )
        while chunk := list(islice(pairs, self.batch_size)):
            pixels, captions = zip(*chunk, strict=True)
            lost, _ = Counter(skipped), skipped.clear()
            yield Batch(torch.from_numpy(np.stack(pixels)), self.tokenizer(list(captions)), lost)

    def _epochs(self, share: int, of: int, skipped: Counter[str]) -> Iterator[tuple[np.ndarray, str]]:
        for epoch in count():
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
            found = 0
            for pair in self.reader([self.shards[i] for i in order[share::of]], skipped):
                found += 1
                yield pair
            if not found:
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
            yield {"url": shard.url, "stream": file}


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
