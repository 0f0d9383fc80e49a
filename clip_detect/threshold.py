"""The cutoff of the most suspicious fraction, found exactly without holding the scores.

`TopFraction` is a fold: each worker adds its scores, partial results are merged in any order, and a
few rounds over the same scores narrow the cutoff down, 16 bits of the key at a time. The key of a
sample is its score, as ordered bits of float32, then its keyed hash, so that ties are broken by chance
but always in the same way. The state is 65,536 counters, whatever the number of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt32, UInt64

_BUCKETS = 2**16
_ROUNDS = 6  # two of 16 bits for the score, four for the hash


def median_mad(x: Float[np.ndarray, "*shape"], axis: int = 0) -> Float64[np.ndarray, "*rest 2"]:
    """Return median and median absolute deviation along an axis, side by side in a new last axis."""
    values = np.asarray(x, np.float64)
    median = np.median(values, axis=axis, keepdims=True)
    mad = np.median(np.abs(values - median), axis=axis)
    return np.stack([np.squeeze(median, axis=axis), mad], axis=-1)


def robust_z(x: np.ndarray, median: np.ndarray | float, mad: np.ndarray | float) -> Float64[np.ndarray, "*shape"]:
    """Standardise by median and MAD: one unit is one standard deviation where x is normal.

    Where more than half of the values are equal the MAD is zero; it then counts as 1e-9.
    """
    return (np.asarray(x, np.float64) - median) / np.maximum(1.4826 * np.asarray(mad, np.float64), 1e-9)


def ordered_bits(scores: Float32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Map float32 to integers in the same order; neighbouring floats get neighbouring integers, -0 equals 0."""
    bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    return np.where(negative, np.uint32(2**31) - (bits & np.uint32(2**31 - 1)), bits | np.uint32(2**31))


