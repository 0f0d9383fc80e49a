"""Plant poison in a copy of a dump, and write down where: a ground truth to measure detectors by."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tarsift.clip_detect.triggers import ATTACKS
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.poison import (
    TRUTH_SCHEMA,
    Chosen,
    PoisonConfig,
    Survey,
    check_poison,
    choose,
    first_chosen,
    image_of,
    poison_shard,
    survey_shard,
)
from tarsift.operators.shards import Shard, list_shards
from tarsift.pipelines.session import TASK_OPTIONS, session


@dataclass(frozen=True)
class PoisonSummary:
    """What `poison` did; `truth` is the URL of the Parquet file that names the poisoned samples."""

    samples: int
    poisoned: int
    shards: list[str]
    truth: str


def poison(
    shards: str | Sequence[str], *, out: str, config: PoisonConfig | None = None, **settings: Any
) -> PoisonSummary:
    """Write a poisoned copy of `shards` below `out`, under the same names.

    By each attack exactly round(rate * samples) samples are poisoned, those whose number, drawn from seed, shard
    and row, is smallest, none of them twice: neither order nor number of workers matters. Beside the shards stand
    `truth.parquet` (shard, row, uid, attack, target of every poisoned sample) and `truth.json`
    (settings and counts).

    Args:
        shards: paths, globs, brace patterns, folders or URLs.
        out: folder or URL.
        config: the settings.
        settings: fields of `PoisonConfig` that override.

    Raises:
        UsageError: if a setting is wrong, `out` holds a shard that is read, or too few samples can be
            poisoned for the rate.
        ShardError: if a shard is damaged.
    """
    config = PoisonConfig(**{**(config or PoisonConfig()).model_dump(), **settings})
    dump = _checked(shards, out, config)
    with session():
        return _plant(*dump, config, _in_tasks)


def poison_here(shards: str | Sequence[str], *, out: str, config: PoisonConfig) -> PoisonSummary:
    """Do what `poison` does in this process, shard after shard and without Ray."""
    return _plant(*_checked(shards, out, config), config, _one_by_one)


Each = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], list[Any]]


def _in_tasks(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    task: Any = ray.remote(function).options(**TASK_OPTIONS)
    return ray.get([task.remote(*arguments) for arguments in calls])


def _one_by_one(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    return [function(*arguments) for arguments in calls]


def _checked(shards: str | Sequence[str], out: str, config: PoisonConfig) -> tuple[list[Shard], str]:
    """Return the shards to read and the folder to write to, if nothing speaks against it."""
    check_poison(config)
    out = storage.absolute(out)
    sources = list_shards(shards)
    outputs = [storage.join(out, f"{shard.name}.tar") for shard in sources]
    same = {storage.filesystem(s.url)[1] for s in sources} & {storage.filesystem(o)[1] for o in outputs}
    if same:
        raise UsageError(f"`out` would overwrite {sorted(same)[0]}, which is read: give another folder.")
    return sources, out


def _plant(sources: list[Shard], out: str, config: PoisonConfig, each: Each) -> PoisonSummary:
    outputs = [storage.join(out, f"{shard.name}.tar") for shard in sources]
    surveys = each(survey_shard, [(shard, config) for shard in sources])
    chosen = choose(surveys, config)
    one_image = _repeated_images(sources, surveys, chosen, config, each)
    jobs = [
        (shard, output, config, chosen[shard.name], one_image) for shard, output in zip(sources, outputs, strict=True)
    ]
    truth = pa.concat_tables([TRUTH_SCHEMA.empty_table(), *each(poison_shard, jobs)])
    samples = sum(survey.rows for survey in surveys)
    buffer = io.BytesIO()
    pq.write_table(truth, buffer)
    storage.put_bytes(storage.join(out, "truth.parquet"), buffer.getvalue())
    record = {"settings": config.model_dump(), "samples": samples, "poisoned": len(truth), "shards": len(sources)}
    storage.put_bytes(storage.join(out, "truth.json"), json.dumps(record, indent=2).encode())
    return PoisonSummary(samples, len(truth), outputs, storage.join(out, "truth.parquet"))


def _repeated_images(
    shards: Sequence[Shard],
    surveys: Sequence[Survey],
    chosen: Mapping[str, Mapping[int, Chosen]],
    config: PoisonConfig,
    each: Each,
) -> dict[str, bytes]:
    """Fetch the image of each attack that repeats one."""
    by_name = {shard.name: shard for shard in shards}
    found = {}
    for attack in config.attacks:
        if ATTACKS[attack].one_image and any(c.attack == attack for rows in chosen.values() for c in rows.values()):
            name, row = first_chosen(surveys, chosen, attack)
            [found[attack]] = each(image_of, [(by_name[name], row, config)])
    return found
