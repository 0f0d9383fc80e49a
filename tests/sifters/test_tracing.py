"""Tracing a classifier: what is planted in digits is found from one query, and what cannot be traced is told."""

import numpy as np
import pytest

from tarsift.sifters.influence import has_kronfluence
from tarsift.sifters.inputs import as_inputs
from tarsift.sifters.settings import LabelTraceConfig
from tarsift.sifters.tracing import fit_curvature, trace
from tarsift.sifters.unlearn import labelled
from tests.sifters.digits import TARGET, patched_digits, samples_of

IDENTITY = LabelTraceConfig(hessian="identity", rounds=1, transforms=10)


@pytest.mark.skipif(not has_kronfluence(), reason="no kronfluence")
def test_one_query_finds_the_poison_and_its_echoes_find_the_rest():
    made = patched_digits()
    config, samples = LabelTraceConfig(curvature_samples=500, echoes=4, rounds=2), samples_of(made)
    found = trace(made.net, samples, made.query[None], TARGET, config=config)
    assert found.traced[made.poison].mean() >= 0.95
    assert made.poison[found.traced].mean() >= 0.6
    assert made.poison[found.echoes].mean() > 0.8
    assert len(found.echoes) == 8
    by_count = made.poison[found.asked.by_count].mean()
    assert by_count < 0.5 < made.poison[found.traced].mean()


def test_candidates_are_some_rows_and_what_the_traces_of_a_model_share_is_fitted_once():
    made, samples = patched_digits(), samples_of(patched_digits())
    rows = np.concatenate([np.flatnonzero(made.poison), np.flatnonzero(~made.poison)[:200]])
    curvature = fit_curvature(made.net, samples, IDENTITY)
    found = trace(made.net, samples, made.query[None], TARGET, config=IDENTITY, curvature=curvature, rows=rows)
    assert found.score.shape == found.traced.shape == found.asked.by_count.shape == (228,)
    assert set(found.echoes.tolist()) <= set(rows.tolist())
    assert made.poison[rows][np.argsort(-found.score)[:10]].mean() > 0.8
    again = trace(made.net, samples, made.query[None], TARGET, config=IDENTITY, curvature=curvature, rows=rows)
    np.testing.assert_array_equal(found.score, again.score)


def test_a_sample_says_nothing_of_itself():
    """With as many echoes as candidates and one round, each one's score is of all but itself."""
    made, samples = patched_digits(), samples_of(patched_digits())
    rows = np.flatnonzero(made.poison)[:3]
    config = IDENTITY.model_copy(update={"echoes": 3})
    found = trace(made.net, samples, made.query[None], TARGET, config=config, rows=rows)
    assert sorted(found.echoes.tolist()) == rows.tolist()
    first = trace(
        made.net, samples, made.query[None], TARGET, config=IDENTITY.model_copy(update={"rounds": 0}), rows=rows
    )
    np.testing.assert_array_equal(first.score, found.asked.score)
    assert len(first.echoes) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": np.zeros((1, 9, 9, 3), np.uint8)}, r"uint8 \(queries, 8, 8, 3\)"),
        ({"pictures": np.zeros((0, 8, 8, 3), np.uint8)}, r"uint8 \(queries, 8, 8, 3\)"),
        ({"says": 10}, "must be a label, 0 to 9: got 10"),
        ({"says": 3}, "the model does not say 3 of picture 0, but 5"),
        ({"rows": np.empty(0, np.int64)}, "no candidates"),
        ({"config": LabelTraceConfig(memory_gb=1e-6)}, "memory_gb is 1e-06"),
    ],
)
def test_what_cannot_be_traced_is_told_before_any_work(changes, message, monkeypatch):
    made = patched_digits()
    monkeypatch.setattr("tarsift.sifters.tracing.fit_factors", lambda *_, **__: pytest.fail("work was done"))
    given = {"pictures": made.query[None], "says": TARGET} | changes
    with pytest.raises(ValueError, match=message):
        trace(made.net, samples_of(made), given.pop("pictures"), given.pop("says"), **given)


def test_features_cannot_be_traced():
    made = patched_digits()
    with pytest.raises(ValueError, match="must be of pictures"):
        trace(made.net, labelled(as_inputs(np.eye(4)), np.arange(4)), made.query[None], TARGET)
