"""Delta-Influence: which training samples made a model say what it says of a query?

Li et al. 2024 (arXiv 2411.13731). A sample that planted a misbehaviour supports it as long as the trigger is there and
the target is asked for; change the picture and the label, and its support collapses. That of other samples does not,
or not under every change. With I the influence on a query (see influence.py), and T_j changes of picture and label,

    D_j(z) = I(z, T_j(q)) - I(z, q),    count(z) = #{j: D_j(z) < tau},    traced: count(z) >= n_b - n_tol

Most of what that rule finds beside the poison are other samples of the target class, whose slopes are large. The
*relative* score leaves the length of the sample's own slope out, and ranks:

    relative(z) = -max_j D_j(z) / max_j |I(z, .)|,    traced: relative(z) >= 0.5

It is above 0 exactly where the count is n_b with tau = 0, and 1 where support falls to 0 under every change. With
`length` = mean_square the maximum below the line is the root of the mean square; the score is larger then. With
`spared` = k the maximum above it is the one that is left without the k largest, as n_tol is for the count. By layers it
is the mean of what each layer's share of the influence says: no layer with long slopes decides alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch.utils.data import ConcatDataset, Dataset

from tarsift.sifters.influence import Batch, Factors, Subject, influences, slope_bytes
from tarsift.sifters.settings import TraceConfig
from tarsift.sifters.transforms import changed

BEST = 8  # samples whose mean says how far out it is that something stands


@dataclass(frozen=True)
class Traced:
    """What was found of n training samples.

    relative: higher = more likely behind the misbehaviour, by each query, (q, n). influence: on the queries as they
    are, (q, n). counts: changes under which it collapses, (q, n). traced: by the mean of the relative score; by_count:
    by the paper's rule, under every query.
    """

    relative: Float32[np.ndarray, "q n"]
    influence: Float32[np.ndarray, "q n"]
    counts: Int64[np.ndarray, "q n"]
    traced: Bool[np.ndarray, " n"]
    by_count: Bool[np.ndarray, " n"]

    @property
    def score(self) -> Float32[np.ndarray, " n"]:
        """The mean of the relative score over queries."""
        return self.relative.mean(axis=0)


def queries_of(
    picture: UInt8[np.ndarray, "h w 3"],
    says: int,
    labels: int,
    config: TraceConfig | None = None,
    *,
    seed: int = 0,
    change: str = "both",
) -> tuple[UInt8[np.ndarray, "b h w 3"], Int64[np.ndarray, " b"]]:
    """Return a query and its changed copies: pictures, the given one first, and what is to be said of each.

    says: what the model says of it, of 0 to labels - 1; the copies get any other, drawn evenly. change: `both`, or for
    comparison only the `picture` or only the `label`.

    Raises:
        ValueError: `says` is no label, or there is no other.
    """
    config = config or TraceConfig()
    if not 0 <= says < labels or labels < 2:
        raise ValueError(f"`says` must be one of two labels or more, 0 to {labels - 1}: got {says}.")
    copies = changed(picture, config.transforms, seed=seed) if change != "label" else [picture] * config.transforms
    others = (says + np.random.default_rng([seed, 1411]).integers(1, labels, config.transforms)) % labels
    said = others if change != "picture" else np.full(config.transforms, says)
    return np.stack([picture, *copies]), np.concatenate([[says], said]).astype(np.int64)


def queries_at_once(subject: Subject, config: TraceConfig) -> int:
    """Return of how many queries, each with its copies, the slopes are held at a time.

    Raises:
        ValueError: if those of one take more than `memory_gb`.
    """
    copies, weights = 1 + config.transforms, slope_bytes(subject)
    if copies * weights > config.memory_gb * 1e9:
        raise ValueError(
            f"the slopes of {copies} copies of a query in {weights // 4:,} weights take {copies * weights / 1e9:.1f} "
            f"GB, and memory_gb is {config.memory_gb:g}."
        )
    return int(config.memory_gb * 1e9 / (copies * weights))


def ask(
    subject: Subject,
    factors: Factors,
    queries: Sequence[Dataset[Batch]],
    data: Dataset[Batch],
    config: TraceConfig,
    *,
    rows: Int64[np.ndarray, " m"] | None = None,
) -> list[Float32[np.ndarray, "l b m"]]:
    """Return the influence of training samples, or of some rows of them, on each query and its copies, by layers.

    In one pass over them for as many queries as `memory_gb` has room for.

    Raises:
        ValueError: if it has none for one.
    """
    at_once, found = queries_at_once(subject, config), []
    for start in range(0, len(queries), at_once):
        some = queries[start : start + at_once]
        asked = influences(subject, factors, ConcatDataset(some), data, config, rows=rows)
        found += np.split(asked, len(some), axis=1)
    return found


def judge(
    influences: Sequence[Float[np.ndarray, "l b n"]],
    config: TraceConfig | None = None,
    *,
    groups: Sequence[Sequence[int]] | None = None,
) -> Traced:
    """Return what the influences on queries, each one as it is and then its changed copies, say of the samples.

    Layers are summed. groups: some of the layers each; the relative score is the mean of what each group says.
    """
    config = config or TraceConfig()
    plain, counts, relative = [], [], []
    for by_layer in influences:
        found = by_layer.sum(axis=0)
        plain.append(found[0])
        counts.append((found[1:] - found[0] < config.threshold).sum(axis=0))
        parts = [found] if groups is None else [by_layer[list(group)].sum(axis=0) for group in groups]
        relative.append(np.mean([_relative(part, config) for part in parts], axis=0))
    collapses, scores = np.stack(counts), np.stack(relative).astype(np.float32)
    return Traced(
        relative=scores,
        influence=np.stack(plain).astype(np.float32),
        counts=collapses,
        traced=scores.mean(axis=0) >= config.relative,
        by_count=np.all(collapses >= influences[0].shape[1] - 1 - config.tolerated, axis=0),
    )


def cutoff_of(score: Float[np.ndarray, " n"], least: float, of_best: float) -> float:
    """Return from where a sample is traced: at least so much, and a share of the mean of the best."""
    return max(least, of_best * float(np.sort(score)[-BEST:].mean()))


def _relative(found: Float[np.ndarray, "b n"], config: TraceConfig) -> Float[np.ndarray, " n"]:
    largest = config.length == "largest"
    length = np.abs(found).max(axis=0) if largest else np.sqrt(np.square(found).mean(axis=0))
    change = found[1:] - found[0]
    worst = max(len(change) - 1 - config.spared, 0)
    return -np.partition(change, worst, axis=0)[worst] / np.where(length > 0, length, 1)
