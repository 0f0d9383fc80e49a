import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarsift.sifters.result import check_labels, clean_base_set


def test_classes_that_do_not_occur_do_not_matter():
    labels, classes = check_labels(np.array([7, 2, 7, 40]), 4)
    assert labels.tolist() == [1, 0, 1, 2]
    assert classes == 3


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.array([0, 1]), "3 whole numbers"),
        (np.array([0.0, 1, 1]), "whole numbers"),
        (np.array([0, -1, 1]), "0 and up"),
        (np.array([4, 4, 4]), "two classes"),
    ],
)
def test_labels_it_refuses(labels, says):
    with pytest.raises(ValueError, match=says):
        check_labels(labels, 3)


def test_the_base_set_is_the_cleanest_of_each_class_in_proportion():
    labels = np.array([0] * 8 + [1] * 4)
    score = np.array([5, 4, 3, 2, 1, 0, 6, 7, 0.5, 0.1, 0.9, 0.7])
    assert clean_base_set(score, labels, 6).tolist() == [2, 3, 4, 5, 8, 9]
    assert clean_base_set(np.zeros(12), labels, 3).tolist() == [0, 1, 8]  # ties go to the earlier row


def test_the_worst_of_a_class_is_never_chosen():
    labels = np.array([0] * 5 + [1])
    chosen = clean_base_set(np.arange(6.0), labels, 4)
    assert chosen.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="at most 4"):
        clean_base_set(np.arange(6.0), labels, 5)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.data())
def test_shares_follow_sizes(sizes, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    count = data.draw(st.integers(0, len(labels) - len(sizes)))
    chosen = clean_base_set(np.random.default_rng(0).random(len(labels)), labels, count)
    got = np.bincount(labels[chosen], minlength=len(sizes))
    assert got.sum() == count == len(set(chosen.tolist()))
    assert (got < sizes).all()
    exact = np.array(sizes) * count / sum(sizes)
    bound = exact <= np.array(sizes) - 1
    if bound.all():
        assert (np.abs(got - exact) < 1).all()
