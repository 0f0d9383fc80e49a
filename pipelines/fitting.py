"""The rules by which samples are scored: fitted on samples of the stored embeddings, kept in OUT/reference/."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tarsift.clip_detect.mismatch import MismatchRule, fit_mismatch
from tarsift.clip_detect.suspicion import (
    DensityRule,
    ScoredRows,
    SmoothingRule,
    SuspicionConfig,
    fit_density,
    fit_smoothing,
)
from tarsift.clip_detect.verdict import Verdict, fit_verdict
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.folds import CountDuplicates, FetchRows, Side, SmallestHashes
from tarsift.operators.shards import Shard
from tarsift.operators.sides import Sides
from tarsift.operators.stored import Stored
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.tasks import checked_task
from tarsift.pipelines.trusted import TrustedReference

# A partition of the duplicate count holds about this many distinct images in memory.
IMAGES_PER_PARTITION = 4_000_000
TRUSTED = "Scored against a trusted reference: no rate is too high, as long as nothing in the reference is poisoned."


@dataclass(frozen=True)
class ScoreFolders:
    """Where the passes of one result folder keep their files, and whose embeddings they look at."""

    out: str
    sides: Sides

    def embeddings(self, role: str) -> str:
        return storage.join(self.out, "embeddings", role)

    def seen_by(self, role: str, *columns: str) -> Stored:
        """Columns of what another role than `first` has embedded, under names that begin with the role's."""
        return Stored(self.embeddings(role), ("shard", "row", *columns), f"{role}_")

    @property
    def first(self) -> str:
        """The role whose files say which samples there are."""
        role = self.sides.density or self.sides.captions
        assert role is not None  # one of the two is there
        return role

    @property
    def density(self) -> str:
        return storage.join(self.out, "density")

    def rule(self, name: str) -> str:
        return rule_file(self.out, name)


def rule_file(out: str, name: str) -> str:
    """Return where a rule is kept."""
    return storage.join(out, "reference", f"{name}.npz")


