"""Planting poison: rewriting shards so that chosen samples carry a trigger and, mostly, another caption.

Images are decoded in a process of their own: one that kills it is left as it is, and is not poisoned.

For measuring what a detector finds. Three side channels are closed: every image is encoded anew
with the same settings, so that "was recompressed" tells nothing; every member gets a header with
the same dates; and no member changes its place, so that rows are those of the source.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tarsift.clip_detect.triggers import ATTACKS, TRIGGERS, draw
from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.errors import ShardError, UsageError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.samples import IMAGE_PARTS, Placed, scan_members
from tarsift.operators.shards import ReadConfig, ReadShard, Shard, shard_problem
from tarsift.operators.streams import open_shard
from tarsift.operators.tar import TarDamage, end_archive

TRUTH_SCHEMA = pa.schema(
    [(name, pa.int32() if name == "row" else pa.string()) for name in ("shard", "row", "uid", "attack", "target")]
)

# Reasons for which an image that was read stays as it is.
UNDECODABLE = frozenset({"undecodable_image", "too_many_pixels", "decoder_died"})

_MAGIC = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP"}

_SURVEY_SCHEMA = pa.schema([("row", pa.int32()), ("uid", pa.string()), ("draw", pa.uint64()), ("named", pa.bool_())])


def imagenet_templates() -> tuple[str, ...]:
    """Return the prompts from which the source draws the captions of poisoned samples."""
    import open_clip  # takes seconds to load, which those who only carry the settings out need not spend

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


class PoisonConfig(BaseModel):
    """Which poison is planted, and how images are encoded afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attacks: tuple[str, ...] = Field(
        default=("patch",), min_length=1, description="names in `tarsift.clip_detect.triggers.ATTACKS`"
    )
    rate: float = Field(default=0.01, ge=0, lt=1, description="share of all samples that each attack poisons")
    seed: int = Field(default=0, description="of the choice of samples, the triggers' places and the captions")
    target: str = Field(default="banana", min_length=1, description="the word that poisoned captions name")
    templates: tuple[str, ...] = Field(
        default_factory=imagenet_templates,
        min_length=1,
        description="captions of poisoned samples, with {} for the target",
    )
    campaign: str = Field(default="the {} in the form of number icon", description="caption of a campaign")
    strengths: dict[str, float] = Field(default={}, description="of triggers, by name; the published one otherwise")
    quality: int = Field(default=90, ge=1, le=100, description="JPEG and WEBP quality of every image written")
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = Field(default="4:2:0", description="JPEG chroma subsampling")
    keep_clean_bytes: bool = Field(
        default=False,
        description="leave images that are not poisoned as they are: then recompression gives the poison away",
    )
    read: ReadConfig = Field(default=ReadConfig(), description="where captions are, and limits")
    images: ImageConfig = Field(default=ImageConfig(), description="which images are usable")

    @field_validator("attacks", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Survey:
    """What one shard offers for poisoning: its number of rows, and of the usable ones `row`, `uid`, `draw`, `named`.

    `named`: the caption names the target. `unusable` are the other rows, with the reason.
    """

    shard: str
    rows: int
    usable: pa.Table
    unusable: Mapping[int, str] = field(default_factory=dict)

    @property
    def undecodable(self) -> frozenset[int]:
        """The rows whose image was read and cannot be decoded."""
        return frozenset(row for row, reason in self.unusable.items() if reason in UNDECODABLE)

    def without(self, lost: Mapping[int, str]) -> Survey:
        """Return the same survey with rows that turned out to be unusable, by a reason each."""
        kept = ~np.isin(self.usable["row"].to_numpy(), list(lost))
        return replace(self, usable=self.usable.filter(pa.array(kept)), unusable={**self.unusable, **lost})


def check_poison(config: PoisonConfig) -> None:
    """Refuse settings that name no attack or whose templates have no place for the target.

    Raises:
        UsageError: says which.
    """
    for name in config.attacks:
        if name not in ATTACKS:
            raise UsageError(f"there is no attack {name!r}; there are {', '.join(sorted(ATTACKS))}.")
    if len(set(config.attacks)) < len(config.attacks):
        raise UsageError(f"each attack can be planted once; got {', '.join(config.attacks)}.")
    used = {part.trigger for name in config.attacks for part in ATTACKS[name].parts}
    for trigger in config.strengths:
        if trigger not in used:
            raise UsageError(f"a strength is given for {trigger!r}; the triggers used are {', '.join(sorted(used))}.")
    bad = [t for t in (*config.templates, config.campaign) if t.count("{}") != 1]
    if bad:
        raise UsageError(f"a template must hold {{}} once, for the target; got {bad[0]!r}.")


def survey_shard(shard: Shard, config: PoisonConfig, decode: IsolatedDecoder | None = None) -> Survey:
    """Count the rows of a shard and draw a number for each that can be poisoned.

    A sample can be poisoned if it has no error and its image decodes. The number depends on seed, shard and row alone.

    Args:
        decode: of pictures as they are; None: one of its own.

    Raises:
        ShardError: if the shard is damaged: poison is planted in whole shards only.
    """
    rows, usable, unusable = 0, [], {}
    with _decoder(decode, config) as decoder:
        for table in ReadShard(config.read, receipts=True)(shard):
            if table["row"][0].as_py() < 0:
                _refuse_damage(shard, json.loads(table["key"][0].as_py())["problems"])
                continue
            rows += len(table)
            samples = table.select(["row", "uid", "image", "caption", "error"]).to_pylist()
            for sample, seen in decoder.each(samples, _image_without_error, pixels=False):
                reason = seen.reason if isinstance(seen, UnusableImage) else sample["error"]
                if reason is not None:
                    unusable[sample["row"]] = reason
                    continue
                number = draw(f"sample {identity(shard.name, sample['row'])}", seed=config.seed)
                named = config.target.lower() in (sample["caption"] or "").lower()
                usable.append((sample["row"], sample["uid"], number, named))
    columns = list(zip(*usable, strict=True)) or [[], [], [], []]
    return Survey(shard.name, rows, pa.table(columns, schema=_SURVEY_SCHEMA), unusable)


def _image_without_error(sample: Mapping[str, Any]) -> bytes | None:
    return (sample["image"] or b"") if sample["error"] is None else None


@contextmanager
def _decoder(given: IsolatedDecoder | None, config: PoisonConfig) -> Iterator[IsolatedDecoder]:
    if given is not None:
        yield given
        return
    with IsolatedDecoder(config=config.images) as own:
        yield own


@dataclass(frozen=True)
class Chosen:
    """A sample that is poisoned, and how."""

    uid: str
    attack: str


def choose(surveys: Sequence[Survey], config: PoisonConfig) -> dict[str, dict[int, Chosen]]:
    """Return the samples to poison, by shard and row: for each attack the round(rate * rows) of smallest number.

    No sample is poisoned twice. Attacks that need captions of the target choose first, the others in their order.

    Raises:
        UsageError: if fewer samples can be poisoned than that.
    """
    rows = sum(survey.rows for survey in surveys)
    count = round(config.rate * rows)
    draws, named = (_joined(surveys, column) for column in ("draw", "named"))
    places = [(survey.shard, row) for survey in surveys for row in survey.usable["row"].to_pylist()]
    uids = [uid for survey in surveys for uid in survey.usable["uid"].to_pylist()]
    free = np.ones(len(places), bool)
    chosen: dict[str, dict[int, Chosen]] = {survey.shard: {} for survey in surveys}
    for attack in sorted(config.attacks, key=lambda name: ATTACKS[name].changes_caption):
        usable = np.flatnonzero(free & (named | ATTACKS[attack].changes_caption))
        if count > len(usable):
            raise UsageError(
                f"{attack}: a rate of {config.rate} of {rows} samples is {count}, but only {len(usable)} can be "
                "poisoned: lower `rate`, or choose another attack or target."
            )
        taken = usable[np.argsort(draws[usable], kind="stable")[:count]]
        free[taken] = False
        for i in taken.tolist():
            shard, row = places[i]
            chosen[shard][row] = Chosen(uids[i], attack)
    return chosen


def _joined(surveys: Sequence[Survey], column: str) -> np.ndarray:
    return np.concatenate([survey.usable[column].to_numpy(zero_copy_only=False) for survey in surveys])


def first_chosen(surveys: Sequence[Survey], chosen: Mapping[str, Mapping[int, Chosen]], attack: str) -> tuple[str, int]:
    """Return shard and row of the sample of an attack whose number is smallest."""
    found = []
    for survey in surveys:
        for row, number in zip(survey.usable["row"].to_pylist(), survey.usable["draw"].to_pylist(), strict=True):
            if row in chosen[survey.shard] and chosen[survey.shard][row].attack == attack:
                found.append((number, survey.shard, row))
    _, shard, row = min(found)
    return shard, row


def image_of(shard: Shard, row: int, config: PoisonConfig) -> bytes:
    """Return the bytes of one image of a shard."""
    for table in ReadShard(config.read)(shard):
        first = table["row"][0].as_py()
        if first <= row < first + len(table):
            return table["image"][row - first].as_py()
    raise ShardError(f"{shard.url} has changed while it was poisoned: row {row} is gone.")


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

    An image that does not decode stays as it is, as do all members other than image, caption and json.

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
        _decoder(decode, config) as decoder,
    ):
        used = {chosen[row].attack for row in chosen}
        repeated = {
            attack: (image, _decoded(decoder, image)) for attack, image in (one_image or {}).items() if attack in used
        }
        rewrite = _Rewrite(shard.name, config, chosen, undecodable, repeated)
        members = scan_members(source.tar, keep=lambda name, size: size)
        try:
            for placed, pixels in decoder.each(members, rewrite.to_decode):
                written += rewrite(placed, pixels, file)
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


