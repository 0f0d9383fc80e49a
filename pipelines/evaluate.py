"""Compare a run with a truth: which samples were planted, and what every score and the verdict made of them.

The figures are for attacks whose place is known, as `tarsift poison` writes it. They say nothing about
a dump without a truth.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64

from tarsift.clip_detect import metrics
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.schema import MEASURES, SIFTED_FOLDER, SIFTED_SCORES, places_of
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.ledger import RunFile
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.printing import FIGURES, flagged_of, rows_of_evaluation

BATCH_ROWS = 65_536

# The one measure that is also evaluated, turned round: poison need not agree with its caption.
LOW_SIMILARITY = "low_clip_similarity"

# Highest fractions of the samples that have a score, for which recall and clean samples lost are given.
FRACTIONS = (0.005, 0.01, 0.05, 0.1, 0.2)

# With fewer planted samples than this, one more or less moves a recall by over 5 %.
FEW = 20
# Attacks with curves, those of most samples first: what names attacks may name as many as it has rows.
MOST_CURVES = 40


@dataclass(frozen=True)
class Curves:
    """How one score ranks one kind of poison, as lines of some hundred points (see `clip_detect.metrics`)."""

    roc: metrics.Curve
    precision_recall: metrics.Curve
    removal: metrics.Curve


@dataclass(frozen=True)
class Evaluation:
    """What became of planted samples.

    Attributes:
        samples: rows of the run.
        poisoned: planted ones.
        unscored_poisoned: planted ones without any score: no figure of a score can find them.
        errored_poisoned: planted ones put into errored/; they are not in the cleaned dump either.
        scores: per score `auroc`, `average_precision`, `recall_at_F` (of all planted) and `clean_lost_at_F`
            (samples) for the highest fraction F of the samples that have it, and how many these are: `scored`,
            `scored_poison`; empty if there is nothing to measure.
        flagged: the verdict's own `flagged`, `recall`, `precision`, `clean_lost`, `clean_lost_share`;
            None if the run has no flags.
        attacks: the same per attack: `poisoned`, `few` (fewer than 20), `unscored`, `flagged_recall`, `scores`.
        note: what to know before reading on, if anything.
        out: the result folder.
        truth: where the truth was.
        curves: attack (the 40 of most samples), or None for all of them -> score -> its lines. They are not part of
            the JSON, which would grow from some ten kilobytes to megabytes; the page draws them.
    """

    samples: int
    poisoned: int
    unscored_poisoned: int = 0
    errored_poisoned: int = 0
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    flagged: dict[str, float | int] | None = None
    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""
    out: str = ""
    truth: str = ""
    curves: dict[str | None, dict[str, Curves]] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values, without the curves and without passwords in URLs."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "curves"}
        return values | {name: storage.without_secrets(values[name]) for name in ("out", "truth")}

    def rows(self, attack: str | None = None) -> list[dict[str, Any]]:
        """Return one row per score, best average precision first: `score` and its figures.

        Args:
            attack: only this attack's planted samples; all where None.
        """
        scores = self.scores if attack is None else self.attacks[attack]["scores"]
        rows = [{"score": name, **figures} for name, figures in scores.items()]
        return sorted(rows, key=lambda row: (-row["average_precision"], row["score"]))

    def _repr_html_(self) -> str:
        title = f"tarsift evaluate: {self.poisoned:,} of {self.samples:,} samples are planted. {self.note}"
        rows = [("score", *FIGURES.values()), *rows_of_evaluation(self)] if self.scores else []
        return html_table(title, [*rows, *([("verdict", flagged_of(self))] if self.flagged else [])])


@dataclass(frozen=True)
class _Table:
    """Where the samples of a run stand: all shards after one another, in order of their names."""

    out: str
    shards: list[str]
    starts: dict[str, int]
    rows: dict[str, int]
    columns: list[str]  # of any of the shards

    def __len__(self) -> int:
        return sum(self.rows.values())

    def read(self, folder: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        source = ReadStored([Stored(storage.join(self.out, folder), tuple(columns))], batch_rows=BATCH_ROWS)
        for shard in self.shards:
            if self.rows[shard]:
                yield from source(shard)

    def floats(self, name: str) -> Float32[np.ndarray, " n"]:
        """Read a score of all samples; NaN where there is none."""
        folder = SIFTED_FOLDER if name in SIFTED_SCORES else "scores"
        parts = [
            table[name].cast(pa.float32()).to_numpy()
            if name in table.column_names
            else np.full(len(table), np.nan, np.float32)
            for table in self.read(folder, ["row", name])
        ]
        return np.concatenate([np.zeros(0, np.float32), *parts])


def evaluate(out: str, truth: str, *, json: str | None = None) -> Evaluation:
    """Measure every score column and the verdict of a run against planted samples.

    Samples are matched by (shard, row). One column is in memory at a time. `write_evaluation` of
    `tarsift.pipelines.report.evaluation` makes a page of what is returned.

    Args:
        out: result folder of a run over the poisoned shards.
        truth: `truth.parquet` with `shard`, `row` and, if it has them, `uid`, `attack`, of the planted samples only.
        json: also write the evaluation to this path or URL.

    Raises:
        UsageError: if `out` was not scored, or the truth is of other shards.
    """
    with storage.reachable(out):
        run = RunFile.load_or_refuse(out).content
    table = _locate(out, sorted(item["name"] for item in run.get("inputs") or ()))
    with storage.reachable(truth):
        planted = _read_truth(truth)
    at = _match(table, planted, out, truth)
    result = _measure(table, planted, at, truth)
    if json:
        with storage.reachable(json):
            storage.put_bytes(json, json_text.dumps(result.to_json(), indent=1).encode())
    return result


def _locate(out: str, shards: Sequence[str]) -> _Table:
    starts, rows, start = {}, {}, 0
    columns: dict[str, None] = {}
    for shard in shards:
        try:
            with storage.open_read(storage.join(out, "scores", f"{shard}.parquet")) as file:
                parquet = pq.ParquetFile(file)
                n, schema = parquet.metadata.num_rows, parquet.schema_arrow
        except FileNotFoundError:
            continue
        if n:  # a shard of an older run may lack a score
            floats = [f.name for f in schema if pa.types.is_floating(f.type) and f.name not in MEASURES]
            low = [LOW_SIMILARITY] if "clip_similarity" in schema.names else []
            columns |= dict.fromkeys(floats + low)
        starts[shard], rows[shard] = start, n
        start += n
    if not rows:
        raise UsageError(f"{out} holds no scores of its {len(shards)} shards: run `tarsift score {out}` first.")
    sifted = {
        name.removesuffix(".parquet") for name in storage.list_files(storage.join(out, SIFTED_FOLDER), ".parquet")
    }
    more = SIFTED_SCORES if sifted >= rows.keys() else ()
    return _Table(out, list(rows), starts, rows, [*columns, *more])


def _read_truth(url: str) -> pa.Table:
    try:
        with storage.open_read(url) as file:
            table = pq.read_table(pa.BufferReader(file.read()))
    except FileNotFoundError:
        raise UsageError(
            f"there is no truth at {url}; `tarsift poison` writes truth.parquet beside its shards."
        ) from None
    except pa.ArrowException as error:
        raise UsageError(f"{url} is no Parquet file: {error}") from None
    lacking = [name for name in ("shard", "row") if name not in table.column_names]
    if lacking:
        raise UsageError(f"{url} lacks the column {lacking[0]!r}; it has: {', '.join(table.column_names)}.")
    keys = places_of(table)
    if len(set(keys)) < len(keys):
        raise UsageError(f"{url} names {len(keys) - len(set(keys))} samples twice; keep one row for each (shard, row).")
    return table


def _match(table: _Table, planted: pa.Table, out: str, truth: str) -> Int64[np.ndarray, " p"]:
    """Return the position of every planted sample.

    Raises:
        UsageError: if some match nothing, or a sample of another uid.
    """
    keys = places_of(planted)
    strays = [key for key in keys if key[0] not in table.rows or not 0 <= key[1] < table.rows[key[0]]]
    if strays:
        shard, row = strays[0]
        known = f"{table.shards[0]} to {table.shards[-1]}"
        raise UsageError(
            f"{len(strays):,} of {len(keys):,} samples of {truth} are not in {out}, the first is row {row} of shard "
            f"{shard!r}; it has {len(table.shards):,} shards, {known}, with {len(table):,} samples. "
            "Give the truth that was made with these shards."
        )
    at = np.array([table.starts[shard] + row for shard, row in keys], np.int64)
    if len(at) and "uid" in planted.column_names:
        uids = np.concatenate([t["uid"].to_numpy() for t in table.read("scores", ["uid"])])[at]
        wanted = planted["uid"].to_pylist()
        other = [i for i, uid in enumerate(wanted) if uid is not None and uid != uids[i]]
        if other:
            i = other[0]
            raise UsageError(
                f"{len(other):,} of {len(keys):,} samples of {truth} have another uid in {out}, the first is row "
                f"{keys[i][1]} of shard {keys[i][0]!r}: {wanted[i]!r} there, {uids[i]!r} here. "
                "Give the truth that was made with these shards."
            )
    return at


def _measure(table: _Table, planted: pa.Table, at: Int64[np.ndarray, " p"], truth: str) -> Evaluation:
    n, out = len(table), table.out
    if not len(at):
        note = "The truth has no rows: nothing was planted, so there is nothing to find."
        return Evaluation(n, 0, note=note, out=out, truth=truth)
    poison = np.zeros(n, bool)
    poison[at] = True
    kinds = _kinds(planted, at)
    flagged, errored = _verdict(table)
    attacks = {name: _attack(rows, flagged) for name, rows in kinds.items()}
    drawn = {None, *sorted(kinds, key=lambda name: (-len(kinds[name]), name))[:MOST_CURVES]}
    scores: dict[str, dict[str, float]] = {}
    curves: dict[str | None, dict[str, Curves]] = {name: {} for name in (None, *kinds) if name in drawn}
    unscored = np.ones(n, bool)
    for name in table.columns:
        values = -table.floats("clip_similarity") if name == LOW_SIMILARITY else table.floats(name)
        scored = ~np.isnan(values)
        unscored &= ~scored
        if not (scored & poison).any() or not (scored & ~poison).any():
            continue
        ranking = metrics.rank(values, scored=scored)
        for attack, rows in ((None, at), *kinds.items()):
            if not scored[rows].any():
                continue
            own = np.zeros(n, bool)
            own[rows] = True
            counts = metrics.sweep(ranking, own, is_clean=~poison)  # other attacks only take up room
            measured: dict[str, float] = metrics.figures(counts, FRACTIONS)
            measured |= {"scored": len(ranking.order), "scored_poison": int(counts.caught[-1])}
            (scores if attack is None else attacks[attack]["scores"])[name] = measured
            if attack in drawn:
                curves[attack][name] = Curves(
                    metrics.roc_curve(counts), metrics.precision_recall_curve(counts), metrics.removal_curve(counts)
                )
    for attack, rows in kinds.items():
        attacks[attack]["unscored"] = int(unscored[rows].sum())
    lost = int((poison & unscored).sum())
    return Evaluation(
        samples=n,
        poisoned=len(at),
        unscored_poisoned=lost,
        errored_poisoned=0 if errored is None else int((poison & errored).sum()),
        scores=scores,
        flagged=None if flagged is None else _verdict_figures(flagged, poison),
        attacks=attacks,
        note=f"{lost:,} of {len(at):,} planted samples have no score." if lost else "",
        out=out,
        truth=truth,
        curves=curves,
    )


def _kinds(planted: pa.Table, at: Int64[np.ndarray, " p"]) -> dict[str, Int64[np.ndarray, " a"]]:
    """Return the positions of each attack's samples, by its name; samples without one are of no attack."""
    named = planted["attack"].to_pylist() if "attack" in planted.column_names else []
    rows: dict[str, list[int]] = {}
    for place, attack in enumerate(named):
        if attack is not None:
            rows.setdefault(str(attack), []).append(place)
    return {attack: at[rows[attack]] for attack in sorted(rows)}