def fit_reference(
    shards: Sequence[Shard],
    folders: ScoreFolders,
    config: CleanConfig,
    key: bytes,
    *,
    samples: int,
    trusted: TrustedReference | None,
) -> dict[str, Any]:
    """Fit what needs no scores on a hashed sample of the dump, count duplicates, and save all of it.

    Returns:
        What `run.json` says about the reference.
    """
    names = [shard.name for shard in shards]
    first, sides = folders.embeddings(folders.first), folders.sides
    hashes = run_fold(SmallestHashes(config.suspicion.candidates, key=key), names, [first])
    if not len(hashes):
        raise UsageError("no sample of the dump has an image embedding; see the error counts in the ledger.")
    largest = int(hashes[-1])
    about: dict[str, Any] = {"candidates": len(hashes), "largest_candidate_hash": largest}
    if sides.density:
        about |= _fit_density(names, folders, config, key, largest, trusted)
    if sides.captions:
        pairs = _fetch_pairs(names, folders.embeddings(sides.captions), key, largest)
        mismatch = run_job(fit_mismatch, *pairs.values(), config.mismatch, config)
        save_arrays(folders.rule("mismatch"), *mismatch.state())
        about["pairs"] = len(mismatch.reference.ids)
    partitions = max(1, -(-samples // IMAGES_PER_PARTITION))
    found = [run_fold(CountDuplicates(p, partitions, key=key), names, [first]) for p in range(partitions)]
    ids, counts = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(ids)
    save_arrays(folders.rule("duplicates"), {"ids": ids[order], "counts": counts[order]}, {})
    return about | {"duplicate_images": len(ids), "duplicate_samples": int(counts.sum())}


def _fit_density(
    names: Sequence[str],
    folders: ScoreFolders,
    config: CleanConfig,
    key: bytes,
    largest: int,
    trusted: TrustedReference | None,
) -> dict[str, Any]:
    rows = run_fold(FetchRows(largest, key=key), names, [folders.embeddings(folders.first)])
    arrays = (rows["embeddings"], rows["ids"], rows["hashes"])
    clean = None if trusted is None else trusted.draw(config.suspicion.candidates, key)
    rule = run_job(fit_density, *arrays, config.suspicion, config, reference=clean)
    save_arrays(folders.rule("density"), *rule.state())
    return {
        "rows": len(rule.contaminated.ids),
        "trusted": config.reference.path,
        "largest_rate": None if rule.trusted else config.suspicion.coverage,
        "coverage": TRUSTED if rule.trusted else config.suspicion.coverage_sentence,
        "k_left_out": list(rule.left_out_ks),
    }


def _fetch_pairs(names: Sequence[str], folder: str, key: bytes, largest: int) -> dict[str, np.ndarray]:
    """Return images, captions, ids and hashes of the candidate sample, in this order."""
    rows = run_fold(FetchRows(largest, key=key, also={"captions": "text_embedding"}), names, [folder])
    if "captions" not in rows:
        raise UsageError(f"{folder} holds no caption embeddings: the encoder's `towers` must have image and text.")
    return {name: rows[name] for name in ("embeddings", "captions", "ids", "hashes")}


def run_job(fit: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run one fit as a Ray task; the last of `arguments` is the configuration of the run.

    Raises:
        UsageError: if the dump is too small for it, or the settings do not fit it.
        TarsiftError: if it does not end within `resources.stall_timeout_s`.
    """
    *arguments_, config = arguments
    options = {"backend": config.resources.backend, "threads": config.resources.threads}
    return checked_task(fit, *arguments_, **named, **options)


def fit_enriched(
    shards: Sequence[Shard], folders: ScoreFolders, config: CleanConfig, key: bytes, *, largest_candidate_hash: int
) -> None:
    """Fit what needs the density: smoothing among suspects and as many others, and the verdict; save both."""
    names, sides = [shard.name for shard in shards], folders.sides
    density, pairs = None, None
    if sides.density:
        density = _fetch_scored(names, folders, config, key, largest_candidate_hash)
    mismatch = None
    if sides.captions:
        pairs = _fetch_pairs(names, folders.embeddings(sides.captions), key, largest_candidate_hash)
        mismatch = MismatchRule.from_state(*load_arrays(folders.rule("mismatch")))
    smoothing, verdict = run_job(_fit_last, density, pairs, mismatch, sides.judges, config.suspicion, config)
    if smoothing is not None:
        save_arrays(folders.rule("smoothing"), *smoothing.state())
    save_arrays(folders.rule("verdict"), *verdict.state())


def _fetch_scored(
    names: Sequence[str], folders: ScoreFolders, config: CleanConfig, key: bytes, largest_candidate_hash: int
) -> tuple[ScoredRows, ScoredRows, ScoredRows]:
    """Return suspects, others and the candidate sample, with their density."""
    sources: list[str | Stored] = [folders.embeddings(folders.first), folders.density]
    also = {"captions": "text_embedding"}
    if second := folders.sides.second_look:
        sources.append(folders.seen_by(second, "image_embedding"))
        also["witness"] = f"{second}_image_embedding"
    rule = DensityRule.from_state(*load_arrays(folders.rule("density")))

    def fetch(largest: int, **draw: Any) -> ScoredRows:
        fold = FetchRows(largest, key=key, extra=("density",), also=also, **draw)
        return ScoredRows(**run_fold(fold, names, sources))

    halves = []
    for salt, above in (("pool", True), ("rest", False)):
        side = Side("density", rule.pool_cutoff, above)
        hashes = run_fold(SmallestHashes(config.suspicion.pool_size, key=key, salt=salt, side=side), names, sources)
        if not len(hashes):
            raise UsageError(
                "the dump is too small for neighbour smoothing; raise suspicion.pool_fraction or give more data."
            )
        halves.append(fetch(int(hashes[-1]), salt=salt, side=side))
    return halves[0], halves[1], fetch(largest_candidate_hash)


def _fit_last(
    density: tuple[ScoredRows, ScoredRows, ScoredRows] | None,
    pairs: dict[str, np.ndarray] | None,
    mismatch: MismatchRule | None,
    judges: Sequence[str],
    config: SuspicionConfig,
    **search: Any,
) -> tuple[SmoothingRule | None, Verdict]:
    """Fit the smoothing on suspects, others and candidates, and the verdict on the candidates' scores."""
    smoothing = image = caption = second = None
    if density is not None:
        candidates = density[-1]
        smoothing = fit_smoothing(*density, config, **search)
        said = candidates.captions if smoothing.excess else None
        rows = (candidates.embeddings, candidates.ids, candidates.density, said, candidates.witness)
        columns = smoothing.score(*rows, **search)
        if "density" in judges:
            image, second = columns["suspicion"], columns.get("neighbor_disagreement")
    if pairs is not None and mismatch is not None:
        rows = (pairs[name] for name in ("embeddings", "captions", "ids"))
        caption = mismatch.score(*rows, **search)["caption_mismatch"]
    if density is not None and pairs is not None and image is not None and caption is not None:
        # Two encoders: an image may have failed for one of them.
        _, here, there = np.intersect1d(density[-1].ids, pairs["ids"], return_indices=True)
        image, caption = image[here], caption[there]
        second = None if second is None else second[here]
    return smoothing, fit_verdict(image, caption, second)


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
