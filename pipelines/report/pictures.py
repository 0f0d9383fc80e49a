"""Thumbnails for the report: single images fetched by byte range, decoded in a process of their own, as data URIs."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.errors import AccessError, StoreError, TarsiftError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.listing import Shard
from tarsift.operators.shards import fetch_members

Identity = tuple[str, int]

# What a picture of this edge may cost in bytes; one that needs more is encoded again, coarser.
BYTES_PER_EDGE = 40
LARGE, SMALL = 160, 72  # edges: of a card, of a strip
QUALITIES = (72, 50, 30, 12)


@dataclass(frozen=True)
class Picture:
    """Where one image lies, what its bytes must hash to, and how large it is shown (longer edge, pixels)."""

    shard: str
    row: int
    offset: int
    size: int
    sha256: bytes | None
    edge: int


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as a data URI; a `tiny` one is enlarged by the page without smoothing."""

    uri: str
    tiny: bool


@dataclass(frozen=True)
class Thumbnails:
    """Pictures by (shard, row), and why others are missing: reason -> number of pictures."""

    made: dict[Identity, Thumbnail]
    missing: dict[str, int]


def make_thumbnails(
    pictures: Iterable[Picture],
    shards: Mapping[str, Shard],
    *,
    images: ImageConfig,
    max_image_bytes: int = 64 << 20,
    max_scan_bytes: int = 2 << 30,
    threads: int = 8,
) -> Thumbnails:
    """Fetch and shrink pictures; whatever goes wrong with one leaves a gap and is counted, never an error.

    Args:
        pictures: most important first: of compressed shards, which have to be read from the start,
            only the first are opened, up to `max_scan_bytes` of compressed bytes in all.
        shards: by name, as the run read them.
        images: limits of decoding.
        max_image_bytes: larger members are not fetched.
        max_scan_bytes: see `pictures`.
        threads: shards that are read at once.
    """
    missing: dict[str, int] = defaultdict(int)
    by_shard: dict[str, dict[Identity, Picture]] = {}
    scanned = 0
    refused: set[str] = set()
    for picture in pictures:
        shard = shards.get(picture.shard)
        if shard is None:
            missing["its shard is not among the inputs"] += 1
            continue
        if picture.shard not in by_shard and picture.shard not in refused:
            compressed = shard.url.endswith(("gz", "tgz"))
            if compressed and scanned + shard.size > max_scan_bytes and scanned:
                refused.add(picture.shard)
            else:
                scanned += shard.size if compressed else 0
                by_shard[picture.shard] = {}
        if picture.shard in refused:
            missing["compressed shard: reading it again would take too long"] += 1
        elif picture.size > max_image_bytes:
            missing["larger than the report fetches"] += 1
        else:
            known = by_shard[picture.shard].get((picture.shard, picture.row))
            if known is None or known.edge < picture.edge:
                by_shard[picture.shard][picture.shard, picture.row] = picture
    thumbnails: dict[Identity, Thumbnail] = {}
    with IsolatedDecoder(config=images) as decoder, ThreadPoolExecutor(threads) as pool:
        lock = Lock()

        def decode(image: bytes) -> UInt8[np.ndarray, "h w 3"]:
            with lock:  # one decoder for all threads, whose time goes by in fetching
                return decoder(image)

        work = {name: list(wanted.values()) for name, wanted in by_shard.items()}
        for made, gaps in pool.map(lambda name: _one_shard(shards[name], work[name], decode), work):
            thumbnails.update(made)
            for reason in gaps:
                missing[reason] += 1
    return Thumbnails(thumbnails, dict(sorted(missing.items())))


def _one_shard(
    shard: Shard, pictures: Sequence[Picture], decode: Callable[[bytes], UInt8[np.ndarray, "h w 3"]]
) -> tuple[dict[Identity, Thumbnail], list[str]]:
    made: dict[Identity, Thumbnail] = {}
    gaps: list[str] = []
    for picture, data in zip(pictures, _fetch(shard, pictures), strict=True):
        if isinstance(data, str):
            gaps.append(data)
        elif picture.sha256 is not None and hashlib.sha256(data).digest() != picture.sha256:
            gaps.append("its shard was changed since it was read")
        else:
            try:
                made[picture.shard, picture.row] = thumbnail(decode(data), picture.edge)
            except UnusableImage as error:
                gaps.append(error.reason)
    return made, gaps


def _fetch(shard: Shard, pictures: Sequence[Picture]) -> list[bytes | str]:
    ranges = [(p.offset, p.size) for p in pictures]
    try:
        return list(fetch_members(shard, ranges))
    except (StoreError, AccessError, OSError, ValueError, EOFError):
        return ["its shard cannot be read"] * len(ranges)
    except TarsiftError:  # the shard is shorter than one of them asks: the others may still be there
        if len(ranges) == 1:
            return ["its shard was changed since it was read"]
        if shard.url.endswith(("gz", "tgz")):
            return ["its shard was changed since it was read"] * len(ranges)
        return [_fetch(shard, [p])[0] for p in pictures]


def thumbnail(pixels: UInt8[np.ndarray, "h w 3"], edge: int) -> Thumbnail:
    """Shrink a picture to at most `edge` pixels, as WebP.

    One that is smaller stays as it is: the page enlarges it without smoothing, so that a small
    trigger remains visible.
    """
    picture = Image.fromarray(pixels)
    scale = edge / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    encoded = b""
    for quality in QUALITIES:
        sink = io.BytesIO()
        picture.save(sink, "WEBP", quality=quality, method=4)
        encoded = sink.getvalue()
        if len(encoded) <= BYTES_PER_EDGE * edge:
            break
    else:  # noise does not compress
        return thumbnail(pixels, edge // 2)
    uri = "data:image/webp;base64," + base64.b64encode(encoded).decode()
    return Thumbnail(uri, tiny=2 * max(picture.size) <= LARGE)
