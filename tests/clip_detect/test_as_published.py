import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from tarsift.clip_detect import as_published
from tarsift.clip_detect.as_published import (
    dao_as_published,
    equal_batches,
    k_distance_as_published,
    lid_as_published,
    slof_as_published,
)
from tarsift.clip_detect.neighbors import knn
from tarsift.clip_detect.reference import ReferenceSet
from tarsift.clip_detect.scores import SCORES

FUNCTIONS = {
    "k_distance": k_distance_as_published,
    "lid": lid_as_published,
    "slof": slof_as_published,
    "dao": dao_as_published,
}

every_score = pytest.mark.parametrize("name", list(FUNCTIONS))


def in_batch_order(points, *, seed):
    """Rows of which the one batch, once shuffled, is `points`; and where each point went."""
    (order,) = equal_batches(len(points), as_published.BATCH_SIZE, seed=seed)
    rows = np.empty(points.shape, np.float32)
    rows[order] = points
    return rows, order


def oracle(name, images, captions, k):
    """The released steps for one batch, on lists: delete the own entries, sort what is left, look positions up."""
    points = [*images] if captions is None else [*images, *captions]
    count = len(images)

    def distance(a, b):
        return math.dist([float(v) for v in points[a]], [float(v) for v in points[b]])

    def dimension(ascending):
        return -k / sum(math.log(d / ascending[k] + 1e-4) for d in ascending[:k])

    table = [sorted(distance(a, b) for b in range(len(points))) for a in range(len(points))]
    out = []
    for i in range(count):
        left = [distance(i, j) for j in range(len(points)) if j not in (i, i + count)]
        positions = sorted(range(len(left)), key=lambda position: left[position])
        own = [left[position] for position in positions]
        looked_up = positions[:k]  # as if they were rows of the table
        if name == "k_distance":
            out.append(own[k])
        elif name == "lid":
            out.append(dimension(own))
        elif name == "slof":
            out.append(sum(own[k] / table[row][k] for row in looked_up) / k)
        else:
            out.append(sum(dimension(table[row]) * math.log(own[k] / table[row][k]) for row in looked_up) / k)
    return np.array(out)


# In batch order 7, 3, 1, 0 on a line, k = 1. Second nearest: 6, 3, 2, 3. Nearest: 3, 1, 0, 1, which stand behind the
# query except for the last, so that they are looked up one row before, at 7, 3, 1, and 1: there d_1 = 4, 2, 1, 1.
# Right look-ups and k would give ratios 4/2, 2/1, 1/1, 1/1. The LID of every row is -1 / log(0 + 1e-4).
BY_HAND = {
    "k_distance": [6, 3, 2, 3],
    "lid": [-1 / math.log(d + 1e-4) for d in (4 / 6, 2 / 3, 1 / 2, 1 / 3)],
    "slof": [6 / 4, 3 / 2, 2 / 1, 3 / 1],
    "dao": [math.log(r) / -math.log(1e-4) for r in (1.5, 1.5, 2, 3)],
}


@every_score
def test_by_hand(name):
    rows, order = in_batch_order(np.array([[7.0], [3.0], [1.0], [0.0]]), seed=3)
    found = FUNCTIONS[name](rows, seed=3, k=1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[order], BY_HAND[name], rtol=1e-6)


@every_score
@pytest.mark.parametrize("gap", [None, 0.0, 9.0], ids=["images", "captions", "captions far away"])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_equals_the_released_steps(name, gap, k):
    rng = np.random.default_rng(k)
    points = rng.normal(size=(40, 6)).astype(np.float32)
    texts = None if gap is None else rng.normal(loc=gap, size=(40, 6)).astype(np.float32)
    rows, order = in_batch_order(points, seed=k)
    captions = None if texts is None else in_batch_order(texts, seed=k)[0]
    found = FUNCTIONS[name](rows, captions, seed=k, k=k)
    np.testing.assert_allclose(found[order], oracle(name, points, texts, k), rtol=1e-4, atol=1e-5)


