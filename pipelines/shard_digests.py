"""Shards as they are found before a training: their SHA-256, how many pairs they hold, what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import ray

from tarsift.operators.shards import ReadConfig, ReadShard, Shard, ShardEnd
from tarsift.pipelines.progress import Event, Listener
from tarsift.pipelines.session import TASK_OPTIONS

# Of samples that have a picture and a caption, those with these errors are no pairs: somebody else's, or cut.
NO_PAIR = frozenset({"duplicate_key", "caption_too_large"})


@dataclass(frozen=True)
class ShardDigest:
    """A shard as it was found before training: its SHA-256, its usable pairs, and what is wrong with it."""

    name: str
    sha256: str
    pairs: int
    problems: list[str] = field(default_factory=list)


def count_pairs(table: pa.Table) -> int:
    """Return how many rows of a table of `ReadShard` are pairs, if their images decode."""
    there = np.asarray(table["image"].is_valid()) & np.asarray(table["caption"].is_valid())
    errors = table["error"].to_pylist()
    return sum(whole and error not in NO_PAIR for whole, error in zip(there.tolist(), errors, strict=True))


def digest_shard(shard: Shard, read: ReadConfig) -> ShardDigest:
    """Read a shard once, for its digest and the number of its pairs."""
    pairs = 0
    end = None
    for table in ReadShard(read, receipts=True)(shard):
        if table["row"][0].as_py() < 0:
            end = ShardEnd.model_validate_json(table["key"][0].as_py())
        else:
            pairs += count_pairs(table)
    assert end is not None  # a reader with receipts always ends with one
    return ShardDigest(shard.name, end.sha256, pairs, [str(problem) for problem in end.problems])


def digest_all(shards: Sequence[Shard], read: ReadConfig, progress: Listener) -> list[ShardDigest]:
    """Digest all shards as Ray tasks."""
    task = ray.remote(digest_shard).options(**TASK_OPTIONS)
    progress(Event("digest", 0, len(shards)))
    pending = {task.remote(shard, read): i for i, shard in enumerate(shards)}
    done: dict[int, ShardDigest] = {}
    while pending:
        ready, _ = ray.wait(list(pending))
        for ref in ready:
            done[pending.pop(ref)] = ray.get(ref)
        progress(Event("digest", len(done), len(shards), finished=not pending))
    return [done[i] for i in range(len(shards))]
