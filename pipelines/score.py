"""Embeddings to scores, by what each side has: the density of images, and how well captions fit.

Four short passes over stored embeddings, each linear in the number of samples:

1. `reference`  a hashed sample of distinct images -> what needs no scores    reference/{density,mismatch}.npz
2. `density`    every sample against the reference                           density/<shard>.parquet
3. `enriched`   suspects and as many others -> smoothing, verdict             reference/{smoothing,verdict}.npz
4. `score`      every sample smoothed over its neighbours in (3), judged      scores/<shard>.parquet

Without an encoder that was trained on the dump there is no density, and (2) is left out.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tarsift.clip_detect.mismatch import MismatchRule
from tarsift.clip_detect.suspicion import DensityRule, SmoothingRule
from tarsift.clip_detect.verdict import Verdict
from tarsift.operators.errors import UsageError
from tarsift.operators.scorer import CountCopies, Judge, ScoreDensity, ScoreMismatch, SmoothScores
from tarsift.operators.shards import Shard
from tarsift.operators.sides import Sides
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.commit import PassResult, run_pass, run_whole
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.fitting import ScoreFolders, ScoreSources, fit_enriched, fit_reference
from tarsift.pipelines.ledger import Ledger, fingerprint
from tarsift.pipelines.progress import Listener, silent
from tarsift.pipelines.reading import shard_items, shards_of
from tarsift.pipelines.rules import load_arrays, rule_file
from tarsift.pipelines.session import ACTOR_OPTIONS, map_tables
from tarsift.pipelines.standing import StandingReference
from tarsift.pipelines.trusted import TrustedReference

BOTH_TOWERS = ("image_embedding", "text_embedding")
CARRIED = ("shard", "row", "key", "uid", "image_sha256", "clip_similarity", "image_norm", "error")


def dump_key(embedded: Mapping[str, Mapping[str, Any]], config: CleanConfig) -> bytes:
    """Derive the key of the sampling hash: from the settings, or from the digests of all shards.

    Whoever supplies only part of a dump cannot foresee the second.
    """
    if config.reference.key is not None:
        return hashlib.sha256(config.reference.key.encode()).digest()
    digests = [f"{name}:{entry['source'].get('sha256')}" for name, entry in sorted(embedded.items())]
    return hashlib.sha256("\n".join(digests).encode()).digest()


class DensityScorer:
    """Shards' names to tables with density columns; loads the saved rule once."""

    def __init__(self, folders: ScoreFolders, key: bytes, search: Search):
        self.read = ReadStored(
            [Stored(folders.embeddings(folders.sides.first), (*CARRIED, "image_embedding"))],
            batch_rows=search.batch_rows,
            receipts=True,
        )
        rule = DensityRule.from_state(*load_arrays(folders.rule("density")))
        self.score = ScoreDensity(rule, key=key, backend=search.backend, threads=search.threads)

    def __call__(self, items: pa.Table) -> Iterator[pa.Table]:
        for shard in shards_of(items):
            yield from map(self.score, self.read(shard.name))


