"""From what queries say of candidates to a verdict on them: queries in rounds, neighbours, and what stands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, UInt8

from tarsift.clip_detect.neighbors import knn
from tarsift.operators.schema import append, matrix
from tarsift.operators.trace_settings import TracingConfig
from tarsift.sifters.delta_influence import cutoff_of

NORMAL = 1.4826  # by which the median distance from the median is the deviation of a normal distribution
# What is known of a candidate, beside where its picture lies.
TRACE_COLUMNS = {
    "candidate": "why it was looked at: `suspect`, `alike` (its caption) or `random`, or several of these",
    "influence": "on what the model says of the queries that were asked, their mean; positive = supports it",
    "collapses": "changes under which that support falls, of the query with the fewest",
    "trace_score": "mean `own_score` of the candidates most alike to the model, in deviations above the random ones",
    "own_score": "how far its support falls under every change, relative to its influences: the mean over all queries",
    "by_count": "the rule of the paper: it collapses under all changes but a few",
    "traced": "`trace_score` is at least `above`, and at least `of_best` of that of the best",
}
RANDOM = "random"  # candidates that show what is usual


@dataclass(frozen=True)
class Question:
    """What is traced: pictures of which the model says the first of some captions, each of another concept.

    pictures: (q, h, w, 3) uint8 at the encoder's size. samples: where those are from that are samples themselves,
    which say nothing of themselves; none for pictures from elsewhere.
    """

    pictures: UInt8[np.ndarray, "q h w 3"]
    concepts: tuple[str, ...]
    samples: tuple[tuple[str, int], ...] = ()


def ask_in_rounds(
    ask: Callable[[int, Question], pa.Table],
    question: Question,
    echo: Callable[[pa.Table], Question | None],
    config: TracingConfig,
) -> tuple[pa.Table, float, int]:
    """Return the verdict on candidates, its cutoff, and how many of them were queries in the last round.

    Args:
        ask: from the number of a round and its question to what it says of every candidate (see `TraceSlice`).
        echo: see `echo_of`.
    """
    asked = ask(0, question)
    found, echoes = combined(asked, None, config), 0
    for number in range(1, config.rounds + 1):
        further = echo(found)
        if further is None:
            break
        found, echoes = combined(asked, ask(number, further), config), len(further.samples)
    return *with_verdict(found, config), echoes


def combined(asked: pa.Table, echoed: pa.Table | None, config: TracingConfig) -> pa.Table:
    """Return candidates with what all queries say of them, the most probable first.

    Appends `own_score`, the mean of the relative score over all queries, and `trace_score`, the mean of that over the
    candidates whose pictures are nearest to the model: what was planted lies together. Of the queries that were asked
    `influence` (their mean), `collapses` (the least) and `by_count`, the paper's rule.

    Args:
        asked: by the queries that were asked; echoed: by candidates that were taken for queries, of the same rows.
    """
    tables = [asked] if echoed is None else [asked, echoed]
    scores = np.concatenate([matrix(table["relative"])[0] for table in tables], axis=1)
    own = np.nanmean(scores, axis=1)
    collapses = matrix(asked["collapses"])[0].min(axis=1).astype(np.int32)
    score = smoothed(own, matrix(asked["embedding"])[0], config.neighbors)
    out = append(
        asked.drop_columns(["relative", "embedding"]),
        {
            "trace_score": score.astype(np.float32),
            "own_score": own.astype(np.float32),
            "influence": matrix(asked["influence"])[0].mean(axis=1),
            "collapses": collapses,
            "by_count": collapses >= config.method.transforms - config.method.tolerated,
        },
    )
    return out.take(pa.array(np.argsort(-score, kind="stable")))


def smoothed(
    scores: Float[np.ndarray, " n"], embedded: Float32[np.ndarray, "n d"], neighbors: int
) -> Float[np.ndarray, " n"]:
    """Return the mean score of each one's nearest others; the scores themselves where none are asked for or there."""
    k = min(neighbors, len(scores) - 1)
    if k < 1:
        return scores
    places = np.arange(len(scores))
    return scores[knn(embedded, embedded, k, query_ids=places, reference_ids=places).indices].mean(axis=1)


def with_verdict(candidates: pa.Table, config: TracingConfig) -> tuple[pa.Table, float]:
    """Turn `trace_score` into deviations above the candidates that were drawn at random, and append `traced`.

    Median and deviation are robust, since a part of those may be what is looked for. Where something stands far out,
    the cutoff, which is returned beside the table, is higher than `above`.
    """
    score = np.asarray(candidates["trace_score"].combine_chunks(), np.float64)
    random = score[[RANDOM in why for why in candidates["candidate"].to_pylist()]]
    middle = float(np.median(random))
    spread = NORMAL * float(np.median(np.abs(random - middle)))
    above = ((score - middle) / (spread or 1.0)).astype(np.float32)
    cutoff = cutoff_of(above, config.above, config.of_best)
    return append(candidates, {"trace_score": above, "traced": above >= cutoff}), cutoff
