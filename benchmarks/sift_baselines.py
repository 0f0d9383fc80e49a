"""What do the methods that sifters are compared with find, as they are and with dilution? The protocol of sift.py.

The sets, networks and figures are those of sift.py. Methods that look at a trained model share one, which is what each
would have trained. *diluted*: they judge a diluted copy of each picture in its place, as Meta-Sift does; ITLM, which
trains four times, judges pictures alone, and the diluted loss is in sift.py. Appends one JSON line per set.

    python benchmarks/sift_baselines.py --data DATA
    python benchmarks/sift_baselines.py --table
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import statistics
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int64
from measuring import RESULTS, ROOT, Cells
from sift import SEEDS, SHOWN, protocol, tiny
from sift_cell import figures
from sift_sets import Cell, code_digest, labelled, poisoned

from tarsift.sifters.baselines import BASELINES
from tarsift.sifters.inputs import Inputs
from tarsift.sifters.result import SiftResult
from tarsift.sifters.settings import BaselineConfig
from tarsift.sifters.training import Learner

BY_A_MODEL = ("mi_dcm", "sf_least", "self_if", "activation_clustering", "spectral_signatures")
METHODS = {  # and how they judge
    "dcm": ("plain", "diluted"),
    **dict.fromkeys(BY_A_MODEL, ("plain", "diluted")),
    "loss_scan": ("plain", "diluted"),
    "itlm": ("plain",),
}


class Diluted:
    """Inputs that are trained on as they were, and judged by one diluted copy of each, made once."""

    def __init__(self, inputs: Inputs, seed: int) -> None:
        self._inputs = inputs
        draw = torch.Generator(inputs.device).manual_seed(seed)
        rows = torch.arange(len(inputs), device=inputs.device).split(1000)
        self._copies = torch.cat([inputs.diluted(part, draw) for part in rows])

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._inputs.shape

    @property
    def device(self) -> torch.device:
        return self._inputs.device

    def plain(self, rows: Int64[torch.Tensor, " b"]) -> Float32[torch.Tensor, "b ..."]:
        return self._copies[rows]

    def augmented(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b ..."]:
        return self._inputs.augmented(rows, draw)

    def diluted(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b ..."]:
        return self._inputs.diluted(rows, draw)


class Trained(Learner):
    """A learner that has learned: fitting it does nothing."""

    def fit(self, rows: Int64[torch.Tensor, " s"], *, epochs: int, draw: torch.Generator) -> None:
        pass


def run_set(job: tuple[Cell, Path, Path]) -> dict[str, Any]:
    """Judge one poisoned set by all methods."""
    cell, data, cache = job
    torch.set_num_threads(1)
    made, config = poisoned(cell, data, cache), BaselineConfig(**cell.settings)
    given = labelled(made.images, made.labels, cell)
    start, learner = time.process_time(), given.fresh()
    learner.fit(given.rows, epochs=config.epochs, draw=given.draw)
    trained_s = time.process_time() - start
    inputs = {"plain": given.inputs, "diluted": Diluted(given.inputs, cell.seed)}
    judged = []
    for name, ways in METHODS.items():
        for way in ways:
            own, start = labelled(made.images, made.labels, cell), time.process_time()
            own.inputs = inputs[way]
            if name in BY_A_MODEL:
                own.fresh = partial(_trained, learner, own.inputs)
                start -= trained_s
            found = figures(SiftResult(BASELINES[name](own, config)), made)
            cpu_s = round(time.process_time() - start, 1)
            judged.append({"method": name, "judges": way, **found, "cpu_s": cpu_s})
    return {"cell": asdict(cell), "poisoned": int(made.poison.sum()), "judged": judged}


def _trained(learner: Learner, inputs: Inputs) -> Trained:
    return Trained(copy.deepcopy(learner.net), inputs, learner.targets, learner.config)


def digest() -> str:
    """Return the digest of the code that figures depend on: that of sift.py's cells, and this file."""
    return hashlib.sha256(code_digest().encode() + Path(__file__).read_bytes()).hexdigest()[:12]


def table(results: Path) -> None:
    """Print NCR by attack, method and what it judges: means over seeds, and the worst."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        for found in line["judged"]:
            groups.setdefault((line["cell"]["attack"], found["method"], found["judges"]), []).append(found)
    for (attack, name, way), found in sorted(groups.items()):
        parts = [[each["ncr"][f"{size:g}"] for each in found] for size in SHOWN]
        ncr = " / ".join(f"{statistics.mean(part):.0f} ({max(part):.0f})" for part in parts)
        missed, cpu_s = (statistics.mean(each[what] for each in found) for what in ("missed", "cpu_s"))
        print(f"{attack:13} {name:22} {way:8} {len(found)} sets  NCR {ncr}  missed {missed:.0f}  CPU-s {cpu_s:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TARSIFT_DATA"), help="folder of the corpora")
    parser.add_argument("--cache", type=Path, default=ROOT / "scratch" / "sift", help="where witnesses are kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "sift_baselines.jsonl")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="150 pictures: check that it runs; measures nothing")
    options = parser.parse_args()
    if options.table:
        return table(options.results)
    if options.data is None:
        parser.error("--data, or TARSIFT_DATA in the environment, must name the folder of the corpora")
    cells = protocol("baselines", SEEDS)
    done = Cells(options.results, digest())
    jobs = [
        (cell, Path(options.data), options.cache)
        for cell in (tiny(cells) if options.tiny else cells)
        if not done.find(cell=asdict(cell))
    ]
    for line in done.run(run_set, jobs, processes=options.processes):
        print(f"{line['cell']['attack']}, seed {line['cell']['seed']}", flush=True)
    return None


if __name__ == "__main__":
    main()
