"""Run a fold over the stored rows of all shards, in parallel and in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from tarsift.operators.folds import Fold
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.session import TASK_OPTIONS

SHARDS_PER_TASK = 8
TASKS_PER_CPU = 2


def run_fold(fold: Fold, shards: Sequence[str], folders: Sequence[str]) -> Any:
    """Fold over the rows of `shards`, whose columns lie in `folders` side by side.

    States are merged on the driver as they come; a fold's state is small by contract.
    """
    task = ray.remote(num_cpus=1, **TASK_OPTIONS)(_fold_some)
    chunks = [list(shards[i : i + SHARDS_PER_TASK]) for i in range(0, len(shards), SHARDS_PER_TASK)]
    limit = max(2, int(ray.cluster_resources().get("CPU", 1)) * TASKS_PER_CPU)
    fold_ref = ray.put(fold)
    state = fold.init()
    running: list[ray.ObjectRef] = []
    while chunks or running:
        while chunks and len(running) < limit:
            running.append(task.remote(fold_ref, chunks.pop(0), list(folders)))
        finished, running = ray.wait(running, num_returns=1)
        state = fold.merge(state, ray.get(finished[0]))
    return fold.finish(state)


def _fold_some(fold: Fold, shards: list[str], folders: list[str]) -> Any:
    read = ReadStored([Stored(folder, tuple(fold.columns)) for folder in folders], batch_rows=4096)
    state = fold.init()
    for shard in shards:
        for table in read(shard):
            if len(table):
                state = fold.add(state, table)
    return state
