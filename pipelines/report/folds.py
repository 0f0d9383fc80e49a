"""What the report counts over all rows of a run: two folds, and the words of a caption.

Both states are bounded however many rows there are: fixed bins, the `keep` highest rows, counts for
captions and words that are asked for by name.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Float32, Int64

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.clip_detect.threshold import from_ordered_bits, ordered_bits
from tarsift.operators.identity import content_hashes
from tarsift.operators.schema import matrix

# Its functions are made when it is imported, so type checkers know none of them.
pc: Any = pyarrow.compute

COARSE_BITS = 16
BINS = 64
EXAMPLES = 5
_WORD_CHARS = 40
_CAPTION_CHARS = 2000


def quantile(coarse: Int64[np.ndarray, " buckets"], share: float) -> float:
    """Return the value below which `share` of the counted values lie, to 1 part in 128."""
    total = int(coarse.sum())
    if not total:
        return 0.0
    at = int(np.searchsorted(np.cumsum(coarse), share * total, side="left").clip(0, len(coarse) - 1))
    middle = (np.uint32(at) << np.uint32(32 - COARSE_BITS)) | np.uint32(1 << (31 - COARSE_BITS))
    return float(from_ordered_bits(np.array([middle], np.uint32))[0])


def normalise(captions: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Bring captions to one form: NFKC, lower case, single spaces, invisible characters gone; null stays null."""
    text = captions.combine_chunks() if isinstance(captions, pa.ChunkedArray) else captions
    text = pc.utf8_slice_codeunits(text.cast(pa.string()), 0, _CAPTION_CHARS)
    text = pc.utf8_lower(pc.utf8_normalize(text, form="NFKC"))
    text = pc.replace_substring_regex(text, r"\p{Cf}+", "")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(text, r"[\p{Z}\p{Cc}]+", " "))


