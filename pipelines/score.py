"""Embeddings to scores: draw the reference, score densities, smooth over neighbours.

Four short passes over stored embeddings, each linear in the number of samples:

1. `reference`  a hashed sample of distinct images -> the fitted rule        reference/<role>.npz
2. `density`    every sample against the reference                          density/<shard>.parquet
3. `enriched`   suspects and as many others                                 reference/<role>.smoothing.npz
4. `score`      every sample smoothed over its neighbours in (3)            scores/<shard>.parquet
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tarsift.clip_detect.suspicion import DensityRule, SmoothingRule, fit_density, fit_smoothing
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.folds import CountDuplicates, FetchRows, SmallestHashes
from tarsift.operators.scorer import ScoreDensity, SmoothScores
from tarsift.operators.shards import Shard
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.commit import PassResult, run_pass
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.embed import shard_items, shards_of
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.ledger import Ledger, fingerprint
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.session import ACTOR_OPTIONS, TASK_OPTIONS

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
    smallest = SmallestHashes(config.reference.candidates, key=key, salt="candidates")
    hashes = run_fold(smallest, names, [folders.embeddings])
    if not len(hashes):
        raise UsageError("no sample of the dump has an image embedding; see the error counts in the ledger.")
    rows = run_fold(FetchRows(int(hashes[-1]), key=key, salt="candidates"), names, [folders.embeddings])
    trusted = trusted_reference(config.reference.path, key) if config.reference.path else None
    task = ray.remote(num_cpus=1, **TASK_OPTIONS)(_fit_density)
    rule = ray.get(task.remote(rows, config, trusted))
    partitions = max(1, -(-samples // IMAGES_PER_PARTITION))
    pairs = [run_fold(CountDuplicates(p, partitions, key=key), names, [folders.embeddings]) for p in range(partitions)]
    ids, counts = (np.concatenate(columns) for columns in zip(*pairs, strict=True))
    order = np.argsort(ids)
    save_arrays(folders.rule("density"), *rule.to_arrays())
    save_arrays(folders.rule("duplicates"), {"ids": ids[order], "counts": counts[order]}, {})
    coverage = rule.coverage
    return {
        "rows": int(rule.reference_rows),
        "candidates": len(rows["hashes"]),
        "trusted": config.reference.path,
        "largest_rate": coverage.largest_rate,
        "coverage": coverage.sentence,
        "k_left_out": list(rule.k_left_out),
        "duplicate_images": len(ids),
        "duplicate_samples": int(counts.sum()),
    }


def _fit_density(
    rows: dict[str, np.ndarray], config: CleanConfig, trusted: tuple[np.ndarray, np.ndarray] | None
) -> DensityRule:
    return fit_density(
        rows["embeddings"],
        rows["ids"],
        rows["hashes"],
        config.suspicion,
        reference=trusted,
        backend=config.resources.backend,
        threads=config.resources.threads,
    )


def trusted_reference(path: str, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Load a trusted reference: (embeddings (r, d) float32, ids (r,) uint64) of an `embeddings/` folder.

    Raises:
        UsageError: if there is no Parquet file with `image_embedding` and `image_sha256`.
    """
    folder, _, file = path.rpartition("/") if path.endswith(".parquet") else (path, "", "")
    names = [file] if file else storage.list_files(path, ".parquet")
    if not names:
        raise UsageError(f"--reference {path}: no Parquet file there; give an embeddings/ folder of a trusted dump.")
    fold = FetchRows(2**64 - 1, key=key, salt="candidates")
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


def fit_enriched(shards: Sequence[Shard], folders: ScoreFolders, config: CleanConfig, key: bytes) -> None:
    """Collect suspects and as many others, fit the smoothing rule on them and save it."""
    names = [shard.name for shard in shards]
    rule = DensityRule.from_arrays(*load_arrays(folders.rule("density")))
    sources = [folders.embeddings, folders.density]
    halves = {}
    for half, above in (("pool", True), ("rest", False)):
        where = ("density", float(rule.pool_cutoff), above)
        smallest = SmallestHashes(config.suspicion.pool_size, key=key, salt=half, where=where)
        hashes = run_fold(smallest, names, sources)
        cutoff = int(hashes[-1]) if len(hashes) else 0
        fetch = FetchRows(cutoff, key=key, salt=half, where=where, extra=("density",))
        halves[half] = run_fold(fetch, names, sources)
    task = ray.remote(num_cpus=1, **TASK_OPTIONS)(_fit_smoothing)
    save_arrays(folders.rule("smoothing"), *ray.get(task.remote(rule, halves, config)).to_arrays())


