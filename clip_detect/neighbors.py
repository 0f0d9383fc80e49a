"""Exact nearest neighbours in a reference of some thousand embeddings: the search below every score.

A float32 matrix product proposes candidates quickly, but where two embeddings nearly coincide it
loses most digits of their distance and with them their order. So the distances of the candidates
are computed again as differences, always by the same function on the CPU, and the order comes from
these. A backend only proposes; the result is the same, bit for bit, whichever one did, however
the queries are split or ordered, and whatever the number of threads. (On one kind of processor, and as long as faiss
is installed or is not: it has the faster function.)

Memory on top of inputs and result: `CHUNK_BYTES` of candidate distances and, without faiss, `SCRATCH_BYTES` of copied
rows, whatever the number of queries.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped, UInt64

CHUNK_BYTES = 32 * 2**20
SCRATCH_BYTES = 2 * 2**20
BACKENDS = ("torch", "faiss", "faiss-gpu")

_UNIT = 2.0**-24  # u, the unit roundoff of float32
_NO_ROW = np.uint64(2**64 - 1)
_CORE_TYPE = "OPENBLAS_CORETYPE"
# One of these is there where a GPU can be: NVIDIA's, Jetson's, that of Windows' Linux, AMD's.
_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")

# chunk of queries -> (squared distances, ascending up to rounding; reference rows)
Propose = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Neighbors:
    """The k nearest reference rows of each query, nearest first.

    distances: Euclidean, not squared. indices: rows of the reference; equal distances are ordered by row.
    searched_again: queries whose candidates could not be proven complete and that were compared
    with every row; a measure of cost, without influence on the result.
    """

    distances: Float32[np.ndarray, "n k"]
    indices: Int64[np.ndarray, "n k"]
    searched_again: int = 0

    def rows(self, start: int, stop: int) -> Neighbors:
        """Return the neighbours of queries start..stop-1."""
        return Neighbors(self.distances[start:stop], self.indices[start:stop])


def unit_norm(x: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Scale each row to length one; a row of zeros stays zero. A row's result does not depend on the others."""
    out = np.empty(x.shape, np.float32)
    for start in range(0, len(x), 4096):
        rows = x[start : start + 4096].astype(np.float64)
        length = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
        np.divide(rows, np.where(length > 0, length, 1.0), out=out[start : start + 4096], casting="same_kind")
    return out