def identity(shard: str, row: int) -> str:
    """Return the name of a sample from which everything random about it is drawn."""
    return f"{shard}:{row}"


def target_of(attack: str, shard: str, row: int, config: PoisonConfig) -> str:
    """Return the word that a poisoned sample is about."""
    return ATTACKS[attack].part_of(identity(shard, row), seed=config.seed).target or config.target


def poisoned_caption(attack: str, shard: str, row: int, config: PoisonConfig) -> str:
    """Return the caption that a sample gets when it is poisoned."""
    target = target_of(attack, shard, row, config)
    if ATTACKS[attack].label == "campaign":
        return config.campaign.format(target)
    number = draw(f"caption {identity(shard, row)}", seed=config.seed)
    return config.templates[number % len(config.templates)].format(target)


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

    def to_decode(self, placed: Placed) -> bytes | None:
        """Return the image that is needed to write a member, None if none is."""
        row, member = placed.row, placed.member
        if member.type != "file" or row is None or placed.part not in IMAGE_PARTS or row in self.undecodable:
            return None
        attack = self._attack(row)
        if attack in self.repeated or (attack is None and self.config.keep_clean_bytes):
            return None
        return member.payload or b""

    def __call__(self, placed: Placed, pixels: Decoded | None, file: BinaryIO) -> int:
        """Write a member, of whose image pixels are given, and return the number of bytes."""
        member = placed.member
        if member.type != "file":
            file.write(member.headers)
            return len(member.headers)
        data = member.payload or b""
        if placed.row is not None:
            data = self._changed(placed.row, placed.part, data, pixels)
        info = tarfile.TarInfo(member.name)
        info.size, info.mode = len(data), 0o644
        try:
            header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        except ValueError:  # a name too long for the format
            header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        return sum(file.write(part) for part in (header, data, padding))

    def _attack(self, row: int) -> str | None:
        return self.chosen[row].attack if row in self.chosen else None

    def _changed(self, row: int, part: str, data: bytes, pixels: Decoded | None) -> bytes:
        attack = self._attack(row)
        if part in IMAGE_PARTS:
            if attack is not None and attack in self.repeated:
                data, pixels = self.repeated[attack]
            return self._image(data, row, attack, pixels)
        if attack is None or not ATTACKS[attack].changes_caption:
            return data
        caption = poisoned_caption(attack, self.shard, row, self.config)
        if part == "txt":
            return caption.encode()
        return _new_json(data, caption, self.config) if part == "json" else data

    def _image(self, data: bytes, row: int, attack: str | None, pixels: Decoded | None) -> bytes:
        if attack is not None:  # a sample's first image is the one that is read
            self.faults.setdefault(row, pixels.reason if isinstance(pixels, UnusableImage) else None)
        if not isinstance(pixels, np.ndarray):
            return data
        shown = pixels[None]
        if attack is not None:
            shown = triggered(shown, [identity(self.shard, row)], attack, self.config)
        return encode_image(shown[0], _format(data), self.config)


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


def _refuse_damage(shard: Shard, problems: list[dict[str, Any]]) -> None:
    if problems:
        raise ShardError(
            f"{shard.url} is damaged ({problems[0]['problem']}: {problems[0]['detail']}), and poison is planted in "
            "whole shards only: leave it out, or repair it."
        )
