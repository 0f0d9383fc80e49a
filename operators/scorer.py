"""Score operators: from stored embeddings to score columns, one batch at a time.

All are stateless maps around a fitted rule, so that a row's scores depend on nothing else in its
batch. They run alone in a notebook: `ScoreDensity(rule)(table)`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tarsift.clip_detect.mismatch import MismatchRule
from tarsift.clip_detect.suspicion import DensityRule, SmoothingRule
from tarsift.clip_detect.verdict import Verdict
from tarsift.operators.identity import identities, scorable
from tarsift.operators.schema import append, as_table, matrix


class ScoreDensity:
    """Map: append the published scores, `multiscale_*`, `purified_slof` and `density` to rows with an embedding.

    Args:
        rule: fitted by `clip_detect.suspicion.fit_density`.
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
    """Map: append `suspicion_image` and `suspicion` to rows with an embedding and `density`.

    Where the rule was fitted with captions, it also appends `caption_excess`; where it was with a witness,
    `neighbor_disagreement`.

    Args:
        rule: fitted by `clip_detect.suspicion.fit_smoothing`.
        key: key of the content hashes.
        embedding, captions, witness: columns that are scored.
    """

    def __init__(
        self,
        rule: SmoothingRule,
        *,
        key: bytes,
        embedding: str = "image_embedding",
        captions: str = "text_embedding",
        witness: str = "witness_image_embedding",
        backend: str = "auto",
        threads: int = 1,
    ):
        self.rule, self.key = rule, key
        self.embedding, self.captions, self.witness = embedding, captions, witness
        self.search = {"backend": backend, "threads": threads}

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = as_table(batch)
        mask = _scored(table, self.embedding)
        chosen = table.filter(pa.array(mask))

        def values(column: str) -> np.ndarray:
            return matrix(chosen[column])[0].astype(np.float32)

        density = np.asarray(chosen["density"].combine_chunks(), np.float32)
        said = values(self.captions) if self.rule.excess else None
        seen = values(self.witness) if self.rule.disagreement else None
        ids = identities(chosen, self.key)
        columns = self.rule.score(values(self.embedding), ids, density, said, seen, **self.search)
        return append(table, {name: spread(column, mask) for name, column in columns.items()})


class ScoreMismatch:
    """Map: append `caption_mismatch` and what it is made of (see `clip_detect.mismatch`).

    Null for a row without an image or a caption (an embedding of zeros is none).

    Args:
        rule: fitted by `clip_detect.mismatch.fit_mismatch`.
        key: key of the content hashes.
        embedding, captions: columns that are scored.
    """

    def __init__(
        self,
        rule: MismatchRule,
        *,
        key: bytes,
        embedding: str = "image_embedding",
        captions: str = "text_embedding",
        backend: str = "auto",
        threads: int = 1,
    ):
        self.rule, self.key, self.embedding, self.captions = rule, key, embedding, captions
        self.search = {"backend": backend, "threads": threads}

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = as_table(batch)
        mask = _scored(table, self.embedding) & np.asarray(table[self.captions].is_valid())
        chosen = table.filter(pa.array(mask))
        images, said = (matrix(chosen[name])[0].astype(np.float32) for name in (self.embedding, self.captions))
        columns = self.rule.score(images, said, identities(chosen, self.key), **self.search)
        return append(table, {name: spread(values, mask) for name, values in columns.items()})


class Judge:
    """Map: make `suspicion` of the sides that judge; what `SmoothScores` put there becomes `suspicion_density`.

    Where density judges, so does `neighbor_disagreement` if it is there.

    Args:
        verdict: fitted by `clip_detect.verdict.fit_verdict`.
        density, captions: whether that side judges.
    """

    def __init__(self, verdict: Verdict, *, density: bool, captions: bool):
        self.verdict, self.density, self.captions = verdict, density, captions

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = as_table(batch)
        if "suspicion" in table.column_names:
            names = ["suspicion_density" if name == "suspicion" else name for name in table.column_names]
            table = table.rename_columns(names)
        judged = ~np.isnan(_floats(table, "suspicion_density" if self.density else "caption_mismatch"))
        chosen = table.filter(pa.array(judged))
        density = _floats(chosen, "suspicion_density") if self.density else None
        captions = _floats(chosen, "caption_mismatch") if self.captions else None
        second = "neighbor_disagreement"
        disagreement = _floats(chosen, second) if self.density and second in table.column_names else None
        return append(table, {"suspicion": spread(self.verdict.score(density, captions, disagreement), judged)})


class CountCopies:
    """Map: append `duplicate_count`, null where there is no image.

    Args:
        ids, counts: ascending uint64 (n,) and int32 (n,) of the images that occur more than once.
        key: key of the content hashes.
    """

    def __init__(self, ids: np.ndarray, counts: np.ndarray, *, key: bytes):
        self.ids, self.counts, self.key = ids, counts, key

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = as_table(batch)
        counts = lookup(identities(table, self.key), self.ids, self.counts)
        missing = ~np.asarray(table["image_sha256"].is_valid())
        return append(table, {"duplicate_count": pa.array(counts, mask=missing)})


def _floats(table: pa.Table, name: str) -> np.ndarray:
    """Return a column as float32 (n,), NaN where it is null."""
    return np.asarray(table[name].combine_chunks().to_numpy(zero_copy_only=False), np.float32)


def _scored(table: pa.Table, embedding: str) -> np.ndarray:
    return scorable(table) & np.asarray(table[embedding].is_valid())


def spread(values: np.ndarray, mask: np.ndarray) -> pa.Array:
    """Put the values of the masked rows at their rows (n,), null elsewhere and where they are NaN; float32."""
    full = np.full(len(mask), np.nan, np.float32)
    full[mask] = values
    return pa.array(full, mask=np.isnan(full))


def lookup(ids: np.ndarray, known: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Count (n,) int32 of each id among the `known` ascending ones, 1 where it is not among them."""
    out = np.ones(len(ids), np.int32)
    if len(known):
        at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        found = known[at] == ids
        out[found] = counts[at[found]]
    return out
