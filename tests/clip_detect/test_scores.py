import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

from tarsift.clip_detect.neighbors import knn, unit_norm
from tarsift.clip_detect.reference import LARGEST_DIMENSION, SMALLEST_DISTANCE, ReferenceSet
from tarsift.clip_detect.scores import SCORES, published_scores

every_score = pytest.mark.parametrize("name", list(SCORES))


def score(name, queries, reference, k, *, query_ids=None):
    """One score of queries against a reference whose rows have the ids 0, 1, ..."""
    ids = np.arange(len(reference), dtype=np.uint64)
    own = np.arange(10**6, 10**6 + len(queries), dtype=np.uint64) if query_ids is None else query_ids
    built = ReferenceSet.build(reference.astype(np.float32), ids, [k])
    near = knn(queries.astype(np.float32), built.embeddings, k, query_ids=own, reference_ids=ids)
    return SCORES[name].function(near, built, k)


def oracle(name, queries, reference, k, query_ids):
    """The definitions as loops over float64, each distance taken afresh."""

    def nearest(point, own):
        distance = sorted(
            (max(float(np.linalg.norm(point - other)), SMALLEST_DISTANCE), row)
            for row, other in enumerate(reference)
            if row != own
        )
        return distance[:k]

    def dimension(near):
        mean = np.mean([np.log(near[-1][0] / d) for d, _ in near])
        return min(1 / mean if mean > 0 else np.inf, LARGEST_DIMENSION)

    out = []
    for point, own in zip(queries, query_ids, strict=True):
        near = nearest(point, own)
        around = [nearest(reference[row], row) for _, row in near]
        ratios = np.array([near[-1][0] / other[-1][0] for other in around])
        lids = np.array([dimension(other) for other in around])
        out.append(
            {
                "k_distance": near[-1][0],
                "lid": dimension(near),
                "slof": ratios.mean(),
                "dao": (ratios**lids).mean(),
                "dao_log": (lids * np.log(ratios)).mean(),
            }[name]
        )
    return np.array(out)


# Reference at 0, 1, 3, 7 on a line, query at 5, k = 2. Neighbours: 3 and 7, both at 2.
# d_2 of 3 is 3 (to 0), with distances (2, 3); d_2 of 7 is 6 (to 1), with distances (4, 6).
# LID of 3 and of 7 is 2 / log(1.5). Ratios are 2/3 and 2/6.
LID = 2 / np.log(1.5)
BY_HAND = {
    "k_distance": 2.0,
    "lid": LARGEST_DIMENSION,  # both neighbours equally far
    "slof": 0.5,
    "dao": ((2 / 3) ** LID + (1 / 3) ** LID) / 2,
    "dao_log": LID * (np.log(2 / 3) + np.log(1 / 3)) / 2,
}


@every_score
def test_by_hand(name):
    line = np.array([[0.0], [1.0], [3.0], [7.0]])
    np.testing.assert_allclose(score(name, np.array([[5.0]]), line, 2), [BY_HAND[name]], rtol=1e-5)


@every_score
@pytest.mark.parametrize("k", [2, 7, 20])
def test_equals_brute_force(name, k):
    rng = np.random.default_rng(k)
    reference = rng.normal(size=(60, 6)).astype(np.float32).astype(np.float64)
    queries = np.concatenate([rng.normal(size=(15, 6)) * 2, reference[:5]]).astype(np.float32).astype(np.float64)
    ids = np.array([*range(1000, 1015), *range(5)], np.uint64)  # the last five are in the reference
    found = score(name, queries, reference, k, query_ids=ids)
    assert found.dtype == np.float32
    expected = oracle(name, queries, reference, k, ids)
    if name == "dao":  # spans the range of float32 and is held at its end
        found, expected = np.log(found), np.minimum(np.log(expected), np.log(np.finfo(np.float32).max))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@every_score
def test_order_of_the_reference_does_not_matter(name):
    rng = np.random.default_rng(0)
    queries, reference = rng.normal(size=(40, 10)), rng.normal(size=(200, 10))
    order = rng.permutation(200)
    np.testing.assert_allclose(
        score(name, queries, reference, 12), score(name, queries, reference[order], 12), rtol=1e-5, atol=1e-5
    )


