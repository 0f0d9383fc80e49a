"""How well a score finds known poison: AUROC beside what matters when samples are removed.

At the rates of real poisonings an AUROC of .99 still hides thousands of clean samples above the
poison, so each row also says what removing 1, 5 and 10 percent would catch and cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score, roc_auc_score

FRACTIONS = (0.01, 0.05, 0.10)


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


def detection_table(
    scores: Mapping[str, Float[np.ndarray, " n"]],
    is_poison: Bool[np.ndarray, " n"],
    *,
    scored: Bool[np.ndarray, " n"] | None = None,
) -> list[dict[str, Any]]:
    """Measure every score: one row each with `score`, `auroc`, `average_precision`, recalls and clean samples lost.

    Raises:
        ValueError: there is no poison or nothing clean among the scored samples, or shapes differ.
    """
    table = []
    for name, values in scores.items():
        row: dict[str, Any] = {
            "score": name,
            "auroc": auroc(values, is_poison, scored=scored),
            "average_precision": average_precision(values, is_poison, scored=scored),
        }
        for fraction in FRACTIONS:
            row[f"recall_at_{fraction:.2f}"] = recall_at(values, is_poison, fraction, scored=scored)
            row[f"clean_lost_at_{fraction:.2f}"] = clean_lost_at(values, is_poison, fraction, scored=scored)
        row["samples"], row["poison"] = len(is_poison), int(is_poison.sum())
        row["unscored"] = 0 if scored is None else int((~scored).sum())
        row["unscored_poison"] = 0 if scored is None else int((is_poison & ~scored).sum())
        table.append(row)
    return table


def _scored(scores: np.ndarray, is_poison: np.ndarray, scored: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Drop unscored samples and check what is left."""
    usable = np.ones(len(is_poison), bool) if scored is None else scored
    if is_poison.dtype != bool or usable.dtype != bool:
        raise ValueError(f"`is_poison` and `scored` must be boolean: got {is_poison.dtype} and {usable.dtype}.")
    if scores.shape != is_poison.shape or usable.shape != is_poison.shape:
        raise ValueError(f"one score and one label per sample: got {scores.shape} scores, {is_poison.shape} labels.")
    values, poison = scores[usable], is_poison[usable]
    if poison.all() or not poison.any():
        raise ValueError(
            f"of {len(poison)} scored samples {int(poison.sum())} are poison: detection is measured on both poison "
            "and clean samples. Check that the labels belong to these samples."
        )
    if np.isnan(values).any():
        raise ValueError("a score is NaN: mark samples without a score with `scored`.")
    return values, poison


def _removed(
    scores: np.ndarray, is_poison: np.ndarray, fraction: float, scored: np.ndarray | None
) -> Float[np.ndarray, " n"]:
    """For each sample the chance of being removed: 1 above the cutoff, a share at it, 0 below and if unscored."""
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be over 0 and at most 1 (0.01 for one percent): got {fraction}.")
    values, _ = _scored(scores, is_poison, scored)
    budget = math.ceil(Fraction(repr(float(fraction))) * len(values))
    cutoff = np.partition(values, len(values) - budget)[len(values) - budget]
    over, at = values > cutoff, values == cutoff
    chance = over + at * ((budget - over.sum()) / at.sum())
    if scored is None:
        return chance
    removed = np.zeros(len(is_poison))
    removed[scored] = chance
    return removed
