"""The rules by which samples are scored: fitted on samples of the stored embeddings, kept in OUT/reference/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

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
from tarsift.operators.folds import CountDuplicates, FetchRows, Fold, Side, SmallestHashes
from tarsift.operators.scorer import ScoreDensity
from tarsift.operators.shards import Shard
from tarsift.operators.sides import Sides
from tarsift.operators.stored import ReadStored, Stored, put_table
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.rules import load_arrays, rule_file, save_arrays
from tarsift.pipelines.standing import DENSITY, STANDING, StandingReference
from tarsift.pipelines.tasks import checked_task, run_task
from tarsift.pipelines.trusted import TrustedReference

# A partition of the duplicate count holds about this many distinct images in memory.
IMAGES_PER_PARTITION = 4_000_000
ROWS_FOR_SCALES = 4096  # of the candidates, where rules are kept: medians take no more
TRUSTED = "Scored against a trusted reference: no rate is too high, as long as nothing in the reference is poisoned."


class ScoreSources(Protocol):
    """What the fits look at: who judges what, the rows to fold over, and where rules are kept."""

    @property
    def sides(self) -> Sides: ...
    @property
    def standing(self) -> StandingReference | None: ...
    def fold(
        self,
        fold: Fold,
        names: Sequence[str],
        role: str,
        *,
        scored: bool = False,
        second: str | None = None,
        standing: bool = True,
    ) -> Any: ...
    def rule(self, name: str) -> str: ...


@dataclass(frozen=True)
class ScoreFolders:
    """Where the passes of one result folder keep their files, and whose embeddings they look at."""

    out: str
    sides: Sides
    standing: StandingReference | None = None

    def embeddings(self, role: str) -> str:
        return storage.join(self.out, "embeddings", role)

    def seen_by(self, role: str, *columns: str) -> Stored:
        """Columns of what another role than `first` has embedded, under names that begin with the role's."""
        return Stored(self.embeddings(role), ("shard", "row", *columns), f"{role}_")

    def fold(
        self,
        fold: Fold,
        names: Sequence[str],
        role: str,
        *,
        scored: bool = False,
        second: str | None = None,
        standing: bool = True,
    ) -> Any:
        """Run a fold over what a role has embedded.

        Args:
            names: of the shards.
            scored: with their density beside; second: with another role's embeddings of the images too.
            standing: over the rows of the standing reference as well, where there is one.
        """
        folders: list[str | Stored] = [self.embeddings(role), *([self.density] if scored else [])]
        if second:
            folders.append(self.seen_by(second, "image_embedding"))
        beside = None
        if standing and self.standing:
            density = [Stored(storage.join(self.out, "reference"), drawn=True)] if scored else []
            also = [self.standing.stored(second, "image_embedding", prefix=f"{second}_")] if second else []
            beside = [STANDING], [self.standing.stored(role), *density, *also]
        return run_fold(fold, names, folders, beside=beside)

    @property
    def density(self) -> str:
        return storage.join(self.out, "density")

    def rule(self, name: str) -> str:
        return rule_file(self.out, name)


