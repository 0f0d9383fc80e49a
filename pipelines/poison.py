"""Plant poison in a copy of a dump, and write down where: a ground truth to measure detectors by."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tarsift.clip_detect.triggers import ATTACKS
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.planting import TRUTH_SCHEMA, Planted, poison_shard
from tarsift.operators.poison import (
    Chosen,
    PoisonConfig,
    Survey,
    check_poison,
    choose,
    first_chosen,
    image_of,
    survey_shard,
)
from tarsift.operators.retry import add_repeated, take_repeated
from tarsift.operators.shards import Shard, list_shards
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.session import session
from tarsift.pipelines.tasks import side_by_side

STALL_TIMEOUT_S = 1800.0  # there is no setting for it, and a task reads, decodes and writes a whole shard


@dataclass(frozen=True)
class PoisonSummary:
    """What `poison` did; `truth` is the URL of the Parquet file that names the poisoned samples.

    `unusable` counts the samples that cannot be poisoned, by reason; `repeated_requests` to the store were tried
    again, with success.
    """

    samples: int
    poisoned: int
    shards: list[str]
    truth: str
    unusable: dict[str, int] = field(default_factory=dict)
    repeated_requests: int = 0

    def _repr_html_(self) -> str:
        rows = [("samples", self.samples), ("poisoned", self.poisoned), *self.unusable.items()]
        return html_table("tarsift poison", rows, {"truth": self.truth})


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
        UsageError: if a setting is wrong, `out` holds a shard that is read, cannot be written to, or too
            few samples can be poisoned for the rate.
        ShardError: if a shard is damaged.
    """
    config = PoisonConfig(**{**(config or PoisonConfig()).model_dump(), **settings})
    dump = _checked(shards, out, config)
    with session(stall_timeout_s=STALL_TIMEOUT_S):
        return _plant(*dump, config, _in_tasks, None)


def poison_here(shards: str | Sequence[str], *, out: str, config: PoisonConfig) -> PoisonSummary:
    """Do what `poison` does in this process, shard after shard and without Ray."""
    dump = _checked(shards, out, config)
    with IsolatedDecoder(config=config.images) as decode:
        return _plant(*dump, config, _one_by_one, decode)


Each = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], list[Any]]


def _in_tasks(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    calls = list(calls)
    by_shard = ((arguments[0].name, (function, *arguments)) for arguments in calls)
    found = {}
    for name, (result,) in side_by_side(_counting, by_shard):
        found[name], repeated = ray.get(result)
        add_repeated(repeated)
    return [found[arguments[0].name] for arguments in calls]


def _counting(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    return function(*arguments), take_repeated()


def _one_by_one(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    return [function(*arguments) for arguments in calls]


def _checked(shards: str | Sequence[str], out: str, config: PoisonConfig) -> tuple[list[Shard], str]:
    """Return the shards to read and the folder to write to, if nothing speaks against it."""
    check_poison(config)
    out = storage.absolute(out)
    sources = list_shards(shards)
    outputs = [_output(out, shard) for shard in sources]
    same = {storage.filesystem(s.url)[1] for s in sources} & {storage.filesystem(o)[1] for o in outputs}
    if same:
        raise UsageError(f"`out` would overwrite {sorted(same)[0]}, which is read: give another folder.")
    storage.refuse_unwritable(out)
    return sources, out


def _plant(
    sources: list[Shard], out: str, config: PoisonConfig, each: Each, decode: IsolatedDecoder | None
) -> PoisonSummary:
    surveys: list[Survey] = each(survey_shard, [(shard, config, decode) for shard in sources])
    tables, surveys = _rewrite_all(sources, out, config, surveys, each, decode)
    truth = pa.concat_tables([TRUTH_SCHEMA.empty_table(), *tables])
    samples = sum(survey.rows for survey in surveys)
    unusable = dict(Counter(reason for survey in surveys for reason in survey.unusable.values()))
    buffer = io.BytesIO()
    pq.write_table(truth, buffer)
    storage.put_bytes(storage.join(out, "truth.parquet"), buffer.getvalue())
    record = {
        "settings": config.model_dump(),
        "samples": samples,
        "poisoned": len(truth),
        "unusable": unusable,
        "shards": len(sources),
    }
    storage.put_bytes(storage.join(out, "truth.json"), json.dumps(record, indent=2).encode())
    outputs = [_output(out, shard) for shard in sources]
    return PoisonSummary(samples, len(truth), outputs, storage.join(out, "truth.parquet"), unusable, take_repeated())


def _rewrite_all(
    sources: Sequence[Shard],
    out: str,
    config: PoisonConfig,
    surveys: list[Survey],
    each: Each,
    decode: IsolatedDecoder | None,
) -> tuple[list[pa.Table], list[Survey]]:
    """Choose samples and write all shards; return the truth of each, and the surveys that it agrees with.

    A chosen image that was decoded for the survey may kill its decoder now: then others are chosen in its place, and
    the shards for which that changes anything are written again.
    """
    written: dict[str, Any] = {}
    planted: dict[str, Planted] = {}
    while True:
        chosen = choose(surveys, config)
        one_image = _repeated_images(sources, surveys, chosen, config, each)
        wanted = {survey.shard: (chosen[survey.shard], one_image, survey.undecodable) for survey in surveys}
        stale = [shard for shard in sources if wanted[shard.name] != written.get(shard.name)]
        jobs = [(shard, _output(out, shard), config, *wanted[shard.name], decode) for shard in stale]
        written = wanted
        planted |= zip([shard.name for shard in stale], each(poison_shard, jobs), strict=True)
        lost: dict[str, dict[int, str]] = {}
        for name, result in planted.items():
            for row, reason in result.lost.items():
                attack = chosen[name][row].attack
                place = first_chosen(surveys, chosen, attack) if ATTACKS[attack].one_image else (name, row)
                lost.setdefault(place[0], {})[place[1]] = reason
        if not lost:
            return [planted[shard.name].truth for shard in sources], surveys
        surveys = [survey.without(lost.get(survey.shard, {})) for survey in surveys]


def _output(out: str, shard: Shard) -> str:
    return storage.join(out, f"{shard.name}.tar")


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
