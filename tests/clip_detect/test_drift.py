"""Drift: nights of one kind are left in peace, and a fuller tail is told."""

import numpy as np
import pytest

from tarsift.clip_detect.drift import LEVELS, DriftConfig, Spread, drifts, judge_share


def spread(values) -> Spread:
    made = Spread.of(np.asarray(values))
    assert made is not None
    return made


def nights(count: int, seed: int, size: int = 5000, shift: float = 0.0) -> list[Spread]:
    """Nights of normal scores, whose middles differ by `shift` times a normal number."""
    rng = np.random.default_rng(seed)
    return [spread(rng.normal(size=size) + shift * rng.normal()) for _ in range(count)]


def test_quantiles_are_those_of_numpy_and_nothing_is_lost_on_the_way_through_json():
    values = np.append(np.random.default_rng(0).normal(size=999), np.nan)
    made = spread(values)
    assert made.count == 999
    assert np.allclose(made.quantiles, np.nanquantile(values, LEVELS))
    again = Spread.from_json(made.to_json())
    assert again.count == made.count
    assert np.allclose(again.quantiles, made.quantiles, rtol=1e-5)
    assert Spread.of(np.array([np.nan])) is None


@pytest.mark.parametrize("level", LEVELS[1:-1:10])
def test_the_share_above_a_quantile_is_what_is_left_of_one(level):
    made = nights(1, 0)[0]
    at = float(np.interp(level, LEVELS, made.quantiles))
    assert made.share_above(at) == pytest.approx(1 - level)


def test_nights_of_one_kind_are_left_in_peace():
    quiet = [drifts(*(lambda known: (known[-1], known[:-1]))(nights(9, seed))) for seed in range(200)]
    assert sum(bool(found) for found in quiet) <= 2


def test_nights_that_always_differ_are_left_in_peace_where_chance_alone_would_not():
    """What comes in one night belongs together: a share varies by more than chance, and that is no drift."""
    alarms, by_chance = 0, 0
    for seed in range(100):
        known = nights(12, seed, shift=0.2)
        alarms += bool(drifts(known[-1], known[:-1]))
        share, expected = known[-1].share_above(1.645), 0.05
        by_chance += abs(share - expected) > 4 * np.sqrt(0.05 * 0.95 / 5000)
    assert by_chance > 30
    assert alarms <= 6


def test_one_per_cent_far_out_is_told_with_the_share_it_makes():
    earlier, rng = nights(12, 1), np.random.default_rng(2)
    tonight = spread(np.concatenate([rng.normal(size=4950), rng.normal(6, 1, size=50)]))
    [outer, *_] = drifts(tonight, earlier)
    assert outer.upper
    assert outer.expected == pytest.approx(0.01, abs=0.003)
    assert outer.share == pytest.approx(0.02, abs=0.004)
    assert outer.z >= 3.5


def test_three_nights_that_happen_to_agree_say_little_about_a_fourth():
    """Nights that truly differ by a half: among so few the variance is often far too small by chance."""
    rng, config = np.random.default_rng(5), DriftConfig()
    alarms = 0
    for _ in range(2000):
        shares = 0.01 * np.exp(0.5 * rng.normal(size=4))
        alarms += judge_share(float(shares[3]), 5000, shares[:3], config) is not None
    assert alarms <= 20


def test_low_values_are_judged_where_they_are_the_suspicious_ones():
    earlier, rng = nights(5, 1), np.random.default_rng(2)
    tonight = spread(np.concatenate([rng.normal(size=4900), rng.normal(-6, 1, size=100)]))
    assert drifts(tonight, earlier) == []
    found = drifts(tonight, earlier, upper=False)
    assert found
    assert not found[0].upper


def test_nothing_is_judged_before_there_are_nights_enough():
    tonight = spread(np.full(100, 9.0))
    known = nights(4, 1)
    assert drifts(tonight, known[:2]) == []
    assert drifts(tonight, known, DriftConfig(after=5)) == []
    assert drifts(tonight, known)


def test_a_slight_change_of_very_many_samples_is_no_drift():
    shares = np.array([0.05, 0.0501, 0.0499])
    assert judge_share(0.055, 10**7, shares, DriftConfig()) is None
    assert judge_share(0.08, 10**7, shares, DriftConfig()) is not None
    assert judge_share(0.02, 100, np.zeros(3), DriftConfig()) is None  # two of a hundred where there were none
    assert judge_share(0.05, 1000, np.zeros(3), DriftConfig()) is not None
