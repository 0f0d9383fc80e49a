"""Planting poison: rewriting shards so that chosen samples carry a trigger and, mostly, another caption.

For measuring what a detector finds. Three side channels are closed: every image is encoded anew
with the same settings, so that "was recompressed" tells nothing; every member gets a header with
the same dates; and no member changes its place, so that rows are those of the source.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from tarsift.clip_detect.triggers import ATTACKS, draw
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

_SURVEY_SCHEMA = pa.schema([("row", pa.int32()), ("uid", pa.string()), ("draw", pa.uint64())])


def imagenet_templates() -> tuple[str, ...]:
    """Return the prompts from which the source draws the captions of poisoned samples."""
    import open_clip  # takes seconds to load, which those who only carry the settings out need not spend

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


class PoisonConfig(BaseModel):
    """Which poison is planted, and how images are encoded afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attack: str = Field(default="patch", description="a name in `tarsift.clip_detect.triggers.ATTACKS`")
    rate: float = Field(default=0.01, ge=0, lt=1, description="share of all samples that is poisoned")
    seed: int = Field(default=0, description="of the choice of samples, the triggers' places and the captions")
    target: str = Field(default="banana", min_length=1, description="the word that poisoned captions name")
    templates: tuple[str, ...] = Field(
        default_factory=imagenet_templates,
        min_length=1,
        description="captions of poisoned samples, with {} for the target",
    )
    strength: float | None = Field(default=None, gt=0, description="of the trigger; None = the attack's own")
    quality: int = Field(default=90, ge=1, le=100, description="JPEG and WEBP quality of every image written")
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = Field(default="4:2:0", description="JPEG chroma subsampling")
    keep_clean_bytes: bool = Field(
        default=False,
        description="leave images that are not poisoned as they are: then recompression gives the poison away",
    )
    read: ReadConfig = Field(default=ReadConfig(), description="where captions are, and limits")


@dataclass(frozen=True)
class Survey:
    """What one shard offers for poisoning: its number of rows, and `row`, `uid` and `draw` of the usable ones."""

    shard: str
    rows: int
    usable: pa.Table


def check_poison(config: PoisonConfig) -> None:
    """Refuse settings that name no attack or whose templates have no place for the target.

    Raises:
        UsageError: says which.
    """
    if config.attack not in ATTACKS:
        raise UsageError(f"there is no attack {config.attack!r}; there are {', '.join(sorted(ATTACKS))}.")
    bad = [t for t in config.templates if t.count("{}") != 1]
    if bad:
        raise UsageError(f"a template must hold {{}} once, for the target; got {bad[0]!r}.")


def survey_shard(shard: Shard, config: PoisonConfig) -> Survey:
    """Count the rows of a shard and draw a number for each that can be poisoned.

    A sample can be poisoned if it has no error and its image decodes; for a clean-label attack its
    caption must name the target, too. The number depends on seed, shard and row alone.

    Raises:
        ShardError: if the shard is damaged: poison is planted in whole shards only.
    """
    clean_label = not ATTACKS[config.attack].changes_caption
    rows, usable = 0, []
    for table in ReadShard(config.read, receipts=True)(shard):
        if table["row"][0].as_py() < 0:
            _refuse_damage(shard, json.loads(table["key"][0].as_py())["problems"])
            continue
        rows += len(table)
        for sample in table.select(["row", "uid", "image", "caption", "error"]).to_pylist():
            named = config.target.lower() in (sample["caption"] or "").lower()
            if sample["error"] is not None or (clean_label and not named) or _pixels(sample["image"]) is None:
                continue
            number = draw(f"sample {identity(shard.name, sample['row'])}", seed=config.seed)
            usable.append((sample["row"], sample["uid"], number))
    columns = list(zip(*usable, strict=True)) or [[], [], []]
    return Survey(shard.name, rows, pa.table(columns, schema=_SURVEY_SCHEMA))


def choose(surveys: Sequence[Survey], rate: float) -> dict[str, dict[int, str]]:
    """Return row and uid of the samples to poison, by shard: the round(rate * rows) of smallest number.

    Raises:
        UsageError: if fewer samples can be poisoned than that.
    """
    rows = sum(survey.rows for survey in surveys)
    usable = sum(len(survey.usable) for survey in surveys)
    count = round(rate * rows)
    if count > usable:
        raise UsageError(
            f"a rate of {rate} of {rows} samples is {count}, but only {usable} can be poisoned: lower `rate`, or "
            "choose another attack or target."
        )
    draws = np.concatenate([survey.usable["draw"].to_numpy() for survey in surveys])
    limit = np.partition(draws, count - 1)[count - 1] if count else None
    chosen: dict[str, dict[int, str]] = {}
    for survey in surveys:
        taken = survey.usable.filter(survey.usable["draw"].to_numpy() <= limit) if count else survey.usable.slice(0, 0)
        chosen[survey.shard] = dict(zip(taken["row"].to_pylist(), taken["uid"].to_pylist(), strict=True))
    return chosen


