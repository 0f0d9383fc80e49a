"""The published local-density scores, from one neighbour search against a `ReferenceSet`.

All are functions of a query's neighbours, the reference and k; **higher is more suspicious**, and a
scored sample never gets NaN or infinity. Distances below `SMALLEST_DISTANCE` count as that much, so
copies and zeros are defined: the ratio of two distances that are both zero is one.

Poison is locally sparse only while fewer than k of it are in the reference: with a reference of R
rows these scores need k >= 2.5 x poison rate x R, and turn around below that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from tarsift.clip_detect.neighbors import Neighbors
from tarsift.clip_detect.reference import SMALLEST_DISTANCE, ReferenceSet, local_dimension

_LARGEST_LOG = float(np.log(np.finfo(np.float32).max)) - 1e-3
_ROWS = 512  # scored at a time, so that the intermediate (rows, k) tables stay in the cache


def k_distance(neighbors: Neighbors, reference: ReferenceSet, k: int) -> Float32[np.ndarray, " n"]:
    """Return the distance to the k-th neighbour."""
    return neighbors.distances[:, k - 1]


def lid(neighbors: Neighbors, reference: ReferenceSet, k: int) -> Float32[np.ndarray, " n"]:
    """Return the local intrinsic dimension (see `local_dimension`)."""
    return local_dimension(neighbors.distances, k).astype(np.float32)


def slof(neighbors: Neighbors, reference: ReferenceSet, k: int) -> Float32[np.ndarray, " n"]:
    """Return how many times farther the k-th neighbour is than for the neighbours themselves."""
    return np.exp(_log_ratio(neighbors, reference, k)).mean(axis=1).astype(np.float32)


def dao(neighbors: Neighbors, reference: ReferenceSet, k: int) -> Float32[np.ndarray, " n"]:
    """Return the density ratio SLOF estimates, each neighbour's term in its own local dimension."""
    terms = _log_ratio(neighbors, reference, k) * _neighbor_lid(neighbors, reference, k)
    # The mean of powers as log-sum-exp: a power overflows long before its rank is lost.
    highest = terms.max(axis=1)
    total = highest + np.log(np.exp(terms - highest[:, None]).mean(axis=1))
    return np.exp(np.minimum(total, _LARGEST_LOG)).astype(np.float32)


def dao_log(neighbors: Neighbors, reference: ReferenceSet, k: int) -> Float32[np.ndarray, " n"]:
    """Return the logarithm of DAO with the geometric in place of the arithmetic mean."""
    terms = _log_ratio(neighbors, reference, k) * _neighbor_lid(neighbors, reference, k)
    return terms.mean(axis=1).astype(np.float32)


def _log_ratio(neighbors: Neighbors, reference: ReferenceSet, k: int) -> Float64[np.ndarray, "n k"]:
    """log(d_k(x) / d_k(o)) for each query x and each o of its k nearest."""
    of_reference = _log_distance(reference.k_distance[:, reference.column(k)])
    return _log_distance(neighbors.distances[:, k - 1])[:, None] - of_reference[neighbors.indices[:, :k]]


def _log_distance(distance: Float32[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    return np.log(np.maximum(distance.astype(np.float64), SMALLEST_DISTANCE))


def _neighbor_lid(neighbors: Neighbors, reference: ReferenceSet, k: int) -> Float64[np.ndarray, "n k"]:
    return reference.lid[:, reference.column(k)].astype(np.float64)[neighbors.indices[:, :k]]


@dataclass(frozen=True)
class ScoreSpec:
    """A score and what a reader must know of it."""

    name: str
    function: Callable[[Neighbors, ReferenceSet, int], np.ndarray]
    description: str
    formula: str
    source: str


SCORES: dict[str, ScoreSpec] = {
    spec.name: spec
    for spec in (
        ScoreSpec(
            "k_distance",
            k_distance,
            "Distance to the k-th nearest reference image; robust to the poison rate, blind to local scale.",
            "d_k(x)",
            "Ramaswamy, Rastogi, Shim 2000, SIGMOD",
        ),
        ScoreSpec(
            "lid",
            lid,
            "Local intrinsic dimension at the image; turns around early when poison is frequent.",
            "-1 / ((1/k) sum_{i<=k} log(d_i(x) / d_k(x)))",
            "Levina and Bickel 2004, NIPS; Amsaleg et al. 2015, KDD",
        ),
        ScoreSpec(
            "slof",
            slof,
            "How many times sparser it is around the image than around its neighbours (simplified LOF).",
            "(1/k) sum_{o in kNN(x)} d_k(x) / d_k(o)",
            "Schubert, Zimek, Kriegel 2014, Data Mining and Knowledge Discovery",
        ),
        ScoreSpec(
            "dao",
            dao,
            "SLOF with each ratio raised to the local dimension of the neighbour it is taken against.",
            "(1/k) sum_{o in kNN(x)} (d_k(x) / d_k(o)) ^ LID(o)",
            "Anderberg et al. 2024, SDM, arXiv 2401.05453",
        ),
        ScoreSpec(
            "dao_log",
            dao_log,
            "The logarithm of DAO with a geometric mean: less ruled by a single neighbour.",
            "(1/k) sum_{o in kNN(x)} LID(o) log(d_k(x) / d_k(o))",
            "after Anderberg et al. 2024, arXiv 2401.05453, as in the code released with arXiv 2502.01385",
        ),
    )
}


def published_scores(
    neighbors: Neighbors, reference: ReferenceSet, ks: Iterable[int], *, suffix: str = ""
) -> dict[str, Float32[np.ndarray, " n"]]:
    """Compute every score of `SCORES` for every k, as columns `k_distance_k64`, `slof_k64`, ...

    `neighbors` must come from a search in `reference.embeddings` with at least the largest k.
    suffix: appended to the names; `_raw` where the embeddings were not normalised.
    """
    count, found = neighbors.distances.shape
    columns: dict[str, np.ndarray] = {}
    for k in ks:
        if not 1 <= k <= found:
            raise ValueError(f"k={k} needs as many neighbours: the search found {found}. Search with the largest k.")
        for name, spec in SCORES.items():
            column = columns[f"{name}_k{k}{suffix}"] = np.empty(count, np.float32)
            for start in range(0, count, _ROWS):
                part = neighbors.rows(start, start + _ROWS)
                column[start : start + _ROWS] = spec.function(part, reference, k)
    return columns