def _fit_smoothing(rule: DensityRule, halves: dict[str, dict[str, np.ndarray]], config: CleanConfig) -> SmoothingRule:
    pool, rest = halves["pool"], halves["rest"]
    return fit_smoothing(
        rule,
        pool=(pool["embeddings"], pool["ids"], pool["density"]),
        rest=(rest["embeddings"], rest["ids"], rest["density"]),
        backend=config.resources.backend,
        threads=config.resources.threads,
    )


def save_arrays(url: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Save plain arrays and a JSON-able mapping as one npz without pickle."""
    sink = io.BytesIO()
    np.savez(sink, __about__=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    storage.put_bytes(url, sink.getvalue())


def load_arrays(url: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Load what `save_arrays` saved."""
    with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, json.loads(arrays.pop("__about__").tobytes())


class DensityActor:
    """Score actor: loads the saved rule once."""

    def __init__(self, folders: ScoreFolders, key: bytes, backend: str, threads: int):
        rule = DensityRule.from_arrays(*load_arrays(folders.rule("density")))
        self.score = ScoreDensity(rule, key=key, backend=backend, threads=threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.score(batch)


class SmoothActor:
    """Score actor of the last pass."""

    def __init__(self, folders: ScoreFolders, key: bytes, backend: str, threads: int):
        rule = SmoothingRule.from_arrays(*load_arrays(folders.rule("smoothing")))
        arrays, _ = load_arrays(folders.rule("duplicates"))
        duplicates = (arrays["ids"], arrays["counts"])
        self.score = SmoothScores(rule, duplicates=duplicates, key=key, backend=backend, threads=threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.score(batch)


def read_stored(items: pa.Table, *, sources: Sequence[Stored]):
    """Read the stored rows of shards, each ended by its end-of-shard row."""
    source = ReadStored(sources, receipts=True)
    for shard in shards_of(items):
        yield from source(shard.name)


def scoring_pass(
    shards: Sequence[Shard],
    ledger: Ledger,
    actor: type,
    sources: Sequence[Stored],
    folders: ScoreFolders,
    config: CleanConfig,
    key: bytes,
    *,
    folder: str,
    progress: Listener,
) -> PassResult:
    """Run one of the two score operators over the stored rows of all shards."""
    resources = config.resources
    cpus = ray.cluster_resources().get("CPU", 1)
    gpus = ray.cluster_resources().get("GPU", 0) if resources.backend in ("auto", "faiss-gpu") else 0
    workers = resources.workers or int(max(1, gpus or cpus // 2))
    needs = {"num_gpus": 1} if gpus else {"num_cpus": min(resources.cpus_per_worker, max(0.5, cpus / 2))}

    def stream(wave: list[Shard]) -> ray.data.Dataset:
        rows = shard_items(wave).map_batches(
            read_stored,
            fn_kwargs={"sources": sources},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.5,
            **TASK_OPTIONS,
        )
        return rows.map_batches(
            actor,
            fn_constructor_args=(folders, key, resources.backend, resources.threads),
            batch_size=resources.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            **needs,
            **ACTOR_OPTIONS,
        )

    metadata = {"encoder_role": folders.role, "rule": "F2"}
    return run_pass(
        ledger, shards, stream, folder=folder, metadata=metadata, wave_shards=resources.wave_shards, progress=progress
    )


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
) -> tuple[PassResult, dict[str, Any]]:
    """Run the four passes, continuing where an earlier run stopped.

    Args:
        embedded: the ledger records of the embed pass, by shard.
        fingerprint_: from `score_fingerprint`.
        finished: called with (pass name, figures) after each pass.

    Returns:
        The result of the last pass and what is known of the reference.
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
    embeddings = Stored(folders.embeddings, (*CARRIED, "image_embedding"))
    density = scoring_pass(
        shards, Ledger(out, "density", fingerprint_), DensityActor, [embeddings], folders, config, key,
        folder="density", progress=progress,
    )  # fmt: skip
    finished("density", density.figures(fingerprint_))
    once("enriched", lambda: fit_enriched(shards, folders, config, key))
    result = scoring_pass(
        shards, Ledger(out, "score", fingerprint_), SmoothActor, [embeddings, Stored(folders.density)], folders, config, key,
        folder="scores", progress=progress,
    )  # fmt: skip
    finished("score", result.figures(fingerprint_))
    return result, about


def score_location(out: str, role: str, score: str) -> tuple[float, float]:
    """Median and scaled MAD of `suspicion` in the candidate sample, for the policy `z`.

    Raises:
        UsageError: for another score: only `suspicion` is standardised.
    """
    if score != "suspicion":
        raise UsageError(
            f"the policy `z` needs the score suspicion, got {score}; use `fraction` or `score` with others."
        )
    rule = SmoothingRule.from_arrays(*load_arrays(ScoreFolders(out, role).rule("smoothing")))
    return float(rule.location), float(rule.scale)
