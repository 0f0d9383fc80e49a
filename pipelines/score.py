"""Embeddings to scores: draw the reference, score densities, smooth over neighbours.

Four short passes over stored embeddings, each linear in the number of samples:

1. `reference`  a hashed sample of distinct images -> the fitted rule        reference/<role>.npz
2. `density`    every sample against the reference                          density/<shard>.parquet
3. `enriched`   suspects and as many others                                 reference/<role>.smoothing.npz
4. `score`      every sample smoothed over its neighbours in (3)            scores/<shard>.parquet
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from tarsift.clip_detect.suspicion import (
    DensityRule,
    ScoredRows,
    SmoothingRule,
    SuspicionConfig,
    fit_density,
    fit_smoothing,
)
from tarsift.clip_detect.threshold import median_mad
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.folds import CountDuplicates, FetchRows, Side, SmallestHashes
from tarsift.operators.scorer import ScoreDensity, SmoothScores
from tarsift.operators.shards import Shard
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.commit import SINK_CPUS, PassResult, run_pass
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.ledger import Ledger, fingerprint
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.reading import shard_items, shards_of
from tarsift.pipelines.session import ACTOR_OPTIONS, TASK_OPTIONS, map_tables

# A partition of the duplicate count holds about this many distinct images in memory.
IMAGES_PER_PARTITION = 4_000_000
CARRIED = ("shard", "row", "key", "uid", "image_sha256", "clip_similarity", "image_norm", "error")


def dump_key(embedded: Mapping[str, Mapping[str, Any]], config: CleanConfig) -> bytes:
    """Derive the key of the sampling hash: from the settings, or from the digests of all shards.

    Whoever supplies only part of a dump cannot foresee the second.
    """
    if config.reference.key is not None:
        return hashlib.sha256(config.reference.key.encode()).digest()
    digests = [f"{name}:{entry['source'].get('sha256')}" for name, entry in sorted(embedded.items())]
    return hashlib.sha256("\n".join(digests).encode()).digest()


@dataclass(frozen=True)
class ScoreFolders:
    """Where the passes of one result folder keep their files."""

    out: str
    role: str = "detect"

    @property
    def embeddings(self) -> str:
        return storage.join(self.out, "embeddings", self.role)

    @property
    def density(self) -> str:
        return storage.join(self.out, "density")

    def rule(self, name: str) -> str:
        return storage.join(self.out, "reference", f"{self.role}.{name}.npz")


def fit_reference(
    shards: Sequence[Shard], folders: ScoreFolders, config: CleanConfig, key: bytes, *, samples: int
) -> dict[str, Any]:
    """Fit the density rule on a hashed sample of the dump, count duplicates, and save both.

    Returns:
        What `run.json` says about the reference.
    """
    names = [shard.name for shard in shards]
    hashes = run_fold(SmallestHashes(config.suspicion.candidates, key=key), names, [folders.embeddings])
    if not len(hashes):
        raise UsageError("no sample of the dump has an image embedding; see the error counts in the ledger.")
    rows = run_fold(FetchRows(int(hashes[-1]), key=key), names, [folders.embeddings])
    trusted = trusted_reference(config.reference.path, key) if config.reference.path else None
    rule = run_job(fit_density, rows["embeddings"], rows["ids"], rows["hashes"], config, reference=trusted)
    partitions = max(1, -(-samples // IMAGES_PER_PARTITION))
    pairs = [run_fold(CountDuplicates(p, partitions, key=key), names, [folders.embeddings]) for p in range(partitions)]
    ids, counts = (np.concatenate(columns) for columns in zip(*pairs, strict=True))
    order = np.argsort(ids)
    save_arrays(folders.rule("density"), *rule.state())
    save_arrays(folders.rule("duplicates"), {"ids": ids[order], "counts": counts[order]}, {})
    return {
        "rows": len(rule.contaminated.ids),
        "candidates": len(rows["hashes"]),
        "largest_candidate_hash": int(hashes[-1]),
        "trusted": config.reference.path,
        "largest_rate": None if rule.trusted else config.suspicion.coverage,
        "coverage": TRUSTED if rule.trusted else config.suspicion.coverage_sentence,
        "k_left_out": list(rule.left_out_ks),
        "duplicate_images": len(ids),
        "duplicate_samples": int(counts.sum()),
    }


TRUSTED = "Scored against a trusted reference: no rate is too high, as long as nothing in the reference is poisoned."


def run_job(fit: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run one fit as a Ray task.

    Raises:
        UsageError: if the dump is too small for it, or the settings do not fit it.
    """
    *arrays, config = arguments
    options = {"backend": config.resources.backend, "threads": config.resources.threads}
    try:
        task: Any = ray.remote(num_cpus=1, **TASK_OPTIONS)(fit)
        return ray.get(task.remote(*arrays, config.suspicion, **named, **options))
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, ValueError) else None
        if cause is None:
            raise
        raise UsageError(str(cause)) from None