@every_score
def test_rotation_does_not_matter(name):
    rng = np.random.default_rng(1)
    queries, reference = rng.normal(size=(40, 10)), rng.normal(size=(200, 10))
    rotation, _ = np.linalg.qr(rng.normal(size=(10, 10)))
    np.testing.assert_allclose(
        score(name, queries, reference, 12), score(name, queries @ rotation, reference @ rotation, 12), rtol=1e-3
    )


@every_score
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_scale(name, factor):
    rng = np.random.default_rng(2)
    queries, reference = rng.normal(size=(40, 10)), rng.normal(size=(200, 10))
    expected = score(name, queries, reference, 12) * (factor if name == "k_distance" else 1)
    np.testing.assert_allclose(score(name, queries * factor, reference * factor, 12), expected, rtol=1e-3)


@every_score
def test_copies_and_zeros_are_defined(name):
    rng = np.random.default_rng(3)
    reference = unit_norm(rng.normal(size=(120, 8)))
    reference[:40] = reference[0]  # more copies than k, under different ids
    reference[40:60] = 0
    reference[60:63] = reference[63]
    queries = np.concatenate([reference[[0, 45, 60]], unit_norm(rng.normal(size=(30, 8))), np.full((1, 8), 1e6)])
    found = score(name, queries, reference, 16)
    assert np.isfinite(found).all()
    if name in ("slof", "dao"):
        assert found[0] == found[1] == 1  # among its copies the ratio of zero to zero is one
    if name == "dao_log":
        assert found[0] == found[1] == 0


@every_score
def test_isolated_points_score_high(name):
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(500, 20)) * np.array([1.0] * 2 + [0.05] * 18)  # nearly flat
    queries = np.concatenate([reference[:100] + rng.normal(size=(100, 20)) * 0.001, rng.normal(size=(10, 20))])
    assert roc_auc_score(np.arange(110) >= 100, score(name, queries, reference, 16)) > 0.97


def test_k_distance_and_lof_of_scikit_learn():
    rng = np.random.default_rng(5)
    scale = np.repeat([1.0, 0.2, 0.6], 200)[:, None]
    reference = rng.normal(size=(600, 8)) * scale + rng.normal(size=(3, 8))[np.repeat([0, 1, 2], 200)] * 6
    queries = reference + rng.normal(size=(600, 8)) * 0.4
    expected = NearestNeighbors(n_neighbors=20).fit(reference).kneighbors(queries)[0][:, -1]
    np.testing.assert_allclose(score("k_distance", queries, reference, 20), expected, rtol=1e-4)
    # SLOF is LOF without reachability distances: other numbers, nearly the same order.
    lof = -LocalOutlierFactor(n_neighbors=20, novelty=True).fit(reference).score_samples(queries)
    assert spearmanr(lof, score("slof", queries, reference, 20)).statistic > 0.97


def test_columns_of_every_batch_are_the_same_bits():
    rng = np.random.default_rng(6)
    built = ReferenceSet.build(unit_norm(rng.normal(size=(300, 16))), np.arange(300, dtype=np.uint64), (4, 16, 64))
    x = unit_norm(rng.normal(size=(1100, 16)))
    whole = published_scores(knn(x, built.embeddings, 64), built, (16, 64), suffix="_raw")
    assert list(whole) == [f"{name}_k{k}_raw" for k in (16, 64) for name in SCORES]
    for start, stop in ((0, 1), (1, 7), (7, 600), (600, 1100)):
        part = published_scores(knn(x[start:stop], built.embeddings, 64), built, (16, 64), suffix="_raw")
        assert all(part[name].tobytes() == whole[name][start:stop].tobytes() for name in whole)
    with pytest.raises(ValueError, match="k=64 needs as many neighbours: the search found 16"):
        published_scores(knn(x, built.embeddings, 16), built, (64,))


@every_score
def test_the_table_says_what_a_reader_must_know(name):
    spec = SCORES[name]
    assert spec.name == spec.function.__name__ == name
    for text in (spec.description, spec.formula, spec.source):
        assert text.strip()
        assert "\n" not in text