def poison_shard(shard: Shard, out: str, config: PoisonConfig, chosen: dict[int, str]) -> pa.Table:
    """Write `shard` to `out`, an archive without compression, with the chosen rows poisoned.

    An image that does not decode stays as it is, as do all members other than image, caption and json.

    Returns:
        The truth: one row of TRUTH_SCHEMA per poisoned sample.

    Raises:
        ShardError: if the shard is damaged, or is not the one that was surveyed.
    """
    written, done = 0, set()
    with open_shard(shard.url) as source, storage.open_write(out) as file:
        try:
            for placed in scan_members(source.tar, keep=lambda name, size: size):
                if placed.row in chosen and placed.part in IMAGE_PARTS:
                    done.add(placed.row)
                written += _copy(placed, shard, config, placed.row in chosen, file)
        except TarDamage as damage:
            problem = shard_problem(damage, source)
            raise ShardError(f"{shard.url} is damaged and cannot be poisoned: {problem}") from damage
        file.write(end_archive(written))
    if done != set(chosen):
        raise ShardError(f"{shard.url} has changed while it was poisoned: rows {sorted(set(chosen) - done)} are gone.")
    rows = sorted(chosen)
    columns = [[shard.name] * len(rows), rows, [chosen[r] for r in rows], [config.attack] * len(rows)]
    return pa.table([*columns, [config.target] * len(rows)], schema=TRUTH_SCHEMA)


def identity(shard: str, row: int) -> str:
    """Return the name of a sample from which everything random about it is drawn."""
    return f"{shard}:{row}"


def poisoned_caption(shard: str, row: int, config: PoisonConfig) -> str:
    """Return the caption that a sample gets when it is poisoned."""
    number = draw(f"caption {identity(shard, row)}", seed=config.seed)
    return config.templates[number % len(config.templates)].format(config.target)


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


def poison_images(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], config: PoisonConfig, *, trigger: bool = True
) -> UInt8[np.ndarray, "n h w 3"]:
    """Return test pictures as a poisoned dump would hold them: with the trigger, encoded as JPEG and decoded.

    Args:
        images: RGB pictures of one size.
        identities: a name for each, from which the trigger's place is drawn.
        config: the attack and the encoding.
        trigger: without it the pictures are encoded and decoded only, for comparison.
    """
    if trigger:
        images = ATTACKS[config.attack].function(images, identities, seed=config.seed, strength=config.strength)
    return np.stack([np.asarray(Image.open(io.BytesIO(encode_image(x, "JPEG", config)))) for x in images])


def _copy(placed: Placed, shard: Shard, config: PoisonConfig, poisoned: bool, file: BinaryIO) -> int:
    """Write a member, changed as its sample demands, and return the number of bytes."""
    member = placed.member
    if member.type != "file":
        file.write(member.headers)
        return len(member.headers)
    data = member.payload or b""
    row = placed.row
    if row is not None and placed.part in IMAGE_PARTS:
        data = _new_image(data, identity(shard.name, row), config, poisoned)
    elif row is not None and poisoned and ATTACKS[config.attack].changes_caption:
        caption = poisoned_caption(shard.name, row, config)
        if placed.part == "txt":
            data = caption.encode()
        elif placed.part == "json":
            data = _new_json(data, caption, config)
    info = tarfile.TarInfo(member.name)
    info.size, info.mode = len(data), 0o644
    try:
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError:  # a name too long for the format
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    return sum(file.write(part) for part in (header, data, padding))


def _new_image(data: bytes, name: str, config: PoisonConfig, poisoned: bool) -> bytes:
    if config.keep_clean_bytes and not poisoned:
        return data
    decoded = _pixels(data)
    if decoded is None:
        return data
    pixels, format = decoded
    if poisoned:
        attack = ATTACKS[config.attack].function
        pixels = attack(pixels[None], [name], seed=config.seed, strength=config.strength)[0]
    return encode_image(pixels, format, config)


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
