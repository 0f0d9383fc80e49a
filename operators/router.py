"""The class of a sample, from its caption or its label; and what is known of each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators.identity import row_hashes
from tarsift.operators.schema import append, as_table, matrix
from tarsift.sifters.problems import UNROUTED, ClassRule


class RouteCaptions:
    """Map: append `class` and `class_cosine` by the caption's embedding; class -1 where it is like none.

    Args:
        rule: from `sifters.problems`.
        captions: column of caption embeddings; it is dropped from the output.
    """

    def __init__(self, rule: ClassRule, *, captions: str = "text_embedding"):
        self.rule, self.captions = rule, captions

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = as_table(batch)
        classes, cosines = self.rule.assign(unit_norm(matrix(table[self.captions])[0]))
        table = table.drop_columns([self.captions])
        return append(table, {"class": pa.array(classes), "class_cosine": pa.array(cosines)})


class RouteLabels:
    """Map: take `label`, the number in the sample's `.cls`, for the class; -1 where there is none."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = as_table(batch)
        classes = np.asarray(table["label"].combine_chunks().fill_null(UNROUTED), np.int32)
        table = table.drop_columns(["label"])
        cosines = pa.array(np.where(classes >= 0, 1, 0).astype(np.float32))
        return append(table, {"class": pa.array(classes), "class_cosine": cosines})


@dataclass(frozen=True)
class ClassCounts:
    """What is known of each class c: samples, suspects, images that occur more than once; and its typical caption.

    unrouted: samples in no class.
    """

    samples: np.ndarray
    suspects: np.ndarray
    duplicates: np.ndarray
    captions: tuple[str, ...]
    cosines: np.ndarray
    unrouted: int

    @classmethod
    def empty(cls, classes: int) -> ClassCounts:
        zeros = [np.zeros(classes, np.int64) for _ in range(3)]
        return cls(*zeros, captions=("",) * classes, cosines=np.full(classes, -np.inf), unrouted=0)

    def plus(self, other: ClassCounts) -> ClassCounts:
        """Return both added up; of two captions the one nearer to the class's center, of equals the first by letter."""
        mine = list(zip(-self.cosines, self.captions, strict=True))
        theirs = list(zip(-other.cosines, other.captions, strict=True))
        best = [min(pair) for pair in zip(mine, theirs, strict=True)]
        return ClassCounts(
            self.samples + other.samples,
            self.suspects + other.suspects,
            self.duplicates + other.duplicates,
            captions=tuple(caption for _, caption in best),
            cosines=np.array([-negative for negative, _ in best]),
            unrouted=self.unrouted + other.unrouted,
        )


class CountClasses:
    """Fold: `ClassCounts` over routed and scored rows; rows that are not scored take no part.

    Args:
        classes: how many there are.
        score, cutoff: a row with at least this score is a suspect.
    """

    def __init__(self, classes: int, *, score: str, cutoff: float):
        self.classes, self.score, self.cutoff = classes, score, np.float32(cutoff)
        self.columns = ("class", "class_cosine", "caption", "duplicate_count", score)

    def init(self) -> ClassCounts:
        return ClassCounts.empty(self.classes)

    def add(self, state: ClassCounts, table: pa.Table) -> ClassCounts:
        table = table.filter(table[self.score].is_valid())
        classes = np.asarray(table["class"].combine_chunks(), np.int64)
        routed = classes >= 0
        cosines = np.asarray(table["class_cosine"].combine_chunks(), np.float64)
        suspect = np.asarray(table[self.score].combine_chunks(), np.float32) >= self.cutoff
        copies = np.asarray(table["duplicate_count"].combine_chunks().fill_null(1)) > 1

        def count(mask: np.ndarray) -> np.ndarray:
            return np.bincount(classes[routed & mask], minlength=self.classes)

        captions, best = [""] * self.classes, np.full(self.classes, -np.inf)
        for label in np.unique(classes[routed]):
            rows = np.flatnonzero(classes == label)
            best[label] = cosines[rows].max()
            nearest = rows[cosines[rows] == best[label]]
            captions[label] = min(caption or "" for caption in table["caption"].take(pa.array(nearest)).to_pylist())
        found = ClassCounts(
            count(np.ones(len(table), bool)), count(suspect), count(copies), tuple(captions), best, int((~routed).sum())
        )
        return state.plus(found)

    def merge(self, a: ClassCounts, b: ClassCounts) -> ClassCounts:
        return a.plus(b)

    def finish(self, state: ClassCounts) -> ClassCounts:
        return state


class LowestPerClass:
    """Fold: of each class the samples of lowest `sift_rank`; finishes to a table of them, by shard and row.

    Args:
        quotas: how many of each class.
        key: of the hash that breaks ties.
        cutoff: samples with at least this `suspicion` are left out; None: none is.
    """

    columns = ("shard", "row", "uid", "class", "sift_rank", "suspicion")

    def __init__(self, quotas: np.ndarray, *, key: bytes, cutoff: float | None = None):
        self.quotas, self.key, self.cutoff = quotas, key, cutoff

    def init(self) -> pa.Table:
        kinds = (pa.string(), pa.int32(), pa.string(), pa.int32(), pa.float32(), pa.float32(), pa.uint64())
        return pa.table([pa.array([], kind) for kind in kinds], [*self.columns, "tie"])

    def add(self, state: pa.Table, table: pa.Table) -> pa.Table:
        table = table.filter(table["sift_rank"].is_valid())
        if self.cutoff is not None:
            table = table.filter(pa.array(np.asarray(table["suspicion"].combine_chunks()) < np.float32(self.cutoff)))
        table = table.select(list(self.columns)).append_column("tie", pa.array(row_hashes(table, self.key)))
        return self.merge(state, table.cast(state.schema))

    def merge(self, a: pa.Table, b: pa.Table) -> pa.Table:
        both = pa.concat_tables([a, b])
        classes = np.asarray(both["class"].combine_chunks())
        order = np.lexsort((np.asarray(both["tie"]), np.asarray(both["sift_rank"]), classes))
        sizes = np.bincount(classes, minlength=len(self.quotas))
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return both.take(pa.array(order[place < self.quotas[classes[order]]]))

    def finish(self, state: pa.Table) -> pa.Table:
        return state.drop_columns(["tie"]).sort_by([("shard", "ascending"), ("row", "ascending")])


def class_table(counts: ClassCounts, status: list[str], names: Sequence[str] = ()) -> pa.Table:
    """Return one row per class: what is known of it, its name if it has one, and whether it is sifted."""
    columns: dict[str, Any] = {
        "class": pa.array(np.arange(len(status), dtype=np.int32)),
        "name": pa.array(names, pa.string()) if names else pa.nulls(len(status), pa.string()),
        "samples": pa.array(counts.samples),
        "suspects": pa.array(counts.suspects),
        "duplicates": pa.array(counts.duplicates),
        "caption": pa.array(counts.captions, pa.string()),
        "status": pa.array(status, pa.string()),
    }
    return pa.table(columns)
