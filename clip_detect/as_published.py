"""The local-density scores as the code released with arXiv 2502.01385 computes them, errors included.

For comparisons with published numbers, never to clean a dump by: `scores` holds the definitions.
Written anew from what that code does (HanxunH/Detect-CLIP-Backdoor-Samples at ff2399a, folder
backdoor_sample_detector). Where it departs from the definitions, with the names used below:

- *batch as reference*: a sample is compared with the other samples of its random batch alone, so its
  score depends on its company, and on the order in the batch by *shifted row*.
- *raw features*: embeddings are not normalised.
- *captions as neighbours*: with captions the reference is the images and the captions of the batch,
  less the sample's own two. The released script does so for CLIP, its README does not.
- *one neighbour too far*: column k of a sorted row counts the sample itself in the reference's table,
  but not on the query's side: d_k of a neighbour is set against d_{k+1} of the query.
- *shifted row*: a neighbour is looked up by its position among the columns left once the query's own
  are dropped. Every neighbour behind the query in the batch is taken for the row before it (behind its
  own caption too: two before), and about half of all look-ups find an unrelated row.
- *self in the dimension*: the k distances of a reference row's LID begin with the 0 to itself.
- *bias in the logarithm*: LID is -k / sum log(d_i / d_k + 1e-4). With the zero above it is at
  most k / 9.21 for a reference row, nearly a constant, and DAO ranks like SLOF.
- *mean of exponents*: DAO is the mean of LID log ratio in place of the mean of ratio ^ LID.
- *sentinels*: a mean that is NaN (0/0) or infinite (x/0) becomes 1000, one of minus infinity (log 0) becomes 0.
  So copies, and who is next to them, tie at the top or look clean.
- *another k*: LID runs with k = 64, the other scores with 16.

Where this departs from the released code: batches are floor(n / batch_size) equal ones, without a short
or padded last batch; LID has the sentinels too, instead of NaN; distances are always taken as
differences, which is an option there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

BATCH_SIZE = 2048
K = 16
LID_K = 64

_BIAS = 1e-4
_SENTINEL = 1000.0

# (k + 1 nearest distances of each image, the rows they are looked up at, k + 1 smallest of each row of the table)
_Tables = tuple[Float64[np.ndarray, "b k+1"], Int64[np.ndarray, "b k+1"], Float64[np.ndarray, "R k+1"]]


def equal_batches(n: int, batch_size: int, *, seed: int) -> list[Int64[np.ndarray, " b"]]:
    """Split the rows 0..n-1, shuffled, into floor(n / batch_size) batches, at least one, of sizes one apart at most."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1: got {batch_size}.")
    rows = np.random.default_rng(seed).permutation(n)
    return np.array_split(rows, max(1, n // batch_size)) if n else []


def k_distance_as_published(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "n d"] | None = None,
    *,
    seed: int,
    k: int = K,
    batch_size: int = BATCH_SIZE,
) -> Float32[np.ndarray, " n"]:
    """Return the distance to the neighbour after the k-th of the batch (*one neighbour too far*)."""
    return _per_batch(lambda tables: tables[0][:, k], images, captions, seed, k, batch_size)


def lid_as_published(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "n d"] | None = None,
    *,
    seed: int,
    k: int = LID_K,
    batch_size: int = BATCH_SIZE,
) -> Float32[np.ndarray, " n"]:
    """Return the local dimension in the batch (*one neighbour too far*, *bias in the logarithm*, *another k*)."""
    return _per_batch(lambda tables: _dimension(tables[0]), images, captions, seed, k, batch_size)


def slof_as_published(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "n d"] | None = None,
    *,
    seed: int,
    k: int = K,
    batch_size: int = BATCH_SIZE,
) -> Float32[np.ndarray, " n"]:
    """Return the mean of d_{k+1}(x) / d_k(o) over rows o of which about half are x's neighbours (*shifted row*)."""

    def slof(tables: _Tables) -> np.ndarray:
        near, looked_up, table = tables
        return (near[:, k, None] / table[looked_up[:, :k], k]).mean(axis=1)

    return _per_batch(slof, images, captions, seed, k, batch_size)


def dao_as_published(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "n d"] | None = None,
    *,
    seed: int,
    k: int = K,
    batch_size: int = BATCH_SIZE,
) -> Float32[np.ndarray, " n"]:
    """Return the mean of LID(o) log(d_{k+1}(x) / d_k(o)) over the rows o of `slof_as_published`."""

    def dao(tables: _Tables) -> np.ndarray:
        near, looked_up, table = tables
        rows = looked_up[:, :k]
        return (_dimension(table)[rows] * np.log(near[:, k, None] / table[rows, k])).mean(axis=1)

    return _per_batch(dao, images, captions, seed, k, batch_size)


def _per_batch(
    score: Callable[[_Tables], np.ndarray],
    images: np.ndarray,
    captions: np.ndarray | None,
    seed: int,
    k: int,
    batch_size: int,
) -> Float32[np.ndarray, " n"]:
    out = np.empty(len(images), np.float32)
    for rows in equal_batches(len(images), batch_size, seed=seed):
        if not 1 <= k <= len(rows) - 2:
            raise ValueError(
                f"a batch needs k + 2 samples, each scored by k + 1 others: got k={k} and a batch of {len(rows)}. "
                "Lower `k` or give more samples."
            )
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = score(_tables(images[rows], None if captions is None else captions[rows], k)).astype(np.float32)
        out[rows] = np.nan_to_num(found, nan=_SENTINEL, posinf=_SENTINEL, neginf=0.0)
    return out


def _tables(images: np.ndarray, captions: np.ndarray | None, k: int) -> _Tables:
    import torch

    count = len(images)
    reference = images if captions is None else np.concatenate([images, captions])
    points = torch.from_numpy(np.ascontiguousarray(reference, dtype=np.float32))
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    table = np.sort(np.partition(distance, k, axis=1)[:, : k + 1], axis=1)  # begins with the 0 to itself

    others, row = distance[:count], np.arange(count)
    dropped = [row] if captions is None else [row, row + count]
    for column in dropped:
        others[row, column] = np.inf
    nearest = np.argsort(others, axis=1, kind="stable")[:, : k + 1]
    near = np.take_along_axis(others, nearest, axis=1)
    looked_up = nearest - sum((nearest > column[:, None]).astype(np.int64) for column in dropped)  # *shifted row*
    return near.astype(np.float64), looked_up, table.astype(np.float64)


def _dimension(ascending: Float64[np.ndarray, "n k+1"]) -> Float64[np.ndarray, " n"]:
    """-k / sum_{i<k} log(d_i / d_k + 1e-4), with i and k columns counted from 0."""
    k = ascending.shape[1] - 1
    return -k / np.log(ascending[:, :k] / ascending[:, k:] + _BIAS).sum(axis=1)
