"""Captions that do not fit their images, as seen by a *witness*: an encoder that never saw the dump.

An encoder that was trained on poison has learned that its captions fit. One that was not finds them far from
their images, and far from what the captions of similar images say. So these scores are for a witness alone; on
the encoder under test their sign is anybody's guess.

Per pair, with d(a, b) = 1 - cos(a, b), image x, caption y, and the k nearest images and captions in a random
reference of pairs (x_j, y_j), the pair itself and its copies excluded:

    caption_distance   d(x, y)
    lemon_image        mean over the nearest images of d(y, y_j), weighted by exp(-tau1 d(x, x_j) - tau2 d(x_j, y_j))
    lemon_caption      mean over the nearest captions of d(x, x_j), weighted by exp(-tau1 d(y, y_j) - tau2 d(x_j, y_j))
    caption_unmatched  mean of d(x_j, y) over the k images that y fits best: high for a caption that fits no image here
    safeclip           log odds that d(x, y) is of the wider component of a mixture of two normal distributions
    caption_mismatch   the verdict of this side: caption_distance, lemon_caption and caption_unmatched, each
                       standardised, added up

Sources: LEMoN, Zhang et al. 2025 (ICML, arXiv 2407.18941), for the neighbour terms, whose weights here add up to
one: a pair among pairs that do not fit would otherwise be the least suspicious of all; SafeCLIP, Yang et al. 2024
(ICML, arXiv 2310.05862), for the mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt64
from pydantic import BaseModel, Field

from tarsift.clip_detect.agreement import cosines
from tarsift.clip_detect.density import check_rule
from tarsift.clip_detect.neighbors import knn, unit_norm
from tarsift.clip_detect.sampling import resalt, smallest
from tarsift.clip_detect.threshold import median_mad, robust_z

FEWEST_PAIRS = 64
_ROWS = 512  # at a time, so that the rows of their neighbours stay in the cache


class MismatchConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of the caption side."""

    reference_size: int = Field(default=4096, ge=FEWEST_PAIRS, description="pairs of the reference")
    neighbors: int = Field(default=64, ge=1, description="nearest images and captions, k")
    distance_decay: float = Field(default=0.1, ge=0, description="tau1: how fast farther neighbours count less")
    trust_decay: float = Field(default=1.0, ge=0, description="tau2: how fast neighbours that do not fit count less")


@dataclass(frozen=True)
class Pairs:
    """Images and captions, both at unit length; a missing caption is a row of zeros."""

    images: Float32[np.ndarray, "n d"]
    captions: Float32[np.ndarray, "n d"]
    ids: UInt64[np.ndarray, " n"]

    @property
    def complete(self) -> Bool[np.ndarray, " n"]:
        """Which have a caption."""
        return np.asarray(self.captions.any(axis=1))

    def rows(self, chosen: Any) -> Pairs:
        return Pairs(self.images[chosen], self.captions[chosen], self.ids[chosen])


