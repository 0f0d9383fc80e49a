"""Drift: are tonight's scores spread as those of the nights before?

Compared are tails, where poison is: the share of tonight's samples beyond a level that a known share of earlier ones
was beyond. Nights differ more than chance says, since what comes in one night belongs together; so a share is
judged by how much it has varied between the earlier nights, and of few nights by Student's t: three that happen to
agree say little about a fourth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import norm
from scipy.stats import t as student_t

# By thousandths in the outer hundredths: between two levels shares are interpolated, which outliers must not stretch.
_TAIL = tuple(i / 1000 for i in range(1, 10))
LEVELS = (*_TAIL, *(i / 100 for i in range(1, 100)), *(1 - level for level in reversed(_TAIL)))
UPPER, LOWER = (0.95, 0.99), (0.05, 0.01)


class DriftConfig(BaseModel):
    """When a night counts as unlike those before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nights: int = Field(default=30, ge=1, description="earlier nights that are compared with, the latest")
    after: int = Field(default=3, ge=2, description="nights before anything is judged")
    z: float = Field(default=3.5, gt=0, description="standard deviations, of a share between nights, that are drift")
    ratio: float = Field(default=1.25, ge=1, description="times the share expected, which drift must reach as well")


@dataclass(frozen=True)
class Spread:
    """How the values of one night are spread: quantiles at `LEVELS`, and of how many values."""

    quantiles: Float64[np.ndarray, " levels"]
    count: int

    @classmethod
    def of(cls, values: Float[np.ndarray, " n"]) -> Spread | None:
        """Measure values; NaN are left out; None if nothing is left."""
        there = np.asarray(values, np.float64)
        there = there[~np.isnan(there)]
        return cls(np.quantile(there, LEVELS), len(there)) if len(there) else None

    def at(self, level: float) -> float:
        """Return the value that a share `level` of the values is below."""
        return float(np.interp(level, LEVELS, self.quantiles))

    def share_above(self, value: float) -> float:
        """Share of the values above one, interpolated between quantiles."""
        return float(1 - np.interp(value, self.quantiles, LEVELS, left=0.0, right=1.0))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"quantiles": [float(f"{value:.6g}") for value in self.quantiles], "count": self.count}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Spread:
        """Rebuild a spread from `to_json`."""
        return cls(np.array(plain["quantiles"], np.float64), int(plain["count"]))


@dataclass(frozen=True)
class Drift:
    """A tail that is fuller than it was.

    Attributes:
        beyond: the value; upper: whether the samples above it are counted, else those below.
        share: of tonight's samples that are beyond; expected: of those of earlier nights.
        z: how far these are apart, in standard deviations of such a share between nights.
    """

    beyond: float
    upper: bool
    share: float
    expected: float
    z: float


def drifts(
    tonight: Spread, earlier: Sequence[Spread], config: DriftConfig | None = None, *, upper: bool = True
) -> list[Drift]:
    """Return the tails that are fuller tonight than in earlier nights, the outermost first.

    Args:
        tonight: spread of tonight's values; earlier: those of the nights before, the latest last.
        upper: whether high values are the suspicious ones.
    """
    config = config or DriftConfig()
    known = list(earlier)[-config.nights :]
    if len(known) < config.after:
        return []
    found = []
    for level in sorted(UPPER if upper else LOWER, key=lambda level: -abs(level - 0.5)):
        beyond = float(np.median([spread.at(level) for spread in known]))
        shares = np.array([_beyond(spread, beyond, upper) for spread in known])
        share = _beyond(tonight, beyond, upper)
        judged = judge_share(share, tonight.count, shares, config)
        if judged is not None:
            found.append(Drift(beyond, upper, share, float(shares.mean()), judged))
    return found


def judge_share(share: float, count: int, earlier: Float64[np.ndarray, " nights"], config: DriftConfig) -> float | None:
    """Return by how many standard deviations a share of `count` samples is above earlier ones; None: it is no drift."""
    if len(earlier) < config.after:
        return None
    expected = float(earlier.mean())
    by_chance = max(expected * (1 - expected), 1 / max(count, 1)) / max(count, 1)
    between = float(earlier.var(ddof=1))
    nights = 1 + 1 / len(earlier)
    of_chance = (share - expected) / np.sqrt(by_chance * nights)
    of_nights = (share - expected) / max(np.sqrt(between * nights), 1e-12)
    told = student_t.logsf(of_nights, len(earlier) - 1)  # as likely as so many deviations of a normal distribution
    z = min(of_chance, float(norm.isf(np.exp(told))))
    return float(z) if z >= config.z and share >= config.ratio * expected else None


def _beyond(spread: Spread, value: float, upper: bool) -> float:
    above = spread.share_above(value)
    return above if upper else 1 - above
