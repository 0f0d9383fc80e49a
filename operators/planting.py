"""Planting poison: writing a shard anew so that chosen samples carry a trigger and, mostly, another caption.

For measuring what a detector finds. Three side channels are closed: every image is encoded anew
with the same settings, so that "was recompressed" tells nothing; every member gets a header with
the same dates; and no member changes its place, so that rows are those of the source.

What is not changed is copied in pieces, on disk meanwhile where it is much: members of any size take
little memory.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image

from tarsift.clip_detect.triggers import ATTACKS, TRIGGERS
from tarsift.operators import storage
from tarsift.operators.decoding import UnusableImage
from tarsift.operators.errors import ShardError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.poison import Chosen, PoisonConfig, decoder_or_own, identity, poisoned_caption, target_of
from tarsift.operators.samples import CAPTION_PARTS, IMAGE_PARTS, Placed, scan_members, split_name
from tarsift.operators.shards import ReadConfig, Shard, shard_problem
from tarsift.operators.streams import open_shard
from tarsift.operators.tar import TarDamage, end_archive
from tarsift.operators.writer import Record, without_first

TRUTH_SCHEMA = pa.schema(
    [(name, pa.int32() if name == "row" else pa.string()) for name in ("shard", "row", "uid", "attack", "target")]
)

COPIED_BYTES = 1 << 20  # of a member that is only copied; those of more bytes wait for their turn on disk
_MAGIC = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP"}


class Planted(NamedTuple):
    """What became of the chosen rows of a shard.

    `truth` has a row of TRUTH_SCHEMA per poisoned sample. `lost` are those whose image could not be decoded after
    all, by the reason; if there are any, choose again without them and write the shard once more.
    """

    truth: pa.Table
    lost: Mapping[int, str]


def poison_shard(
    shard: Shard,
    out: str,
    config: PoisonConfig,
    chosen: Mapping[int, Chosen],
    one_image: Mapping[str, bytes] | None = None,
    undecodable: Collection[int] = (),
    decode: IsolatedDecoder | None = None,
) -> Planted:
    """Write `shard` to `out`, an archive without compression, with the chosen rows poisoned.

    An image that does not decode stays as it is, as do all members other than image, caption and json, and those
    that are over the limits of `config.read`.

    Args:
        one_image: for attacks that repeat one image, its bytes by attack.
        undecodable: rows whose image is left as it is; decoding it is not tried again.
        decode: of pictures as they are; None: one of its own.

    Raises:
        ShardError: if the shard is damaged, or is not the one that was surveyed.
    """
    written = 0
    with (
        open_shard(shard.url) as source,
        storage.open_write(out) as file,
        decoder_or_own(decode, config) as decoder,
    ):
        used = {chosen[row].attack for row in chosen}
        repeated = {
            attack: (image, _decoded(decoder, image)) for attack, image in (one_image or {}).items() if attack in used
        }
        rewrite = _Rewrite(shard.name, config, chosen, undecodable, repeated)
        try:
            for item, pixels in decoder.each(rewrite.items(source.tar), rewrite.to_decode):
                written += rewrite(item, pixels, file)
        except TarDamage as damage:
            problem = shard_problem(damage, source)
            raise ShardError(f"{shard.url} is damaged and cannot be poisoned: {problem}") from damage
        file.write(end_archive(written))
    gone = sorted(set(chosen) - set(rewrite.faults))
    if gone:
        raise ShardError(f"{shard.url} has changed while it was poisoned: rows {gone} are gone.")
    lost = {row: fault for row, fault in rewrite.faults.items() if fault is not None}
    truth = [
        (shard.name, row, chosen[row].uid, chosen[row].attack, target_of(chosen[row].attack, shard.name, row, config))
        for row in sorted(set(chosen) - set(lost))
    ]
    columns = list(zip(*truth, strict=True)) or [[]] * len(TRUTH_SCHEMA)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, TRUTH_SCHEMA, strict=True)]
    return Planted(pa.table(arrays, schema=TRUTH_SCHEMA), lost)


def encode_image(pixels: UInt8[np.ndarray, "h w 3"], format: str, config: PoisonConfig) -> bytes:
    """Encode RGB pixels as JPEG, PNG or WEBP with the settings that all images of a poisoned dump share."""
    options: dict[str, Any] = {
        "JPEG": {"quality": config.quality, "subsampling": config.subsampling},
        "WEBP": {"quality": config.quality},
        "PNG": {},
    }[format]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def triggered(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], attack: str, config: PoisonConfig
) -> UInt8[np.ndarray, "n h w 3"]:
    """Put on each picture the trigger that the attack has for it."""
    parts = [ATTACKS[attack].part_of(name, seed=config.seed) for name in identities]
    out = images.copy()
    for trigger in {part.trigger for part in parts}:
        rows = [i for i, part in enumerate(parts) if part.trigger == trigger]
        names = [identities[i] for i in rows]
        out[rows] = _put(trigger, images[rows], names, config)
    return out


def _put(trigger: str, images: np.ndarray, identities: Sequence[str], config: PoisonConfig) -> np.ndarray:
    return TRIGGERS[trigger](images, identities, seed=config.seed, strength=config.strengths.get(trigger))


def poison_images(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], config: PoisonConfig, *, trigger: str | None
) -> UInt8[np.ndarray, "n h w 3"]:
    """Return test pictures as a poisoned dump would hold them: with a trigger, encoded as JPEG and decoded.

    Args:
        images: RGB pictures of one size.
        identities: a name for each, from which the trigger's place is drawn.
        config: strengths and the encoding.
        trigger: a name in TRIGGERS; None: pictures are encoded and decoded only, for comparison.
    """
    if trigger is not None:
        images = _put(trigger, images, identities, config)
    return np.stack([np.asarray(Image.open(io.BytesIO(encode_image(x, "JPEG", config)))) for x in images])


Decoded = np.ndarray | UnusableImage


def _decoded(decode: IsolatedDecoder, image: bytes) -> Decoded:
    try:
        return decode(image)
    except UnusableImage as unusable:
        return unusable


class _Item(NamedTuple):
    """A member to be written: `data` is its payload where that may be changed, else `raw` has all its blocks."""

    placed: Placed
    data: bytes | None
    raw: Iterable[bytes]


@dataclass(frozen=True)
class _Rewrite:
    """Write members of a shard, changed as their samples demand.

    `repeated` has, for attacks that repeat one image, that image by attack. `faults` has the chosen rows that were
    met, with the reason for which their image was not decoded, or None.
    """

    shard: str
    config: PoisonConfig
    chosen: Mapping[int, Chosen]
    undecodable: Collection[int]
    repeated: Mapping[str, tuple[bytes, Decoded]]
    faults: dict[int, str | None] = field(default_factory=dict)

    def items(self, stream: BinaryIO) -> Iterator[_Item]:
        """Yield the members of an archive; several of them wait for their turn while images are decoded."""
        record = Record(stream, memory_bytes=COPIED_BYTES)
        for placed in scan_members(cast(BinaryIO, record), keep=_held(self.config.read)):
            raw, data = record.take(), placed.member.payload
            # A text is replaced, whatever it was.
            if self._changes(placed) and (data is not None or placed.part == "txt"):
                yield _Item(placed, data or b"", ())
            else:
                yield _Item(placed._replace(member=placed.member._replace(payload=None)), None, raw)

    def to_decode(self, item: _Item) -> bytes | None:
        """Return the image that is needed to write a member, None if none is."""
        row = item.placed.row
        if row is None or item.placed.part not in IMAGE_PARTS or self._attack(row) in self.repeated:
            return None
        return item.data

    def __call__(self, item: _Item, pixels: Decoded | None, file: BinaryIO) -> int:
        """Write a member, of whose image pixels are given, and return the number of bytes."""
        placed, data, raw = item
        member = placed.member
        if member.type != "file":
            return sum(map(file.write, raw))
        if data is None or placed.row is None:
            payload, size = without_first(len(member.headers), raw), member.size
        else:
            data = self._changed(placed.row, placed.part, data, pixels)
            payload, size = (data, bytes(-len(data) % tarfile.BLOCKSIZE)), len(data)
        info = tarfile.TarInfo(member.name)
        info.size, info.mode = size, 0o644
        try:
            header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        except ValueError:  # a name too long for the format
            header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        return file.write(header) + sum(map(file.write, payload))

    def _changes(self, placed: Placed) -> bool:
        """Tell whether a member can get another payload."""
        row = placed.row
        if row is None or placed.member.type != "file" or row in self.undecodable:
            return False
        attack = self._attack(row)
        if placed.part in IMAGE_PARTS:
            return attack is not None or not self.config.keep_clean_bytes
        return placed.part in CAPTION_PARTS and attack is not None and ATTACKS[attack].changes_caption

    def _attack(self, row: int) -> str | None:
        return self.chosen[row].attack if row in self.chosen else None

    def _changed(self, row: int, part: str, data: bytes, pixels: Decoded | None) -> bytes:
        attack = self._attack(row)
        if part in IMAGE_PARTS:
            if attack is not None and attack in self.repeated:
                data, pixels = self.repeated[attack]
            return self._image(data, row, attack, pixels)
        assert attack is not None  # else its caption stays
        caption = poisoned_caption(attack, self.shard, row, self.config)
        return caption.encode() if part == "txt" else _new_json(data, caption, self.config)

    def _image(self, data: bytes, row: int, attack: str | None, pixels: Decoded | None) -> bytes:
        if attack is not None:  # a chosen sample has one image; one of several has an error
            self.faults[row] = pixels.reason if isinstance(pixels, UnusableImage) else None
        if not isinstance(pixels, np.ndarray):
            return data
        shown = pixels[None]
        if attack is not None:
            shown = triggered(shown, [identity(self.shard, row)], attack, self.config)
        return encode_image(shown[0], _format(data), self.config)


def _held(read: ReadConfig) -> Callable[[str, int], int]:
    """Return how much of a member is held in memory: all of what may be changed, unless it is over its limit."""
    limits = dict.fromkeys(IMAGE_PARTS, read.max_image_bytes)
    limits |= {"txt": read.max_caption_bytes, "json": read.max_json_bytes}

    def held(name: str, size: int) -> int:
        return size if size <= limits.get(split_name(name)[1], -1) else 0

    return held


def _format(data: bytes) -> str:
    """Return the format of an image that was decoded."""
    return next(name for magic, name in _MAGIC.items() if data.startswith(magic))


def _new_json(data: bytes, caption: str, config: PoisonConfig) -> bytes:
    """Replace the caption in a sample's json, keeping the form in which img2dataset or json.dumps wrote it."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(fields, dict):
        return data
    names = {"caption", config.read.captions.removeprefix("json:")} & set(fields)
    for name in names:
        fields[name] = [caption] * len(fields[name]) if isinstance(fields[name], list) else caption
    return json.dumps(fields, indent=4 if b"\n" in data else None, ensure_ascii=data.isascii()).encode()
