"""How well a score finds known poison: AUROC beside what matters when samples are removed.

At the rates of real poisonings an AUROC of .99 still hides thousands of clean samples above the
poison, so `figures` also says what removing 1, 5 and 10 percent would catch and cost.

For a score that is measured against several kinds of poison, `rank` sorts it once; `sweep` counts
for one kind, and from the counts come the same figures and the curves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from sklearn.metrics import average_precision_score, roc_auc_score

FRACTIONS = (0.01, 0.05, 0.10)
# A curve is thinned to what can be told apart when each axis has so many steps.
STEPS = 128

NAN_SCORE = "a score is NaN: mark samples without a score with `scored`."


def auroc(
    scores: Float[np.ndarray, " n"], is_poison: Bool[np.ndarray, " n"], *, scored: Bool[np.ndarray, " n"] | None = None
) -> float:
    """Return the chance that a random poison scores higher than a random clean sample, among the scored ones."""
    values, poison = _scored(scores, is_poison, scored)
    return float(roc_auc_score(poison, values))


def average_precision(
    scores: Float[np.ndarray, " n"], is_poison: Bool[np.ndarray, " n"], *, scored: Bool[np.ndarray, " n"] | None = None
) -> float:
    """Return the mean precision over the ranks of the poison, among the scored samples."""
    values, poison = _scored(scores, is_poison, scored)
    return float(average_precision_score(poison, values))


def recall_at(
    scores: Float[np.ndarray, " n"],
    is_poison: Bool[np.ndarray, " n"],
    fraction: float,
    *,
    scored: Bool[np.ndarray, " n"] | None = None,
) -> float:
    """Return the share of all poison, unscored included, that is caught by removing the top fraction.

    fraction: of the scored samples, rounded up to whole ones. Samples tied at the cutoff count in proportion,
    as if chance decided among them.
    """
    removed = _removed(scores, is_poison, fraction, scored)
    return float(removed[is_poison].sum() / is_poison.sum())


def clean_lost_at(
    scores: Float[np.ndarray, " n"],
    is_poison: Bool[np.ndarray, " n"],
    fraction: float,
    *,
    scored: Bool[np.ndarray, " n"] | None = None,
) -> float:
    """Return the number of clean samples lost by removing the top fraction (see `recall_at`)."""
    return float(_removed(scores, is_poison, fraction, scored)[~is_poison].sum())


@dataclass(frozen=True)
class Ranking:
    """The scored samples from the most suspicious one down.

    Attributes:
        order: their positions.
        ends: for each distinct value, how many samples have it or a higher one: equal ones stand or fall together.
    """

    order: Int64[np.ndarray, " m"]
    ends: Int64[np.ndarray, " t"]


def rank(scores: Float[np.ndarray, " n"], *, scored: Bool[np.ndarray, " n"] | None = None) -> Ranking:
    """Sort the scored samples.

    Raises:
        ValueError: a score is NaN.
    """
    at = np.arange(len(scores)) if scored is None else np.flatnonzero(scored)
    values = scores[at]
    if np.isnan(values).any():
        raise ValueError(NAN_SCORE)
    down = np.argsort(values, kind="stable")[::-1]
    values = values[down]
    last = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1) if len(values) else down
    return Ranking(at[down], last + 1)


@dataclass(frozen=True)
class Sweep:
    """What a threshold removes while it falls from over the highest score to the lowest.

    Attributes:
        removed: scored samples at or above the threshold; from 0 to all.
        caught: poison among them.
        lost: clean samples among them; with the poison all of them, unless some are neither.
        poison: all poison, unscored included.
    """

    removed: Int64[np.ndarray, " t"]
    caught: Int64[np.ndarray, " t"]
    lost: Int64[np.ndarray, " t"]
    poison: int


def sweep(
    ranking: Ranking, is_poison: Bool[np.ndarray, " n"], *, is_clean: Bool[np.ndarray, " n"] | None = None
) -> Sweep:
    """Count poison and clean samples above every threshold.

    Args:
        ranking: of the scores of these samples.
        is_poison: the poison to be found.
        is_clean: the rest where None; samples that are neither (poison of other kinds) only take up room.

    Raises:
        ValueError: there is no poison or nothing clean among the scored samples.
    """
    clean = ~is_poison if is_clean is None else is_clean

    def above(labels: Bool[np.ndarray, " n"]) -> Int64[np.ndarray, " t"]:
        counts = np.cumsum(labels[ranking.order], dtype=np.int64)
        return np.concatenate([np.zeros(1, np.int64), counts[ranking.ends - 1]])

    found = Sweep(np.concatenate([[0], ranking.ends]), above(is_poison), above(clean), int(is_poison.sum()))
    _check_both(int(found.caught[-1]), int(found.caught[-1] + found.lost[-1]))
    return found


def figures(counts: Sweep, fractions: Sequence[float] = FRACTIONS) -> dict[str, float]:
    """Return `auroc`, `average_precision`, and `recall_at_F` and `clean_lost_at_F` for each fraction F.

    They are those of the functions of these names, from one sorting.
    """
    caught, lost, removed = counts.caught, counts.lost, counts.removed
    pairs = float(np.diff(lost) @ (caught[1:] + caught[:-1])) / 2  # a tie is half a pair
    rows = {
        "auroc": pairs / (float(caught[-1]) * float(lost[-1])),
        "average_precision": float(np.diff(caught) @ _precision(counts)) / float(caught[-1]),
    }
    for fraction in fractions:
        budget = _budget(fraction, int(removed[-1]))
        rows[f"recall_at_{fraction:g}"] = float(np.interp(budget, removed, caught)) / counts.poison
        rows[f"clean_lost_at_{fraction:g}"] = float(np.interp(budget, removed, lost))
    return rows


@dataclass(frozen=True)
class Curve:
    """A line in the unit square, thinned to at most 4 x `STEPS` + 4 points; `x` never falls.

    Kept are the points at which the whole one enters and leaves each cell of a grid, so that it can
    be drawn and integrated to within one step of `STEPS`; neither end is lost.
    """

    x: Float64[np.ndarray, " p"]
    y: Float64[np.ndarray, " p"]


def roc_curve(counts: Sweep) -> Curve:
    """Return the share of scored poison found (y) over the share of scored clean samples removed (x).

    Straight between its points, also where many samples are tied; the area below is `auroc`. Steps in x
    are those of the logarithm, as only small rates are of interest.
    """
    x, y = counts.lost / counts.lost[-1], counts.caught / counts.caught[-1]
    return _staircase(x, y, counts.lost)


def removal_curve(counts: Sweep) -> Curve:
    """Return `recall_at` (y) over the removed share of the scored samples (x).

    Straight between its points: chance decides among tied samples. Steps in x are those of the logarithm.
    """
    x, y = counts.removed / counts.removed[-1], counts.caught / counts.poison
    return _staircase(x, y, counts.removed)


def precision_recall_curve(counts: Sweep) -> Curve:
    """Return the share of poison in what is removed (y) over the share of scored poison found (x).

    A point holds from the x before it, or 0, up to its own: the area below these steps is
    `average_precision`. In each step of `STEPS` the first and last, highest and lowest are kept.
    """
    rises = np.flatnonzero(np.diff(counts.caught))
    recall, precision = counts.caught[1:][rises] / counts.caught[-1], _precision(counts)[rises]
    cell = np.floor(recall * STEPS)
    by_height = np.lexsort((precision, cell))
    keep = np.zeros(len(recall), bool)
    for edge in (np.diff(cell, prepend=-1) > 0, np.diff(cell, append=STEPS + 1) > 0):
        keep |= edge
        keep[by_height[edge]] = True
    return Curve(recall[keep], precision[keep])


def _precision(counts: Sweep) -> Float64[np.ndarray, " s"]:
    """Share of poison above each threshold but the first, above which there is nothing."""
    return counts.caught[1:] / np.maximum(1, counts.caught[1:] + counts.lost[1:])


def _staircase(x: np.ndarray, y: np.ndarray, samples: Int64[np.ndarray, " t"]) -> Curve:
    """Thin a curve that rises in both directions; its steps in x are those of log(1 + samples)."""
    cell = np.floor(STEPS * np.log1p(samples) / np.log1p(samples[-1])) + np.floor(STEPS * y)
    enters = np.diff(cell, prepend=-1) > 0
    keep = enters | np.append(enters[1:], True)
    return Curve(x[keep], y[keep])


def _scored(scores: np.ndarray, is_poison: np.ndarray, scored: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Drop unscored samples and check what is left."""
    usable = np.ones(len(is_poison), bool) if scored is None else scored
    if is_poison.dtype != bool or usable.dtype != bool:
        raise ValueError(f"`is_poison` and `scored` must be boolean: got {is_poison.dtype} and {usable.dtype}.")
    if scores.shape != is_poison.shape or usable.shape != is_poison.shape:
        raise ValueError(f"one score and one label per sample: got {scores.shape} scores, {is_poison.shape} labels.")
    values, poison = scores[usable], is_poison[usable]
    _check_both(int(poison.sum()), len(poison))
    if np.isnan(values).any():
        raise ValueError(NAN_SCORE)
    return values, poison


def _check_both(poison: int, samples: int) -> None:
    if not 0 < poison < samples:
        raise ValueError(
            f"of {samples} scored samples {poison} are poison: detection is measured on both poison "
            "and clean samples. Check that the labels belong to these samples."
        )


def _budget(fraction: float, samples: int) -> int:
    """Return how many samples the top fraction is, rounded up; exact, so that 0.07 of 100 are 7."""
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be over 0 and at most 1 (0.01 for one percent): got {fraction}.")
    return math.ceil(Fraction(repr(float(fraction))) * samples)


def _removed(
    scores: np.ndarray, is_poison: np.ndarray, fraction: float, scored: np.ndarray | None
) -> Float[np.ndarray, " n"]:
    """For each sample the chance of being removed: 1 above the cutoff, a share at it, 0 below and if unscored."""
    values, _ = _scored(scores, is_poison, scored)
    budget = _budget(fraction, len(values))
    cutoff = np.partition(values, len(values) - budget)[len(values) - budget]
    over, at = values > cutoff, values == cutoff
    chance = over + at * ((budget - over.sum()) / at.sum())
    if scored is None:
        return chance
    removed = np.zeros(len(is_poison))
    removed[scored] = chance
    return removed