def from_ordered_bits(codes: UInt32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Undo `ordered_bits`."""
    codes = np.asarray(codes, np.uint32)
    sign = np.uint32(2**31)
    return np.where(codes >= sign, codes & ~sign, (sign - codes) | sign).astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class Cutoff:
    """Where the top fraction ends: a sample is in it if (score, hash) is at or above the cutoff's.

    selected: samples at or above, `ceil(fraction * total)` unless samples with equal score *and* hash stand
    at the cutoff: they are not separated, and all of them are in.
    """

    score: float
    hash: int
    selected: int
    total: int

    def mask(self, scores: Float32[np.ndarray, " n"], hashes: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Tell for each sample whether it is in the top fraction."""
        bits = ordered_bits(scores)
        at = ordered_bits(np.array([self.score], np.float32))[0]
        return (bits > at) | ((bits == at) & (hashes >= np.uint64(self.hash)))

    def near(self, scores: Float32[np.ndarray, " n"]) -> int:
        """Count scores at most one float32 step from the cutoff's: verdicts that rounding could turn."""
        at = int(ordered_bits(np.array([self.score], np.float32))[0])
        return int((np.abs(ordered_bits(scores).astype(np.int64) - at) <= 1).sum())


@dataclass(frozen=True)
class TopFraction:
    """Exact mergeable selection of the most suspicious fraction.

    ::

        top = TopFraction.start(0.01)
        while not top.done:
            top = functools.reduce(TopFraction.merge, [top.add(s, h) for s, h in parts]).next_round()
        cutoff = top.finish()

    In each round every sample is added once, anywhere; results of the round are merged in any order.
    """

    fraction: float
    round: int
    prefix: int  # the bits settled so far
    above: int  # samples over all keys that begin with the prefix
    total: int  # samples, known after the first round
    done: bool
    counts: Int64[np.ndarray, " buckets"]

    @classmethod
    def start(cls, fraction: float) -> TopFraction:
        """Begin the first round. fraction: of samples to select, over 0 and at most 1."""
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be over 0 and at most 1 (0.01 for one percent): got {fraction}.")
        return cls(fraction, 0, 0, 0, 0, False, np.zeros(_BUCKETS, np.int64))

    def add(self, scores: Float32[np.ndarray, " n"], hashes: UInt64[np.ndarray, " n"]) -> TopFraction:
        """Count samples; unscored ones must be left out.

        Raises:
            ValueError: a score is NaN, the arrays differ in length, or the cutoff is already found.
        """
        if self.done:
            raise ValueError("the cutoff is already found: call `finish`.")
        if scores.shape != hashes.shape:
            raise ValueError(f"one hash per score is needed: got {hashes.shape} hashes for {scores.shape} scores.")
        if np.isnan(scores).any():
            raise ValueError("a score is NaN: leave out the samples without a score.")
        bits, keyed = ordered_bits(scores), hashes.astype(np.uint64)
        inside = np.ones(len(bits), bool)
        digits = _digits(bits, keyed)
        for step in range(self.round):
            inside &= digits(step) == (self.prefix >> 16 * (self.round - 1 - step)) & (_BUCKETS - 1)
        counted = np.bincount(digits(self.round)[inside], minlength=_BUCKETS)
        return replace(self, counts=self.counts + counted)

    def merge(self, other: TopFraction) -> TopFraction:
        """Add the counts of another part of the same round."""
        if (self.fraction, self.round, self.prefix) != (other.fraction, other.round, other.prefix):
            raise ValueError(
                f"parts of different rounds cannot be merged: round {self.round} with prefix {self.prefix:#x} and "
                f"round {other.round} with {other.prefix:#x}. Give every worker the state of the same `next_round`."
            )
        return replace(self, counts=self.counts + other.counts)

    def next_round(self) -> TopFraction:
        """Settle 16 more bits; `done` is set once they separate the top fraction.

        Raises:
            ValueError: nothing was added, or this round saw other samples than the first.
        """
        seen = int(self.counts.sum())
        if seen == 0:
            raise ValueError("no scored sample was added: there is no top fraction of nothing.")
        total = self.total or seen
        # The share as written, 0.1 and not the double next to it: ceil(0.07 * 100) is 7.
        wanted = math.ceil(Fraction(repr(float(self.fraction))) * total) - self.above
        from_top = np.cumsum(self.counts[::-1])
        if not 0 < wanted <= from_top[-1]:
            raise ValueError("a round did not see the samples of the round before: add each sample once per round.")
        place = int(np.searchsorted(from_top, wanted))
        bucket = _BUCKETS - 1 - place
        over = self.above + int(from_top[place] - self.counts[bucket])
        settled = replace(
            self,
            round=self.round + 1,
            prefix=self.prefix << 16 | bucket,
            above=over,
            total=total,
            counts=np.zeros(_BUCKETS, np.int64),
        )
        # From the second round on the prefix holds a whole score: if all of its bucket is wanted, stop.
        everything = self.round >= 1 and from_top[place] == wanted
        if everything or settled.round == _ROUNDS:
            return replace(settled, done=True, above=self.above + int(from_top[place]))
        return settled

    def finish(self) -> Cutoff:
        """Return the cutoff."""
        if not self.done:
            raise ValueError(f"the cutoff is not found after {self.round} rounds: add all samples again, `next_round`.")
        key = self.prefix << 16 * (_ROUNDS - self.round)
        return Cutoff(_score_of(key >> 64), key & (2**64 - 1), self.above, self.total)


def _digits(bits: UInt32[np.ndarray, " n"], hashes: UInt64[np.ndarray, " n"]):
    def digit(step: int) -> np.ndarray:
        source, place = (bits, 1 - step) if step < 2 else (hashes, 5 - step)
        return ((source >> source.dtype.type(16 * place)) & source.dtype.type(_BUCKETS - 1)).astype(np.int64)

    return digit


def _score_of(ordered: int) -> float:
    bits = ordered & (2**31 - 1) if ordered >= 2**31 else (2**31 - ordered) | 2**31
    return float(np.array([bits], np.uint32).view(np.float32)[0])