def trusted_reference(path: str, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Load a trusted reference: (embeddings (r, d) float32, ids (r,) uint64) of an `embeddings/` folder.

    Raises:
        UsageError: if there is no Parquet file with `image_embedding` and `image_sha256`.
    """
    folder, _, file = path.rpartition("/") if path.endswith(".parquet") else (path, "", "")
    names = [file] if file else storage.list_files(path, ".parquet")
    if not names:
        raise UsageError(f"--reference {path}: no Parquet file there; give an embeddings/ folder of a trusted dump.")
    fold = FetchRows(2**64 - 1, key=key)
    state = fold.init()
    for name in names:
        for table in ReadStored([Stored(folder or ".", fold.columns)])(name.removesuffix(".parquet")):
            missing = [column for column in fold.columns if column not in table.column_names]
            if missing:
                raise UsageError(
                    f"--reference {path}: {name} lacks the columns {missing}; it has {table.column_names}."
                )
            state = fold.add(state, table)
    rows = fold.finish(state)
    if not rows:
        raise UsageError(f"--reference {path} holds no embedded sample.")
    return rows["embeddings"], rows["ids"]


def fit_enriched(
    shards: Sequence[Shard], folders: ScoreFolders, config: CleanConfig, key: bytes, *, largest_candidate_hash: int
) -> None:
    """Collect suspects and as many others, fit the smoothing rule on them and save it."""
    names = [shard.name for shard in shards]
    sources = [folders.embeddings, folders.density]
    rule = DensityRule.from_state(*load_arrays(folders.rule("density")))

    def fetch(largest: int, **draw: Any) -> ScoredRows:
        rows = run_fold(FetchRows(largest, key=key, extra=("density",), **draw), names, sources)
        return ScoredRows(**rows)

    halves = []
    for salt, above in (("pool", True), ("rest", False)):
        side = Side("density", rule.pool_cutoff, above)
        hashes = run_fold(SmallestHashes(config.suspicion.pool_size, key=key, salt=salt, side=side), names, sources)
        if not len(hashes):
            raise UsageError(
                "the dump is too small for neighbour smoothing; raise suspicion.pool_fraction or give more data."
            )
        halves.append(fetch(int(hashes[-1]), salt=salt, side=side))
    smoothing, scale = run_job(_fit_smoothing, *halves, fetch(largest_candidate_hash), config)
    arrays, settings = smoothing.state()
    save_arrays(folders.rule("smoothing"), arrays, {**settings, "suspicion_scale": scale})


def _fit_smoothing(
    pool: ScoredRows, rest: ScoredRows, candidates: ScoredRows, config: SuspicionConfig, **search: Any
) -> tuple[SmoothingRule, list[float]]:
    """Fit the rule, and take median and MAD of `suspicion` over the candidate sample."""
    rule = fit_smoothing(pool, rest, candidates, config, **search)
    columns = rule.score(candidates.embeddings, candidates.ids, candidates.density, **search)
    return rule, median_mad(columns["suspicion"]).tolist()


def save_arrays(url: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Save plain arrays and a JSON-able mapping as one npz without pickle."""
    sink = io.BytesIO()
    everything: dict[str, Any] = {"__about__": np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays}
    np.savez(sink, **everything)
    storage.put_bytes(url, sink.getvalue())


def load_arrays(url: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Load what `save_arrays` saved."""
    with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, json.loads(arrays.pop("__about__").tobytes())


class DensityScorer:
    """Shards' names to tables with density columns; loads the saved rule once."""

    def __init__(self, folders: ScoreFolders, key: bytes, search: Search):
        self.read = ReadStored(
            [Stored(folders.embeddings, (*CARRIED, "image_embedding"))], batch_rows=search.batch_rows, receipts=True
        )
        rule = DensityRule.from_state(*load_arrays(folders.rule("density")))
        self.score = ScoreDensity(rule, key=key, backend=search.backend, threads=search.threads)

    def __call__(self, items: pa.Table) -> Iterator[pa.Table]:
        for shard in shards_of(items):
            yield from map(self.score, self.read(shard.name))


class SmoothingScorer:
    """Shards' names to tables with all score columns; loads the saved rule once."""

    def __init__(self, folders: ScoreFolders, key: bytes, search: Search):
        sources = [Stored(folders.embeddings, ("shard", "row", "image_embedding")), Stored(folders.density)]
        self.read = ReadStored(sources, batch_rows=search.batch_rows, receipts=True)
        rule = SmoothingRule.from_state(*load_arrays(folders.rule("smoothing")))
        arrays, _ = load_arrays(folders.rule("duplicates"))
        self.score = SmoothScores(
            rule, duplicates=(arrays["ids"], arrays["counts"]), key=key, backend=search.backend, threads=search.threads
        )

    def __call__(self, items: pa.Table) -> Iterator[pa.Table]:
        for shard in shards_of(items):
            yield from map(self.score, self.read(shard.name))


@dataclass(frozen=True)
class Search:
    """How neighbours are searched for; nothing here changes a score. `made_by` tells rules of one path apart."""

    backend: str
    threads: int
    batch_rows: int
    made_by: str


@functools.lru_cache(maxsize=1)
def _loaded(scorer: type, *arguments: Any) -> Callable[[pa.Table], Iterator[pa.Table]]:
    return scorer(*arguments)


def _score_in_task(items: pa.Table, *, scorer: type, arguments: tuple[Any, ...]) -> Iterator[pa.Table]:
    yield from _loaded(scorer, *arguments)(items)


def scoring_pass(
    shards: Sequence[Shard],
    ledger: Ledger,
    scorer: type,
    folders: ScoreFolders,
    config: CleanConfig,
    key: bytes,
    *,
    folder: str,
    progress: Listener,
) -> PassResult:
    """Run one of the two scorers over the stored rows of all shards.

    On CPUs each shard is a task: Ray's workers, and the rule they have loaded, serve shard after
    shard and pass after pass. On GPUs it is a pool of actors, since Ray ends the worker of a GPU task.
    """
    resources = config.resources
    gpus = int(ray.cluster_resources().get("GPU", 0)) if resources.backend in ("auto", "faiss-gpu") else 0
    arguments = (folders, key, Search(resources.backend, resources.threads, resources.batch_size, ledger.fingerprint))

    def stream(wave: list[Shard]) -> ray.data.Dataset:
        items = shard_items(wave)
        if gpus:
            pool = ray.data.ActorPoolStrategy(size=resources.workers or gpus)
            return items.map_batches(
                scorer,
                fn_constructor_args=arguments,
                batch_size=None,
                batch_format="pyarrow",
                num_gpus=1,
                compute=pool,
                **ACTOR_OPTIONS,
            )
        return map_tables(
            items, _score_in_task, {"scorer": scorer, "arguments": arguments}, num_cpus=resources.cpus_per_worker or 1
        )

    metadata = {"encoder_role": folders.role, "rule": "F2"}
    return run_pass(
        ledger, shards, stream, folder=folder, metadata=metadata, wave_shards=resources.wave_shards, progress=progress,
        sink_cpus=SINK_CPUS if gpus else resources.cpus_per_worker or 1,
    )  # fmt: skip


def score_fingerprint(embed_fingerprint: str, inputs: Mapping[str, Any], config: CleanConfig) -> str:
    """Digest of all that a score depends on; `inputs` are the digests of all shards."""
    settings = config.result_settings()
    return fingerprint("score", embed_fingerprint, inputs, settings["reference"], settings["suspicion"])


def score_passes(
    shards: Sequence[Shard],
    out: str,
    config: CleanConfig,
    embedded: Mapping[str, Mapping[str, Any]],
    fingerprint_: str,
    *,
    role: str = "detect",
    progress: Listener = silent,
    finished: Any = None,
) -> dict[str, Any]:
    """Run the four passes, continuing where an earlier run stopped.

    Args:
        embedded: the ledger records of the embed pass, by shard.
        fingerprint_: from `score_fingerprint`.
        finished: called with (pass name, figures) after each pass.

    Returns:
        What is known of the reference.
    """
    folders = ScoreFolders(out, role)
    key = dump_key(embedded, config)
    samples = sum(entry["rows"] for entry in embedded.values())
    finished = finished or (lambda name, figures: None)

    def once(name: str, work: Any) -> dict[str, Any]:
        """Do a piece of work that concerns all shards, unless its record is there."""
        ledger = Ledger(out, name, fingerprint_)
        record = ledger.entries(["all"]).get("all")
        if record is None:
            start = time.monotonic()
            progress(Event(name, 0, 1, unit="sample"))
            about = work() or {}
            record = ledger.commit("all", {"rows": samples, "about": about, "elapsed_s": time.monotonic() - start})
        progress(Event(name, 1, 1, unit="sample", finished=True))
        figures = {"shards": len(shards), "samples": samples, "elapsed_s": round(record["elapsed_s"], 3)}
        finished(name, {**figures, "fingerprint": fingerprint_, "whole": True})
        return record["about"]

    about = once("reference", lambda: fit_reference(shards, folders, config, key, samples=samples))
    density = scoring_pass(
        shards, Ledger(out, "density", fingerprint_), DensityScorer, folders, config, key,
        folder="density", progress=progress,
    )  # fmt: skip
    finished("density", density.figures(fingerprint_))
    largest = about["largest_candidate_hash"]
    once("enriched", lambda: fit_enriched(shards, folders, config, key, largest_candidate_hash=largest))
    result = scoring_pass(
        shards, Ledger(out, "score", fingerprint_), SmoothingScorer, folders, config, key,
        folder="scores", progress=progress,
    )  # fmt: skip
    finished("score", result.figures(fingerprint_))
    return about


def score_location(out: str, role: str, score: str) -> tuple[float, float]:
    """Read median and scaled MAD of `suspicion` in the candidate sample, for the policy `z`.

    Raises:
        UsageError: for another score: only `suspicion` is standardised.
    """
    if score != "suspicion":
        raise UsageError(
            f"the policy `z` needs the score suspicion, got {score}; use `fraction` or `score` with others."
        )
    _, settings = load_arrays(ScoreFolders(out, role).rule("smoothing"))
    median, mad = settings["suspicion_scale"]
    return float(median), float(max(1.4826 * mad, 1e-9))
