"""Run the demo for several seeds, and once without poison: does the whole story hold?

Each seed is one process, `tarsift demo --seed S`. Prints a table, and with `--json FILE` writes every
summary and whether the seed meets the bars: AUROC >= 0.95 and recall >= 0.9 at 5 % removed, attack success
>= 0.8 before, <= 0.1 after with accuracy within 3 points, >= 0.7 after random removal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COLUMNS = (
    "auroc",
    "average_precision",
    "recall_at_0.05",
    "attack_success_before",
    "attack_success_after",
    "attack_success_random_removal",
    "accuracy_before",
    "accuracy_after",
    "elapsed_s",
)


def run(seed: int, *extra: str) -> dict[str, Any]:
    """Run one demo in a process of its own and return its summary."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        tarsift = Path(sys.executable).parent / "tarsift"
        start = time.monotonic()
        command = [str(tarsift), "demo", "--seed", str(seed), "--out", str(out), *extra]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"seed {seed} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        summary = json.loads((out / "summary.json").read_text())
        del summary["report"]  # a path that is gone
        return summary | {"seed": seed, "process_s": round(time.monotonic() - start, 1)}


def detection_holds(s: dict[str, Any]) -> bool:
    """Tell whether `suspicion` found the planted samples."""
    return s["auroc"] >= 0.95 and s["recall_at_0.05"] >= 0.9


def repair_holds(s: dict[str, Any]) -> bool:
    """Tell whether the attack worked before, not after, and still after random removal."""
    return (
        s["attack_success_before"] >= 0.8
        and s["attack_success_after"] <= 0.1
        and s["accuracy_before"] - s["accuracy_after"] <= 0.03
        and s["attack_success_random_removal"] >= 0.7
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    summaries = []
    print("seed  " + "  ".join(name[-16:] for name in COLUMNS))
    for seed in options.seeds:
        summary = run(seed)
        summary |= {"detection_holds": detection_holds(summary), "repair_holds": repair_holds(summary)}
        summaries.append(summary)
        figures = "  ".join(f"{summary[name]:>{min(16, len(name))}.3f}" for name in COLUMNS)
        print(f"{seed:>4}  {figures}  {'holds' if summary['detection_holds'] and summary['repair_holds'] else 'MISS'}")
        sys.stdout.flush()
    clean = run(options.seeds[0], "--rate", "0")
    print(f"rate 0: accuracy {clean['accuracy_before']:.3f} -> {clean['accuracy_after']:.3f}, keys {sorted(clean)}")
    if options.json:
        options.json.write_text(json.dumps({"seeds": summaries, "rate_0": clean}, indent=2) + "\n")


if __name__ == "__main__":
    main()