def last_maps(sources: ScoreSources, key: bytes, search: Search) -> list[Callable[[pa.Table], pa.Table]]:
    """Load the saved rules, and return what appends all scores to rows with embeddings and density, in this order."""
    sides = sources.sides
    options = {"key": key, "backend": search.backend, "threads": search.threads}
    prefix = f"{sides.captions}_" if sides.captions and sides.captions != sides.first else ""

    def saved(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return load_arrays(sources.rule(name))

    copies, _ = saved("duplicates")
    maps: list[Callable[[pa.Table], pa.Table]] = [CountCopies(copies["ids"], copies["counts"], key=key)]
    if sides.density:
        smoothing = SmoothingRule.from_state(*saved("smoothing"))
        maps.append(SmoothScores(smoothing, witness=f"{prefix}image_embedding", **options))
    if sides.captions:
        towers = {"embedding": f"{prefix}image_embedding", "captions": f"{prefix}text_embedding"}
        maps.append(ScoreMismatch(MismatchRule.from_state(*saved("mismatch")), **towers, **options))
        judges = {side: side in sides.judges for side in ("density", "captions")}
        maps.append(Judge(Verdict.from_state(*saved("verdict")), **judges))
    return maps


class LastScorer:
    """Shards' names to tables with all score columns; loads the saved rules once."""

    def __init__(self, folders: ScoreFolders, key: bytes, search: Search):
        sides = folders.sides
        both = ("shard", "row", *BOTH_TOWERS)
        if sides.density:
            sources = [Stored(folders.embeddings(sides.density), both), Stored(folders.density)]
        else:
            sources = [Stored(folders.embeddings(folders.sides.first), (*CARRIED, *BOTH_TOWERS))]
        if sides.captions and sides.captions != folders.sides.first:
            sources.append(folders.seen_by(sides.captions, *BOTH_TOWERS, "clip_similarity"))
        self.read = ReadStored(sources, batch_rows=search.batch_rows, receipts=True)
        self.maps = last_maps(folders, key, search)

    def __call__(self, items: pa.Table) -> Iterator[pa.Table]:
        for shard in shards_of(items):
            for table in self.read(shard.name):
                for append_to in self.maps:
                    table = append_to(table)
                yield table.drop_columns([n for n in table.column_names if n.endswith(BOTH_TOWERS)])


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
    cpus = resources.cpus_per_worker or 1
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
        return map_tables(items, _score_in_task, {"scorer": scorer, "arguments": arguments}, num_cpus=cpus)

    metadata = {"encoder_role": folders.sides.first, "judged_by": " and ".join(folders.sides.judges)}
    return run_pass(
        ledger, shards, stream, folder=folder, metadata=metadata, wave_shards=resources.wave_shards, progress=progress,
        fused_cpus=None if gpus else cpus,
    )  # fmt: skip


def score_fingerprint(
    embed_fingerprints: Mapping[str, str],
    inputs: Mapping[str, Any],
    sides: Sides,
    config: CleanConfig,
    trusted: TrustedReference | None = None,
    standing: StandingReference | None = None,
) -> str:
    """Digest of all that a score depends on; `inputs` are the digests of all shards."""
    settings = config.result_settings()
    parts = [settings[name] for name in ("reference", "suspicion", "mismatch")]
    others = [other and other.digest for other in (trusted, standing)]
    return fingerprint("score", embed_fingerprints, inputs, sides.to_json(), *parts, *others)


def score_passes(
    shards: Sequence[Shard],
    out: str,
    config: CleanConfig,
    embedded: Mapping[str, Mapping[str, Any]],
    fingerprint_: str,
    sides: Sides,
    *,
    trusted: TrustedReference | None = None,
    standing: StandingReference | None = None,
    progress: Listener = silent,
    finished: Any = None,
) -> dict[str, Any]:
    """Run the passes, continuing where an earlier run stopped.

    Args:
        embedded: the ledger records of the embed pass, by shard.
        fingerprint_: from `score_fingerprint`.
        sides: which encoder judges what.
        trusted: what densities are compared with, in place of a sample of the dump.
        standing: samples of earlier dumps that rules are fitted on as well.
        finished: called with (pass name, figures) after each pass.

    Returns:
        What is known of the reference.
    """
    folders = ScoreFolders(out, sides, standing)
    key = dump_key(embedded, config)
    samples = sum(entry["rows"] for entry in embedded.values())
    finished = finished or (lambda name, figures: None)

    def once(name: str, work: Any) -> dict[str, Any]:
        """Do a piece of work that concerns all shards, unless its record is there."""
        ledger = Ledger(out, name, fingerprint_)
        about, figures = run_whole(ledger, work, shards=len(shards), samples=samples, progress=progress)
        finished(name, figures)
        return about

    def each(name: str, scorer: type, folder: str) -> None:
        """Run a pass over all shards."""
        ledger = Ledger(out, name, fingerprint_)
        done = scoring_pass(shards, ledger, scorer, folders, config, key, folder=folder, progress=progress)
        finished(name, done.figures(fingerprint_))

    about = once("reference", lambda: fit_reference(shards, folders, config, key, samples=samples, trusted=trusted))
    if sides.density:
        each("density", DensityScorer, "density")
    largest = about["largest_candidate_hash"]
    once("enriched", lambda: fit_enriched(shards, folders, config, key, largest_candidate_hash=largest))
    each("score", LastScorer, "scores")
    return about


def score_location(out: str, score: str) -> tuple[float, float]:
    """Read median and scaled MAD of `suspicion` in the candidate sample, for the policy `z`.

    Raises:
        UsageError: for another score: only `suspicion` is standardised.
    """
    if score != "suspicion":
        raise UsageError(
            f"the policy `z` needs the score suspicion, got {score}; use `fraction` or `score` with others."
        )
    median, mad = Verdict.from_state(*load_arrays(rule_file(out, "verdict"))).scale.tolist()
    return median, max(1.4826 * mad, 1e-9)
