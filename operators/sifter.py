"""Sifting as an operator: its settings, one problem as a self-contained job, and its verdicts by sample."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tarsift.operators import storage
from tarsift.operators.grouped import read_groups, write_grouped
from tarsift.operators.schema import append, matrix
from tarsift.operators.sift_settings import SiftConfig
from tarsift.sifters.problems import UNROUTED, Problem

CHECKPOINTS = ".checkpoints"
SIFTED, FAILED = "sifted", "failed"
VERDICT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("problem", pa.string()),
        ("class", pa.int32()),
        ("score", pa.float32()),
        ("rank", pa.float32()),
        ("kept", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class SiftProblem:
    """Job: sift the samples of a problem's classes; they are read from, and its verdicts written to, grouped files.

    Args:
        gathered: folder of `<shard>.parquet` with shard, row, class and features or pixels, grouped by class.
        shards: names of all shards.
        out: folder of `<problem>.parquet` with `VERDICT_SCHEMA`, grouped by shard.
        fingerprint: of all that the verdicts depend on; what was begun under another one is not gone on with.
    """

    gathered: str
    shards: tuple[str, ...]
    out: str
    config: SiftConfig
    device: str = "cpu"
    fingerprint: str = ""

    def __call__(self, problem: Problem) -> dict[str, Any]:
        """Return how many samples were judged, and what the sifter says of the whole.

        Raises:
            ValueError: if the problem cannot be sifted: a class alone, or a sifter that learned nothing.
        """
        from tarsift.sifters.methods import RESUMABLE, sift  # with torch and torchvision, which take seconds to load

        files = (storage.join(self.gathered, f"{shard}.parquet") for shard in self.shards)
        table = pa.concat_tables(read_groups(file, problem.classes) for file in files)
        labels = np.asarray(table["class"].combine_chunks(), np.int64)
        seed = problem_seed(problem, self.config.seed)
        checkpoint = storage.join(self.out, CHECKPOINTS, f"{problem.name}-{self.fingerprint}.npz")
        resuming: dict[str, Any] = {}
        if self.config.method.sifter in RESUMABLE:
            resuming = {"state": load_state(checkpoint), "save": lambda state: save_state(checkpoint, state)}
        result = sift(samples_of(table), labels, self.config.method, seed=seed, device=self.device, **resuming)
        kept = pa.nulls(len(table), pa.bool_()) if result.kept is None else pa.array(result.kept)
        verdicts = table.select(["shard", "row", "class"])
        verdicts = append(
            verdicts,
            {
                "problem": pa.array([problem.name] * len(table)),
                "score": pa.array(result.score.astype(np.float32)),
                "rank": pa.array(ranks_within(result.score, labels)),
                "kept": kept,
            },
        )
        url = storage.join(self.out, f"{problem.name}.parquet")
        write_grouped(url, verdicts.select(VERDICT_SCHEMA.names).cast(VERDICT_SCHEMA), "shard")
        if resuming:
            storage.remove(checkpoint)
        return {"rows": len(table), "classes": len(problem.classes), "facts": dict(result.facts)}


def save_state(url: str, state: dict[str, np.ndarray]) -> None:
    """Keep what a sifter is to go on from."""
    sink = io.BytesIO()
    np.savez(sink, **state)  # pyright: ignore[reportArgumentType]
    storage.put_bytes(url, sink.getvalue())


def load_state(url: str) -> dict[str, np.ndarray] | None:
    """Return what `save_state` kept; None where there is nothing."""
    if not storage.exists(url):
        return None
    with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def problem_seed(problem: Problem, seed: int) -> int:
    """Return the seed of a problem: the same whenever and wherever it is sifted."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{problem.name}".encode()).digest()[:4], "big")


def samples_of(table: pa.Table) -> np.ndarray:
    """Return what a sifter takes: pictures (n, h, w, 3) uint8, or features (views, n, d), the plain view first."""
    if "pixels" in table.column_names:
        pixels = matrix(table["pixels"])[0]
        side = round((pixels.shape[1] / 3) ** 0.5)
        return pixels.reshape(-1, side, side, 3)
    plain = matrix(table["image_embedding"])[0].astype(np.float32)
    if "view_embeddings" not in table.column_names:
        return plain
    views = matrix(table["view_embeddings"])[0].astype(np.float32).reshape(len(plain), -1, plain.shape[1])
    return np.concatenate([plain[None], views.transpose(1, 0, 2)])


