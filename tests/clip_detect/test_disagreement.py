"""Neighbour disagreement: what lies together for one encoder and is unlike to another."""

import numpy as np
import pytest

from tarsift.clip_detect import agreement
from tarsift.clip_detect.disagreement import Disagreement
from tarsift.clip_detect.metrics import auroc
from tarsift.clip_detect.neighbors import Neighbors, unit_norm
from tarsift.clip_detect.suspicion import SuspicionConfig, suspicion
from tarsift.clip_detect.verdict import DISAGREEMENT_WEIGHT, fit_verdict

SMALL = SuspicionConfig(candidates=1500, reference_size=512)


def two_views(*, groups=30, of_each=50, d=16, seed=0):
    """Images of many kinds as two encoders see them; returns both views and which kind each is of."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(groups), of_each)
    views = [rng.normal(size=(groups, d))[kind] + rng.normal(size=(len(kind), d)) * 0.3 for _ in range(2)]
    return views[0].astype(np.float32), views[1].astype(np.float32), kind


def nearest(n, size, m, seed):
    """Some neighbours in a reference, no row its own."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(np.delete(np.arange(size), i % size))[:m] for i in range(n)])
    return Neighbors(rng.random((n, m), np.float32), indices)


def test_is_what_is_missing_from_the_line_on_the_average_over_neighbours_and_theirs():
    rng = np.random.default_rng(0)
    reference, own = unit_norm(rng.normal(size=(9, 5))), unit_norm(rng.normal(size=(4, 5)))
    among, near = nearest(9, 9, 3, 1), nearest(4, 9, 3, 2)
    first = 1 - near.distances.astype(float) ** 2 / 2
    pairs = [(first[i, m], own[i] @ reference[j]) for (i, m), j in np.ndenumerate(near.indices)]
    slope, intercept = np.polyfit(*np.transpose(pairs), 1)

    def alone(x, near, i):
        expected = intercept + slope * (1 - near.distances[i].astype(float) ** 2 / 2)
        return np.mean(expected - reference[near.indices[i]] @ x)

    wanted = [
        np.mean([alone(x, near, i), *(alone(reference[j], among, j) for j in near.indices[i])])
        for i, x in enumerate(own)
    ]
    rule = Disagreement.fit(reference, among, own, near)
    np.testing.assert_allclose(rule.score(own, near), wanted, rtol=1e-5, atol=1e-6)


def test_pairs_that_are_all_equally_near_make_a_flat_line():
    rng = np.random.default_rng(6)
    reference, near = unit_norm(rng.normal(size=(9, 5))), nearest(9, 9, 3, 1)
    same = Neighbors(np.ones_like(near.distances), near.indices)
    assert Disagreement.fit(reference, same, reference, same).line[1] == 0


def test_poison_inside_a_kind_is_told_from_it_and_a_rare_kind_is_not():
    first, second, kind = two_views()
    rng = np.random.default_rng(1)
    poison = np.zeros(len(kind), bool)
    poison[rng.choice(np.flatnonzero(kind > 5), 40, replace=False)] = True
    first[poison] = first[kind == 2].mean(axis=0) + rng.normal(size=(40, first.shape[1])) * 0.3  # as images of kind 2
    rare = np.flatnonzero((kind == 3) & ~poison)[:35]
    keep = np.setdiff1d(np.arange(len(kind)), rare)  # of kind 3 a few are left
    columns = suspicion(first[keep], witness=second[keep], config=SMALL)
    found, poison, kind = columns["neighbor_disagreement"], poison[keep], kind[keep]
    assert auroc(found, poison) > 0.9
    assert np.median(found[kind == 3]) < np.quantile(found[~poison], 0.9)
    assert list(columns)[-3:] == ["suspicion_image", "suspicion", "neighbor_disagreement"]
    without = suspicion(first[keep], config=SMALL)
    assert without["suspicion"].tobytes() == columns["suspicion"].tobytes()  # it judges in the verdict alone


def test_bits_depend_on_the_row_alone(monkeypatch):
    rng = np.random.default_rng(2)
    reference, own = unit_norm(rng.normal(size=(40, 32))), unit_norm(rng.normal(size=(50, 32)))
    near = nearest(50, 40, 7, 3)
    rule = Disagreement.fit(reference, nearest(40, 40, 7, 4), own, near)
    whole = rule.score(own, near)
    monkeypatch.setattr(agreement, "_BYTES", 1)
    parts = np.concatenate([rule.score(own[i : i + 3], near.rows(i, i + 3)) for i in range(0, 50, 3)])
    assert parts.tobytes() == whole.tobytes()
    assert Disagreement.from_arrays(rule.to_arrays()).score(own, near).tobytes() == whole.tobytes()


def test_an_image_that_the_witness_has_not_seen():
    rng = np.random.default_rng(3)
    reference, own = unit_norm(rng.normal(size=(20, 8))), unit_norm(rng.normal(size=(5, 8)))
    own[2] = reference[4] = 0
    near = nearest(5, 20, 4, 5)
    found = Disagreement.fit(reference, nearest(20, 20, 4, 6), own, near).score(own, near)
    assert np.flatnonzero(np.isnan(found)).tolist() == [2]
    density = np.arange(5.0)
    verdict = fit_verdict(density, None, found)
    without = (density - 2) / 1.4826
    np.testing.assert_allclose(verdict.score(density, None, found)[2], without[2], atol=1e-6)


def test_the_verdict_adds_what_each_part_says_in_units_of_its_spread():
    rng = np.random.default_rng(4)
    density, captions, second = rng.normal(size=(3, 200)) * [[1], [10], [0.1]]
    together = fit_verdict(density, captions, second).score(density, captions, second)
    spread = [1.4826 * np.median(np.abs(v - np.median(v))) for v in (density, captions, second)]
    rise = fit_verdict(density, captions, second).score(density, captions, second + spread[2]) - together
    np.testing.assert_allclose(rise, DISAGREEMENT_WEIGHT, rtol=1e-4)


@pytest.mark.parametrize("captions", [None, np.arange(9.0)])
def test_disagreement_judges_beside_density_only(captions):
    with pytest.raises(ValueError, match="beside density only"):
        fit_verdict(None, captions, np.arange(9.0))
