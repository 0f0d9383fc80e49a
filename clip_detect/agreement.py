"""Caption excess: do an image's suspect neighbours say what it says, more than its clean neighbours do?

Poisoned images that lie together have captions that agree, whatever the images show: their captions were written
for the attack. The captions of the clean images that *look* like a poisoned one do not agree with its own. Among
natural images the two go together. So the excess of the first over the second confirms a suspicion. It is no
verdict by itself, and an attacker who varies the captions weakens it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt64

from tarsift.clip_detect.neighbors import knn

_BYTES = 4 << 20  # of neighbours at a time, so that they stay in the cache


@dataclass(frozen=True)
class CaptionExcess:
    """What captions are compared with; all embeddings at unit length, a missing caption is a row of zeros.

    suspects: captions of the enriched reference. images, ids, captions: clean samples.
    """

    suspects: Float32[np.ndarray, "E d"]
    images: Float32[np.ndarray, "C d"]
    ids: UInt64[np.ndarray, " C"]
    captions: Float32[np.ndarray, "C d"]
    clean_neighbors: int

    def score(
        self,
        images: Float32[np.ndarray, "n d"],
        ids: UInt64[np.ndarray, " n"],
        captions: Float32[np.ndarray, "n d"],
        near_suspects: Int64[np.ndarray, "n m"],
        *,
        backend: str = "auto",
        threads: int = 1,
        device: str | None = None,
    ) -> Float64[np.ndarray, " n"]:
        """Return mean cosine with the captions of suspect neighbours less that with clean neighbours, -2 to 2.

        near_suspects: rows of the enriched reference nearest to each image. 0 for an image without a caption.
        """
        near = knn(
            images, self.images, self.clean_neighbors, query_ids=ids, reference_ids=self.ids,
            backend=backend, threads=threads, device=device,
        )  # fmt: skip
        excess = _agreement(captions, self.suspects, near_suspects) - _agreement(captions, self.captions, near.indices)
        return np.where(captions.any(axis=1), excess, 0.0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the whole as named arrays, to be saved with `np.savez`."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> CaptionExcess:
        """Rebuild what `to_arrays` gave, bit for bit."""
        plain = {f.name: arrays[f.name] for f in fields(cls)}
        return cls(**{**plain, "clean_neighbors": int(plain["clean_neighbors"])})


def _agreement(
    own: Float32[np.ndarray, "n d"], others: Float32[np.ndarray, "R d"], near: Int64[np.ndarray, "n m"]
) -> Float64[np.ndarray, " n"]:
    """Mean cosine of each caption with those of its neighbours that have one; 0 where none has."""
    out = np.empty(len(own))
    has_caption = np.asarray(others.any(axis=1))
    for part, agreeing in neighbor_cosines(own, others, near):
        out[part] = agreeing.sum(axis=1) / np.maximum(has_caption[near[part]].sum(axis=1), 1)
    return out


def neighbor_cosines(
    own: Float32[np.ndarray, "n d"], others: Float32[np.ndarray, "R d"], near: Int64[np.ndarray, "n m"]
) -> Iterator[tuple[slice, Float64[np.ndarray, "r m"]]]:
    """Yield parts of the rows, with the cosines of each row and the others that are near it."""
    rows = max(1, _BYTES // (near.shape[1] * own.shape[1] * own.itemsize))
    for start in range(0, len(own), rows):
        part = slice(start, start + rows)
        yield part, cosines(own[part], others[near[part]])


def cosines(a: Float32[np.ndarray, "n d"], b: Float32[np.ndarray, "n m d"]) -> Float64[np.ndarray, "n m"]:
    """Return the products of each row of unit length with those that belong to it.

    Each is summed by itself: the bits of a matrix product depend on how many rows there are.
    """
    return np.einsum("nd,nmd->nm", a, b, optimize=False).astype(np.float64)
