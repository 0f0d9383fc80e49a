"""Score operators: from stored embeddings to score columns, one batch at a time.

Both are stateless maps around a fitted rule, so that a row's scores depend on nothing else in its
batch. They run alone in a notebook: `ScoreDensity(rule)(table)`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tarsift.clip_detect.suspicion import DensityRule, SmoothingRule
from tarsift.operators.folds import identities, scorable
from tarsift.operators.schema import append, as_table, matrix


class ScoreDensity:
    """Map: append the published scores, `multiscale_*`, `purified_slof` and `density` to rows with an embedding.

    Args:
        rule: fitted by `clip_detect.suspicion.fit_density`, or the path of a saved one.
        key: key of the content hashes by which an image is kept from being its own neighbour.
        embedding: column that is scored; it is dropped from the output.
    """

    def __init__(
        self,
        rule: DensityRule,
        *,
        key: bytes,
        embedding: str = "image_embedding",
        backend: str = "auto",
        threads: int = 1,
    ):
        self.rule, self.key, self.embedding = rule, key, embedding
        self.search = {"backend": backend, "threads": threads}

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = as_table(batch)
        mask = _scored(table, self.embedding)
        chosen = table.filter(pa.array(mask))
        embeddings = matrix(chosen[self.embedding])[0].astype(np.float32)
        columns = self.rule.score(embeddings, identities(chosen, self.key), **self.search)
        table = table.drop_columns([self.embedding])
        return append(table, {name: spread(values, mask) for name, values in columns.items()})


class SmoothScores:
    """Map: append `suspicion` and `duplicate_count` to rows with an embedding and `density`.

    Args:
        rule: fitted by `clip_detect.suspicion.fit_smoothing`.
        duplicates: (ids ascending uint64 (n,), counts int32 (n,)) of the images that occur more than once.
        key: key of the content hashes.
        embedding: column that is scored; it is dropped from the output.
    """

    def __init__(
        self,
        rule: SmoothingRule,
        *,
        duplicates: tuple[np.ndarray, np.ndarray],
        key: bytes,
        embedding: str = "image_embedding",
        backend: str = "auto",
        threads: int = 1,
    ):
        self.rule, self.duplicates, self.key, self.embedding = rule, duplicates, key, embedding
        self.search = {"backend": backend, "threads": threads}

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = as_table(batch)
        ids = identities(table, self.key)
        mask = _scored(table, self.embedding)
        chosen = table.filter(pa.array(mask))
        embeddings = matrix(chosen[self.embedding])[0].astype(np.float32)
        density = np.asarray(chosen["density"].combine_chunks(), np.float32)
        columns = self.rule.score(embeddings, ids[mask], density, **self.search)
        counts = pa.array(lookup(ids, *self.duplicates), mask=~np.asarray(table["image_sha256"].is_valid()))
        table = append(table.drop_columns([self.embedding]), {"duplicate_count": counts})
        return append(table, {name: spread(values, mask) for name, values in columns.items()})


def _scored(table: pa.Table, embedding: str) -> np.ndarray:
    return scorable(table) & np.asarray(table[embedding].is_valid())


def spread(values: np.ndarray, mask: np.ndarray) -> pa.Array:
    """Put the values of the masked rows at their rows (n,), null elsewhere; float32."""
    full = np.zeros(len(mask), np.float32)
    full[mask] = values
    return pa.array(full, mask=~mask)


def lookup(ids: np.ndarray, known: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Count (n,) int32 of each id among the `known` ascending ones, 1 where it is not among them."""
    out = np.ones(len(ids), np.int32)
    if len(known):
        at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        found = known[at] == ids
        out[found] = counts[at[found]]
    return out