def fit_reference(
    shards: Sequence[Shard],
    folders: ScoreSources,
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
    sides, standing = folders.sides, folders.standing
    hashes = folders.fold(SmallestHashes(config.suspicion.candidates, key=key), names, folders.sides.first)
    if not len(hashes):
        raise UsageError("no sample of the dump has an image embedding; see the error counts in the ledger.")
    kept = standing is not None and standing.keeps_rules(config, sides)
    for_scales = hashes[:ROWS_FOR_SCALES][-1] if kept else hashes[-1]
    about: dict[str, Any] = {
        "candidates": len(hashes), "largest_hash": int(hashes[-1]), "largest_candidate_hash": int(for_scales),
        "standing": 0 if standing is None else standing.rows, "rules": "kept" if kept else "fitted",
    }  # fmt: skip
    if sides.density:
        about |= _fit_density(names, folders, config, key, int(hashes[-1]), trusted, kept=kept)
    if sides.captions:
        about["pairs"] = _fit_mismatch(names, folders, config, key, int(hashes[-1]), kept=kept)
    partitions = max(1, -(-samples // IMAGES_PER_PARTITION))
    folds = (CountDuplicates(p, partitions, key=key) for p in range(partitions))
    found = [folders.fold(fold, names, folders.sides.first, standing=False) for fold in folds]
    ids, counts = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(ids)
    save_arrays(folders.rule("duplicates"), {"ids": ids[order], "counts": counts[order]}, {})
    return about | {"duplicate_images": len(ids), "duplicate_samples": int(counts.sum())}


def _fit_density(
    names: Sequence[str],
    folders: ScoreSources,
    config: CleanConfig,
    key: bytes,
    largest: int,
    trusted: TrustedReference | None,
    *,
    kept: bool,
) -> dict[str, Any]:
    standing = folders.standing
    if kept and standing:
        rule = DensityRule.from_state(*load_arrays(standing.rule("density")))
    else:
        rows = folders.fold(FetchRows(largest, key=key), names, folders.sides.first)
        arrays = (rows["embeddings"], rows["ids"], rows["hashes"])
        clean = None if trusted is None else trusted.draw(config.suspicion.candidates, key)
        rule = run_job(fit_density, *arrays, config.suspicion, config, reference=clean)
    save_arrays(folders.rule("density"), *rule.state())
    if standing:
        if kept:
            densities = standing.read(DENSITY)
        else:
            search = {"backend": config.resources.backend, "threads": config.resources.threads}
            densities = run_task(
                _density_of, ScoreDensity(rule, key=key, **search), standing.stored(folders.sides.first)
            )
        put_table(folders.rule(STANDING).removesuffix(".npz") + ".parquet", densities)
    return {
        "rows": len(rule.contaminated.ids),
        "trusted": config.reference.path,
        "largest_rate": None if rule.trusted else config.suspicion.coverage,
        "coverage": TRUSTED if rule.trusted else config.suspicion.coverage_sentence,
        "k_left_out": list(rule.left_out_ks),
    }


def _density_of(score: ScoreDensity, stored: Stored) -> pa.Table:
    """Return shard, row and density of the rows of the standing reference."""
    tables = [score(table).select(["shard", "row", "density"]) for table in ReadStored([stored])(STANDING)]
    return pa.concat_tables(tables)


def _fit_mismatch(
    names: Sequence[str], folders: ScoreSources, config: CleanConfig, key: bytes, largest: int, *, kept: bool
) -> int:
    """Fit and save the rule for captions, or take the one that is kept; return how many pairs it compares with."""
    if kept and folders.standing:
        rule = MismatchRule.from_state(*load_arrays(folders.standing.rule("mismatch")))
    else:
        pairs = _fetch_pairs(names, folders, key, largest)
        rule = run_job(fit_mismatch, *pairs.values(), config.mismatch, config)
    save_arrays(folders.rule("mismatch"), *rule.state())
    return len(rule.reference.ids)


def _fetch_pairs(names: Sequence[str], folders: ScoreSources, key: bytes, largest: int) -> dict[str, np.ndarray]:
    """Return images, captions, ids and hashes of the candidate sample, in this order."""
    role = folders.sides.captions
    assert role is not None  # asked for where captions judge
    rows = folders.fold(FetchRows(largest, key=key, also={"captions": "text_embedding"}), names, role)
    if "captions" not in rows:
        raise UsageError(f"there are no caption embeddings: the `towers` of the {role} must have image and text.")
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
    shards: Sequence[Shard], folders: ScoreSources, config: CleanConfig, key: bytes, *, largest_candidate_hash: int
) -> None:
    """Fit what needs the density: smoothing among suspects and as many others, and the verdict; save both."""
    names, sides = [shard.name for shard in shards], folders.sides
    density, pairs = None, None
    if sides.density:
        density = _fetch_scored(names, folders, config, key, largest_candidate_hash)
    mismatch = None
    if sides.captions:
        pairs = _fetch_pairs(names, folders, key, largest_candidate_hash)
        mismatch = MismatchRule.from_state(*load_arrays(folders.rule("mismatch")))
    smoothing, verdict = run_job(_fit_last, density, pairs, mismatch, sides.judges, config.suspicion, config)
    if smoothing is not None:
        save_arrays(folders.rule("smoothing"), *smoothing.state())
    save_arrays(folders.rule("verdict"), *verdict.state())


def _fetch_scored(
    names: Sequence[str], folders: ScoreSources, config: CleanConfig, key: bytes, largest_candidate_hash: int
) -> tuple[ScoredRows, ScoredRows, ScoredRows]:
    """Return suspects, others and the candidate sample, with their density."""
    also = {"captions": "text_embedding"}
    if second := folders.sides.second_look:
        also["witness"] = f"{second}_image_embedding"
    rule = DensityRule.from_state(*load_arrays(folders.rule("density")))

    def fetch(largest: int, **draw: Any) -> ScoredRows:
        fold = FetchRows(largest, key=key, extra=("density",), also=also, **draw)
        return ScoredRows(**folders.fold(fold, names, folders.sides.first, scored=True, second=second))

    halves = []
    for salt, above in (("pool", True), ("rest", False)):
        side = Side("density", rule.pool_cutoff, above)
        smallest = SmallestHashes(config.suspicion.pool_size, key=key, salt=salt, side=side)
        hashes = folders.fold(smallest, names, folders.sides.first, scored=True)
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
