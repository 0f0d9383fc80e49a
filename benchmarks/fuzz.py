"""Does any input break the parsers? Coverage-guided fuzzing (atheris) of the targets in tests/fuzz/targets.py.

Each target runs in slices of a few minutes of CPU, on a working corpus under `build/fuzz/` that begins with the kept
one and with what the tests are made of. A slice ends with one JSON line in `--results`: CPU seconds, inputs tried,
code reached, peak memory, and what failed, if anything did. Slices of the same code add up; run it again to go on.

    make fuzz                                             # sets up atheris; one CPU-hour per target
    python benchmarks/fuzz.py --target tar --minutes 60   # of one
    python benchmarks/fuzz.py --keep                      # the working corpora become the kept ones

The bar: an hour of CPU per target with no crash, no input that takes over 20 s, and no more than 1 GB resident.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, ROOT, Cells

WORK = ROOT / "build" / "fuzz"
KEPT = ROOT / "tests" / "fuzz" / "corpus"
HANG_S, MEMORY_MB, MAX_BYTES = 20, 1024, {"tar": 16384, "json": 2048, "caption": 512}
KEEP_AT_MOST = 200  # files per target

# What each target runs; instrumented for coverage, and the code by whose digest slices add up.
MODULES = {
    "tar": ["operators.tar", "operators.samples", "operators.streams", "operators.shards", "operators.writer"],
    "json": ["operators.shards", "operators.audit"],
    "caption": ["operators.shards", "pipelines.text", "pipelines.printing", "pipelines.report.folds"],
}

LOOP = ROOT / "tests" / "fuzz" / "loop.py"


def target_digest(target: str) -> str:
    """Digest of what the target runs and of what it checks."""
    digest = hashlib.sha256((ROOT / "tests" / "fuzz" / "targets.py").read_bytes())
    for module in MODULES[target]:
        digest.update((ROOT / (module.replace(".", "/") + ".py")).read_bytes())
    return digest.hexdigest()[:12]


def seed(target: str, folder: Path) -> None:
    """Begin a working corpus with the kept one and with the traps of the tests."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [path.read_bytes() for path in sorted((KEPT / target).glob("*"))]
    if target == "tar":
        from tests.traps import traps

        found += [trap.content for trap in traps(folder / "canary")]
    elif target == "json":
        found += [b'{"uid": "a", "caption": "a thing"}', b'{"uid": 3, "caption": ["x", 1]}', b'{"successes": 7}']
    else:
        found += [b"a photo of a thing", "\u202egpj.exe \x1b[2J ＡＢ é\u0301".encode(), b"caf\xe9\0"]
    for data in found:
        if len(data) <= MAX_BYTES[target]:
            (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


def fuzz(target: str, folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the fuzzer over a folder; return how it ended and the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    modules = ",".join(f"tarsift.{module}" for module in MODULES[target])
    command = [sys.executable, str(LOOP), target, modules, *options, str(folder)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_slice(target: str, seconds: int) -> dict[str, Any]:
    """Fuzz for about so many seconds of wall clock and say what came of it."""
    folder, finds = WORK / target, WORK / "finds" / target
    seed(target, folder)
    finds.mkdir(parents=True, exist_ok=True)
    ended, cpu_s = fuzz(
        target,
        folder,
        f"-max_total_time={seconds}",
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={MAX_BYTES[target]}",
        f"-artifact_prefix={finds}/",
        "-print_final_stats=1",
    )
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", ended.stderr))
    reached = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", ended.stderr)
    failed = None if ended.returncode == 0 else ended.stderr[-2000:]
    return {
        "cpu_s": round(cpu_s, 1),
        "inputs": int(stats.get("number_of_executed_units", 0)),
        "edges": int(reached[-1][0]) if reached else 0,
        "corpus": int(reached[-1][2]) if reached else 0,
        "peak_mb": int(stats.get("peak_rss_mb", 0)),
        "slowest_s": int(stats.get("slowest_unit_time_sec", 0)),
        "failed": failed,
        "date": time.strftime("%Y-%m-%d"),
    }


def keep(target: str) -> int:
    """Keep the working corpus, of which every file once reached something new; the smallest, if they are many."""
    chosen = sorted((WORK / target).iterdir(), key=lambda path: (path.stat().st_size, path.name))[:KEEP_AT_MOST]
    shutil.rmtree(KEPT / target, ignore_errors=True)
    (KEPT / target).mkdir(parents=True)
    for path in chosen:
        shutil.copy(path, KEPT / target / hashlib.sha1(path.read_bytes()).hexdigest()[:16])
    return len(chosen)


def spent(cells: Cells) -> float:
    """CPU seconds that this code has been fuzzed for."""
    return sum(record["cpu_s"] for record in cells.records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(MODULES), action="append")
    parser.add_argument("--minutes", type=float, default=60, help="of CPU per target, earlier runs included")
    parser.add_argument("--slice", type=int, default=300, help="seconds between two lines of the results")
    parser.add_argument("--keep", action="store_true", help="make the working corpora the kept ones")
    parser.add_argument("--results", type=Path, default=RESULTS / "fuzz.jsonl")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    failed = False
    for target in args.target or MODULES:
        if args.keep:
            print(f"{target}: {keep(target)} inputs are kept in {KEPT / target}")
            continue
        cells = Cells(args.results, target_digest(target))
        while (left := 60 * args.minutes - spent(cells)) > 0 and not failed:
            record = cells.add(target=target, **run_slice(target, min(args.slice, max(10, int(left)))))
            print({key: value for key, value in record.items() if key != "failed"}, flush=True)
            if record["failed"]:
                failed = True
                print(record["failed"])
        print(f"{target}: {spent(cells) / 60:.1f} CPU minutes by this code", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
