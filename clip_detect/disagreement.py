"""Neighbour disagreement: are images that lie together for one encoder less alike to another than they should be?

In an encoder that has learned a trigger, images of all kinds lie together that carry it. To one that never saw the
dump, the witness, they are as different as any. Natural clusters, however rare or dense, are alike to both. So this
tells poison from what is merely rare, and poison that lies inside a class from that class, without a look at captions.

How alike two images are to the witness is expected to rise with how alike they are to the first encoder: by a line
through pairs of clean neighbours. What is missing is the disagreement of a pair; that of an image is the mean over its
neighbours in the enriched reference, and then over itself and them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from tarsift.clip_detect.agreement import neighbor_cosines
from tarsift.clip_detect.neighbors import Neighbors


@dataclass(frozen=True)
class Disagreement:
    """What neighbours are compared by: the enriched reference as the witness sees it.

    witness: embeddings of unit length. own: how much each of them disagrees with its own neighbours. line: intercept
    and slope of the cosine that is expected of the witness over that of the first encoder.
    """

    witness: Float32[np.ndarray, "E d"]
    own: Float64[np.ndarray, " E"]
    line: Float64[np.ndarray, " 2"]

    @classmethod
    def fit(
        cls,
        witness: Float32[np.ndarray, "E d"],
        among: Neighbors,
        sample: Float32[np.ndarray, "n d"],
        near: Neighbors,
    ) -> Disagreement:
        """Fit the line on a sample, which is mostly clean, and compare the reference with itself.

        among, near: the nearest in the reference, to the first encoder, of each of its rows and of the sample.
        """
        line = _fit_line(witness, sample, near)
        own = _missing(witness, witness, among, line)
        return cls(witness, np.where(np.isnan(own), np.nanmedian(own), own), line)

    def score(self, witness: Float32[np.ndarray, "n d"], near: Neighbors) -> Float64[np.ndarray, " n"]:
        """Return the mean disagreement of each image and its neighbours; around 0, at most about 2.

        witness: embeddings of unit length; NaN for a row of zeros, which the witness has not seen. near: the nearest
        in the reference to the first encoder.
        """
        total = _missing(witness, self.witness, near, self.line) + self.own[near.indices].sum(axis=1)
        return total / (near.indices.shape[1] + 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the whole as named arrays, to be saved with `np.savez`."""
        return {"witness": self.witness, "own": self.own, "line": self.line}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Disagreement:
        """Rebuild what `to_arrays` gave, bit for bit."""
        return cls(arrays["witness"], arrays["own"], arrays["line"])


def _missing(
    own: Float32[np.ndarray, "n d"],
    others: Float32[np.ndarray, "E d"],
    near: Neighbors,
    line: Float64[np.ndarray, " 2"],
) -> Float64[np.ndarray, " n"]:
    """Return how far the cosines with the neighbours are below the line, on the average; NaN for a row of zeros."""
    out = np.empty(len(own))
    for part, first, second in _cosines(own, others, near):
        out[part] = line[0] + line[1] * first.mean(axis=1) - second.mean(axis=1)
    return np.where(own.any(axis=1), out, np.nan)


def _fit_line(witness: np.ndarray, sample: np.ndarray, near: Neighbors) -> Float64[np.ndarray, " 2"]:
    """Least squares over all pairs of the sample; flat where the first encoder sees no difference between pairs."""
    sums = np.zeros(5)
    for part, first, second in _cosines(sample, witness, near):
        x, y = (cosine[sample[part].any(axis=1)] for cosine in (first, second))
        sums += x.size, x.sum(), y.sum(), (x * x).sum(), (x * y).sum()
    count, x, y, xx, xy = sums
    spread = count * xx - x * x
    slope = (count * xy - x * y) / spread if spread > 1e-9 * count * count else 0.0
    return np.array([(y - slope * x) / max(count, 1.0), slope])


def _cosines(own: np.ndarray, others: np.ndarray, near: Neighbors) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield parts of the rows, and their neighbours' cosines (n, m) to the first encoder and to the witness."""
    for part, to_witness in neighbor_cosines(own, others, near.indices):
        to_first = 1 - np.square(near.distances[part], dtype=np.float64) / 2  # of vectors of unit length
        yield part, to_first, to_witness
