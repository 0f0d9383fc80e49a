import inspect

import numpy as np
import pytest

from tarsift.clip_detect.metrics import auroc, average_precision, clean_lost_at, detection_table, recall_at

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
    row = detection_table({"s": values}, poison, scored=scored)[0]
    assert (row["samples"], row["poison"], row["unscored"], row["unscored_poison"]) == (10, 2, 2, 1)


def test_table():
    table = detection_table({"good": scores, "bad": -scores}, poison)
    assert [row["score"] for row in table] == ["good", "bad"]
    assert table[0]["auroc"] == 1 - table[1]["auroc"] == 15 / 16
    assert table[0]["average_precision"] == average_precision(scores, poison)
    assert (table[0]["recall_at_0.10"], table[0]["clean_lost_at_0.10"]) == (0.5, 0)
    assert (table[1]["recall_at_0.10"], table[1]["clean_lost_at_0.10"]) == (0, 1)


def test_errors_teach():
    for labels in (np.zeros(10, bool), np.ones(10, bool)):
        with pytest.raises(ValueError, match="measured on both poison and clean samples"):
            detection_table({"s": scores}, labels)
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
