"""Run a fold over the stored rows of all shards, in parallel and in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from tarsift.operators.folds import Fold
from tarsift.operators.retry import add_repeated, take_repeated
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.tasks import side_by_side

SHARDS_PER_TASK = 8


def run_fold(
    fold: Fold,
    shards: Sequence[str],
    folders: Sequence[str | Stored],
    *,
    beside: tuple[Sequence[str], Sequence[str | Stored]] | None = None,
) -> Any:
    """Fold over the rows of `shards`, whose columns lie in `folders` side by side.

    Of a plain folder the columns are read that the fold looks at, of a `Stored` its own. States are merged on the
    driver as they come; a fold's state is small by contract.

    Args:
        beside: further names and folders whose rows take part.
    """
    rows = [(shards, folders), *([beside] if beside else [])]
    chunks = [
        (list(names[i : i + SHARDS_PER_TASK]), list(places))
        for names, places in rows
        for i in range(0, len(names), SHARDS_PER_TASK)
    ]
    fold_ref = ray.put(fold)
    state = fold.init()
    calls = ((f"{type(fold).__name__} of {c[0]} to {c[-1]}", (fold_ref, c, places)) for c, places in chunks)
    for _, (result,) in side_by_side(_fold_some, calls):
        part, repeated = ray.get(result)
        add_repeated(repeated)
        state = fold.merge(state, part)
    return fold.finish(state)


def _fold_some(fold: Fold, shards: list[str], folders: list[str | Stored]) -> tuple[Any, int]:
    columns = tuple(fold.columns)
    sources = [folder if isinstance(folder, Stored) else Stored(folder, columns) for folder in folders]
    read = ReadStored(sources, batch_rows=4096)
    state = fold.init()
    for shard in shards:
        for table in read(shard):
            if len(table):
                state = fold.add(state, table)
    return state, take_repeated()
