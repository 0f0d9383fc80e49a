import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarsift.clip_detect.metrics import (
    FRACTIONS,
    STEPS,
    auroc,
    average_precision,
    clean_lost_at,
    figures,
    precision_recall_curve,
    rank,
    recall_at,
    removal_curve,
    roc_curve,
    sweep,
)

scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
poison = np.array([1, 0, 1, 0, 0, 0, 0, 0, 0, 0], bool)


def test_by_hand():
    assert auroc(scores, poison) == 15 / 16  # one of 2 x 8 pairs is the wrong way round
    np.testing.assert_allclose(average_precision(scores, poison), (1 + 2 / 3) / 2)
    assert [recall_at(scores, poison, f) for f in (0.1, 0.2, 0.3, 1.0)] == [0.5, 0.5, 1, 1]
    assert [clean_lost_at(scores, poison, f) for f in (0.1, 0.2, 0.3, 1.0)] == [0, 1, 1, 8]
    assert recall_at(scores, poison, 0.21) == 1  # rounded up to three samples


def test_ties_count_in_proportion():
    tied = np.array([1.0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0])
    mixed = np.array([0, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    np.testing.assert_allclose(recall_at(tied, mixed, 0.3), 0.5)  # two of four tied are removed
    np.testing.assert_allclose(clean_lost_at(tied, mixed, 0.3), 1 + 1)
    np.testing.assert_allclose(auroc(np.zeros(10), mixed), 0.5)


def test_unscored_samples():
    scored = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 0], bool)
    values = np.where(scored, scores, np.nan)
    assert auroc(values, poison, scored=scored) == 1
    assert recall_at(values, poison, 0.5, scored=scored) == 0.5  # the unscored poison is never caught


def test_errors_teach():
    for labels in (np.zeros(10, bool), np.ones(10, bool)):
        with pytest.raises(ValueError, match="measured on both poison and clean samples"):
            auroc(scores, labels)
    with pytest.raises(ValueError, match="of 8 scored samples 0 are poison"):
        auroc(scores, poison, scored=~poison)
    with pytest.raises(ValueError, match="a score is NaN"):
        auroc(np.where(poison, np.nan, scores), poison)
    with pytest.raises(ValueError, match=r"got \(9,\) scores, \(10,\) labels"):
        inspect.unwrap(auroc)(scores[:9], poison)  # its own checks, also where annotations are checked before
    with pytest.raises(ValueError, match="must be boolean"):
        inspect.unwrap(auroc)(scores, poison.astype(int))
    with pytest.raises(ValueError, match="`fraction` must be over 0"):
        recall_at(scores, poison, 0.0)


# --- one sorting for several kinds of poison, and curves

POISON, CLEAN, OTHER = 0, 1, 2


