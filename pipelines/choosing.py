"""Samples of a result folder that are chosen by a value: the highest, or random ones, with where their pictures lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators.folds import Foremost
from tarsift.operators.identity import row_hashes, scorable
from tarsift.operators.schema import matrix
from tarsift.operators.storage import join
from tarsift.operators.stored import Stored
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.run import Run

SUSPICION = "suspicion"
KEY = b"tarsift.choosing"
PLACE = ("shard", "row", "key", "uid", "image_offset", "image_size", "image_sha256", "caption")


def choose(
    run: Run,
    role: str,
    count: int,
    value: Callable[[pa.Table], np.ndarray],
    columns: Sequence[str],
    folders: Sequence[Stored] = (),
) -> pa.Table:
    """Return the pairs that a value is highest of, the highest first, with the columns of `PLACE`.

    Args:
        role: whose stored rows are looked at.
        value: from a table to (n,) float64; NaN: not to be chosen. Picklable.
        columns: what it looks at; folders: where they are, beside that role's own.
    """
    kept = tuple(dict.fromkeys((*PLACE, "error", *columns)))
    embedded = Stored(join(run.out, "embeddings", role), kept)
    fold = Foremost(count, key=KEY, value=_OfPairs(value), columns=("error", *columns), kept=PLACE)
    return run_fold(fold, run.names, [embedded, *folders]).select(list(PLACE))


def choose_random(run: Run, role: str, count: int, *, salt: str) -> pa.Table:
    """Return random pairs; other ones for another salt."""
    return choose(run, role, count, Drawn(KEY + salt.encode()), ())


class _OfPairs:
    """A value, where there are a picture and a caption."""

    def __init__(self, value: Callable[[pa.Table], np.ndarray]) -> None:
        self.value = value

    def __call__(self, table: pa.Table) -> np.ndarray:
        usable = np.asarray(table["caption"].is_valid()) & np.asarray(table["image_offset"].is_valid())
        return np.where(usable & scorable(table), self.value(table), np.nan)


class Drawn:
    """A number from 0 to 1 for each row."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def __call__(self, table: pa.Table) -> np.ndarray:
        return row_hashes(table, self.key) / 2.0**64


class Alike:
    """How near captions are to one, as cosines (n,). Picklable, for a fold."""

    def __init__(self, said: np.ndarray) -> None:
        self.said = said

    def __call__(self, table: pa.Table) -> np.ndarray:
        captions, there = matrix(table["text_embedding"])
        return np.where(there, unit_norm(captions.astype(np.float32)) @ self.said, np.nan)


def by_suspicion(table: pa.Table) -> np.ndarray:
    """The score, (n,)."""
    return table[SUSPICION].to_numpy().astype(np.float64)
