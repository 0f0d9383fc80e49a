"""What a sifter returns, the check of labels all of them share, and the choice of a clean base set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

State = dict[str, np.ndarray]  # of a sifter at work, for a later run to go on from


@dataclass(frozen=True)
class SiftResult:
    """A verdict on n labelled samples.

    score: higher = more suspicious, finite. kept: which samples the method itself would keep; None where it only ranks.
    details: other arrays, one value per sample. facts: what happened, as plain values.
    """

    score: Float32[np.ndarray, " n"]
    kept: Bool[np.ndarray, " n"] | None = None
    details: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, int | float | str] = field(default_factory=dict)


def check_labels(labels: Int64[np.ndarray, " n"], n: int) -> tuple[Int64[np.ndarray, " n"], int]:
    """Return the labels renumbered without gaps, and the number of classes that occur.

    Raises:
        ValueError: not one per sample, negative, or fewer than two classes.
    """
    labels = np.asarray(labels)
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`labels` must be {n} whole numbers, one per sample: got {labels.dtype} {labels.shape}.")
    if n and labels.min() < 0:
        raise ValueError("`labels` must be 0 and up: leave samples without a class out.")
    names, renumbered = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a sifter needs samples of two classes at least: got {len(names)}.")
    return renumbered.astype(np.int64), len(names)


def clean_base_set(
    score: Float[np.ndarray, " n"], labels: Int64[np.ndarray, " n"], count: int
) -> Int64[np.ndarray, " count"]:
    """Return the rows of the `count` least suspicious samples, from each class in proportion to its size, in order.

    No class gives all it has, so that the worst of each is never chosen; ties go to the earlier row.

    Raises:
        ValueError: more than there are, less one per class.
    """
    labels, classes = check_labels(labels, len(score))
    sizes = np.bincount(labels, minlength=classes)
    if not 0 <= count <= len(labels) - classes:
        raise ValueError(f"`count` must be at most {len(labels) - classes}, a sample less per class: got {count}.")
    quota = quotas(sizes, count)
    chosen = []
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[np.argsort(score[rows], kind="stable")[: quota[label]]])
    return np.sort(np.concatenate(chosen))


def quotas(sizes: Int64[np.ndarray, " c"], count: int) -> Int64[np.ndarray, " c"]:
    """Share `count` among classes by their sizes, with the largest remainders rounded up.

    One sample at least of each class is left; `count` is at most what there is then.
    """
    exact = sizes * (count / max(1, sizes.sum()))
    quota = np.minimum(np.floor(exact).astype(np.int64), sizes - 1)
    for label in np.argsort(-(exact - quota), kind="stable"):
        room = min(count - quota.sum(), sizes[label] - 1 - quota[label], 1)
        quota[label] += max(0, room)
    while quota.sum() < count:  # classes of one sample gave nothing: the largest fill in
        quota[np.argmax(sizes - quota)] += 1
    return quota
