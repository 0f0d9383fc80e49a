"""Rows in Ray's object store, block by block: folded over like the files of a result folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tarsift.operators.folds import Fold
from tarsift.pipelines.tasks import side_by_side

BLOCKS_PER_TASK = 8
FOLD_ROWS = 4096


@dataclass(frozen=True)
class Blocks:
    """Columns of consecutive rows in the object store.

    Attributes:
        refs: of each block one table or several, whose columns stand side by side.
        firsts: number of the first row of each block, from 0.
        rows: of all blocks.
        prefix: of an encoder's columns; they are found under their plain names, in place of those of the first encoder.
    """

    refs: tuple[tuple[ray.ObjectRef, ...], ...]
    firsts: tuple[int, ...]
    rows: int
    prefix: str = ""

    def __str__(self) -> str:
        return "the Dataset"

    @property
    def arguments(self) -> list[tuple[int, tuple[Any, ...]]]:
        """Calls for `map_blocks`: of each block its number, and number of its first row and tables."""
        return [(i, (first, *refs)) for i, (first, refs) in enumerate(zip(self.firsts, self.refs, strict=True))]


def fold_blocks(fold: Fold, blocks: Blocks) -> Any:
    """Fold over the rows of blocks in parallel, in any order; states are merged on the driver as they come."""
    fold_ref = ray.put(fold)
    starts = range(0, len(blocks.refs), BLOCKS_PER_TASK)
    calls = ((f"{type(fold).__name__} of block {at}", _some(fold_ref, blocks, at)) for at in starts)
    state = fold.init()
    for _, (part,) in side_by_side(_fold_some, calls):
        state = fold.merge(state, ray.get(part))
    return fold.finish(state)


def _some(fold_ref: ray.ObjectRef, blocks: Blocks, at: int) -> tuple[Any, ...]:
    """Arguments of one task. Tables are arguments of their own, since Ray resolves no others."""
    part = slice(at, at + BLOCKS_PER_TASK)
    tables = [ref for refs in blocks.refs[part] for ref in refs]
    return fold_ref, blocks.prefix, blocks.firsts[part], *tables


def _fold_some(fold: Fold, prefix: str, firsts: Sequence[int], *tables: pa.Table) -> Any:
    state, width = fold.init(), len(tables) // len(firsts)
    for i, first in enumerate(firsts):
        table = beside(first, *tables[i * width : (i + 1) * width], prefix=prefix)
        for start in range(0, len(table), FOLD_ROWS):
            state = fold.add(state, table.slice(start, FOLD_ROWS))
    return state


def beside(first: int, *tables: pa.Table, prefix: str = "") -> pa.Table:
    """Put the columns of tables side by side; rows that have no `shard` and `row` are numbered from `first` on."""
    columns: dict[str, Any] = {}
    for table in tables:
        columns |= {name: table[name] for name in table.column_names if name not in columns}
    if "row" not in columns:
        rows = len(tables[0])
        columns |= {"shard": pa.array([""] * rows, pa.string()), "row": pa.array(np.arange(first, first + rows))}
    if prefix:
        columns |= {name.removeprefix(prefix): columns[name] for name in columns if name.startswith(prefix)}
    return pa.table(columns)


def map_blocks(
    function: Callable[..., tuple[int, pa.Table]],
    calls: Iterable[tuple[int, tuple[Any, ...]]],
    *,
    num_cpus: float = 1,
    done: Callable[[int], None] = lambda rows: None,
) -> list[tuple[int, ray.ObjectRef]]:
    """Call a function once per block, in tasks, and return (rows, table) of each in the order of the blocks.

    Args:
        function: returns the number of rows, and a table that stays in the object store.
        calls: number of a block and arguments.
        num_cpus: of a call.
        done: told the rows of each block that is done.
    """
    found: dict[int, tuple[int, ray.ObjectRef]] = {}
    for number, (count, table) in side_by_side(function, calls, num_returns=2, num_cpus=num_cpus):
        rows = ray.get(count)
        found[number] = rows, table
        done(rows)
    return [found[number] for number in sorted(found)]


def numbered(tables: Sequence[tuple[int, ray.ObjectRef]]) -> Blocks:
    """Make blocks of what `map_blocks` returns; empty ones are left out."""
    filled = [(rows, ref) for rows, ref in tables if rows]
    firsts = [0, *np.cumsum([rows for rows, _ in filled]).tolist()]
    return Blocks(tuple((ref,) for _, ref in filled), tuple(firsts[:-1]), firsts[-1])


def slices(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    """Yield a table in parts of so many rows."""
    for start in range(0, len(table), rows):
        yield table.slice(start, rows)