def planted(n, *, rate=0.02, shift=2.0, digits=6, seed=0):
    """Scores of n samples rounded to `digits`, and what each sample is."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice([POISON, CLEAN, OTHER], n, p=[rate, 0.97 - rate, 0.03])
    return np.round(rng.normal(size=n) + shift * (kinds == POISON), digits).astype(np.float32), kinds


PROBLEMS = {
    "continuous": planted(3000),
    "ties": planted(3000, digits=0),
    "all tied": (np.ones(300, np.float32), planted(300, rate=0.1)[1]),
    "few": planted(2000, rate=0.002),
    "wrong way": planted(3000, shift=-1.0),
    "many": planted(100_000, rate=0.05),
    "infinite": (np.where(np.arange(500) % 50 == 0, np.inf, np.arange(500)), planted(500, rate=0.1)[1]),
}


def swept(scores, kinds, scored=None):
    return sweep(rank(scores, scored=scored), kinds == POISON, is_clean=kinds == CLEAN)


def by_thresholds(scores, kinds):
    """Count removed, caught and lost samples anew for every threshold."""
    above = [scores >= threshold for threshold in np.unique(scores)[::-1]]
    rows = [(a.sum(), (a & (kinds == POISON)).sum(), (a & (kinds == CLEAN)).sum()) for a in above]
    return np.array([(0, 0, 0), *rows]).T


def test_curves_by_hand():
    counts = sweep(rank(scores), poison)
    np.testing.assert_array_equal(roc_curve(counts).x, np.array([0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8]) / 8)
    np.testing.assert_array_equal(roc_curve(counts).y, [0, 0.5, 0.5, *[1] * 8])
    np.testing.assert_array_equal(removal_curve(counts).x, np.arange(11) / 10)
    np.testing.assert_array_equal(removal_curve(counts).y, [0, 0.5, 0.5, *[1] * 8])
    np.testing.assert_array_equal(precision_recall_curve(counts).x, [0.5, 1])
    np.testing.assert_allclose(precision_recall_curve(counts).y, [1, 2 / 3])


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "many"])
def test_every_point_of_a_curve_is_a_threshold(name):
    removed, caught, lost = by_thresholds(*PROBLEMS[name])
    counts = swept(*PROBLEMS[name])
    for got, expected in ((counts.removed, removed), (counts.caught, caught), (counts.lost, lost)):
        np.testing.assert_array_equal(got, expected)
    recall, precision = caught / caught[-1], caught[1:] / np.maximum(1, caught + lost)[1:]
    for curve, points in (
        (roc_curve(counts), zip(lost / lost[-1], recall, strict=True)),
        (removal_curve(counts), zip(removed / removed[-1], recall, strict=True)),
        (precision_recall_curve(counts), zip(recall[1:], precision, strict=True)),
    ):
        assert set(zip(curve.x.tolist(), curve.y.tolist(), strict=True)) <= set(points)


@pytest.mark.parametrize("name", PROBLEMS)
def test_curves_rise_from_end_to_end_and_are_short(name):
    counts = swept(*PROBLEMS[name])
    for curve in (roc_curve(counts), removal_curve(counts)):
        assert (np.diff(curve.x) >= 0).all()
        assert (np.diff(curve.y) >= 0).all()
        assert [*curve.x[[0, -1]], *curve.y[[0, -1]]] == [0, 1, 0, 1]
    pure = precision_recall_curve(counts)
    assert (np.diff(pure.x) > 0).all()
    assert pure.x[-1] == 1
    assert max(len(c.x) for c in (roc_curve(counts), removal_curve(counts), pure)) <= 4 * STEPS + 4


@pytest.mark.parametrize("name", PROBLEMS)
def test_thinned_curves_keep_their_areas(name):
    scores, kinds = PROBLEMS[name]
    counts = swept(scores, kinds)
    told = figures(counts)
    # Left out is what stays in a cell; a rising line and its chord there differ by half the cell at most.
    roc = roc_curve(counts)
    area = float(np.sum(np.diff(roc.x) * (roc.y[1:] + roc.y[:-1]) / 2))
    assert area == pytest.approx(told["auroc"], abs=1 / (2 * STEPS))
    removal = removal_curve(counts)
    for fraction in FRACTIONS:
        caught = np.interp(np.ceil(fraction * len(scores)) / len(scores), removal.x, removal.y)
        assert caught == pytest.approx(told[f"recall_at_{fraction:g}"], abs=1 / STEPS)
    # Within a step of recall the highest and lowest precision are kept, so it is off by their difference at most.
    pure = precision_recall_curve(counts)
    step = np.floor(pure.x * STEPS)
    spread = sum(np.ptp(pure.y[step == s]) for s in np.unique(step))
    area = float(np.sum(np.diff(pure.x, prepend=0) * pure.y))
    assert area == pytest.approx(told["average_precision"], abs=spread / STEPS + 1e-12)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([POISON, CLEAN, OTHER]), st.booleans()), max_size=40),
    st.sampled_from([0.005, 0.01, 0.07, 0.2, 0.5, 1.0]),
)
def test_figures_are_those_of_the_single_functions(rows, fraction):
    rows = [*rows, (3, POISON, True), (2, CLEAN, True)]
    values, kinds, scored = (np.array(column) for column in zip(*rows, strict=True))
    values = np.where(scored, values, np.nan).astype(np.float32)
    is_poison, is_clean = kinds == POISON, kinds == CLEAN
    compared = scored & (is_poison | is_clean)
    got = figures(swept(values, kinds, scored), [fraction])
    expected = {
        "auroc": auroc(values, is_poison, scored=compared),
        "average_precision": average_precision(values, is_poison, scored=compared),
        f"recall_at_{fraction:g}": recall_at(values, is_poison, fraction, scored=scored),
        f"clean_lost_at_{fraction:g}": clean_lost_at(values, ~is_clean, fraction, scored=scored),
    }
    assert got == pytest.approx(expected, abs=1e-12)


def test_unscored_poison_is_never_removed():
    scored = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 0], bool)
    counts = sweep(rank(np.where(scored, scores, np.nan), scored=scored), poison)
    assert removal_curve(counts).y[-1] == 0.5
    assert roc_curve(counts).y[-1] == 1


def test_a_ranking_without_poison_or_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="of 10 scored samples 0 are poison"):
        sweep(rank(scores), np.zeros(10, bool))
    with pytest.raises(ValueError, match="of 0 scored samples"):
        sweep(rank(scores, scored=np.zeros(10, bool)), poison)
    with pytest.raises(ValueError, match="a score is NaN"):
        rank(np.where(poison, np.nan, scores))
    with pytest.raises(ValueError, match="`fraction` must be over 0"):
        figures(sweep(rank(scores), poison), [0.0])