def _attack(rows: Int64[np.ndarray, " a"], flagged: Bool[np.ndarray, " n"] | None) -> dict[str, Any]:
    recall = None if flagged is None else float(flagged[rows].mean())
    return {"poisoned": len(rows), "few": len(rows) < FEW, "unscored": 0, "flagged_recall": recall, "scores": {}}


def _verdict(table: _Table) -> tuple[Bool[np.ndarray, " n"] | None, Bool[np.ndarray, " n"] | None]:
    """Read which samples are flagged and which errored; None for both if the run has no flags."""
    try:
        homes = [t["home"].to_numpy() for t in table.read("flags", ["home"])]
    except FileNotFoundError:
        return None, None
    home = np.concatenate([np.zeros(0, object), *homes])
    if len(home) != len(table):
        raise UsageError(
            f"{table.out} has flags of {len(home):,} samples and scores of {len(table):,}: "
            f"run `tarsift flag {table.out}`."
        )
    return home == "removed", home == "errored"


def _verdict_figures(flagged: Bool[np.ndarray, " n"], poison: Bool[np.ndarray, " n"]) -> dict[str, float | int]:
    caught, clean_lost = int((flagged & poison).sum()), int((flagged & ~poison).sum())
    return {
        "flagged": int(flagged.sum()),
        "caught": caught,
        "recall": caught / int(poison.sum()),
        "precision": caught / max(1, int(flagged.sum())),
        "clean_lost": clean_lost,
        "clean_lost_share": clean_lost / max(1, int((~poison).sum())),
    }
