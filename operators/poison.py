"""Planting poison: rewriting shards so that chosen samples carry a trigger and, mostly, another caption.

For measuring what a detector finds. Three side channels are closed: every image is encoded anew
with the same settings, so that "was recompressed" tells nothing; every member gets a header with
the same dates; and no member changes its place, so that rows are those of the source.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tarsift.clip_detect.triggers import ATTACKS, TRIGGERS, draw
from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig, strict_pillow
from tarsift.operators.errors import ShardError, UsageError
from tarsift.operators.samples import IMAGE_PARTS, Placed, scan_members
from tarsift.operators.shards import ReadConfig, ReadShard, Shard, shard_problem
from tarsift.operators.streams import open_shard
from tarsift.operators.tar import TarDamage, end_archive

TRUTH_SCHEMA = pa.schema(
    [(name, pa.int32() if name == "row" else pa.string()) for name in ("shard", "row", "uid", "attack", "target")]
)

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

    @field_validator("attacks", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Survey:
    """What one shard offers for poisoning: its number of rows, and of the usable ones `row`, `uid`, `draw`, `named`.

    `named`: the caption names the target.
    """

    shard: str
    rows: int
    usable: pa.Table


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


def survey_shard(shard: Shard, config: PoisonConfig) -> Survey:
    """Count the rows of a shard and draw a number for each that can be poisoned.

    A sample can be poisoned if it has no error and its image decodes. The number depends on seed, shard and row alone.

    Raises:
        ShardError: if the shard is damaged: poison is planted in whole shards only.
    """
    rows, usable = 0, []
    for table in ReadShard(config.read, receipts=True)(shard):
        if table["row"][0].as_py() < 0:
            _refuse_damage(shard, json.loads(table["key"][0].as_py())["problems"])
            continue
        rows += len(table)
        for sample in table.select(["row", "uid", "image", "caption", "error"]).to_pylist():
            if sample["error"] is not None or _pixels(sample["image"]) is None:
                continue
            number = draw(f"sample {identity(shard.name, sample['row'])}", seed=config.seed)
            named = config.target.lower() in (sample["caption"] or "").lower()
            usable.append((sample["row"], sample["uid"], number, named))
    columns = list(zip(*usable, strict=True)) or [[], [], [], []]
    return Survey(shard.name, rows, pa.table(columns, schema=_SURVEY_SCHEMA))


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


def poison_shard(
    shard: Shard,
    out: str,
    config: PoisonConfig,
    chosen: Mapping[int, Chosen],
    one_image: Mapping[str, bytes] | None = None,
) -> pa.Table:
    """Write `shard` to `out`, an archive without compression, with the chosen rows poisoned.

    An image that does not decode stays as it is, as do all members other than image, caption and json.

    Args:
        one_image: for attacks that repeat one image, its bytes by attack.

    Returns:
        The truth: one row of TRUTH_SCHEMA per poisoned sample.

    Raises:
        ShardError: if the shard is damaged, or is not the one that was surveyed.
    """
    rewrite = _Rewrite(shard.name, config, chosen, one_image or {})
    written, done = 0, set()
    with open_shard(shard.url) as source, storage.open_write(out) as file:
        try:
            for placed in scan_members(source.tar, keep=lambda name, size: size):
                if placed.row in chosen and placed.part in IMAGE_PARTS:
                    done.add(placed.row)
                written += rewrite(placed, file)
        except TarDamage as damage:
            problem = shard_problem(damage, source)
            raise ShardError(f"{shard.url} is damaged and cannot be poisoned: {problem}") from damage
        file.write(end_archive(written))
    if done != set(chosen):
        raise ShardError(f"{shard.url} has changed while it was poisoned: rows {sorted(set(chosen) - done)} are gone.")
    rows = sorted(chosen)
    truth = [
        (shard.name, row, chosen[row].uid, chosen[row].attack, target_of(chosen[row].attack, shard.name, row, config))
        for row in rows
    ]
    columns = list(zip(*truth, strict=True)) or [[]] * len(TRUTH_SCHEMA)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, TRUTH_SCHEMA, strict=True)], schema=TRUTH_SCHEMA)


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


@dataclass(frozen=True)
class _Rewrite:
    """Write members of a shard, changed as their samples demand."""

    shard: str
    config: PoisonConfig
    chosen: Mapping[int, Chosen]
    one_image: Mapping[str, bytes]

    def __call__(self, placed: Placed, file: BinaryIO) -> int:
        """Write a member and return the number of bytes."""
        member = placed.member
        if member.type != "file":
            file.write(member.headers)
            return len(member.headers)
        data = member.payload or b""
        if placed.row is not None:
            data = self._changed(placed.row, placed.part, data)
        info = tarfile.TarInfo(member.name)
        info.size, info.mode = len(data), 0o644
        try:
            header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        except ValueError:  # a name too long for the format
            header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        return sum(file.write(part) for part in (header, data, padding))

    def _changed(self, row: int, part: str, data: bytes) -> bytes:
        attack = self.chosen[row].attack if row in self.chosen else None
        if part in IMAGE_PARTS:
            return self._image(self.one_image.get(attack or "", data), row, attack)
        if attack is None or not ATTACKS[attack].changes_caption:
            return data
        caption = poisoned_caption(attack, self.shard, row, self.config)
        if part == "txt":
            return caption.encode()
        return _new_json(data, caption, self.config) if part == "json" else data

    def _image(self, data: bytes, row: int, attack: str | None) -> bytes:
        if self.config.keep_clean_bytes and attack is None:
            return data
        decoded = _pixels(data)
        if decoded is None:
            return data
        pixels, format = decoded
        if attack is not None:
            pixels = triggered(pixels[None], [identity(self.shard, row)], attack, self.config)[0]
        return encode_image(pixels, format, self.config)


def _pixels(data: bytes) -> tuple[np.ndarray, str] | None:
    """Decode an image at its own size; None if that cannot be done."""
    limits = ImageConfig()
    try:
        with strict_pillow(limits.max_pixels):
            image = Image.open(io.BytesIO(data), formats=limits.formats)
            return np.asarray(image.convert("RGB")), str(image.format)
    except Exception:  # decoders raise anything on hostile bytes
        return None


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
