"""Does memory grow with the dump? Resident memory of `tarsift clean`, summed over all its processes.

Dumps of `--samples` tiny pictures each, in shards of `--per-shard`, go through the whole main job with
512-d embeddings of both towers. Ten times a second the anonymous and file-backed resident memory of
the command and of everything below it is summed; shared memory, where Ray keeps objects, is left out.
Files mapped by several processes count once for each. Appends one JSON line per cell to `--results`; a
cell that is there already (same settings and code) is not run again.

    python benchmarks/memory.py --results benchmarks/results/memory.jsonl

The bars: from 20,000 to 200,000 samples the peak grows by 64 MB at most, medians of three; shards of
100,000 samples do not raise it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TARSIFT = Path(sys.executable).parent / "tarsift"
CELLS = ((20_000, 10_000), (200_000, 10_000), (200_000, 100_000))
MB = 1 << 20


def make_dump(folder: Path, samples: int, per_shard: int) -> None:
    """Write shards of pictures of 32 x 32 pixels, all different, with a caption each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for first in range(0, samples, per_shard):
        with tarfile.open(folder / f"{first // per_shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + per_shard, samples)):
                small = rng.integers(0, 255, (4, 4, 3), np.uint8)
                sink = io.BytesIO()
                Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=85)
                for suffix, data in (("jpg", sink.getvalue()), ("txt", b"a photo of thing %d" % (i % 997))):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def make_encoder(path: Path) -> None:
    """Write a small encoder with 512-d embeddings and random weights."""
    from tarsift.operators.checkpoints import save_checkpoint
    from tarsift.operators.models import build_model, model_config

    config = {**model_config("tiny"), "embed_dim": 512}
    save_checkpoint(path, build_model(config, seed=0), config=config, shards={}, steps=0, samples=0, seed=0)


def family(root: int) -> Iterator[int]:
    """Yield a process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += parents.get(pid, [])


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
            peak = max(peak, sum(map(resident, family(process.pid))))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.monotonic() - start


def code_digest() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for package in ("clip_detect", "operators", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_cell(work: Path, samples: int, per_shard: int) -> dict[str, Any]:
    dump, encoder = work / f"dump-{samples}-{per_shard}", work / "enc.pt"
    if not dump.exists():
        make_dump(dump, samples, per_shard)
    if not encoder.exists():
        make_encoder(encoder)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    clean = ["clean", str(dump), "--out", str(out), "--encoder", f"detect={encoder}", "--quiet"]
    peak, elapsed = watch([str(TARSIFT), *clean])
    counts = json.loads((out / "run.json").read_text())["counts"]
    if counts["read"] != samples:
        raise SystemExit(f"{counts['read']} samples were read of {samples}")
    return {"peak_mb": round(peak / MB, 1), "elapsed_s": round(elapsed, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "memory.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for dumps and results; a temporary one if not given")
    args = parser.parse_args()
    code = code_digest()
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    records = [record for record in map(json.loads, lines) if record["code"] == code]
    done = {(code, r["samples"], r["per_shard"], r["repeat"]): r for r in records}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for samples, per_shard in CELLS:
                key = (code, samples, per_shard, repeat)
                if key in done:
                    continue
                cell = dict(zip(("code", "samples", "per_shard", "repeat"), key, strict=True))
                done[key] = cell | run_cell(args.work or Path(folder), samples, per_shard)
                with args.results.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
                print(json.dumps(done[key]), flush=True)
    medians = {
        cell: statistics.median(r["peak_mb"] for r in done.values() if (r["samples"], r["per_shard"]) == cell)
        for cell in CELLS
    }
    small, large, wide = (medians[cell] for cell in CELLS)
    print(json.dumps({"peak_mb": [small, large, wide], "growth_mb": large - small, "wide_shards_mb": wide - large}))


if __name__ == "__main__":
    main()