@every_score
def test_batches_are_scored_alone(name):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(150, 6)).astype(np.float32)
    parts = equal_batches(150, 40, seed=1)
    assert [len(part) for part in parts] == [50, 50, 50]
    assert sorted(np.concatenate(parts)) == list(range(150))
    found = FUNCTIONS[name](points, seed=1, k=4, batch_size=40)
    for part in parts:
        np.testing.assert_allclose(found[part], oracle(name, points[part], None, 4), rtol=1e-4, atol=1e-5)


@every_score
def test_the_seed_is_the_batches(name):
    points = np.random.default_rng(1).normal(size=(120, 6)).astype(np.float32)
    found = [FUNCTIONS[name](points, seed=seed, k=4, batch_size=60) for seed in (0, 0, 1)]
    assert found[0].tobytes() == found[1].tobytes()
    assert (found[0] != found[2]).mean() > 0.5


def test_the_errors_are_there():
    """Facts of the released code that a correct implementation does not share."""
    rng = np.random.default_rng(2)
    points = rng.normal(size=(500, 20)).astype(np.float32)
    ids = np.arange(500, dtype=np.uint64)
    reference = ReferenceSet.build(points, ids, [16])
    near = knn(points, points, 17, query_ids=ids, reference_ids=ids)
    slof = slof_as_published(points, seed=0)
    defined = SCORES["slof"].function(near, reference, 16)
    assert spearmanr(slof, dao_as_published(points, seed=0)).statistic > 0.99  # LID is nearly a constant
    assert spearmanr(slof, defined).statistic < 0.99
    np.testing.assert_allclose(k_distance_as_published(points, seed=0), near.distances[:, 16], rtol=1e-5)
    assert (lid_as_published(points, seed=0, k=16) < SCORES["lid"].function(near, reference, 16)).mean() > 0.8
    # raw features: lengths matter
    assert not np.allclose(slof, slof_as_published(points * rng.uniform(1, 3, (500, 1)), seed=0), rtol=0.01)


@pytest.mark.parametrize("name", ["slof", "dao"])
def test_copies_tie_at_the_top_beside_clean_samples(name):
    points = np.random.default_rng(3).normal(size=(512, 8)).astype(np.float32)
    points[:17] = points[0]  # d_16 of each is 0, but the query's own is that to the 17th
    found = FUNCTIONS[name](points, seed=0)
    assert (found[:17] == 1000).sum() >= 16  # the first in the batch may look up other rows only
    assert (found[17:] == 1000).any()
    assert np.isfinite(found).all()


def test_copies_of_one_more_than_k_look_clean_or_certain():
    points = np.random.default_rng(4).normal(size=(512, 8)).astype(np.float32)
    points[:18] = points[0]  # the 17th other copy is at distance 0 too: log 0 and 0/0
    for name, function in FUNCTIONS.items():
        found = function(points, seed=0, k=16)
        assert np.isfinite(found).all(), name
        if name == "dao":
            assert set(found[:18]) <= {0.0, 1000.0}


@every_score
def test_small_batches_are_refused(name):
    points = np.random.default_rng(5).normal(size=(18, 3)).astype(np.float32)
    assert np.isfinite(FUNCTIONS[name](points, seed=0, k=16)).all()
    with pytest.raises(ValueError, match="got k=17 and a batch of 18"):
        FUNCTIONS[name](points, seed=0, k=17)
    with pytest.raises(ValueError, match="got k=16 and a batch of 9"):
        FUNCTIONS[name](points, seed=0, k=16, batch_size=9)
    assert FUNCTIONS[name](points[:0], seed=0).shape == (0,)


def test_published_settings():
    assert (as_published.BATCH_SIZE, as_published.K, as_published.LID_K) == (2048, 16, 64)
    assert [len(part) for part in equal_batches(10_000, 2048, seed=0)] == [2500] * 4
    assert [len(part) for part in equal_batches(1000, 2048, seed=0)] == [1000]
    with pytest.raises(ValueError, match="`batch_size` must be at least 1: got 0"):
        equal_batches(10, 0, seed=0)