@dataclass(frozen=True)
class MismatchRule:
    """The reference pairs, medians and MADs (last axis) of the candidate sample, and the mixture."""

    config: MismatchConfig
    reference: Pairs
    scale: Float64[np.ndarray, "4 2"]  # of the first four scores
    mixture: Float64[np.ndarray, "2 3"]  # weight, mean and variance of caption_distance; the fitting component first

    def score(
        self,
        images: Float[np.ndarray, "n d"],
        captions: Float[np.ndarray, "n d"],
        ids: UInt64[np.ndarray, " n"],
        *,
        backend: str = "auto",
        threads: int = 1,
        device: str | None = None,
    ) -> dict[str, Float32[np.ndarray, " n"]]:
        """Score pairs, embedded by the witness; higher = fits less. NaN throughout for a pair without a caption."""
        search = {"backend": backend, "threads": threads, "device": device}
        pairs = Pairs(unit_norm(images), unit_norm(captions), ids.astype(np.uint64))
        has_caption = pairs.complete
        terms = self._terms(pairs.rows(has_caption), search)
        z = robust_z(terms, self.scale[:, 0], self.scale[:, 1])
        columns = {name: terms[:, i] for i, name in enumerate(_TERMS)}
        columns["safeclip"] = _log_odds(terms[:, 0], self.mixture)
        columns["caption_mismatch"] = z[:, 0] + z[:, 2] + z[:, 3]
        return {name: _spread(column, has_caption) for name, column in columns.items()}

    def _terms(self, pairs: Pairs, search: Mapping[str, Any]) -> Float64[np.ndarray, "n 4"]:
        out = np.empty((len(pairs.ids), 4))
        reference, k = self.reference, self.config.neighbors
        doubt = self.config.trust_decay * _distance(reference.images, reference.captions)
        ids = {"query_ids": pairs.ids, "reference_ids": reference.ids}
        by_image = knn(pairs.images, reference.images, k, **ids, **search).indices
        by_caption = knn(pairs.captions, reference.captions, k, **ids, **search).indices
        best_images = knn(pairs.captions, reference.images, k, **ids, **search)
        out[:, 3] = np.square(best_images.distances, dtype=np.float64).mean(axis=1) / 2
        for start in range(0, len(out), _ROWS):
            part = slice(start, start + _ROWS)
            x, y = pairs.images[part], pairs.captions[part]
            out[part, 0] = _distance(x, y)
            out[part, 1] = self._neighbor_term(x, reference.images, y, reference.captions, by_image[part], doubt)
            out[part, 2] = self._neighbor_term(y, reference.captions, x, reference.images, by_caption[part], doubt)
        return out

    def _neighbor_term(
        self, near: np.ndarray, near_reference: np.ndarray, other: np.ndarray, other_reference: np.ndarray,
        rows: Int64[np.ndarray, "n k"], doubt: Float64[np.ndarray, " R"],
    ) -> Float64[np.ndarray, " n"]:  # fmt: skip
        """Mean distance in the other modality to the neighbours in one; near and fitting ones count more."""
        distances = 1.0 - cosines(near, near_reference[rows])
        weights = np.exp(-self.config.distance_decay * distances - doubt[rows])
        return ((1.0 - cosines(other, other_reference[rows])) * weights).sum(axis=1) / weights.sum(axis=1)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the rule as plain arrays (for `np.savez`) and a dict that json can write."""
        arrays = {"images": self.reference.images, "captions": self.reference.captions, "ids": self.reference.ids}
        arrays |= {"scale": self.scale, "mixture": self.mixture}
        return arrays, {"rule": "mismatch-1", "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> MismatchRule:
        """Rebuild a rule from `state`, bit for bit."""
        check_rule(settings, "mismatch-1")
        reference = Pairs(arrays["images"], arrays["captions"], arrays["ids"])
        config = MismatchConfig.model_validate(settings["config"])
        return cls(config, reference, np.asarray(arrays["scale"]), np.asarray(arrays["mixture"]))


_TERMS = ("caption_distance", "lemon_image", "lemon_caption", "caption_unmatched")


def fit_mismatch(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "n d"],
    ids: UInt64[np.ndarray, " n"],
    hashes: UInt64[np.ndarray, " n"],
    config: MismatchConfig | None = None,
    *,
    backend: str = "auto",
    threads: int = 1,
    device: str | None = None,
) -> MismatchRule:
    """Fit the caption side on a random sample of the dump; pairs without a caption are left out.

    The order of rows does not matter: further draws come from the hashes.

    Raises:
        ValueError: fewer than 64 pairs have a caption.
    """
    config = config or MismatchConfig()
    order = np.argsort(hashes, kind="stable")
    everything = Pairs(unit_norm(images[order]), unit_norm(captions[order]), ids[order].astype(np.uint64))
    pairs, hashes = everything.rows(everything.complete), hashes[order][everything.complete]
    if len(hashes) < FEWEST_PAIRS:
        raise ValueError(
            f"too few images with a caption for the caption side: {len(hashes)}, at least {FEWEST_PAIRS} are needed."
        )
    drawn = smallest(resalt(hashes, "mismatch"), min(config.reference_size, len(hashes) * 4 // 5))
    config = config.model_copy(update={"neighbors": min(config.neighbors, len(drawn) // 8)})
    unscaled = MismatchRule(config, pairs.rows(drawn), np.zeros((4, 2)), np.zeros((2, 3)))
    terms = unscaled._terms(pairs, {"backend": backend, "threads": threads, "device": device})
    return replace(unscaled, scale=median_mad(terms), mixture=_fit_mixture(terms[:, 0]))


def _fit_mixture(distances: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, "2 3"]:
    from sklearn.mixture import GaussianMixture

    low, high = np.quantile(distances, (0.25, 0.9))
    start = np.array([[low], [high + 1e-6]])
    fitted: Any = GaussianMixture(2, means_init=start, random_state=0, tol=1e-6, max_iter=500).fit(distances[:, None])
    table = np.stack([fitted.weights_, fitted.means_[:, 0], fitted.covariances_[:, 0, 0]], axis=1)
    return table[np.argsort(table[:, 1])]


def _log_odds(distances: Float64[np.ndarray, " n"], mixture: Float64[np.ndarray, "2 3"]) -> Float64[np.ndarray, " n"]:
    """Log odds of the component of higher distance; a distance below the mean of the lower one counts as that mean.

    Below it, the wider of the two would win again, and the best fitting pairs would be the most suspicious.
    """
    x = np.maximum(distances, mixture[0, 1])[:, None]
    weight, mean, variance = mixture.T
    logs = np.log(weight) - 0.5 * np.log(variance) - 0.5 * (x - mean) ** 2 / variance
    return logs[:, 1] - logs[:, 0]


def _distance(a: Float32[np.ndarray, "n d"], b: Float32[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
    return 1.0 - cosines(a, b[:, None])[:, 0]


def _spread(values: np.ndarray, mask: Bool[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    out = np.full(len(mask), np.nan, np.float32)
    out[mask] = values
    return out
