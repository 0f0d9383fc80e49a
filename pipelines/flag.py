"""Scores to verdicts: find the cutoff over the whole dump, then flag shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tarsift.clip_detect.threshold import Cutoff, TopFraction
from tarsift.operators import storage
from tarsift.operators.errors import ConfigError, ShardError, UsageError
from tarsift.operators.flag import Flag, FlagConfig, Judged
from tarsift.operators.folds import CountNear, SelectTop
from tarsift.operators.identity import row_hashes
from tarsift.operators.schema import SIFTED_FOLDER, SIFTED_SCORES
from tarsift.operators.shards import Shard
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.commit import PassResult, run_pass
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.progress import Listener, silent
from tarsift.pipelines.reading import shard_items, shards_of
from tarsift.pipelines.session import map_tables

TIE_KEY = b"tarsift.flag"  # ties are broken by identity; nothing is gained by foreseeing it
FLAG_FILE_COLUMNS = ("shard", "row", "key", "uid", "flagged", "reasons", "home", "error")


@dataclass(frozen=True)
class Threshold:
    """The cutoff that a policy comes to on this dump.

    Attributes:
        cutoff: lowest flagged score; +inf if nothing is flagged.
        tie_hash: of the samples exactly at the cutoff, those with at least this tie hash are flagged; None = all.
        ties_within_one_ulp: judged samples whose score is within one unit in the last place of the cutoff.
        judged: samples that the policy looked at.
    """

    policy: str
    score: str
    value: float
    cutoff: float
    tie_hash: int | None
    ties_within_one_ulp: int
    judged: int

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: a cutoff that flags nothing is null."""
        return {**asdict(self), "cutoff": self.cutoff if np.isfinite(self.cutoff) else None}


def find_threshold(
    out: str, shards: Sequence[str], config: FlagConfig, *, location: float, scale: float, quarantined: frozenset[str]
) -> Threshold:
    """Find the cutoff of a policy; by fraction exactly, with memory that does not grow with the dump.

    Args:
        location, scale: median and scaled MAD of the score in the reference, for the policy `z`.
    """
    folders = [storage.join(out, "scores"), *sifted_folder(out, config.score)]
    judged = Judged(config, quarantined)
    if config.policy == "fraction" and config.value > 0:
        columns = (*judged.columns, "row")
        cut = select_top(config.value, config.score, shards, folders, judged=judged, hashes=tie_hashes, columns=columns)
        score, tie_hash = cut.score, cut.hash
    else:
        given = {"fraction": np.inf, "score": config.value, "z": location + config.value * scale}
        score, tie_hash = float(np.float32(given[config.policy])), None
    count = CountNear(score, config.score, judged=judged, columns=judged.columns)
    near, total = run_fold(count, shards, folders)
    return Threshold(config.policy, config.score, config.value, score, tie_hash, near, total)


def select_top(fraction: float, score: str, shards: Sequence[str], folders: Sequence[str], **fold: Any) -> Cutoff:
    """Find the exact cutoff of the highest fraction in a few rounds over one column.

    Args:
        fold: `judged`, `hashes` and `columns` of `SelectTop`.

    Raises:
        UsageError: if no row is judged.
    """
    selection = TopFraction.start(fraction)
    while not selection.done:
        try:
            selection = run_fold(SelectTop(selection, score, **fold), shards, folders)
        except ValueError as error:
            raise UsageError(f"no threshold by {score}: {error}") from None
    return selection.finish()


def tie_hashes(table: pa.Table) -> np.ndarray:
    """Hashes (n,) uint64 that break ties between equal scores: of the identity (shard, row)."""
    return row_hashes(table, TIE_KEY)


def quarantined_shards(embedded: Mapping[str, Mapping[str, Any]], config: FlagConfig) -> frozenset[str]:
    """Choose the shards that the policy puts aside whole.

    Raises:
        ShardError: if a shard is damaged and the policy is `fail`.
    """
    damaged = {name: entry["source"]["problems"] for name, entry in embedded.items() if entry["source"].get("problems")}
    if damaged and config.on_bad_shard == "fail":
        name, problems = next(iter(sorted(damaged.items())))
        raise ShardError(
            f"{len(damaged)} damaged shards, the first is {name}: {problems[0]['problem']} "
            f"at byte {problems[0]['offset']}. "
            "Repair them, or choose --on-bad-shard salvage or quarantine."
        )
    return frozenset(damaged) if config.on_bad_shard == "quarantine" else frozenset()


def sifted_folder(out: str, score: str) -> list[str]:
    """Return the folder beside that of the scores in which this one is, if it is there."""
    return [storage.join(out, SIFTED_FOLDER)] if score in SIFTED_SCORES else []


def flag_rows(items: pa.Table, *, folders: list[str], flag: Flag):
    """Read a shard's scores, flag them and yield the columns of a flags file, then the end-of-shard row."""
    columns = ("shard", "row", "key", "uid", "error", flag.config.score)
    source = ReadStored([Stored(folder, columns) for folder in folders], batch_rows=8192, receipts=True)
    for shard in shards_of(items):
        for table in source(shard.name):
            yield flag(table, tie_hashes(table)).select(FLAG_FILE_COLUMNS)


def flag_pass(
    shards: Sequence[Shard],
    out: str,
    config: FlagConfig,
    fingerprint: str,
    *,
    threshold: Threshold,
    quarantined: frozenset[str],
    wave_shards: int,
    progress: Listener = silent,
) -> tuple[PassResult, Ledger]:
    """Write `out`/flags/<shard>.parquet for all shards."""
    ledger = Ledger(out, "flag", fingerprint)
    flag = Flag(config, cutoff=threshold.cutoff, tie_hash=threshold.tie_hash, quarantined=quarantined)

    def stream(wave: list[Shard]) -> ray.data.Dataset:
        folders = [storage.join(out, "scores"), *sifted_folder(out, config.score)]
        return map_tables(shard_items(wave), flag_rows, {"folders": folders, "flag": flag}, num_cpus=1)

    metadata = {
        "policy": config.policy,
        "value": str(config.value),
        "score": config.score,
        "cutoff": repr(threshold.cutoff),
    }
    result = run_pass(
        ledger,
        shards,
        stream,
        folder="flags",
        metadata=metadata,
        wave_shards=wave_shards,
        progress=progress,
        fused_cpus=1,
    )
    return result, ledger


def check_score_exists(score: str, available: Sequence[str]) -> None:
    """Refuse a score column that the score files do not have.

    Raises:
        ConfigError: naming those that are there.
    """
    if score not in available:
        raise ConfigError(f"there is no score {score!r}; the score files have: {', '.join(available)}.")
