"""Choosing poison: which samples of which shards are poisoned, and what is planted in each.

Every sample that can be poisoned gets a number, drawn from seed, shard and row alone; those of the smallest numbers are
chosen. Images are decoded in a process of their own: one that kills it is not poisoned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tarsift.clip_detect.triggers import ATTACKS, draw
from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.errors import ShardError, UsageError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.shards import ReadConfig, ReadShard, Shard

# Reasons for which an image that was read stays as it is.
UNDECODABLE = frozenset({"undecodable_image", "too_many_pixels", "decoder_died"})

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
    with decoder_or_own(decode, config) as decoder:
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
def decoder_or_own(given: IsolatedDecoder | None, config: PoisonConfig) -> Iterator[IsolatedDecoder]:
    """Lend the given decoder, or one that ends with the block."""
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


def _refuse_damage(shard: Shard, problems: list[dict[str, Any]]) -> None:
    if problems:
        raise ShardError(
            f"{shard.url} is damaged ({problems[0]['problem']}: {problems[0]['detail']}), and poison is planted in "
            "whole shards only: leave it out, or repair it."
        )
