"""Flagged images that look alike: groups that are tighter than the dump around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from tarsift.clip_detect.neighbors import knn

NEIGHBORS = 8
SCALE_NEIGHBOR = 4
NARROWER = (1.0, 0.85, 0.7, 0.55, 0.4)
SMALLEST = 5
# Near-duplicates (frames of a film, product pictures) are far tighter than any campaign: from here on
# tighter is not stronger.
TIGHT = 3.0
# Members looked at for the agreement of captions: its cost grows with their square.
CAPTIONS_COMPARED = 200


@dataclass(frozen=True)
class Look:
    """Flagged images that lie closer together than the dump around them.

    `tightness` is how many times farther a member has to go for its fourth neighbour among random
    kept samples than within the group. `agreement` is the mean cosine between the captions of the
    group, `around` the same between captions of kept samples that look alike to a member; None
    where there are no caption embeddings. The ball of `centre` and `radius` holds nine in ten members.
    """

    members: tuple[int, ...]
    tightness: float
    agreement: float | None
    around: float | None
    centre: Float32[np.ndarray, " d"]
    radius: float


def looks(
    images: Float32[np.ndarray, "n d"],
    background: Float32[np.ndarray, "b d"],
    *,
    texts: tuple[Float32[np.ndarray, "n e"], Bool[np.ndarray, " n"]] | None = None,
    background_texts: tuple[Float32[np.ndarray, "b e"], Bool[np.ndarray, " b"]] | None = None,
    threads: int = 1,
) -> list[Look]:
    """Find groups among suspects: connected by mutual nearness that the background does not show.

    Two suspects are connected if each is among the eight nearest of the other and they are closer
    than `narrower` times the distance at which either has its fourth neighbour in the background.
    The connected parts for a falling `narrower` form a tree; from it those parts are taken, none
    inside another, that make the sum of size x (tightness - 1) largest, tightness counted up to 3. Only
    parts of at least five that are tighter than their surroundings count.

    Args:
        images: unit-norm embeddings of the suspects, each image once.
        background: unit-norm embeddings of random samples that are not suspects.
        texts: unit-norm caption embeddings of the suspects, and which of them are there.
        background_texts: the same of the background.
    """
    n, around = len(images), len(background)
    if n < SMALLEST or around < 2 * SCALE_NEIGHBOR:
        return []
    outer = knn(images, background, min(2 * NEIGHBORS, around), threads=threads)
    scale = outer.distances[:, SCALE_NEIGHBOR - 1]
    ids = np.arange(n)
    inner = knn(images, images, min(NEIGHBORS, n - 1), query_ids=ids, reference_ids=ids, threads=threads)
    i, j, distance = _mutual(inner.indices, inner.distances)
    limit = np.minimum(scale[i], scale[j])
    parts: dict[tuple[int, ...], float] = {}
    for narrower in NARROWER:
        near = distance < narrower * limit
        for part in _connected(n, i[near], j[near]):
            if len(part) >= SMALLEST:
                parts.setdefault(part, len(part) * (min(_tightness(images, scale, part), TIGHT) - 1))
    found = []
    for part in _disjoint(parts):
        agreement, nearby = _agreement(part, outer.indices, texts, background_texts)
        middle = images[list(part)].mean(axis=0)
        centre = (middle / max(float(np.linalg.norm(middle)), 1e-12)).astype(np.float32)
        reach = np.linalg.norm(images[list(part)] - centre, axis=1)
        radius = float(np.quantile(reach, 0.9, method="higher")) + 1e-6
        found.append(Look(part, _tightness(images, scale, part), agreement, nearby, centre, radius))
    return sorted(found, key=lambda g: (-len(g.members) * (min(g.tightness, TIGHT) - 1), g.members))


def _mutual(
    indices: Int64[np.ndarray, "n k"], distances: Float32[np.ndarray, "n k"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, k = indices.shape
    i, j = np.repeat(np.arange(n), k), indices.ravel()
    forward, backward = i * n + j, j * n + i
    mutual = np.isin(backward, forward) & (i < j)
    return i[mutual], j[mutual], distances.ravel()[mutual]


def _connected(n: int, i: np.ndarray, j: np.ndarray) -> Iterator[tuple[int, ...]]:
    parent = list(range(n))

    def root(a: int) -> int:
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    for a, b in zip(i.tolist(), j.tolist(), strict=True):
        parent[root(a)] = root(b)
    members: dict[int, list[int]] = {}
    for a in range(n):
        members.setdefault(root(a), []).append(a)
    return (tuple(part) for part in members.values())


def _tightness(images: np.ndarray, scale: np.ndarray, part: tuple[int, ...]) -> float:
    own, ids = images[list(part)], np.arange(len(part))
    k = min(SCALE_NEIGHBOR, len(part) - 1)
    within = knn(own, own, k, query_ids=ids, reference_ids=ids).distances[:, -1]
    return float(np.median(scale[list(part)] / np.maximum(within, 1e-3)))


def _disjoint(parts: dict[tuple[int, ...], float]) -> list[tuple[int, ...]]:
    """Choose parts, none inside another, with the largest sum of values; parts of zero or less are left out."""
    by_size = sorted(parts, key=len)  # parts are nested or disjoint
    best: dict[tuple[int, ...], tuple[float, list[tuple[int, ...]]]] = {}
    outermost: list[tuple[int, ...]] = []
    for part in by_size:
        inside = set(part)
        below = [p for p in outermost if p[0] in inside]
        value = sum(best[p][0] for p in below)
        chosen = [q for p in below for q in best[p][1]]
        if parts[part] > max(value, 0.0):
            value, chosen = parts[part], [part]
        best[part] = (value, chosen)
        outermost = [p for p in outermost if p not in below] + [part]
    return [q for p in outermost for q in best[p][1]]


def _agreement(part, background_near, texts, background_texts) -> tuple[float | None, float | None]:
    if texts is None or background_texts is None:
        return None, None
    pick = np.array([m for m in part if texts[1][m]][:CAPTIONS_COMPARED], int)
    nearby = []
    for m in pick:
        near = background_near[m][background_texts[1][background_near[m]]]
        if len(near) > 1:
            nearby.append(_mean_pair(background_texts[0][near]))
    own = _mean_pair(texts[0][pick]) if len(pick) > 1 else None
    return own, float(np.mean(nearby)) if nearby else None


def _mean_pair(rows: Float32[np.ndarray, "n d"]) -> float:
    n = len(rows)
    return float((np.square(rows.sum(axis=0)).sum() - np.square(rows).sum()) / (n * (n - 1)))
