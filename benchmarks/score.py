"""Time the search and the five published scores at the paper's setting (k=16, a reference of 2048).

Everything is compared side by side in one process, on the same rows, with the same number of threads:

released   the released detector's algorithm for DAO, written anew from its structure: per batch of 2048 all
           pairwise distances twice (batch against reference, reference against itself, one set when there is
           one worker) without a matrix product, both matrices sorted whole, and for every sample the whole
           sorted rows of its k neighbours gathered to read one column. One score.
released_mm  the same with distances from a matrix product.
dense      what one would write today: float32 matrix product and torch.topk per chunk, self masked by index,
           all five scores in float32. Not exact: distances are those of the matrix product.
lof        scikit-learn's LocalOutlierFactor(novelty=True), fitted on the reference. One score.
sgemm      the bare matrix product of the same shape: no distances, no neighbours.
ours       `knn` (exact, self excluded by id) and `published_scores`: all five scores.

Measuring the reference (once per dump) is outside all timings except in `released`, which has none.
A ratio is time per sample divided by ours; blocks alternate, and the median over blocks and repeats is given.
On a machine that others use, take `--clock cpu --threads 1`.

    python benchmarks/score.py --json benchmarks/results/score.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.neighbors import LocalOutlierFactor
from threadpoolctl import threadpool_limits

from tarsift.clip_detect.neighbors import choose_backend, knn, unit_norm
from tarsift.clip_detect.reference import ReferenceSet
from tarsift.clip_detect.scores import published_scores

CHUNK = 1024


def make_rows(count: int, dimension: int, seed: int) -> np.ndarray:
    """Embeddings as unlike noise as those of an encoder: clusters in 64 directions, and a little of the others."""
    rng = np.random.default_rng(seed)
    shape = np.random.default_rng(12345)
    centers = shape.standard_normal((200, 64), dtype=np.float32)
    basis = shape.standard_normal((64, dimension), dtype=np.float32)
    inside = centers[rng.integers(0, 200, count)] + 0.7 * rng.standard_normal((count, 64), dtype=np.float32)
    out = inside @ basis
    out += rng.standard_normal(out.shape, dtype=np.float32)
    return unit_norm(out)


def released(rows: np.ndarray, k: int, mode: str) -> None:
    """DAO of one batch, by the released algorithm."""
    x = torch.from_numpy(rows)
    count = len(x)
    others = torch.cdist(x, x, compute_mode=mode)[~torch.eye(count, dtype=torch.bool)].view(count, -1)
    near, index = torch.sort(others, dim=1)
    ordered, _ = torch.sort(torch.cdist(x, x, compute_mode=mode), dim=1)
    lid = -k / torch.log(ordered[:, :k] / ordered[:, k, None] + 1e-4).sum(dim=1)
    of_neighbors = torch.stack([ordered.index_select(0, row) for row in index[:, :k]])[:, :, k]
    lid_of_neighbors = torch.stack([lid.index_select(0, row) for row in index[:, :k]])
    (lid_of_neighbors * torch.log(near[:, k, None] / of_neighbors)).mean(dim=1)


def dense(rows: np.ndarray, ids: np.ndarray, reference: ReferenceSet, k: int) -> None:
    """All five scores from matrix product and topk; ids below R are rows of the reference."""
    r = torch.from_numpy(reference.embeddings)
    half = r.square().sum(1) / -2
    column = reference.column(k)
    log_k_distance = torch.from_numpy(reference.k_distance[:, column]).clamp_min(1e-6).log()
    lids = torch.from_numpy(reference.lid[:, column].copy())
    own = torch.from_numpy(ids.astype(np.int64))
    parts = []
    for start in range(0, len(rows), CHUNK):
        x, i = torch.from_numpy(rows[start : start + CHUNK]), own[start : start + CHUNK]
        similarity = torch.addmm(half, x, r.T)
        inside = torch.nonzero(i < len(r))[:, 0]
        similarity[inside, i[inside]] = -torch.inf
        best, index = similarity.topk(k, dim=1)
        log_d = (x.square().sum(1, keepdim=True) - 2 * best).clamp_min(1e-12).log() / 2
        ratio = log_d[:, -1:] - log_k_distance[index]
        lid = lids[index]
        terms = ratio * lid
        parts.append(
            (
                log_d[:, -1].exp(),
                1 / (log_d[:, -1] - log_d.mean(1)).clamp_min(1e-4),
                ratio.exp().mean(1),
                (terms.logsumexp(1) - np.log(k)).clamp_max(88).exp(),
                terms.mean(1),
            )
        )
    for score in zip(*parts, strict=True):
        torch.cat(score)


def sgemm(rows: np.ndarray, reference: ReferenceSet) -> None:
    """The matrix product alone."""
    r = torch.from_numpy(reference.embeddings).T
    for start in range(0, len(rows), CHUNK):
        torch.mm(torch.from_numpy(rows[start : start + CHUNK]), r)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(function: Callable[[], object], clock: str) -> float:
    start = CLOCKS[clock]()
    function()
    return CLOCKS[clock]() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--reference", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--block", type=int, default=8192, help="rows per timing")
    parser.add_argument("--lof-rows", type=int, default=2048)
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: steadier where others use the machine",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads), torch.no_grad():
        result = measure(options)
    print_table(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(options: argparse.Namespace) -> dict:
    size, k, block = options.reference, options.k, options.block
    rows = make_rows(max(options.sizes), options.dimension, seed=0)
    ids = np.arange(len(rows), dtype=np.uint64)  # the first R are the reference: rows are independent
    reference = ReferenceSet.build(rows[:size], ids[:size], [k], threads=options.threads, backend=options.backend)
    lof = LocalOutlierFactor(n_neighbors=k, novelty=True, n_jobs=options.threads).fit(reference.embeddings)
    again = 0

    def ours(part: slice) -> None:
        nonlocal again
        near = knn(
            rows[part],
            reference.embeddings,
            k,
            query_ids=ids[part],
            reference_ids=reference.ids,
            threads=options.threads,
            backend=options.backend,
        )
        again += near.searched_again
        published_scores(near, reference, [k])

    fast: dict[str, Callable[[slice], None]] = {
        "ours": ours,
        "dense": lambda part: dense(rows[part], ids[part], reference, k),
        "sgemm": lambda part: sgemm(rows[part], reference),
    }
    slow: dict[str, tuple[int, Callable[[slice], object]]] = {
        "released": (size, lambda part: released(rows[part], k, "donot_use_mm_for_euclid_dist")),
        "released_mm": (size, lambda part: released(rows[part], k, "use_mm_for_euclid_dist")),
        "lof": (options.lof_rows, lambda part: lof.score_samples(rows[part])),
    }
    for function in fast.values():
        function(slice(0, block))
    ratios: dict[str, list[float]] = {name: [] for name in (*fast, *slow)}
    per_sample: dict[int, list[float]] = {n: [] for n in options.sizes}
    turn = 0
    for _ in range(options.repeats):
        for n in options.sizes:
            spent = 0.0
            for start in range(0, n, block):
                part = slice(start, min(start + block, n))
                order = list(fast)[turn % 3 :] + list(fast)[: turn % 3]
                turn += 1
                took = {name: seconds(lambda name=name, part=part: fast[name](part), options.clock) for name in order}
                spent += took["ours"]
                for name in ("dense", "sgemm"):
                    ratios[name].append(took[name] / took["ours"])
            per_sample[n].append(spent / n)
        for name, (count, function) in slow.items():
            before = seconds(lambda: ours(slice(0, block)), options.clock)
            took = seconds(lambda function=function, count=count: function(slice(0, count)), options.clock)
            after = seconds(lambda: ours(slice(0, block)), options.clock)
            ratios[name].append(took / count / ((before + after) / 2 / block))
    medians = {n: float(np.median(times)) for n, times in per_sample.items()}
    totals = [n * t for n, t in medians.items()]
    slope = float(np.polyfit(np.log(list(medians)), np.log(totals), 1)[0]) if len(medians) > 1 else None
    return {
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "backend": choose_backend(options.backend),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
        **{f"ratio_{name}": float(np.median(values)) for name, values in ratios.items() if values},
        "quartiles": {name: np.percentile(values, [25, 75]).tolist() for name, values in ratios.items() if values},
        "samples_per_s": {str(n): 1 / t for n, t in medians.items()},
        "time_exponent_in_n": slope,
        "searched_again": again,
    }


def print_table(result: dict) -> None:
    print(f"{result['machine']}; {result['settings']['threads']} threads; proposals from {result['backend']}")
    print(f"{'compared with':14} {'time / ours':>12} {'quartiles':>18}")
    for name, (low, high) in result["quartiles"].items():
        print(f"{name:14} {result['ratio_' + name]:12.2f} {low:9.2f} - {high:.2f}")
    for n, rate in result["samples_per_s"].items():
        print(f"{int(n):>10,} rows: {rate:10,.0f} samples/s")
    print(f"time grows as N^{result['time_exponent_in_n'] or np.nan:.3f}; searched again: {result['searched_again']}")


if __name__ == "__main__":
    main()
