"""Does memory grow with the dump? Resident memory of `tarsift clean`, summed over all its processes.

Dumps of 128-pixel JPEGs go through the whole main job with 512-d embeddings of both towers and two encoder actors (by
default a dump of few shards gets one). Smaller pictures, or two shards, are all read before the actors are up, so that
a small dump would never have all processes busy at once. Ten times a second the anonymous and file-backed resident
memory of the command and of everything below it is summed; shared memory, where Ray keeps objects, is left out. Files
mapped by several processes count once for each. Appends one JSON line per cell to `--results`; a cell that is there
already (same settings and code) is not run again.

    python benchmarks/memory.py --results benchmarks/results/memory.jsonl

The bars: from 20,000 to 200,000 samples the peak grows by 64 MB at most, medians of three; shards of
100,000 samples do not raise it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, ROOT, TARSIFT, Cells, code_digest, family, soft_pictures, write_shards

CELLS = ((20_000, 1_000), (200_000, 1_000), (200_000, 100_000))
MB = 1 << 20


def make_encoder(path: Path, dump: Path) -> None:
    """Write a small encoder with 512-d embeddings and random weights, said to be trained on a dump."""
    from tarsift.operators.models import build_model, model_config, save_checkpoint

    config = {**model_config("tiny"), "embed_dim": 512}
    shards = {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in dump.iterdir()}
    save_checkpoint(path, build_model(config, seed=0), config=config, shards=shards, steps=0, samples=0, seed=0)


def resident(pid: int) -> int:
    """Return the anonymous and file-backed resident bytes of a process; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssFile:")))


def watch(command: list[str]) -> tuple[int, float]:
    """Run a command; return the peak of its summed resident memory, in bytes, and the seconds it took."""
    start = time.monotonic()
    peak = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(resident, family([process.pid]))))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.monotonic() - start


def run_cell(work: Path, samples: int, per_shard: int) -> dict[str, Any]:
    dump, encoder = work / f"dump-{samples}-{per_shard}", work / f"enc-{samples}-{per_shard}.pt"
    if not dump.exists():
        write_shards(dump, soft_pictures(samples, side=128, quality=85, seed=0), per_shard=per_shard)
    if not encoder.exists():
        make_encoder(encoder, dump)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    clean = ["clean", str(dump), "--out", str(out), "--encoder", f"detect={encoder}", "--workers", "2", "--quiet"]
    peak, elapsed = watch([str(TARSIFT), *clean])
    counts = json.loads((out / "run.json").read_text())["counts"]
    if counts["read"] != samples:
        raise SystemExit(f"{counts['read']} samples were read of {samples}")
    return {"peak_mb": round(peak / MB, 1), "elapsed_s": round(elapsed, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "memory.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for dumps and results; a temporary one if not given")
    args = parser.parse_args()
    cells = Cells(args.results, code_digest(Path(__file__), ROOT / "benchmarks" / "measuring.py"))
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for samples, per_shard in CELLS:
                cell = {"samples": samples, "per_shard": per_shard, "repeat": repeat}
                if not cells.find(**cell):
                    found = run_cell(args.work or Path(folder), samples, per_shard)
                    print(json.dumps(cells.add(**cell, **found)), flush=True)
    medians = [
        statistics.median(r["peak_mb"] for r in cells.find(samples=samples, per_shard=per_shard))
        for samples, per_shard in CELLS
    ]
    small, large, wide = medians
    print(json.dumps({"peak_mb": medians, "growth_mb": large - small, "wide_shards_mb": wide - large}))


if __name__ == "__main__":
    main()
