"""Density of an image among the others, rated without a guess of the poison rate.

The first three steps of the rule in `suspicion`: against a contaminated reference at several large k, then
against purified references at small k, blended. `fit_density` turns a random candidate sample of the dump
into a `DensityRule` (five references and some medians), and that scores any batch on its own: a row gets the same bits
wherever and in whatever company it is scored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, UInt64
from pydantic import BaseModel, Field, field_validator

from tarsift.clip_detect.neighbors import Neighbors, knn, unit_norm
from tarsift.clip_detect.reference import SMALLEST_DISTANCE, ReferenceSet
from tarsift.clip_detect.sampling import resalt, smallest
from tarsift.clip_detect.scores import published_scores, slof
from tarsift.clip_detect.threshold import median_mad, robust_z

FEWEST_CANDIDATES = 64
_ROWS = 4096  # scored at a time
_SLOF_WEIGHT = 2.0  # of sl beside P, step 3

Search = Callable[..., Neighbors]


class SuspicionConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of the rule; fractions are of the candidate sample."""

    reference_size: int = Field(default=2048, ge=32, description="rows R of each reference; fewer if the dump is small")
    banks: int = Field(default=4, ge=1, le=32, description="purified references that are averaged")
    purge_fraction: float = Field(
        default=0.10, gt=0, le=0.5, description="most suspicious share kept out of references"
    )
    pool_fraction: float = Field(default=0.05, gt=0, le=0.5, description="share of suspects in the enriched reference")
    pool_size: int = Field(default=4096, ge=1, description="most suspects in the enriched reference")
    candidates: int = Field(default=20480, ge=FEWEST_CANDIDATES, description="images the rule is fitted on")
    contaminated_divisors: tuple[int, ...] = Field(default=(32, 16, 8), description="k = R / divisor in step 1")
    purified_divisors: tuple[int, ...] = Field(default=(128, 64, 32), description="k = R / divisor in step 2")
    smoothing: tuple[int, ...] = Field(default=(3, 8, 16, 32), description="numbers m of neighbours averaged in step 4")
    suspect_neighbors: int = Field(default=8, ge=1, description="suspects whose captions are compared in step 5")
    clean_neighbors: int = Field(default=16, ge=1, description="clean images whose captions are compared in step 5")
    published_ks: tuple[int, ...] = Field(
        default=(16, 64, 128, 256), description="k of the published scores, against A"
    )

    @field_validator("contaminated_divisors", "purified_divisors", "published_ks")
    @classmethod
    def _over_one(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or min(values) < 2:
            raise ValueError(f"must name at least one number, each 2 or more: got {values}")
        return values

    @field_validator("smoothing")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or min(values) < 1:
            raise ValueError(f"must name at least one number, each 1 or more: got {values}")
        return values

    @property
    def coverage(self) -> float:
        """The highest poison rate covered: the smaller of k_max / (2.5 R) and half the purged share."""
        return min(1 / (2.5 * min(self.contaminated_divisors)), self.purge_fraction / 2)

    @property
    def coverage_sentence(self) -> str:
        """Say for plan and report what poison rate is covered, and why no more."""
        return (
            f"Poison rates up to {self.coverage:.1%} are covered: the largest neighbourhood is 1/"
            f"{min(self.contaminated_divisors)} of a reference and must be 2.5 times the poison in it, and the purged "
            f"{self.purge_fraction:.0%} must be twice the poison. More frequent poison can look like ordinary data; "
            "a trusted reference (`--reference`) has no such limit."
        )


@dataclass(frozen=True)
class DensityRule:
    """The references, and the medians and MADs (last axis) of the candidate sample."""

    config: SuspicionConfig
    contaminated: ReferenceSet
    purified: tuple[ReferenceSet, ...]
    contaminated_ks: tuple[int, ...]
    published_ks: tuple[int, ...]
    left_out_ks: tuple[int, ...]  # published k that are not smaller than the reference
    trusted: bool
    slof_scale: Float64[np.ndarray, "k 2"]
    k_distance_scale: Float64[np.ndarray, "k 2"]
    purified_scale: Float64[np.ndarray, "banks j 2"]
    blend_scale: Float64[np.ndarray, "2 2"]  # of P and of sl
    pool_cutoff: float  # density of the last candidate in the top `pool_fraction`

    def score(
        self,
        embeddings: Float[np.ndarray, "n d"],
        ids: UInt64[np.ndarray, " n"],
        *,
        backend: str = "auto",
        threads: int = 1,
        device: str | None = None,
    ) -> dict[str, Float32[np.ndarray, " n"]]:
        """Score images: the published scores, `multiscale_slof`, `multiscale_k_distance`, `purified_slof`, `density`.

        embeddings: as the encoder gives them. ids: of the image content, as in the fit.
        """
        search = functools.partial(knn, backend=backend, threads=threads, device=device)
        parts = []
        for start in range(0, max(1, len(embeddings)), _ROWS):
            x, own = unit_norm(embeddings[start : start + _ROWS]), ids[start : start + _ROWS]
            near = _search(search, x, own, self.contaminated)
            logs_slof, logs_k_distance = _logs(near, self.contaminated, self.contaminated_ks)
            sl = _largest_z(logs_slof, self.slof_scale)
            purified = _mean_z(_purified_logs(search, x, own, self.purified), self.purified_scale)
            columns = {
                "multiscale_slof": sl,
                "multiscale_k_distance": _largest_z(logs_k_distance, self.k_distance_scale),
                "purified_slof": purified,
                "density": _blend(purified, sl, self.blend_scale),
            }
            part = published_scores(near, self.contaminated, self.published_ks)
            parts.append(part | {name: column.astype(np.float32) for name, column in columns.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the rule as plain arrays (for `np.savez`) and a dict that json can write."""
        arrays = {f"contaminated.{name}": array for name, array in self.contaminated.to_arrays().items()}
        for bank, reference in enumerate(self.purified):
            arrays |= {f"purified{bank}.{name}": array for name, array in reference.to_arrays().items()}
        arrays |= {name: getattr(self, name) for name in _SCALES}
        settings = {name: list(getattr(self, name)) for name in ("contaminated_ks", "published_ks", "left_out_ks")}
        plain = {"rule": "density-1", "trusted": self.trusted, "pool_cutoff": self.pool_cutoff}
        sizes = {"banks": len(self.purified)}
        return arrays, {**plain, **sizes, **settings, "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> DensityRule:
        """Rebuild a rule from `state`, bit for bit."""
        check_rule(settings, "density-1")
        return cls(
            config=SuspicionConfig.model_validate(settings["config"]),
            contaminated=ReferenceSet.from_arrays(below("contaminated.", arrays)),
            purified=tuple(
                ReferenceSet.from_arrays(below(f"purified{bank}.", arrays)) for bank in range(settings["banks"])
            ),
            contaminated_ks=tuple(settings["contaminated_ks"]),
            published_ks=tuple(settings["published_ks"]),
            left_out_ks=tuple(settings["left_out_ks"]),
            trusted=settings["trusted"],
            pool_cutoff=settings["pool_cutoff"],
            **{name: np.asarray(arrays[name]) for name in _SCALES},
        )


_SCALES = ("slof_scale", "k_distance_scale", "purified_scale", "blend_scale")


def fit_density(
    embeddings: Float[np.ndarray, "n d"],
    ids: UInt64[np.ndarray, " n"],
    hashes: UInt64[np.ndarray, " n"],
    config: SuspicionConfig | None = None,
    *,
    reference: tuple[Float[np.ndarray, "R d"], UInt64[np.ndarray, " R"]] | None = None,
    backend: str = "auto",
    threads: int = 1,
    device: str | None = None,
) -> DensityRule:
    """Fit the rule on a candidate sample: the images of smallest keyed hash, or the whole of a small dump.

    The order of the rows does not matter; all further draws come from the hashes. Of images with the same hash
    one is used.
    reference: trusted embeddings and ids. It takes the place of the contaminated *and* of the purified
    references: nothing in it needs purging, so no rate is too high. Medians still come from the candidates.

    Raises:
        ValueError: fewer than 64 different candidates or trusted images.
    """
    config = config or SuspicionConfig()
    search = functools.partial(knn, backend=backend, threads=threads, device=device)
    order = smallest(hashes, config.candidates)
    _check_count(len(order), "candidates")
    x, ids, hashes = unit_norm(embeddings[order]), ids[order], hashes[order]
    build = functools.partial(ReferenceSet.build, backend=backend, threads=threads, device=device)
    if reference is None:
        size = min(config.reference_size, len(x) * 4 // 5)
        drawn = smallest(resalt(hashes, "contaminated"), size)
        trusted = None
    else:
        trusted = unit_norm(reference[0]), reference[1].astype(np.uint64)
        drawn = smallest(resalt(trusted[1], "contaminated"), config.reference_size)
        size = len(drawn)
        _check_count(size, "trusted images")
    source, source_ids = (x, ids) if trusted is None else trusted
    ks = _neighborhoods(size, config.contaminated_divisors)
    published = tuple(k for k in config.published_ks if k < size)
    contaminated = build(source[drawn], source_ids[drawn], (*ks, *published))

    near = _search(search, x, ids, contaminated)
    logs_slof, logs_k_distance = _logs(near, contaminated, ks)
    slof_scale, k_distance_scale = median_mad(logs_slof), median_mad(logs_k_distance)
    sl, kd = _largest_z(logs_slof, slof_scale), _largest_z(logs_k_distance, k_distance_scale)

    if trusted is None:
        worst = np.maximum(_ranks(sl, hashes), _ranks(kd, hashes))
        keep = np.lexsort((hashes, worst))[: len(x) - int(config.purge_fraction * len(x))]
        source, source_ids, order_by = x[keep], ids[keep], hashes[keep]
    else:
        order_by = trusted[1]
    banks = config.banks if len(source) > size else 1
    draws = (smallest(resalt(order_by, f"purified {bank}"), size) for bank in range(banks))
    purified_ks = _neighborhoods(min(size, len(source)), config.purified_divisors)
    purified = tuple(build(source[rows], source_ids[rows], purified_ks) for rows in draws)
    purified_logs = _purified_logs(search, x, ids, purified)
    purified_scale = np.stack([median_mad(logs) for logs in purified_logs])
    p = _mean_z(purified_logs, purified_scale)
    blend_scale = np.stack([median_mad(p), median_mad(sl)])
    # Among candidates every image counts once: copies of one image must not fill the pool.
    ordered = np.sort(_blend(p, sl, blend_scale).astype(np.float32))
    suspects = max(1, round(config.pool_fraction * len(ordered)))
    return DensityRule(
        config=config,
        contaminated=contaminated,
        purified=purified,
        contaminated_ks=ks,
        published_ks=published,
        left_out_ks=tuple(k for k in config.published_ks if k >= size),
        trusted=trusted is not None,
        slof_scale=slof_scale,
        k_distance_scale=k_distance_scale,
        purified_scale=purified_scale,
        blend_scale=blend_scale,
        pool_cutoff=float(ordered[-suspects]),
    )


def _check_count(count: int, what: str) -> None:
    if count < FEWEST_CANDIDATES:
        raise ValueError(
            f"too few different images to fit a density: {count} {what}, at least {FEWEST_CANDIDATES} are needed. "
            "Score more data at once, or fit on an earlier, larger dump."
        )


def _neighborhoods(size: int, divisors: tuple[int, ...]) -> tuple[int, ...]:
    """The distinct k = size / divisor, ascending; 3 where a small reference would give less."""
    return tuple(sorted({max(3, size // divisor) for divisor in divisors}))


def _search(search: Search, x: np.ndarray, ids: np.ndarray, reference: ReferenceSet) -> Neighbors:
    return search(x, reference.embeddings, reference.ks[-1], query_ids=ids, reference_ids=reference.ids)


def _logs(near: Neighbors, reference: ReferenceSet, ks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return log SLOF_k and log d_k, (n, k) each."""
    logs_slof = [np.log(slof(near, reference, k).astype(np.float64)) for k in ks]
    logs_k_distance = [np.log(np.maximum(near.distances[:, k - 1].astype(np.float64), SMALLEST_DISTANCE)) for k in ks]
    return np.stack(logs_slof, axis=1), np.stack(logs_k_distance, axis=1)


def _purified_logs(
    search: Search, x: np.ndarray, ids: np.ndarray, purified: tuple[ReferenceSet, ...]
) -> list[Float64[np.ndarray, "n j"]]:
    return [_logs(_search(search, x, ids, reference), reference, reference.ks)[0] for reference in purified]


def _largest_z(logs: Float64[np.ndarray, "n k"], scale: Float64[np.ndarray, "k 2"]) -> Float64[np.ndarray, " n"]:
    return robust_z(logs, scale[:, 0], scale[:, 1]).max(axis=1)


def _mean_z(
    logs: list[Float64[np.ndarray, "n j"]], scale: Float64[np.ndarray, "banks j 2"]
) -> Float64[np.ndarray, " n"]:
    # Added one after the other: the bits of a row must not depend on how many rows there are.
    total = np.zeros(len(logs[0]))
    for bank, of_bank in enumerate(logs):
        for z in robust_z(of_bank, scale[bank, :, 0], scale[bank, :, 1]).T:
            total += z
    return total / (scale.shape[0] * scale.shape[1])


def _blend(
    purified: Float64[np.ndarray, " n"], sl: Float64[np.ndarray, " n"], scale: Float64[np.ndarray, "2 2"]
) -> Float64[np.ndarray, " n"]:
    return robust_z(purified, *scale[0]) + _SLOF_WEIGHT * robust_z(sl, *scale[1])


def _ranks(values: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values), np.int64)
    ranks[np.lexsort((hashes, values))] = np.arange(len(values))
    return ranks


def below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def check_rule(settings: Mapping[str, Any], expected: str) -> None:
    """Refuse settings that were not written by the rule that reads them."""
    if settings.get("rule") != expected:
        raise ValueError(f"not a rule of kind {expected!r}: got {settings.get('rule')!r}. Fit the rule again.")
