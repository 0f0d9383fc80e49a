import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsift.clip_detect.threshold import TopFraction, median_mad, ordered_bits, robust_z

floats = st.floats(width=32, allow_nan=False)


def select(fraction, parts):
    """Run the rounds over parts merged in both directions."""
    top, rounds = TopFraction.start(fraction), 0
    while not top.done:
        counted = [top.add(scores, hashes) for scores, hashes in parts]
        merged = backward = counted[0]
        for other in counted[1:]:
            merged, backward = merged.merge(other), other.merge(backward)
        assert (merged.counts == backward.counts).all()
        top, rounds = merged.next_round(), rounds + 1
    return top.finish(), rounds


@settings(deadline=None)
@given(st.lists(st.tuples(floats, st.integers(0, 2**64 - 1)), min_size=1, max_size=60), st.floats(0.001, 1), st.data())
def test_selects_exactly_the_top_by_score_then_hash(rows, fraction, data):
    rows = [(score + 0.0, keyed) for score, keyed in rows]  # -0 counts as 0
    scores = np.array([score for score, _ in rows], np.float32)
    hashes = np.array([keyed for _, keyed in rows], np.uint64)
    cut = data.draw(st.integers(0, len(rows)))
    cutoff, _ = select(fraction, [(scores[:cut], hashes[:cut]), (scores[cut:], hashes[cut:])])
    wanted = math.ceil(Fraction(repr(fraction)) * len(rows))
    last = sorted(rows, reverse=True)[wanted - 1]
    assert (cutoff.total, cutoff.selected) == (len(rows), sum(row >= last for row in rows))
    assert cutoff.mask(scores, hashes).tolist() == [row >= last for row in rows]


@settings(deadline=None)
@given(floats, floats)
def test_ordered_bits_are_ordered_like_the_floats(a, b):
    x, y = ordered_bits(np.array([a, b], np.float32))
    assert (x < y) == (a < b)
    assert (x == y) == (a == b)


def test_ties_need_more_rounds_and_are_broken_by_hash():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 5000, dtype=np.uint64)
    distinct = rng.normal(size=5000).astype(np.float32)
    cutoff, rounds = select(0.01, [(distinct, hashes)])
    assert (cutoff.selected, rounds) == (50, 2)
    assert cutoff.score == np.sort(distinct)[-50]
    equal = np.zeros(5000, np.float32)
    cutoff, rounds = select(0.01, [(equal, hashes)])
    assert cutoff.selected == 50
    assert rounds > 2
    assert set(hashes[cutoff.mask(equal, hashes)]) == set(np.sort(hashes)[-50:])
    cutoff, rounds = select(0.01, [(equal, np.zeros(5000, np.uint64))])
    assert (cutoff.selected, rounds) == (5000, 6)  # nothing tells them apart


def test_fraction_is_taken_as_written():
    scores, hashes = np.arange(100, dtype=np.float32), np.arange(100, dtype=np.uint64)
    assert 0.07 * 100 > 7
    assert select(0.07, [(scores, hashes)])[0].selected == 7
    assert select(1.0, [(scores, hashes)])[0].selected == 100


def test_near_counts_neighbouring_floats():
    one = np.float32(1)
    steps = [np.nextafter(one, np.float32(0)), one, np.nextafter(one, np.float32(2)), np.float32(1.001), np.float32(0)]
    scores = np.array([*steps, 1], np.float32)
    cutoff, _ = select(0.5, [(scores, np.arange(6, dtype=np.uint64))])
    assert cutoff.score == 1
    assert cutoff.near(scores) == 4
    around_zero = np.array([-1e-45, -0.0, 0.0, 1e-45, 1], np.float32)
    assert select(0.4, [(around_zero, np.arange(5, dtype=np.uint64))])[0].near(around_zero) == 3


def test_errors_teach():
    some = np.ones(3, np.float32), np.arange(3, dtype=np.uint64)
    for fraction in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="over 0 and at most 1"):
            TopFraction.start(fraction)
    top = TopFraction.start(0.5)
    with pytest.raises(ValueError, match="a score is NaN"):
        top.add(np.array([np.nan], np.float32), some[1][:1])
    with pytest.raises(ValueError, match=r"got \(2,\) hashes for \(3,\) scores"):
        inspect.unwrap(TopFraction.add)(top, some[0], some[1][:2])
    with pytest.raises(ValueError, match="no scored sample"):
        top.next_round()
    with pytest.raises(ValueError, match="not found after 0 rounds"):
        top.finish()
    second = top.add(*some).next_round()
    with pytest.raises(ValueError, match="parts of different rounds"):
        second.merge(top)
    with pytest.raises(ValueError, match="did not see the samples"):
        second.add(some[0][:1], some[1][:1]).next_round()
    with pytest.raises(ValueError, match="already found"):
        TopFraction.start(1.0).add(*some).next_round().add(*some).next_round().add(*some)


def test_robust_z_by_hand():
    x = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert median_mad(x).tolist() == [3, 1]
    np.testing.assert_allclose(robust_z(x, 3.0, 1.0), (x - 3) / 1.4826)
    assert median_mad(np.stack([x, x * 2], axis=1)).tolist() == [[3, 1], [6, 2]]
    rng = np.random.default_rng(0)
    normal = rng.normal(5, 3, 100_000)
    assert abs(robust_z(normal, *median_mad(normal)).std() - 1) < 0.02
    assert np.isfinite(robust_z(np.array([0.0, 0, 0, 1]), 0.0, 0.0)).all()
