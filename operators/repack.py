"""Samples taken from here and there, written as a shard of their own: image and caption, read back as in the dump."""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from tarsift.operators import storage
from tarsift.operators.listing import Shard
from tarsift.operators.shards import fetch_members

_MAGIC = ((b"\x89PNG", "png"), (b"GIF8", "gif"), (b"RIFF", "webp"), (b"\xff\xd8", "jpg"))


class Taken(NamedTuple):
    """A sample that is taken: where its image lies in which shard, and its caption."""

    shard: Shard
    offset: int
    size: int
    caption: str | None


def write_samples(samples: Sequence[Taken], url: str, captions: str) -> Int64[np.ndarray, "n 2"]:
    """Write samples as one shard, in their order, and return offset and size of each image in it.

    Args:
        captions: where they are in the dump, `txt` or `json:FIELD`; here they are put in the same place.

    Raises:
        ShardError: if a shard is shorter than it was.
    """
    images = _fetch(samples)
    places = np.zeros((len(samples), 2), np.int64)
    with storage.open_write(url) as sink, tarfile.open(fileobj=sink, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for i, (image, sample) in enumerate(zip(images, samples, strict=True)):
            places[i] = tar.offset + tarfile.BLOCKSIZE, len(image)
            _add(tar, f"{i:06d}.{_extension(image)}", image)
            if sample.caption is not None:
                _add(tar, *_caption_member(f"{i:06d}", sample.caption, captions))
    return places


def _fetch(samples: Sequence[Taken]) -> list[bytes]:
    """Return the images, read shard by shard."""
    by_shard: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        by_shard[sample.shard.url].append(i)
    images: list[bytes] = [b""] * len(samples)
    for indices in by_shard.values():
        ranges = [(samples[i].offset, samples[i].size) for i in indices]
        for i, image in zip(indices, fetch_members(samples[indices[0]].shard, ranges), strict=True):
            images[i] = image
    return images


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _caption_member(key: str, caption: str, captions: str) -> tuple[str, bytes]:
    kind, _, name = captions.partition(":")
    if kind == "json":
        return f"{key}.json", json.dumps({name: caption}).encode()
    return f"{key}.txt", caption.encode()


def _extension(image: bytes) -> str:
    return next((name for magic, name in _MAGIC if image.startswith(magic)), "jpg")
