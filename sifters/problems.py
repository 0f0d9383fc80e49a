"""From captions to problems: which class a sample belongs to, and which classes are sifted together.

A sifter needs samples (x, y). The class y comes from the caption, never from the picture: a poisoned sample is a
picture of one thing under the caption of another, and a class taken from the picture would hide it among its like. So
captions are clustered, or matched with the names of classes. About ten classes make a *problem*, as in Meta-Sift's
experiments on ImageNet; they are distant ones, since samples of near-synonyms would look mislabelled.

All embeddings are of captions, by an encoder that never saw the dump, at unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from tarsift.sifters.settings import RoutingConfig

UNROUTED = -1


@dataclass(frozen=True)
class ClassRule:
    """Centers of classes; a caption is of the nearest one, and of none where its cosine is below `least`."""

    centers: Float32[np.ndarray, "c d"]
    least: float = -1.0

    def assign(self, captions: Float[np.ndarray, "n d"]) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Return the class of each caption, UNROUTED for none (or a row of zeros), and the cosine with its center."""
        classes = np.full(len(captions), UNROUTED, np.int32)
        cosines = np.zeros(len(captions), np.float32)
        for start in range(0, len(captions), 4096):
            part = slice(start, start + 4096)
            rows = captions[part].astype(np.float32)
            products = rows @ self.centers.T
            best = products.argmax(axis=1)
            cosines[part] = products[np.arange(len(rows)), best]
            routed = rows.any(axis=1) & (cosines[part] >= self.least)
            classes[part] = np.where(routed, best, UNROUTED)
        return classes, cosines


@dataclass(frozen=True)
class Problem:
    """Classes that are sifted together; its name, in which repeat and place it was made, seeds whatever is random."""

    name: str
    classes: tuple[int, ...]


def classes_by_caption(
    captions: Float[np.ndarray, "n d"], total: int, config: RoutingConfig | None = None, *, seed: int = 0
) -> ClassRule:
    """Cluster a random sample of captions, which stand for `total` of them, into classes of about `class_size`.

    Classes that are too large are split in two until none is, or one caption fills it; then too small ones are merged.

    Raises:
        ValueError: the dump is too small for two classes.
    """
    from sklearn.cluster import MiniBatchKMeans  # loaded where it is used: tasks that route load this module, too

    config = config or RoutingConfig()
    rows = np.ascontiguousarray(captions[captions.any(axis=1)], np.float32)
    wanted = min(round(total / config.class_size), len(np.unique(rows, axis=0)))
    if wanted < 2:
        raise ValueError(
            f"{total} samples are too few for two classes of {config.class_size}: lower `class_size`, or give classes."
        )
    scale = total / len(rows)
    state = int(np.random.default_rng([seed, 7]).integers(2**31))
    fitted: Any = MiniBatchKMeans(wanted, random_state=state, batch_size=max(1024, 4 * wanted), n_init="auto").fit(rows)
    parts = [rows[fitted.labels_ == label] for label in range(wanted)]
    centers = [_center(part) for part in _split([p for p in parts if len(p)], config.largest / scale, state)]
    return _merge(np.stack(centers), rows, config.smallest / scale)


def classes_by_name(names: Float[np.ndarray, "c d"], config: RoutingConfig | None = None) -> ClassRule:
    """Match captions with the embeddings of the names of classes, at unit length; what is like none is unrouted."""
    config = config or RoutingConfig()
    return ClassRule(np.asarray(names, np.float32), config.least_cosine)


def make_problems(
    centers: Float[np.ndarray, "c d"],
    sizes: Int64[np.ndarray, " c"],
    config: RoutingConfig | None = None,
    *,
    seed: int = 0,
    leave_out: Sequence[int] = (),
) -> list[Problem]:
    """Group the classes, `repeats` times, into problems of about `classes_per_problem` that lie far apart.

    In random order, every class goes to the problem, of those that are not full, whose nearest class is farthest from
    it. Empty classes and those in `leave_out` are in none.

    Raises:
        ValueError: fewer than two classes are left.
    """
    config = config or RoutingConfig()
    usable = [label for label in range(len(sizes)) if sizes[label] > 0 and label not in set(leave_out)]
    if len(usable) < 2:
        raise ValueError(f"{len(usable)} of {len(sizes)} classes can be sifted, and a problem needs two.")
    count = max(1, round(len(usable) / config.classes_per_problem))
    capacity = -(-len(usable) // count)
    alike = centers @ centers.T
    out = []
    for repeat in range(config.repeats):
        groups: list[list[int]] = [[] for _ in range(count)]
        for label in np.random.default_rng([seed, repeat, 11]).permutation(usable):
            room = [group for group in groups if len(group) < capacity]
            nearest = [max((alike[label, other] for other in group), default=-2.0 + len(group)) for group in room]
            room[int(np.argmin(nearest))].append(int(label))
        out += [Problem(f"{repeat}-{place}", tuple(sorted(group))) for place, group in enumerate(groups)]
    return out


def _split(parts: list[Float32[np.ndarray, "m d"]], largest: float, state: int) -> list[Float32[np.ndarray, "m d"]]:
    from sklearn.cluster import KMeans

    out = []
    while parts:
        part = parts.pop()
        if len(part) <= max(largest, 1) or (part == part[0]).all():
            out.append(part)
            continue
        labels = KMeans(2, random_state=state, n_init="auto").fit_predict(part)
        halves = [part[labels == label] for label in (0, 1)]
        if all(len(half) for half in halves):
            parts += halves
        else:
            out.append(part)
    return out


def _merge(centers: Float32[np.ndarray, "c d"], rows: Float32[np.ndarray, "n d"], smallest: float) -> ClassRule:
    """Drop the center of the smallest class again and again, as long as it is too small and two others are left."""
    rule = ClassRule(centers)
    while len(rule.centers) > 2:
        sizes = np.bincount(rule.assign(rows)[0], minlength=len(rule.centers))
        least = int(np.argmin(sizes))
        if sizes[least] >= smallest:
            break
        rule = ClassRule(np.delete(rule.centers, least, axis=0))
    return rule


def _center(rows: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, " d"]:
    mean = rows.mean(axis=0)
    length = np.linalg.norm(mean)
    return (mean / length if length > 1e-6 else rows[0]).astype(np.float32)