def ranks_within(score: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the rank of each score in its class, above 0 and below 1, that of equal ones their mean; (n,) float32."""
    out = np.empty(len(score), np.float32)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        _, place, sizes = np.unique(score[mine], return_inverse=True, return_counts=True)
        out[mine] = ((np.cumsum(sizes) - sizes / 2) / len(mine))[place]
    return out


def choose_classes(samples: np.ndarray, suspects: np.ndarray, duplicates: np.ndarray, config: SiftConfig) -> list[str]:
    """Return the status of each class: `sifted`, or why it is not.

    With a budget the classes with the largest part of suspects come first.
    """
    status = np.full(len(samples), SIFTED, object)
    share = suspects / np.maximum(samples, 1)
    status[samples < 2] = "too_small"
    status[duplicates > config.most_duplicates * samples] = "mostly_duplicates"
    status[share > config.most_suspects] = "mostly_suspects"
    if config.budget is not None:
        room = max(2, config.budget * config.routing.classes_per_problem // config.routing.repeats)
        chosen = np.flatnonzero(status == SIFTED)
        beyond = chosen[np.argsort(-share[chosen], kind="stable")][room:]
        status[beyond] = "over_budget"
    return status.tolist()


def largest_problem(problems: Iterable[Problem], samples: np.ndarray, bytes_per_sample: int) -> tuple[Problem, int]:
    """Return the problem that takes most memory, and how many bytes its samples take in a job.

    They are there as they are read, as float32, and once more while they are made ready.
    """
    sized = [(int(samples[list(problem.classes)].sum()), problem.name, problem) for problem in problems]
    rows, _, problem = max(sized, key=lambda item: item[:2])
    return problem, 3 * rows * bytes_per_sample


class JoinVerdicts:
    """Map: append `sift_rank`, `sift_status` and `suspicion_sifted` to the routed and scored rows of a shard.

    `sift_rank` is a sample's mean rank over its problems. One that was not sifted has none, and its status says why:
    `unrouted`, or that of its class. A sifter confirms a suspicion and does not raise one: where suspicion s > 0 and
    the rank r > 1/2, suspicion_sifted = s (1 + weight (2 r - 1)); elsewhere it is s.

    Args:
        verdicts: rows (row, rank) of this shard, of all problems.
        status: of each class.
    """

    def __init__(self, verdicts: pa.Table, status: Sequence[str], *, weight: float):
        rows = np.asarray(verdicts["row"].combine_chunks(), np.int64)
        ranks = np.asarray(verdicts["rank"].combine_chunks(), np.float64)
        sums, counts = np.bincount(rows, weights=ranks), np.bincount(rows)
        self.ranks = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
        self.status = np.array([*status, "unrouted"], object)
        self.weight = weight

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = np.asarray(table["row"].combine_chunks(), np.int64)
        classes = np.asarray(table["class"].combine_chunks().fill_null(UNROUTED), np.int64)  # of the end of a shard
        ranks = np.full(len(rows), np.nan)
        known = (rows >= 0) & (rows < len(self.ranks))
        ranks[known] = self.ranks[rows[known]]
        sifted = ~np.isnan(ranks)
        status = self.status[classes]  # of class -1 the last one
        status[~sifted & (status == SIFTED)] = FAILED
        score = np.asarray(table["suspicion"].combine_chunks().to_numpy(zero_copy_only=False), np.float64)
        confirmed = np.where(sifted, np.maximum(2 * np.nan_to_num(ranks) - 1, 0), 0)
        total = score + np.maximum(score, 0) * self.weight * confirmed
        return append(
            table,
            {
                "sift_rank": pa.array(ranks.astype(np.float32), mask=~sifted),
                "sift_status": pa.array(status.tolist(), pa.string()),
                "suspicion_sifted": pa.array(total.astype(np.float32), mask=np.isnan(total)),
            },
        )
