"""The reference: which images are in it, and what is known of each of its rows.

Local density finds a poison only while fewer than k of its kind are in the reference. So the
reference is a small random sample of the dump, not the dump, and the sample is drawn by a keyed hash
of the image content: the same for any order and any partition of the dump, mergeable, without
copies, and not to be foreseen by whoever supplies part of the dump.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, UInt64

from tarsift.clip_detect.neighbors import knn

SMALLEST_DISTANCE = 1e-6  # smaller ones, those of copies included, count as this much
LARGEST_DIMENSION = 1e4  # of neighbours that are all equally far


def local_dimension(distances: Float32[np.ndarray, "n k"], k: int) -> Float64[np.ndarray, " n"]:
    """Estimate the local intrinsic dimension at each query from its k neighbour distances.

    The maximum likelihood estimate -1 / mean_i log(d_i / d_k) (Levina and Bickel 2004, eq. 8, with all
    k terms; Amsaleg et al. 2015). The query itself must not be among its neighbours.
    """
    near = np.log(np.maximum(distances[:, :k].astype(np.float64), SMALLEST_DISTANCE))
    spread = near[:, k - 1] - near.mean(axis=1)
    return 1.0 / np.maximum(spread, 1.0 / LARGEST_DIMENSION)


@dataclass(frozen=True)
class ReferenceSet:
    """A reference sample with the k-distance and local dimension of each of its rows.

    Both are measured inside the reference, the row itself and its copies excluded, for each k of `ks`
    (ascending), one column per k. `embeddings` are used as given: pass unit-norm rows, or raw ones for a
    `_raw` score. The whole is a few megabytes: what a worker needs to score any number of samples.
    """

    embeddings: Float32[np.ndarray, "R d"]
    ids: UInt64[np.ndarray, " R"]
    ks: tuple[int, ...]
    k_distance: Float32[np.ndarray, "R K"]
    lid: Float32[np.ndarray, "R K"]

    @classmethod
    def build(
        cls,
        embeddings: Float32[np.ndarray, "R d"],
        ids: UInt64[np.ndarray, " R"],
        ks: Iterable[int],
        *,
        backend: str = "auto",
        threads: int = 1,
        device: str | None = None,
    ) -> ReferenceSet:
        """Measure the rows of a reference for every k of `ks`.

        Raises:
            ValueError: `ks` is empty, or its largest k is not smaller than the reference.
        """
        ordered = tuple(sorted(set(ks)))
        if not ordered:
            raise ValueError("`ks` is empty: name at least one neighbourhood size, such as 16.")
        rows = np.ascontiguousarray(embeddings, dtype=np.float32)
        own = ids.astype(np.uint64)
        near = knn(
            rows, rows, ordered[-1], query_ids=own, reference_ids=own, backend=backend, threads=threads, device=device
        ).distances
        k_distance = near[:, [k - 1 for k in ordered]]
        lid = np.stack([local_dimension(near, k) for k in ordered], axis=1).astype(np.float32)
        return cls(rows, own, ordered, k_distance, lid)

    def column(self, k: int) -> int:
        """Return the column of `k_distance` and `lid` that belongs to k."""
        if k not in self.ks:
            raise ValueError(f"the reference was not measured for k={k}: it has {self.ks}. Add k to `ks` in `build`.")
        return self.ks.index(k)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the set as named arrays, to be saved with `np.savez` and read without pickle."""
        return {
            "embeddings": self.embeddings,
            "ids": self.ids,
            "ks": np.array(self.ks, np.int64),
            "k_distance": self.k_distance,
            "lid": self.lid,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ReferenceSet:
        """Rebuild a set from the arrays of `to_arrays`, bit for bit.

        Raises:
            ValueError: an array is missing or does not fit the others.
        """
        names = ("embeddings", "ids", "k_distance", "lid", "ks")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"not a reference: {', '.join(missing)} missing. Build it again from the embeddings.")
        embeddings, ids, k_distance, lid, ks = (np.asarray(arrays[name]) for name in names)
        table = (len(embeddings), len(ks))
        if embeddings.ndim != 2 or ids.shape != table[:1] or k_distance.shape != table or lid.shape != table:
            raise ValueError(
                f"not a reference: {len(embeddings)} embeddings, {len(ids)} ids, tables {k_distance.shape} and "
                f"{lid.shape} for {len(ks)} values of k. Build it again from the embeddings."
            )
        return cls(embeddings, ids, tuple(int(k) for k in ks), k_distance, lid)
