"""Shards as a Ray Dataset: rows with images as bytes, or with decoded pixels. Loads no model and no torch."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.encoder_settings import EncoderInfo
from tarsift.operators.images import DecodeImages, hash_images
from tarsift.operators.imported import ImportedEmbeddings
from tarsift.operators.isolation import HANG_IMAGES, killed_after
from tarsift.operators.shards import ReadConfig, ReadShard, Shard, list_shards
from tarsift.pipelines.commit import parts_of
from tarsift.pipelines.session import map_tables

BEGUN = "begun"
# Far more than any table takes; a table of many huge images is decoded again in a process of its own.
HANG_S_PER_ROW = 0.25  # beside that of HANG_IMAGES images


def read_shards(
    inputs: str | Sequence[str], *, config: ReadConfig | None = None, **ray_options: Any
) -> ray.data.Dataset:
    """Read WebDataset shards into a Dataset with one row per sample, the image as bytes.

    Args:
        inputs: paths, globs, brace patterns, folders or URLs of `.tar` and `.tar.gz` shards.
        config: captions, limits, batch size.
        ray_options: passed to `map_batches` (`num_cpus`, ...).

    Returns:
        A lazy Dataset with the columns of `tarsift.operators.schema.SAMPLE_SCHEMA`. A bad sample is
        a row with a reason code in `error`; a damaged shard gives the rows before the damage.

    Example:
        >>> ds = read_shards("cc3m/{00000..00331}.tar")                                  # doctest: +SKIP
        >>> ds = ds.map_batches(ClipEncoder, fn_constructor_kwargs={"encoder": "enc.pt"},
        ...                     batch_size=256, compute=ray.data.ActorPoolStrategy(1))   # doctest: +SKIP
    """
    config = config or ReadConfig()
    return map_tables(shard_items(list_shards(inputs)), _read, {"config": config}, **ray_options)


def shard_items(shards: Sequence[Shard], *, most_blocks: int | None = None) -> ray.data.Dataset:
    """Make a Dataset of shards, one block each, so that every shard is one task; or several each, in fewer blocks."""
    items = [{"name": s.name, "url": s.url, "size": s.size} for s in shards]
    return ray.data.from_items(items, override_num_blocks=min(len(items), most_blocks or len(items)))


def shards_of(items: pa.Table) -> list[Shard]:
    """Turn a block of `shard_items` back into shards."""
    return [Shard(**item) for item in items.select(["name", "url", "size"]).to_pylist()]


def _read(items: pa.Table, *, config: ReadConfig) -> Iterator[pa.Table]:
    for shard in shards_of(items):
        yield from ReadShard(config)(shard)


def read_joined(items: pa.Table, *, read: ReadConfig, join: ImportedEmbeddings) -> Iterator[pa.Table]:
    """Read and hash shards, and join embeddings to their samples; each ends with its end-of-shard row."""
    source = ReadShard(read, receipts=True)
    for shard in shards_of(items):
        for table in source(shard):
            yield join(hash_images(table))


def read_pictures(
    items: pa.Table, *, read: ReadConfig, images: ImageConfig, info: EncoderInfo, folder: str
) -> Iterator[pa.Table]:
    """Read, hash and decode shards to pixels of the encoder's size; each ends with its end-of-shard row.

    A shard is marked as begun. Where the mark is there already, an earlier attempt died, perhaps of an image, and
    images are decoded in a process of their own.

    Args:
        folder: of the pass; marks lie beside the parts, which are cleared when a shard is committed.
    """
    source = ReadShard(read, receipts=True)
    for shard in shards_of(items):
        decode = DecodeImages(
            info.image_size,
            interpolation=info.interpolation,
            resize_mode=info.resize_mode,
            config=images,
            isolated=not storage.create(storage.join(parts_of(folder, shard.name), BEGUN), secrets.token_bytes(16)),
        )
        for table in source(shard):
            a_row = images.timeout_s if decode.isolated else HANG_S_PER_ROW
            with killed_after(HANG_IMAGES * images.timeout_s + len(table) * a_row):
                decoded = decode(hash_images(table))
            yield decoded
