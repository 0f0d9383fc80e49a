"""Is anything lost when machines die? `tarsift clean`, hit by a fault in each of its passes.

Each cell is a pass, a kind of fault and a seed. The moment is drawn by the seed: after the first commit of the pass
where it has several, anywhere in it where it has one. Then the run must end with the right exit code within five
minutes; where that is not 0, the same command must go on and end with 0. Either way the result must be the bytes of
a run that nothing disturbed, and no record committed before the fault may have been put again. Appends one JSON
line per cell to `--results`; a cell that is there already (same code) is not run again.

    python benchmarks/faults.py                  # every pass with every kind that can hit it, about two hours
    python benchmarks/faults.py --kind raylet    # some
    python benchmarks/faults.py --sample 0.1     # a random tenth, the same every time
    python benchmarks/faults.py --grid           # which cells were hit
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harm import (
    HANG_S,
    Case,
    TooLate,
    eat_memory,
    fill_disk,
    freeze_worker,
    kill_command,
    kill_driver,
    kill_encoder,
    kill_raylet,
    kill_worker,
    lose_node,
    outage,
    second_run,
    stop,
    surroundings,
)
from measuring import RESULTS, ROOT, Cells, code_digest

sys.path.insert(0, str(ROOT))

from tests.conftest import make_dump, make_encoder
from tests.pipelines.runs import clean, contents
from tests.pipelines.store import stored

SHARDS, SAMPLES = 8, 60
# What tells that a pass is being worked on: so many records of a pass (its own, or the one before it).
PASSES: dict[str, tuple[str, int | None]] = {
    "embed": ("embed.detect", None),  # None: a number drawn from 1 to SHARDS - 1
    "merge": ("embed.detect", 1),  # then the next merge that has begun to write
    "reference": ("embed.detect", SHARDS),
    "density": ("density", None),
    "enriched": ("density", SHARDS),
    "score": ("score", None),
    "flag": ("flag", None),
    "write": ("write", None),
    "report": ("write", SHARDS),
}
# Seconds within which the moment is drawn; in other passes a fifth of one.
SPAN_S = {"reference": 2.0, "enriched": 2.0, "report": 1.0}
ON_DRIVER = ("report",)  # no task of Ray's has a part in these


@dataclass(frozen=True)
class Kind:
    """A kind of fault, which passes it cannot hit, and what the run that it hits must exit with, and say then.

    A run that ends with 0 all the same, since it was done with what the fault took away, is right as well.
    `options` are those of the run.
    """

    inflict: Callable[[Case], str]
    exit_code: int
    not_in: tuple[str, ...] = ()
    says: str = ""
    options: tuple[str, ...] = ()


# No progress, and the operators that run: functions of tarsift's, or stages of Ray Data.
STALLED = r"no progress for 60 s in .*(MapBatches|_fold_some|write_shard|fit_|_fit_|_merge_and_tidy)"
MERGES_ON_DISK = ("merge",)  # a merge that writes is seen on a disk only
KINDS = {
    "command": Kind(kill_command, -signal.SIGKILL),
    "driver": Kind(kill_driver, 75),
    "raylet": Kind(kill_raylet, 75),
    "worker": Kind(kill_worker, 0, ON_DRIVER),
    "encoder": Kind(kill_encoder, 0, tuple(name for name in PASSES if name not in ("embed", "merge"))),
    "node": Kind(lose_node, 0),
    "memory": Kind(eat_memory, 0, ON_DRIVER),
    "disk": Kind(fill_disk, 1),
    "store": Kind(outage, 0, MERGES_ON_DISK),
    "stop": Kind(stop, 75),
    "second": Kind(second_run, 0),
    "freeze": Kind(freeze_worker, 1, ON_DRIVER, STALLED, ("--set", "resources.stall_timeout_s=60")),
}


def possible() -> list[tuple[str, str]]:
    """Return every pass with every kind that can hit it."""
    return [(name, kind) for kind, about in KINDS.items() for name in PASSES if name not in about.not_in]


def wait_for_moment(case: Case, name: str) -> dict[str, Any]:
    """Wait until a pass is being worked on, and then until the moment drawn."""
    ledger, count = PASSES[name]
    count = count if count is not None else case.rng.randint(1, SHARDS - 1)
    deadline = time.monotonic() + HANG_S
    while sum(key.startswith(f"{ledger}/") for key in case.records()) < count:
        if case.process.poll() is not None or time.monotonic() > deadline:
            raise TooLate
        time.sleep(0.002)
    while name == "merge" and not case.merging():
        if case.process.poll() is not None:
            raise TooLate
    delay = 0.0 if name == "merge" else case.rng.uniform(0, SPAN_S.get(name, 0.2))
    time.sleep(delay)
    if case.process.poll() is not None:
        raise TooLate
    return {"records": count, "delay_s": round(delay, 3)}


def run_cell(name: str, kind: str, seed: int, folder: Path, encoder: str, whole: dict[str, bytes]) -> dict[str, Any]:
    """Hit one run, let the same command go on if need be, and look at what is there."""
    about = KINDS[kind]
    with surroundings(kind, folder) as (environment, out, special):
        store = special if kind == "store" else None
        source, target = ("s3://bucket/dump", "s3://bucket/out") if store else (folder / "dump", out)
        command = clean(source, target, encoder, *about.options)
        with (folder / "stderr").open("wb") as told:
            process = subprocess.Popen(command, env=environment, stderr=told, start_new_session=True)
        case = Case(process, out, random.Random(f"{name} {kind} {seed}"), store, special if kind == "node" else None)
        try:
            moment = wait_for_moment(case, name)
            before = case.records()
            hit = about.inflict(case)
            start = time.monotonic()
            code = process.wait(timeout=HANG_S)
            ended_s = time.monotonic() - start
        finally:
            process.kill()
            process.wait()
            case.thaw()
        codes = [code]
        last_words = (folder / "stderr").read_text(errors="replace")
        if code:
            (out.parent / "filler").unlink(missing_ok=True)
            codes.append(subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, timeout=HANG_S).returncode)
        after = case.records()
        found = stored(store, "bucket/out") if store else contents(out)
    redone = [key for key in before if before[key] != after.get(key)]
    told = code == 0 or re.search(about.says, " ".join(last_words.split())) is not None
    right = code in (about.exit_code, 0) and codes[-1] == 0 and told and (kind != "second" or hit.endswith("with 75"))
    return {
        "moment": moment,
        "hit": hit,
        "exit_codes": codes,
        "ended_s": round(ended_s, 1),
        "redone": redone,
        "same_bytes": found == whole,
        "ok": right and not redone and found == whole,
        **({} if right else {"told": last_words[-2000:]}),
    }


def make_inputs(work: Path) -> tuple[str, dict[str, bytes]]:
    """Write the dump and an encoder, and return the encoder and what an undisturbed run makes of the dump."""
    make_dump(work / "dump", shards=SHARDS, samples=SAMPLES)
    encoder = make_encoder(work / "enc.pt", work / "dump")
    undisturbed = {**os.environ, "RAY_ADDRESS": "local"}
    subprocess.run(clean(work / "dump", work / "whole", encoder), env=undisturbed, check=True)
    return encoder, contents(work / "whole")


def grid(cells: Cells) -> str:
    """Render which cells were hit, by how many runs, and how many of those were as they must be."""
    lines = ["| pass | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name in PASSES:
        row = []
        for kind, about in KINDS.items():
            runs = cells.find(**{"pass": name, "kind": kind})
            row.append("–" if name in about.not_in else f"{sum(r['ok'] for r in runs)}/{len(runs)}")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass", dest="passes", choices=PASSES, action="append")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sample", type=float, default=1.0, help="a random share of the cells, the same every time")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "faults.jsonl")
    args = parser.parse_args()
    cells = Cells(args.results, code_digest(Path(__file__), ROOT / "benchmarks" / "harm.py"))
    if args.grid:
        print(grid(cells))
        return
    chosen = [
        (name, kind, seed)
        for seed in range(args.seeds)
        for name, kind in possible()
        if name in (args.passes or PASSES) and kind in (args.kind or KINDS)
    ]
    if args.sample < 1:
        chosen = random.Random(0).sample(chosen, max(1, round(args.sample * len(chosen))))
    chosen = [cell for cell in chosen if not cells.find(**dict(zip(("pass", "kind", "seed"), cell, strict=True)))]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        encoder, whole = make_inputs(work)
        for name, kind, seed in chosen:
            for attempt in range(3):
                cell = work / f"{name}-{kind}-{seed}-{attempt}"
                cell.mkdir()
                (cell / "dump").symlink_to(work / "dump")
                try:
                    found = run_cell(name, kind, 100 * attempt + seed, cell, encoder, whole)
                except TooLate:
                    continue
                except subprocess.TimeoutExpired:
                    found = {"ok": False, "hang": True, "told": (cell / "stderr").read_text(errors="replace")[-2000:]}
                record = cells.add(**{"pass": name, "kind": kind, "seed": seed, "attempt": attempt, **found})
                print({k: v for k, v in record.items() if k not in ("code", "told")}, flush=True)
                break
            else:
                print(f"{name} {kind} {seed}: not hit in three runs", flush=True)
    print(grid(cells))
    sys.exit(not all(record["ok"] for record in cells.records))


if __name__ == "__main__":
    main()
