"""What a sifter looks at, from one shard: features or pictures of the samples in some classes, grouped by class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tarsift.operators.decoding import ImageConfig
from tarsift.operators.grouped import write_grouped
from tarsift.operators.images import DecodeImages
from tarsift.operators.schema import append
from tarsift.operators.shards import ReadConfig, ReadShard, Shard
from tarsift.operators.sift_settings import SiftConfig
from tarsift.operators.storage import join
from tarsift.operators.stored import ReadStored, Stored


@dataclass(frozen=True)
class Gather:
    """Job: copy features of one shard's samples, or pictures for networks that take them, to a grouped file.

    Args:
        embeddings, routes: folders of those passes.
        out: folder of `<shard>.parquet`.
        classes: those that are wanted.
    """

    embeddings: str
    routes: str
    out: str
    classes: tuple[int, ...]
    sift: SiftConfig
    read: ReadConfig
    images: ImageConfig

    def __call__(self, shard: Shard) -> int:
        source = self._features(shard) if self.sift.method.on_features else self._pictures(shard)
        parts = [part.filter(self._wanted(part)) for part in source]
        table = pa.concat_tables(parts)
        write_grouped(join(self.out, f"{shard.name}.parquet"), table, "class")
        return len(table)

    def _wanted(self, table: pa.Table) -> pa.Array:
        column = "image_embedding" if self.sift.method.on_features else "pixels"
        usable = np.asarray(table[column].is_valid())
        return pa.array(usable & np.isin(np.asarray(table["class"].combine_chunks()), self.classes))

    def _features(self, shard: Shard) -> Iterator[pa.Table]:
        features = ("shard", "row", "image_embedding", "view_embeddings")
        yield from ReadStored([Stored(self.embeddings, features), Stored(self.routes, ("class",))])(shard.name)

    def _pictures(self, shard: Shard) -> Iterator[pa.Table]:
        routes = pa.concat_tables(ReadStored([Stored(self.routes, ("class",))])(shard.name))["class"]
        decode = DecodeImages(self.sift.picture_size, config=self.images, isolated=True)
        for table in ReadShard(self.read)(shard):
            pictures = decode(table).select(["shard", "row", "pixels"])
            yield append(pictures, {"class": routes.take(pictures["row"]).combine_chunks()})
