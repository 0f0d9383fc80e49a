"""`suspicion`: the default verdict score, which needs no guess of the poison rate.

Every published density score has a k that must fit the rate. This rule does without: it scores at
several large k to find out whom to distrust, throws the most suspicious tenth out of the *reference*,
where poison could otherwise hide among itself, scores everything at small k against what is left, and
averages the result over each image's neighbours among the suspects.

1. Contaminated reference A: R random images; sl = max_k z(log SLOF_k), kd = max_k z(log d_k), k = R/32, R/16, R/8.
2. Images whose rank by sl or by kd is in the top `purge_fraction` are purged; of the others, `banks` references
   of R are drawn; P = mean over banks and k = R/128, R/64, R/32 of z(log SLOF_k).
3. density S = z(P) + 2 z(sl).
4. Enriched reference: the top `pool_fraction` by S and as many others; s_m = mean of S over x and its m nearest
   there; suspicion_image F = max(z(S), max_m z(s_m)).
5. Where captions are embedded too, c is the caption excess (see `agreement`) over candidates that are not in the top
   `purge_fraction` by F, and suspicion = F (1 + max(0, z(c)) / 4) for F > 0; elsewhere suspicion = F.
6. Where a second encoder, the witness, has embedded the images too, neighbor_disagreement says whether the nearest in
   the enriched reference are less alike to it than they should be (see `disagreement`). `verdict` adds it.

z is (v - median) / (1.4826 MAD), always with the median and MAD of a random *candidate sample* of the
dump, which also provides A and the purified references. `fit_density` (steps 1 to 3, in `density`) and
`fit_smoothing` (steps 4 and 5) turn samples into small rules; a rule scores any batch on its own, with the same
bits wherever and in whatever company a row is scored. Another rule is another function beside these.

At scale: candidates are `smallest(keyed_hash(sha256s, key), config.candidates)`, the density of all images is
one pass, both samples for the enriched reference are merged from `draw_pool` of each part of it, and the
final score is a second pass over embeddings and density.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, UInt64

from tarsift.clip_detect.agreement import CaptionExcess
from tarsift.clip_detect.density import DensityRule, SuspicionConfig, below, check_rule, fit_density
from tarsift.clip_detect.disagreement import Disagreement
from tarsift.clip_detect.neighbors import Neighbors, knn, unit_norm
from tarsift.clip_detect.sampling import keyed_hash, resalt, smallest
from tarsift.clip_detect.threshold import median_mad, robust_z

__all__ = [
    "DensityRule",
    "ScoredRows",
    "SmoothingRule",
    "SuspicionConfig",
    "content_ids",
    "draw_pool",
    "fit_density",
    "fit_smoothing",
    "suspicion",
]

CAPTION_WEIGHT = 0.25  # of the standardised caption excess
_ROWS = 4096  # scored at a time


class ScoredRows(NamedTuple):
    """Images with their density, for the second fit.

    `captions` are embeddings too, as are those of the images by the `witness`; zeros where there is none.
    """

    embeddings: Float[np.ndarray, "n d"]
    ids: UInt64[np.ndarray, " n"]
    hashes: UInt64[np.ndarray, " n"]
    density: Float32[np.ndarray, " n"]
    captions: Float[np.ndarray, "n d"] | None = None
    witness: Float[np.ndarray, "n w"] | None = None


@dataclass(frozen=True)
class SmoothingRule:
    """Steps 4 to 6, fitted: the enriched reference, and the medians and MADs (last axis) of the candidate sample."""

    embeddings: Float32[np.ndarray, "E d"]  # unit norm
    ids: UInt64[np.ndarray, " E"]
    density: Float32[np.ndarray, " E"]
    neighbors: tuple[int, ...]  # the m of `SuspicionConfig.smoothing` that are smaller than the reference
    density_scale: Float64[np.ndarray, " 2"]
    smooth_scale: Float64[np.ndarray, "m 2"]
    excess_scale: Float64[np.ndarray, " 2"]  # 0 and 1 without captions
    excess: CaptionExcess | None = None
    suspect_neighbors: int = 8
    disagreement: Disagreement | None = None

    def score(
        self,
        embeddings: Float[np.ndarray, "n d"],
        ids: UInt64[np.ndarray, " n"],
        density: Float32[np.ndarray, " n"],
        captions: Float[np.ndarray, "n d"] | None = None,
        witness: Float[np.ndarray, "n w"] | None = None,
        *,
        backend: str = "auto",
        threads: int = 1,
        device: str | None = None,
    ) -> dict[str, Float32[np.ndarray, " n"]]:
        """Score images: `suspicion_image`, `caption_excess` with captions, `neighbor_disagreement` with a witness,
        and `suspicion`.

        density: as `DensityRule.score` gave it for the same rows. captions, witness: embeddings, zeros for a missing
        one; each needed if, and only if, the rule was fitted with it.
        """
        for name, given, fitted in (("captions", captions, self.excess), ("witness", witness, self.disagreement)):
            if (given is None) != (fitted is None):
                raise ValueError(f"`{name}` is needed where the rule was fitted with it, and only there.")
        search = {"backend": backend, "threads": threads, "device": device}
        parts = []
        for start in range(0, max(1, len(embeddings)), _ROWS):
            part = slice(start, start + _ROWS)
            x, own = unit_norm(embeddings[part]), ids[part].astype(np.uint64)
            found = self._near(x, own, search)
            near = found.indices
            smooth = self._smooth(density[part], near)
            image = self._image(density[part], smooth)
            columns = {"suspicion_image": image}
            if self.excess is None or captions is None:
                columns["suspicion"] = image
            else:
                excess = self.excess.score(
                    x, own, unit_norm(captions[part]), near[:, : self.suspect_neighbors], **search
                )
                columns["caption_excess"] = excess
                confirmed = np.maximum(robust_z(excess, *self.excess_scale), 0)
                columns["suspicion"] = image + np.maximum(image, 0) * CAPTION_WEIGHT * confirmed
            if self.disagreement is not None and witness is not None:
                columns["neighbor_disagreement"] = self.disagreement.score(unit_norm(witness[part]), found)
            parts.append(columns)
        return {name: np.concatenate([part[name] for part in parts]).astype(np.float32) for name in parts[0]}

    def _near(self, x: np.ndarray, ids: np.ndarray, search: Mapping[str, Any]) -> Neighbors:
        return knn(x, self.embeddings, self.neighbors[-1], query_ids=ids, reference_ids=self.ids, **search)

    def _image(self, density: np.ndarray, smooth: Float64[np.ndarray, "n k"]) -> Float64[np.ndarray, " n"]:
        """Return the score of images alone, by their own density and the means around them."""
        own = robust_z(density, self.density_scale[0], self.density_scale[1])
        around = robust_z(smooth, self.smooth_scale[:, 0], self.smooth_scale[:, 1]).max(axis=1)
        return np.maximum(own, around)

    def _smooth(self, density: np.ndarray, near: Int64[np.ndarray, "n m"]) -> Float64[np.ndarray, "n k"]:
        """Mean density of each image and its m nearest in the enriched reference, for every m of `neighbors`."""
        columns = np.array(self.neighbors) - 1
        totals = np.cumsum(self.density[near], axis=1, dtype=np.float64)[:, columns]
        return (density.astype(np.float64)[:, None] + totals) / (columns + 2)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the rule as plain arrays (for `np.savez`) and a dict that json can write."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.excess is not None:
            arrays |= {f"excess.{name}": array for name, array in self.excess.to_arrays().items()}
        if self.disagreement is not None:
            arrays |= {f"disagreement.{name}": array for name, array in self.disagreement.to_arrays().items()}
        settings = {"neighbors": [*self.neighbors], "suspect_neighbors": self.suspect_neighbors}
        fitted = {"captions": self.excess is not None, "witness": self.disagreement is not None}
        return arrays, {"rule": "smoothing-4", **settings, **fitted}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> SmoothingRule:
        """Rebuild a rule from `state`, bit for bit."""
        check_rule(settings, "smoothing-4")
        return cls(
            neighbors=tuple(settings["neighbors"]),
            suspect_neighbors=settings["suspect_neighbors"],
            excess=CaptionExcess.from_arrays(below("excess.", arrays)) if settings["captions"] else None,
            disagreement=Disagreement.from_arrays(below("disagreement.", arrays)) if settings["witness"] else None,
            **{name: np.asarray(arrays[name]) for name in _ARRAYS},
        )


_ARRAYS = ("embeddings", "ids", "density", "density_scale", "smooth_scale", "excess_scale")


def draw_pool(
    density: Float32[np.ndarray, " n"], hashes: UInt64[np.ndarray, " n"], rule: DensityRule
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " r"]]:
    """Return the rows that one part of the dump contributes to the pool of suspects and to the others.

    At most `pool_size` different images each, by smallest hash; the draws of several parts, put together, are
    drawn from once more by `fit_smoothing`. density: as `rule` scored it.
    """
    is_suspect = density >= np.float32(rule.pool_cutoff)
    suspects, others = np.flatnonzero(is_suspect), np.flatnonzero(~is_suspect)
    pool = suspects[smallest(resalt(hashes[suspects], "pool"), rule.config.pool_size)]
    return pool, others[smallest(resalt(hashes[others], "rest"), rule.config.pool_size)]


def fit_smoothing(
    pool: ScoredRows,
    rest: ScoredRows,
    candidates: ScoredRows,
    config: SuspicionConfig | None = None,
    *,
    backend: str = "auto",
    threads: int = 1,
    device: str | None = None,
) -> SmoothingRule:
    """Fit steps 4 to 6.

    pool: suspects; rest: others (see `draw_pool`), of which as many are used as there are suspects; candidates: the
    sample the density was fitted on. Step 5 is fitted where all three have captions, step 6 where they
    have embeddings by a witness. The order of rows is of no importance.

    Raises:
        ValueError: pool or rest has too few rows to average over.
    """
    config = config or SuspicionConfig()
    in_pool = smallest(resalt(pool.hashes, "pool"), config.pool_size)
    in_rest = smallest(resalt(rest.hashes, "rest"), len(in_pool))
    size = len(in_pool) + len(in_rest)
    ms = tuple(sorted({m for m in config.smoothing if m < size}))
    if not ms:
        raise ValueError(
            f"the enriched reference has {len(in_pool)} suspects and {len(in_rest)} others, too few for "
            f"`smoothing`={config.smoothing}. Raise `pool_fraction` or score more data at once."
        )
    density = np.concatenate([pool.density[in_pool], rest.density[in_rest]]).astype(np.float32)
    unscaled = SmoothingRule(
        embeddings=unit_norm(np.concatenate([pool.embeddings[in_pool], rest.embeddings[in_rest]])),
        ids=np.concatenate([pool.ids[in_pool], rest.ids[in_rest]]).astype(np.uint64),
        density=density,
        neighbors=ms,
        density_scale=median_mad(candidates.density),
        smooth_scale=np.zeros((len(ms), 2)),
        excess_scale=np.array([0.0, 1.0]),
        suspect_neighbors=min(config.suspect_neighbors, ms[-1]),
    )
    search = {"backend": backend, "threads": threads, "device": device}
    x, ids = unit_norm(candidates.embeddings), candidates.ids.astype(np.uint64)
    near = unscaled._near(x, ids, search)
    smooth = unscaled._smooth(candidates.density, near.indices)
    rule = replace(unscaled, smooth_scale=median_mad(smooth))
    if pool.captions is not None and rest.captions is not None and candidates.captions is not None:
        suspects = unit_norm(np.concatenate([pool.captions[in_pool], rest.captions[in_rest]]))
        excess = _fit_excess(suspects, candidates, rule._image(candidates.density, smooth), config)
        if excess is not None:
            nearest = near.indices[:, : rule.suspect_neighbors]
            found = excess.score(x, ids, unit_norm(candidates.captions), nearest, **search)
            rule = replace(rule, excess=excess, excess_scale=median_mad(found))
    disagreement = None
    if pool.witness is not None and rest.witness is not None and candidates.witness is not None:
        seen = unit_norm(np.concatenate([pool.witness[in_pool], rest.witness[in_rest]]))
        among = unscaled._near(unscaled.embeddings, unscaled.ids, search)
        disagreement = Disagreement.fit(seen, among, unit_norm(candidates.witness), near)
    return replace(rule, disagreement=disagreement)


def _fit_excess(
    suspects: Float32[np.ndarray, "E d"],
    candidates: ScoredRows,
    image: Float64[np.ndarray, " n"],
    config: SuspicionConfig,
) -> CaptionExcess | None:
    """Draw the clean samples, from candidates that are not among the most suspicious images; None if too few are."""
    assert candidates.captions is not None
    order = np.lexsort((candidates.hashes, image))
    keep = order[: len(order) - int(config.purge_fraction * len(order))]
    drawn = keep[smallest(resalt(candidates.hashes[keep], "captions"), config.reference_size)]
    if len(drawn) <= config.clean_neighbors:
        return None
    return CaptionExcess(
        suspects,
        unit_norm(candidates.embeddings[drawn]),
        candidates.ids[drawn].astype(np.uint64),
        unit_norm(candidates.captions[drawn]),
        config.clean_neighbors,
    )


def content_ids(embeddings: Float[np.ndarray, "n d"]) -> UInt64[np.ndarray, " n"]:
    """Identify rows by their bytes, where no hash of the images is at hand: equal embeddings are one image."""
    rows = np.ascontiguousarray(embeddings)
    return keyed_hash(rows.view(np.uint8).reshape(len(rows), -1), b"", "content")


def suspicion(
    embeddings: Float[np.ndarray, "n d"],
    ids: UInt64[np.ndarray, " n"] | None = None,
    captions: Float[np.ndarray, "n d"] | None = None,
    witness: Float[np.ndarray, "n w"] | None = None,
    *,
    config: SuspicionConfig | None = None,
    key: bytes = b"",
    reference: tuple[Float[np.ndarray, "R d"], UInt64[np.ndarray, " R"]] | None = None,
    backend: str = "auto",
    threads: int = 1,
    device: str | None = None,
) -> dict[str, Float32[np.ndarray, " n"]]:
    """Score a dump that fits into memory: the columns of `DensityRule.score` and of `SmoothingRule.score`.

    embeddings: as an encoder *trained on this dump* gives them; one that was not has not learned the trigger.
    ids: 64-bit hashes of the image content; by default rows with equal embeddings are one image. captions: their
    embeddings by the same encoder, zeros for a missing one; of copies of an image the first one's caption stands
    in the samples. witness: embeddings of the images by an encoder that never saw the dump. key: draws the samples;
    the same key and data give the same bits, in any order of rows.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(2000, 16)) @ rng.normal(size=(16, 64))
        >>> x[:20] = rng.normal(size=64) * 4 + rng.normal(size=(20, 64)) / 2
        >>> bool(suspicion(x)["suspicion"][:20].min() > np.quantile(suspicion(x)["suspicion"], 0.98))
        True
    """
    config = config or SuspicionConfig()
    own = content_ids(embeddings) if ids is None else ids.astype(np.uint64)
    hashes = keyed_hash(own.view(np.uint8).reshape(len(own), 8), key, "reference")
    options = {"backend": backend, "threads": threads, "device": device}
    chosen = smallest(hashes, config.candidates)
    rule = fit_density(embeddings[chosen], own[chosen], hashes[chosen], config, reference=reference, **options)
    columns = rule.score(embeddings, own, **options)
    density = columns["density"]
    pool, rest = draw_pool(density, hashes, rule)

    def take(rows: np.ndarray) -> ScoredRows:
        said, seen = (None if side is None else side[rows] for side in (captions, witness))
        return ScoredRows(embeddings[rows], own[rows], hashes[rows], density[rows], said, seen)

    smoothing = fit_smoothing(take(pool), take(rest), take(chosen), config, **options)
    said = None if smoothing.excess is None else captions
    return columns | smoothing.score(embeddings, own, density, said, witness, **options)
