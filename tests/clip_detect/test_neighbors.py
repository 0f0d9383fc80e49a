import contextlib
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsift.clip_detect import neighbors
from tarsift.clip_detect.neighbors import BACKENDS, choose_backend, knn, unit_norm

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
every_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=[pytest.mark.gpu, no_gpu] if name == "faiss-gpu" else []) for name in BACKENDS],
)


def oracle(queries, reference, k, *, excluded=None):
    """Brute force in float64: distances and rows, ordered by (distance, row)."""
    difference = queries.astype(np.float64)[:, None] - reference.astype(np.float64)[None]
    distance = np.sqrt((difference**2).sum(axis=-1))
    if excluded is not None:
        distance[excluded] = np.inf
    rows = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, rows, axis=1), rows


@contextlib.contextmanager
def without_faiss():
    """As where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        found = (neighbors._faiss_or_none, neighbors._load_faiss)
        for cached in found:
            cached.cache_clear()
        try:
            yield
        finally:
            for cached in found:
                cached.cache_clear()


def same(a, b):
    return a.distances.tobytes() == b.distances.tobytes() and a.indices.tobytes() == b.indices.tobytes()


@every_backend
def test_points_on_a_line(backend):
    points = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
    found = knn(np.array([[0.9], [8.0]], np.float32), points, 3, backend=backend)
    assert found.indices.tolist() == [[1, 0, 2], [3, 2, 1]]
    np.testing.assert_allclose(found.distances, [[0.1, 0.9, 2.1], [1, 5, 7]], rtol=1e-6)


SIZES = [(37, 50, 8, 5), (300, 700, 64, 16), (65, 257, 100, 200), (3, 9, 1, 8)]


@every_backend
@pytest.mark.parametrize(("n", "size", "d", "k"), SIZES)
def test_equals_brute_force(backend, n, size, d, k):
    rng = np.random.default_rng(d)
    queries, reference = (rng.normal(size=(m, d)).astype(np.float32) for m in (n, size))
    found = knn(queries, reference, k, backend=backend)
    distances, rows = oracle(queries, reference, k)
    np.testing.assert_allclose(found.distances, distances, rtol=2e-6, atol=1e-6)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert (found.indices == rows).mean() > 0.999  # float32 may swap two rows at nearly equal distance


@pytest.mark.parametrize("installed", [True, False], ids=["with faiss", "without"])
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    size=st.integers(3, 120),
    d=st.sampled_from([1, 2, 7, 16, 33, 128, 511]),
    spread=st.sampled_from([1.0, 1e-3, 1e-6]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_bits_depend_on_the_pair_alone(installed, n, size, d, spread, seed, data):
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(1, size - 2))
    reference = (rng.normal(size=(1, d)) + spread * rng.normal(size=(size, d))).astype(np.float32)
    queries = np.where(rng.random((n, 1)) < 0.3, reference[rng.integers(0, size, n)], rng.normal(size=(n, d)))
    queries = queries.astype(np.float32)
    with contextlib.nullcontext() if installed else without_faiss():
        whole = knn(queries, reference, k, backend="torch")
        cut, order = data.draw(st.integers(0, n)), rng.permutation(n)
        parts = [knn(part, reference, k, backend="torch") for part in (queries[:cut], queries[cut:])]
        assert np.concatenate([part.distances for part in parts]).tobytes() == whole.distances.tobytes()
        assert np.concatenate([part.indices for part in parts]).tobytes() == whole.indices.tobytes()
        shuffled = knn(queries[order], reference, k, backend="torch")
        assert (shuffled.distances == whole.distances[order]).all()
        assert (shuffled.indices == whole.indices[order]).all()
        if installed:
            assert same(whole, knn(queries, reference, k, backend="faiss"))


@every_backend
def test_any_chunk_or_number_of_threads_gives_the_same_bits(backend, monkeypatch):
    rng = np.random.default_rng(0)
    queries, reference = unit_norm(rng.normal(size=(300, 200))), unit_norm(rng.normal(size=(400, 200)))
    whole = knn(queries, reference, 30, backend=backend)
    assert same(whole, knn(queries, reference, 30, backend=backend, threads=2))
    monkeypatch.setattr(neighbors, "CHUNK_BYTES", 4 * 400 * 7)
    monkeypatch.setattr(neighbors, "SCRATCH_BYTES", 4 * 200 * 5)
    assert same(whole, knn(queries, reference, 30, backend=backend))


@every_backend
def test_near_duplicates_that_a_matrix_product_cannot_order(backend):
    rng = np.random.default_rng(1)
    d, size = 512, 200
    center = unit_norm(rng.normal(size=(1, d)))
    steps = unit_norm(rng.normal(size=(size, d))) * (1e-5 * 1.05 ** rng.permutation(size)[:, None]).clip(0, 0.3)
    reference = (center + steps).astype(np.float32)
    naive = (reference**2).sum(axis=1) - 2 * (center @ reference.T)[0]
    distances, rows = oracle(center, reference, 16)
    assert (np.argsort(naive)[:16] != rows[0]).any()
    found = knn(center, reference, 16, backend=backend)
    assert found.searched_again == 1
    assert (found.indices == rows).all()
    np.testing.assert_allclose(found.distances, distances, rtol=1e-6)


@every_backend
def test_an_image_and_its_copies_are_not_its_neighbours(backend):
    rng = np.random.default_rng(2)
    reference = rng.normal(size=(60, 12)).astype(np.float32)
    ids = np.arange(60, dtype=np.int64) - 30
    reference[50:55], ids[50:55] = reference[7], ids[7]
    found = knn(reference, reference, 9, query_ids=ids, reference_ids=ids, backend=backend)
    excluded = ids[:, None] == ids[None]
    distances, rows = oracle(reference, reference, 9, excluded=excluded)
    assert not np.take_along_axis(excluded, found.indices, axis=1).any()
    np.testing.assert_allclose(found.distances, distances, rtol=2e-6)
    assert (found.indices == rows).all()
    assert found.distances.min() > 0
    assert same(found, knn(reference, reference, 9, query_ids=ids.view("u8"), reference_ids=ids, backend=backend))


@every_backend
def test_equal_distances_are_ordered_by_row(backend):
    reference = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
    found = knn(np.eye(4, dtype=np.float32)[:1], reference, 60, backend=backend)
    assert found.indices.tolist() == [list(range(60))]
    assert (found.distances[0, :50] == 0).all()


def test_k_may_take_all_that_is_left():
    points = np.arange(6, dtype=np.float32)[:, None]
    ids = np.array([1, 1, 1, 2, 3, 4], np.uint64)
    assert knn(points[:1], points, 3, query_ids=ids[:1], reference_ids=ids).indices.tolist() == [[3, 4, 5]]
    with pytest.raises(ValueError, match="got k=4, but of 6 reference rows 3 are copies"):
        knn(points[:1], points, 4, query_ids=ids[:1], reference_ids=ids)
    assert knn(points[3:4], points, 4, query_ids=ids[3:4], reference_ids=ids).indices.tolist() == [[2, 4, 1, 5]]


def test_rotation_leaves_distances():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 24))
    rotation, _ = np.linalg.qr(rng.normal(size=(24, 24)))
    before, after = (knn(y[:50].astype(np.float32), y[50:].astype(np.float32), 10) for y in (x, x @ rotation))
    np.testing.assert_allclose(before.distances, after.distances, rtol=1e-5)


def test_settings_of_the_caller_neither_matter_nor_change():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(64, 96)).astype(np.float32)
    expected = knn(x[:32], x[32:], 5, backend="torch")
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same(expected, knn(x[:32], x[32:], 5, backend="torch", threads=threads + 1))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.get_num_threads() == threads


def test_read_only_half_precision_and_empty_input():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 8)).astype(np.float16)
    x.setflags(write=False)
    assert same(knn(x[:10], x[10:], 4), knn(x[:10].astype(np.float32), x[10:].astype(np.float32), 4))
    nothing = knn(x[:0], x, 4)
    assert nothing.distances.shape == nothing.indices.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 12}, r"`k` must be at least 1 and smaller than the reference: got k=12 with 12 rows"),
        ({"k": 0}, "got k=0"),
        ({"queries": np.zeros((2, 3), np.float32)}, "same number of columns"),
        ({"queries": np.full((2, 4), np.nan, np.float32)}, "row 0 of queries holds NaN"),
        ({"queries": np.array([[0] * 4, [1e30] * 4], np.float32)}, "row 1 of queries"),
        ({"query_ids": np.arange(2)}, "for queries and reference or for neither"),
        ({"query_ids": np.arange(2), "reference_ids": np.arange(3)}, "one id per row"),
        ({"query_ids": np.arange(2.0), "reference_ids": np.arange(12.0)}, "must be int64 or uint64: got float64"),
        ({"backend": "annoy"}, "unknown kNN backend 'annoy'"),
        ({"threads": 0}, "`threads` must be at least 1: got 0"),
    ],
)
def test_errors_teach(change, message):
    arguments = {"queries": np.zeros((2, 4), np.float32), "reference": np.ones((12, 4), np.float32), "k": 3} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(knn)(**arguments)  # its own checks, also where annotations are checked before


def test_without_faiss():
    x = np.eye(4, dtype=np.float32)
    with without_faiss():
        assert choose_backend() == "torch"
        assert knn(x, x, 2).indices[0, 0] == 0
        with pytest.raises(ImportError, match=r"pip install 'tarsift\[cpu\]'"):
            knn(x, x, 2, backend="faiss")
        for n, size, d, k in SIZES:
            test_equals_brute_force("torch", n, size, d, k)


@pytest.mark.parametrize("asked", [None, "Nehalem"])
def test_openblas_is_told_what_the_processor_can_do(asked):
    """In a process of its own: OpenBLAS looks once, when it is loaded."""
    code = (
        "import os, sys\n"
        "from tarsift.clip_detect import neighbors\n"
        "neighbors.choose_backend()\n"
        "print('faiss' in sys.modules, os.environ.get('OPENBLAS_CORETYPE'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    environment |= {"OPENBLAS_VERBOSE": "2", **({"OPENBLAS_CORETYPE": asked} if asked else {})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *_, last = done.stdout.splitlines()
    assert last == f"True {asked}"  # what was set for the import alone is gone
    chosen = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Core: ")]
    if asked is None and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and chosen:
        assert "Core: Prescott" not in chosen


@pytest.mark.skipif(any(map(os.path.exists, neighbors._DRIVERS)), reason="torch is asked for a GPU where one can be")
def test_torch_is_not_loaded_where_faiss_searches():
    """It takes seconds and half a gigabyte in every process that scores."""
    code = (
        "import sys, numpy as np\n"
        "from tarsift.clip_detect.suspicion import suspicion\n"
        "suspicion(np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32))\n"
        "import tarsift.pipelines.score\n"
        "print('faiss' in sys.modules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_unit_norm_is_defined_for_zeros_and_alone_per_row():
    x = np.random.default_rng(6).normal(size=(5000, 20)).astype(np.float16)
    x[3] = 0
    out = unit_norm(x)
    assert out.dtype == np.float32
    assert (out[3] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(np.delete(out, 3, 0).astype(np.float64), axis=1), 1, rtol=1e-6)
    assert unit_norm(x[4321:4322]).tobytes() == out[4321].tobytes()
    assert unit_norm(np.zeros((0, 4))).shape == (0, 4)
