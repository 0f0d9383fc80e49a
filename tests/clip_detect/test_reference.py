import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.clip_detect.reference import ReferenceSet, local_dimension
from tarsift.clip_detect.sampling import keyed_hash, resalt, smallest

hashes = st.lists(st.integers(0, 60), max_size=40).map(lambda values: np.array(values, np.uint64))


def test_keyed_hash_is_blake2b_of_key_salt_and_content():
    content = [hashlib.sha256(bytes([i])).digest() for i in range(50)]
    person = hashlib.blake2b(b"night", digest_size=16).digest()
    expected = [
        int.from_bytes(hashlib.blake2b(c, digest_size=8, key=b"secret", person=person).digest(), "little")
        for c in content
    ]
    found = keyed_hash(content, b"secret", "night")
    assert found.tolist() == expected
    as_array = np.frombuffer(b"".join(content), np.uint8).reshape(50, 32)
    assert keyed_hash(as_array, b"secret", "night").tolist() == expected
    assert not np.isin(keyed_hash(content, b"other", "night"), found).any()
    assert not np.isin(keyed_hash(content, b"secret", "day"), found).any()
    assert keyed_hash([], b"secret").shape == (0,)


def test_resalt_is_one_to_one_and_unrelated():
    first = np.arange(20_000, dtype=np.uint64)  # as alike as hashes can be
    second, third = resalt(first, "a"), resalt(first, "b")
    assert len(np.unique(second)) == len(first)
    for x, y in ((first, second), (second, third)):
        assert abs(np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1]) < 0.03
    assert (resalt(first, "a") == second).all()


@settings(deadline=None)
@given(hashes, hashes, st.integers(1, 20))
def test_samples_merge(left, right, count):
    whole = np.concatenate([left, right])
    merged = np.concatenate([left[smallest(left, count)], right[smallest(right, count)]])
    expected = sorted(set(whole.tolist()))[:count]
    assert whole[smallest(whole, count)].tolist() == merged[smallest(merged, count)].tolist() == expected


def test_smallest_takes_the_first_of_copies():
    assert smallest(np.array([5, 2, 9, 2, 5], np.uint64), 2).tolist() == [1, 0]


def test_local_dimension_by_hand():
    # log ratios of (1, 2, 4) to 4: -2 log 2, -log 2, 0; their mean is -log 2.
    np.testing.assert_allclose(local_dimension(np.array([[1, 2, 4]], np.float32), 3), 1 / np.log(2))
    assert local_dimension(np.array([[2, 2, 2], [0, 0, 0]], np.float32), 3).tolist() == [1e4, 1e4]


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_local_dimension_of_a_uniform_cloud(dimension):
    rng = np.random.default_rng(dimension)
    x = np.zeros((4000, 16), np.float32)
    x[:, :dimension] = rng.uniform(size=(4000, dimension))
    found = np.median(ReferenceSet.build(x, np.arange(4000, dtype=np.uint64), [50]).lid)
    assert dimension * 0.7 < found < dimension * 1.1  # the edge of the cloud lowers it


def test_rows_are_measured_without_themselves_and_their_copies():
    points = np.array([[0.0], [1.0], [3.0], [7.0], [7.0]], np.float32)
    found = ReferenceSet.build(points, np.array([1, 2, 3, 4, 4], np.uint64), [2, 1])
    assert found.ks == (1, 2)
    assert found.k_distance.tolist() == [[1, 3], [1, 2], [2, 3], [4, 6], [4, 6]]
    np.testing.assert_allclose(found.lid[:, 1], 2 / np.log([3, 2, 1.5, 1.5, 1.5]), rtol=1e-6)


def test_saved_without_pickle_and_back(tmp_path):
    rng = np.random.default_rng(0)
    built = ReferenceSet.build(unit_norm(rng.normal(size=(90, 8))), rng.integers(0, 2**63, 90).astype("u8"), (4, 16))
    np.savez(tmp_path / "reference.npz", **built.to_arrays())
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as arrays:
        again = ReferenceSet.from_arrays(arrays)
    for other in (again, pickle.loads(pickle.dumps(built))):
        assert other.ks == built.ks
        for name in ("embeddings", "ids", "k_distance", "lid"):
            a, b = getattr(other, name), getattr(built, name)
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()


def test_errors_teach():
    points, ids = np.eye(8, dtype=np.float32), np.arange(8, dtype=np.uint64)
    with pytest.raises(ValueError, match="`ks` is empty"):
        ReferenceSet.build(points, ids, [])
    with pytest.raises(ValueError, match="got k=8 with 8 rows"):
        ReferenceSet.build(points, ids, [8])
    built = ReferenceSet.build(points, ids, [3])
    with pytest.raises(ValueError, match="not measured for k=5"):
        built.column(5)
    arrays = built.to_arrays()
    with pytest.raises(ValueError, match="lid missing"):
        ReferenceSet.from_arrays({name: a for name, a in arrays.items() if name != "lid"})
    with pytest.raises(ValueError, match="8 embeddings, 7 ids"):
        ReferenceSet.from_arrays(arrays | {"ids": ids[:7]})
