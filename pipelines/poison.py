"""Plant poison in a copy of a dump, and write down where: a ground truth to measure detectors by."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.poison import TRUTH_SCHEMA, PoisonConfig, check_poison, choose, poison_shard, survey_shard
from tarsift.operators.shards import list_shards
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

    Exactly round(rate * samples) samples are poisoned, those whose number, drawn from seed, shard and
    row, is smallest: neither order nor number of workers matters. Beside the shards stand
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
    check_poison(config)
    out = storage.absolute(out)
    sources = list_shards(shards)
    outputs = [storage.join(out, f"{shard.name}.tar") for shard in sources]
    same = {storage.filesystem(s.url)[1] for s in sources} & {storage.filesystem(o)[1] for o in outputs}
    if same:
        raise UsageError(f"`out` would overwrite {sorted(same)[0]}, which is read: give another folder.")
    with session():
        survey = ray.remote(survey_shard).options(**TASK_OPTIONS)
        surveys = ray.get([survey.remote(shard, config) for shard in sources])
        chosen = choose(surveys, config.rate)
        rewrite = ray.remote(poison_shard).options(**TASK_OPTIONS)
        jobs = [
            rewrite.remote(shard, output, config, chosen[shard.name])
            for shard, output in zip(sources, outputs, strict=True)
        ]
        truth = pa.concat_tables([TRUTH_SCHEMA.empty_table(), *ray.get(jobs)])
    samples = sum(survey.rows for survey in surveys)
    buffer = io.BytesIO()
    pq.write_table(truth, buffer)
    storage.put_bytes(storage.join(out, "truth.parquet"), buffer.getvalue())
    record = {"settings": config.model_dump(), "samples": samples, "poisoned": len(truth), "shards": len(sources)}
    storage.put_bytes(storage.join(out, "truth.json"), json.dumps(record, indent=2).encode())
    return PoisonSummary(samples, len(truth), outputs, storage.join(out, "truth.parquet"))
