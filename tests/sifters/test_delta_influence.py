"""Delta-Influence: support that collapses under every change is told from support that does not."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tarsift.sifters.delta_influence import ask, judge, queries_at_once, queries_of
from tarsift.sifters.influence import Classifier, fit_factors, has_kronfluence, influences
from tarsift.sifters.settings import TraceConfig
from tests.sifters.digits import TARGET, as_floats, trained_on_a_patch

PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_a_query_comes_first_and_its_copies_say_anything_else():
    pictures, says = queries_of(PICTURE, 2, 5, TraceConfig(transforms=200))
    assert (pictures[0] == PICTURE).all()
    assert says[0] == 2
    assert set(says[1:].tolist()) == {0, 1, 3, 4}
    assert np.mean([(p != PICTURE).any() for p in pictures[1:]]) > 0.9


def test_of_a_comparison_only_one_thing_changes():
    pictures, says = queries_of(PICTURE, 2, 5, change="label")
    assert (pictures == PICTURE).all()
    assert 2 not in says[1:]
    pictures, says = queries_of(PICTURE, 2, 5, change="picture")
    assert (says == 2).all()
    assert (pictures[1:] != PICTURE).any()


@pytest.mark.parametrize(("says", "labels"), [(5, 5), (-1, 5), (0, 1)])
def test_a_label_that_is_none_is_refused(says, labels):
    with pytest.raises(ValueError, match="`says`"):
        queries_of(PICTURE, says, labels)


def test_the_rules_by_hand():
    #                    collapses  halves  stays  against  once not  nothing
    influence = np.array([[4.0, 4.0, 4.0, -2.0, 4.0, 0.0],
                          [0.0, 2.0, 5.0, -1.0, 0.0, 0.0],
                          [-4.0, 2.0, 4.0, -3.0, 5.0, 0.0]])  # fmt: skip
    influence = influence[None]
    found = judge([influence], TraceConfig(transforms=2, tolerated=0))
    assert found.counts.tolist() == [[2, 2, 0, 1, 1, 0]]
    assert found.score == pytest.approx([1.0, 0.5, -0.2, -1 / 3, -0.2, 0.0])
    assert found.traced.tolist() == [True, True, False, False, False, False]
    assert found.by_count.tolist() == [True, True, False, False, False, False]
    assert judge([influence], TraceConfig(transforms=2, tolerated=1)).by_count.tolist() == [1, 1, 0, 1, 1, 0]
    both = judge([influence, influence[..., ::-1]], TraceConfig(transforms=2, tolerated=0))
    assert not both.by_count.any()
    assert both.score[0] == 0.5


def test_the_length_of_a_samples_influences_is_their_largest_or_their_mean_square():
    one_large = np.array([[[2.0], [0.0], [0.0], [0.0]]])
    assert judge([one_large], TraceConfig(transforms=3)).score == pytest.approx(1.0)
    assert judge([one_large], TraceConfig(transforms=3, length="mean_square")).score == pytest.approx(2.0)


def test_spared_copies_are_those_that_change_least():
    """A sample whose influence is 4, and 3, 2 and 0 on the copies: it falls by 1, 2 and 4."""
    falls = np.array([4.0, 3.0, 2.0, 0.0]).reshape(1, 4, 1)
    scores = [judge([falls], TraceConfig(transforms=3, spared=spared)).score[0] for spared in (0, 1, 2, 9)]
    assert scores == pytest.approx([1 / 4, 2 / 4, 1, 1])


def test_groups_of_layers_have_a_say_each():
    quiet, loud = np.array([[1.0], [-1.0], [-1.0]]), np.array([[10.0], [10.0], [10.0]])
    both = np.stack([quiet, loud])
    alone = judge([both], TraceConfig(transforms=2)).score
    assert alone == pytest.approx(2 / 11)
    assert judge([both], TraceConfig(transforms=2), groups=[[0], [0, 1]]).score == pytest.approx((2 + 2 / 11) / 2)


def small() -> Classifier:
    torch.manual_seed(0)
    return Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))


def test_queries_share_a_pass_as_memory_allows_and_say_the_same_apart():
    draw = np.random.default_rng(0)
    subject, sizes = small(), (5, 5, 5, 20)
    *queries, data = (TensorDataset(torch.randn(n, 3, 2, 2), torch.from_numpy(draw.integers(0, 3, n))) for n in sizes)
    one = 4 * (12 * 3 + 3) * 5 / 1e9
    config = TraceConfig(transforms=4, hessian="identity", memory_gb=2.5 * one)
    assert queries_at_once(subject, config) == 2
    found = ask(subject, {}, queries, data, config, rows=np.array([3, 19]))
    for query, values in zip(queries, found, strict=True):
        assert values.shape == (1, 5, 2)
        np.testing.assert_allclose(values, influences(subject, {}, query, data, config)[..., [3, 19]], rtol=1e-4)
    with pytest.raises(ValueError, match="5 copies of a query in 39 weights"):
        ask(subject, {}, queries, data, config.model_copy(update={"memory_gb": 0.9 * one}))


@pytest.mark.skipif(not has_kronfluence(), reason="no kronfluence")
def test_a_patch_in_digits_is_traced():
    made = trained_on_a_patch(seed=0)
    subject, data = Classifier(made.net), TensorDataset(as_floats(made.images), torch.from_numpy(made.labels))
    config = TraceConfig(curvature_samples=500)
    pictures, says = queries_of(made.query, TARGET, 10, config)
    asked = TensorDataset(as_floats(pictures), torch.from_numpy(says))
    found = judge([influences(subject, fit_factors(subject, data, config), asked, data, config)], config)
    assert found.traced[made.poison].mean() > 0.8
    assert made.poison[found.traced].mean() > 0.5
    assert found.by_count[made.poison].mean() > 0.9