def knn(
    queries: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "R d"],
    k: int,
    *,
    query_ids: Shaped[np.ndarray, " n"] | None = None,
    reference_ids: Shaped[np.ndarray, " R"] | None = None,
    backend: str = "auto",
    threads: int = 1,
    device: str | None = None,
) -> Neighbors:
    """Find the k nearest reference rows of every query by Euclidean distance.

    With ids (64-bit integers of the image content, on both sides or on neither) a reference row with
    the query's own id is never its neighbour: neither the image itself nor a copy of it.
    backend: `torch`, `faiss`, `faiss-gpu` or `auto` (see `choose_backend`); `device` is torch's.
    Queries that are not float32 are converted chunk by chunk.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or fewer than k rows are left for a query.
        ImportError: the backend asked for is not installed.
    """
    rows = np.require(reference, np.float32, ["C", "W"])
    _check_shapes(queries, rows, k, query_ids, reference_ids)
    lengths = _lengths(rows, "reference", 0)
    own, others = _as_ids(query_ids), _as_ids(reference_ids)
    if own is not None and others is not None:
        _check_enough(own, others, k)
    n, size = len(queries), len(rows)
    distances, indices = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    # One candidate for the query itself, and some so that rounding seldom leaves the last one in doubt.
    width = min(size, k + 6 + k // 8)
    step = max(1, min(1024, CHUNK_BYTES // (4 * size)))
    again = 0
    with _settings(threads, chosen := choose_backend(backend, device)):
        propose = _proposer(chosen, rows, width, device)
        exact = _Exact(rows, float(lengths.max(initial=0.0)), others, k)
        for start in range(0, n, step):
            chunk = np.require(queries[start : start + step], np.float32, ["C", "W"])
            length = _lengths(chunk, "queries", start)
            part = slice(start, start + len(chunk))
            again += exact.search(
                chunk, length, *propose(chunk), None if own is None else own[part], distances[part], indices[part]
            )
    return Neighbors(distances, indices, again)


def choose_backend(backend: str = "auto", device: str | None = None) -> str:
    """Name the backend that will propose candidates.

    `auto` takes faiss-gpu if a GPU is there and a small search on it comes out right, then torch if
    it sees a GPU (or if a device is named), then faiss on the CPU, then torch on the CPU, which proposes
    somewhat more slowly (benchmarks/score.py, `--backend`).
    """
    if backend == "auto":
        if device is not None:
            return "torch"
        if _torch_sees_gpu():
            return "faiss-gpu" if _faiss_gpu_works() else "torch"
        return "torch" if _faiss_or_none() is None else "faiss"
    if backend not in BACKENDS:
        raise ValueError(f"unknown kNN backend {backend!r}. Choose one of: auto, {', '.join(BACKENDS)}.")
    return backend


def _proposer(backend: str, reference: np.ndarray, width: int, device: str | None) -> Propose:
    if backend == "torch":
        return _propose_torch(reference, width, device or ("cuda" if _torch_sees_gpu() else "cpu"))
    faiss = _import_faiss(backend)
    if backend == "faiss":
        return lambda queries: faiss.knn(queries, reference, width)
    resources = faiss.StandardGpuResources()
    return lambda queries: faiss.knn_gpu(resources, queries, reference, width)


def _torch_sees_gpu() -> bool:
    """Ask torch for a GPU where there can be one: it takes seconds and half a gigabyte to load."""
    if "torch" not in sys.modules and sys.platform == "linux" and not any(map(os.path.exists, _DRIVERS)):
        return False
    import torch

    return torch.cuda.is_available()


def _propose_torch(reference: np.ndarray, width: int, device: str) -> Propose:
    import torch

    rows = torch.from_numpy(reference).to(device)
    half = rows.square().sum(1).mul_(-0.5)

    def propose(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q = torch.from_numpy(queries).to(device)
        # |q - r|^2 = |q|^2 - 2 (q.r - |r|^2 / 2), and |q| does not matter for the order.
        best = torch.addmm(half, q, rows.T).topk(width, dim=1)
        squared = np.einsum("ij,ij->i", queries, queries)[:, None] - 2 * best.values.cpu().numpy()
        return squared, best.indices.cpu().numpy()

    return propose


class _Exact:
    """Turns candidates into proven neighbours of one reference."""

    def __init__(self, rows: np.ndarray, longest: float, ids: np.ndarray | None, k: int) -> None:
        self.rows, self.longest, self.ids, self.k = rows, longest, ids, k
        self.faiss = _faiss_or_none()
        dimension = rows.shape[1]
        # gamma: any sum of d products in float32 is off by at most gamma times the sum of their
        # magnitudes, in whatever order they are added (Higham, Accuracy and Stability, 3.1).
        self.gamma = (dimension + 8) * _UNIT / (1 - (dimension + 8) * _UNIT)

    def search(
        self,
        queries: np.ndarray,
        lengths: np.ndarray,
        approximate: np.ndarray,
        candidates: np.ndarray,
        ids: np.ndarray | None,
        distances: np.ndarray,
        indices: np.ndarray,
    ) -> int:
        """Fill `distances` and `indices`; return how many queries had to be compared with every row."""
        usable = approximate
        if ids is not None and self.ids is not None:
            usable = np.where(self.ids[candidates] == ids[:, None], np.inf, approximate)
        kth = np.sort(usable, axis=1)[:, self.k - 1].astype(np.float64)
        # A candidate distance is off by at most `error`; a recomputed one by a factor 1 +- gamma. So every
        # row that can be among the k nearest, by recomputed distance, has a candidate distance <= reach.
        error = self.gamma * (lengths + self.longest) ** 2 + 1e-36
        reach = kth + 2 * error + 3 * self.gamma * (np.maximum(kth, 0) + error)
        proven = (approximate[:, -1] > reach) | (approximate.shape[1] == len(self.rows))
        distances[:], indices[:] = self._nearest(queries, candidates, ids)
        everything = np.arange(len(self.rows))[None]
        doubtful = np.flatnonzero(~proven)
        for i in doubtful:
            one = slice(i, i + 1)
            distances[one], indices[one] = self._nearest(queries[one], everything, None if ids is None else ids[one])
        return len(doubtful)

    def _nearest(self, queries: np.ndarray, candidates: np.ndarray, ids: np.ndarray | None) -> tuple:
        """Rank candidates by (recomputed distance, row) and keep the first k."""
        distance = self._distances(queries, candidates)
        # The bits of non-negative floats are ordered like the floats: one integer carries distance and row.
        packed = distance.view(np.uint32).astype(np.uint64) << np.uint64(32) | candidates.astype(np.uint64)
        if ids is not None and self.ids is not None:
            packed[self.ids[candidates] == ids[:, None]] = _NO_ROW
        packed.sort(axis=1)
        packed = packed[:, : self.k]
        return (packed >> np.uint64(32)).astype(np.uint32).view(np.float32), packed & np.uint64(2**32 - 1)

    def _distances(self, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Distances as lengths of differences; each pair's bits depend on that pair alone."""
        if self.faiss is not None:
            out = np.empty(candidates.shape, np.float32)
            chosen = np.require(candidates, np.int64, ["C"])
            pointers = [self.faiss.swig_ptr(array) for array in (out, queries, self.rows, chosen)]
            self.faiss.fvec_L2sqr_by_idx(*pointers, self.rows.shape[1], *candidates.shape)
            return np.sqrt(out)
        return _distances_by_torch(queries, self.rows, candidates)


def _distances_by_torch(queries: np.ndarray, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Do what faiss does, several times slower: it has to copy the rows."""
    import torch

    (count, width), dimension = candidates.shape, rows.shape[1]
    q, r, index = (torch.from_numpy(array) for array in (queries, rows, candidates))
    wide = min(width, max(1, SCRATCH_BYTES // (4 * dimension)))
    tall = max(1, SCRATCH_BYTES // (4 * dimension * wide))
    out = torch.empty((count, width), dtype=torch.float32)
    for top in range(0, count, tall):
        for left in range(0, width, wide):
            block = slice(top, top + tall), slice(left, left + wide)
            difference = r[index[block]]
            difference -= q[top : top + tall, None]
            torch.linalg.vector_norm(difference, dim=-1, out=out[block])
    return out.numpy()


@contextlib.contextmanager
def _settings(threads: int, backend: str) -> Iterator[None]:
    """Fix threads and full float32 precision, which the error bound presumes; put everything back after."""
    if threads < 1:
        raise ValueError(f"`threads` must be at least 1: got {threads}.")
    faiss = _faiss_or_none()
    with _torch_settings(threads) if backend == "torch" or faiss is None else contextlib.nullcontext():
        before = faiss.omp_get_max_threads() if faiss else 0
        try:
            if faiss:
                faiss.omp_set_num_threads(threads)
            yield
        finally:
            if faiss:
                faiss.omp_set_num_threads(before)


@contextlib.contextmanager
def _torch_settings(threads: int) -> Iterator[None]:
    import torch

    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(threads)
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(before)


def _check_shapes(queries, reference, k, query_ids, reference_ids) -> None:
    if queries.ndim != 2 or reference.ndim != 2 or queries.shape[1] != reference.shape[1]:
        raise ValueError(
            f"queries {queries.shape} and reference {reference.shape} must be two matrices with the same number "
            "of columns. Both must come from the same encoder."
        )
    if (query_ids is None) != (reference_ids is None):
        raise ValueError("give ids for queries and reference or for neither: a query is excluded by its id in both.")
    for name, ids, of in (("query_ids", query_ids, queries), ("reference_ids", reference_ids, reference)):
        if ids is not None and ids.shape != of.shape[:1]:
            raise ValueError(f"`{name}` must hold one id per row: got {ids.shape} for {len(of)} rows.")
    if not 1 <= k < len(reference):
        raise ValueError(
            f"`k` must be at least 1 and smaller than the reference: got k={k} with {len(reference)} rows. "
            "Lower `k` or raise `reference_size`."
        )


def _check_enough(own: np.ndarray, others: np.ndarray, k: int) -> None:
    """Check that k rows are left for every query once its own copies are out."""
    ordered = np.sort(others)
    _, counts = np.unique(ordered, return_counts=True)
    if k + counts.max() <= len(others):
        return
    copies = np.searchsorted(ordered, own, "right") - np.searchsorted(ordered, own, "left")
    if len(own) and k + copies.max() > len(others):
        raise ValueError(
            f"`k` is too large: got k={k}, but of {len(others)} reference rows {copies.max()} are copies of one query. "
            "Lower `k`, raise `reference_size`, or keep one row per image in the reference."
        )


def _as_ids(ids: np.ndarray | None) -> UInt64[np.ndarray, " n"] | None:
    if ids is None:
        return None
    if ids.dtype not in (np.dtype(np.uint64), np.dtype(np.int64)):
        raise ValueError(f"ids must be int64 or uint64: got {ids.dtype}.")
    return np.ascontiguousarray(ids).view(np.uint64)


def _lengths(x: Float32[np.ndarray, "n d"], name: str, first: int) -> np.ndarray:
    squared = np.einsum("ij,ij->i", x, x)
    bad = np.flatnonzero(~(squared < 1e36))
    if len(bad):
        raise ValueError(
            f"row {first + bad[0]} of {name} holds NaN, infinity or values over 1e18. "
            "Leave out rows without an embedding; if all rows are like this, the encoder overflowed."
        )
    return np.sqrt(squared.astype(np.float64)) * 1.001  # an upper bound, rounding included


def _import_faiss(backend: str) -> Any:
    extra = "gpu" if backend == "faiss-gpu" else "cpu"
    try:
        faiss = _load_faiss()
    except ImportError as error:
        raise ImportError(f"the kNN backend {backend!r} needs faiss: pip install 'tarsift[{extra}]'") from error
    if backend == "faiss-gpu" and not hasattr(faiss, "StandardGpuResources"):
        raise ImportError(
            "the faiss that is installed has no GPU support: pip uninstall faiss-cpu; pip install 'tarsift[gpu]'"
        )
    return faiss


@functools.cache
def _faiss_or_none() -> Any:
    """Return faiss, None where it is not installed."""
    try:
        return _load_faiss()
    except ImportError:
        return None


def _cpu_features() -> dict[str, bool]:
    """Return what the processor can do, as numpy found out; empty where it does not tell."""
    with contextlib.suppress(ImportError):
        from numpy._core._multiarray_umath import __cpu_features__  # pyright: ignore[reportAttributeAccessIssue]

        return __cpu_features__
    return {}


@functools.cache
def _load_faiss() -> Any:
    """Import faiss, and name the kernels for the OpenBLAS that it loads, where the user has not.

    The OpenBLAS in wheels of faiss (0.3.15) takes a processor newer than itself for one of 2004, and faiss is four
    times slower. Later ones ask what it can do, as is done here: https://github.com/OpenMathLib/OpenBLAS/pull/3485
    """
    can = _cpu_features()
    kernels = "SkylakeX" if can.get("AVX512_SKX") else "Haswell" if can.get("AVX2") and can.get("FMA3") else None
    if kernels is None or _CORE_TYPE in os.environ:
        return importlib.import_module("faiss")
    os.environ[_CORE_TYPE] = kernels
    try:
        return importlib.import_module("faiss")
    finally:
        del os.environ[_CORE_TYPE]


@functools.cache
def _faiss_gpu_works() -> bool:
    """Try a small search: a wheel built for other GPUs imports well and fails, or answers wrongly, when used."""
    try:
        faiss = _import_faiss("faiss-gpu")
        if faiss.get_num_gpus() < 1:
            return False
        points = np.eye(32, 16, dtype=np.float32) * np.arange(1, 33, dtype=np.float32)[:, None]
        distances, rows = faiss.knn_gpu(faiss.StandardGpuResources(), points[:8], points, 1)
    except Exception:
        return False
    return bool((rows[:, 0] == np.arange(8)).all() and np.abs(distances).max() < 1e-3)