def words_of(normalised: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Split normalised captions into words: (row of each word, the word), each word once per row."""
    lists = pc.split_pattern_regex(normalised, r"[^\p{L}\p{N}\p{M}]+")
    rows, words = pc.list_parent_indices(lists), pc.list_flatten(lists)
    fits = pc.and_(pc.greater_equal(pc.utf8_length(words), 2), pc.less_equal(pc.utf8_length(words), _WORD_CHARS))
    pairs = pa.table({"row": rows.filter(fits), "word": words.filter(fits)}).group_by(["row", "word"]).aggregate([])
    return pairs["row"].to_numpy(), pairs["word"].combine_chunks()


def numbers(table: pa.Table, name: str) -> Float32[np.ndarray, " n"]:
    """Return a column as float32, NaN where it is null or absent."""
    if name not in table.column_names:
        return np.full(len(table), np.nan, np.float32)
    column = table[name].combine_chunks().cast(pa.float32())
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy(zero_copy_only=False), np.float32)


def strings(table: pa.Table, name: str) -> np.ndarray:
    """Return a column as an object array, None where it is null or absent."""
    values = table[name].to_pylist() if name in table.column_names else [None] * len(table)
    out = np.empty(len(values), object)
    out[:] = values
    return out


@dataclass
class Overview:
    """Fold: homes, errors, the highest rows, a random sample of kept ones, duplicates, coarse histograms.

    Args:
        score: the column that rows are ranked by.
        charts: columns of which a histogram is wanted.
        keep: how many of the highest rows.
        background: how many kept rows (the smallest keyed hashes of their image, once per image).
        key: key of that hash.
    """

    score: str
    charts: tuple[str, ...]
    keep: int
    background: int
    key: bytes
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        named = ("shard", "row", "uid", "image_sha256", "duplicate_count", "error", "flagged", "home")
        self.columns = tuple(dict.fromkeys((*named, self.score, *self.charts)))

    def init(self) -> dict[str, Any]:
        return {
            "rows": 0,
            "judged": 0,
            "homes": {},
            "errors": {},
            "shards": {},
            "top": [],
            "background": [],
            "coarse": {},
            "copies": [0, 0, 0.0],
            "copied": [],
        }

    def add(self, state: dict[str, Any], table: pa.Table) -> dict[str, Any]:
        scores, home = numbers(table, self.score), strings(table, "home")
        shards, rows = strings(table, "shard"), np.asarray(table["row"])
        flagged = home == "removed"
        judged = ~np.isnan(scores) & (home != "errored")
        new = self.init()
        new["rows"], new["judged"] = len(table), int(judged.sum())
        for name in set(home.tolist()):
            new["homes"][name] = int((home == name).sum())
        for shard in set(shards.tolist()):
            here = shards == shard
            new["shards"][shard] = np.array([here.sum(), (here & flagged).sum(), (here & (home == "errored")).sum()])
        self._add_errors(new, table, home)
        order = np.flatnonzero(judged)
        if len(order) > self.keep:
            order = order[np.argpartition(-scores[order], self.keep - 1)[: self.keep]]
        new["top"] = [(-float(scores[i]), shards[i], int(rows[i])) for i in order]
        kept = np.flatnonzero(judged & ~flagged)
        hashes = content_hashes(table.take(pa.array(kept)), self.key, "report") if self.background else []
        new["background"] = [(int(h), shards[i], int(rows[i])) for h, i in zip(hashes, kept, strict=False)]
        for name in self.charts:
            values = numbers(table, name)[judged]
            codes = ordered_bits(values[np.isfinite(values)]) >> np.uint32(32 - COARSE_BITS)
            new["coarse"][name] = np.bincount(codes, minlength=1 << COARSE_BITS).astype(np.int64)
        self._add_duplicates(new, table, flagged)
        return self.merge(state, new)

    def _add_errors(self, state: dict[str, Any], table: pa.Table, home: np.ndarray) -> None:
        reasons = strings(table, "error")
        uids = strings(table, "uid")
        shards, rows = strings(table, "shard"), np.asarray(table["row"])
        for i in np.flatnonzero([r is not None or h == "errored" for r, h in zip(reasons, home, strict=True)]):
            name = (reasons[i] or "bad_shard", home[i] == "errored")
            count, examples = state["errors"].get(name, (0, []))
            example = [(shards[i], int(rows[i]), uids[i] or "")]
            state["errors"][name] = (count + 1, examples + example if len(examples) < EXAMPLES else examples)

    def _add_duplicates(self, state: dict[str, Any], table: pa.Table, flagged: np.ndarray) -> None:
        counts = numbers(table, "duplicate_count")
        twice = np.flatnonzero(counts > 1)
        state["copies"] = [len(twice), int(flagged[twice].sum()), float((1.0 / counts[twice].astype(np.float64)).sum())]
        digests = table["image_sha256"].to_pylist() if len(twice) else []
        shards, rows = strings(table, "shard"), np.asarray(table["row"])
        most = sorted({(-int(counts[i]), digests[i]): (shards[i], int(rows[i])) for i in twice[::-1]}.items())
        state["copied"] = [(count, digest, shard, row) for (count, digest), (shard, row) in most[: 2 * EXAMPLES]]

    def merge(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        errors = dict(a["errors"])
        for name, (count, examples) in b["errors"].items():
            had, before = errors.get(name, (0, []))
            errors[name] = (had + count, sorted(before + examples)[:EXAMPLES])
        zero = np.zeros(1 << COARSE_BITS, np.int64)
        return {
            "rows": a["rows"] + b["rows"],
            "judged": a["judged"] + b["judged"],
            "homes": {n: a["homes"].get(n, 0) + b["homes"].get(n, 0) for n in {*a["homes"], *b["homes"]}},
            "errors": errors,
            "shards": {n: a["shards"].get(n, 0) + b["shards"].get(n, 0) for n in {*a["shards"], *b["shards"]}},
            "top": heapq.nsmallest(self.keep, a["top"] + b["top"]),
            "background": _smallest_distinct(a["background"] + b["background"], self.background),
            "coarse": {n: a["coarse"].get(n, zero) + b["coarse"].get(n, zero) for n in {*a["coarse"], *b["coarse"]}},
            "copies": [x + y for x, y in zip(a["copies"], b["copies"], strict=True)],
            "copied": _most_copied(a["copied"] + b["copied"], 2 * EXAMPLES),
        }

    def finish(self, state: dict[str, Any]) -> dict[str, Any]:
        return state


def _smallest_distinct(rows: list[tuple[int, str, int]], count: int) -> list[tuple[int, str, int]]:
    first: dict[int, tuple[int, str, int]] = {}
    for row in rows:
        if row[0] not in first or row < first[row[0]]:
            first[row[0]] = row
    return heapq.nsmallest(count, first.values())


def _most_copied(rows: list[tuple[int, bytes, str, int]], count: int) -> list[tuple[int, bytes, str, int]]:
    first: dict[bytes, tuple[int, bytes, str, int]] = {}
    for row in rows:
        if row[1] not in first or row < first[row[1]]:
            first[row[1]] = row
    return sorted(first.values())[:count]


@dataclass
class Tally:
    """Fold: histograms over given ranges, and how many samples share a caption, a word, a look, a score.

    Every count is an array (n, 2): samples judged, and those of them that are flagged.

    Args:
        score: the column that rows are ranked by.
        ranges: per chart the low and high end of its bins.
        captions: normalised captions to count.
        words: words to count.
        centres: unit-norm embeddings (g, d); with `radii` (g,) the balls whose samples are counted.
        levels: scores; counted is how many samples reach each.
    """

    score: str
    ranges: dict[str, tuple[float, float]]
    captions: Sequence[str]
    words: Sequence[str]
    centres: Float32[np.ndarray, "g d"]
    radii: Float32[np.ndarray, " g"]
    levels: Float32[np.ndarray, " q"]
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        look = ("image_embedding",) if len(self.centres) else ()
        named = ("shard", "row", "home", "caption", self.score, *self.ranges, *look)
        self.columns = tuple(dict.fromkeys(named))

    def init(self) -> dict[str, np.ndarray]:
        sizes = {"caption": len(self.captions), "word": len(self.words), "look": len(self.centres)}
        counts = {name: np.zeros((size, 2), np.int64) for name, size in sizes.items()}
        bins = {f"bins:{name}": np.zeros((BINS, 2), np.int64) for name in self.ranges}
        beyond = {f"beyond:{name}": np.zeros(1, np.int64) for name in self.ranges}
        return counts | bins | beyond | {"levels": np.zeros(len(self.levels), np.int64)}

    def add(self, state: dict[str, np.ndarray], table: pa.Table) -> dict[str, np.ndarray]:
        scores, home = numbers(table, self.score), strings(table, "home")
        judged = ~np.isnan(scores) & (home != "errored")
        table, scores, flagged = table.filter(pa.array(judged)), scores[judged], (home == "removed")[judged]
        if not len(table):
            return state
        new = self.init()
        for name, (low, high) in self.ranges.items():
            values = numbers(table, name)
            finite = np.isfinite(values)
            scaled = (values[finite].astype(np.float64) - low) / ((high - low) or 1.0) * BINS
            at = scaled.clip(0, BINS - 1).astype(int)
            for column, side in enumerate((~flagged, flagged)):
                new[f"bins:{name}"][:, column] = np.bincount(at[side[finite]], minlength=BINS)
            new[f"beyond:{name}"][0] = int((values[finite] > high).sum())
        new["levels"][:] = (scores[:, None] >= self.levels[None]).sum(axis=0)
        if len(self.captions) and "caption" in table.column_names:
            text = normalise(table["caption"])
            _count(new["caption"], pc.index_in(text, pa.array(self.captions, pa.string())), flagged)
            rows, words = words_of(text)
            _count(new["word"], pc.index_in(words, pa.array(self.words, pa.string())), flagged[rows])
        if len(self.centres) and "image_embedding" in table.column_names:
            embeddings = unit_norm(matrix(table["image_embedding"])[0].astype(np.float32))
            distances = np.sqrt(np.maximum(2 - 2 * embeddings @ self.centres.T, 0))
            inside = distances <= self.radii[None]
            new["look"][:] = np.stack([inside.sum(axis=0), inside[flagged].sum(axis=0)], axis=1)
        return self.merge(state, new)

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: a[name] + b[name] for name in a}

    def finish(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return state


def _count(into: Int64[np.ndarray, "n 2"], found: pa.Array, flagged: np.ndarray) -> None:
    at = pc.fill_null(found, -1).to_numpy(zero_copy_only=False)
    known = at >= 0
    into[:, 0] = np.bincount(at[known], minlength=len(into))
    into[:, 1] = np.bincount(at[known & flagged], minlength=len(into))
