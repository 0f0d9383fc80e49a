"""How much training does detection need? Recall against cost, by epochs, size, kind of tower and starting point.

On the tuning part of detect.py (CIFAR-10, a patch and a blend at 1 %), encoders that differ in one thing: how long
they are trained; which towers they have (`tiny`, the same convolutions at half and twice the epochs' cost, a
vision transformer); and whether training begins with random weights or goes on from an encoder that was
trained on other, clean pictures. Appends one JSON line per cell, as detect.py does.

    python benchmarks/encoders.py --data DATA
    python benchmarks/encoders.py --table
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from detect import PARTS, figures, load, parser_of, require_data, score, scoring_digest, success_of
from detect import cell as cell_of
from measuring import Cells
from zoo import Cell, make

ATTACKS = ("patch", "blend")
EPOCHS = (2, 4, 8, 15, 25)
BASE_EPOCHS = (1, 2, 4)
MODELS = ("tiny", "vit")


def cells() -> list[Cell]:
    """Return the cells, the cheapest first."""
    out = []
    for attack in ATTACKS:
        start = cell_of("cifar10", attack, 0.01, PARTS["tuning"][0], "banana")
        out += [replace(start, model=model, epochs=epochs) for model in MODELS for epochs in EPOCHS]
        out += [replace(start, epochs=epochs, base=True) for epochs in BASE_EPOCHS]
    return sorted(out, key=lambda cell: (cell.epochs or 0, cell.model))


def run_cell(job: tuple[Cell, Path, Path]) -> dict[str, Any]:
    """Make and score one cell."""
    cell, data, cache = job
    made = make(cell, data, cache)
    losses = made.arrays["losses"]  # in few epochs a pair may be in no batch at all: it gets the mean of the others
    arrays = {**made.arrays, "losses": np.where(np.isnan(losses), np.nanmean(losses), losses)}
    columns = score(arrays)
    poison = arrays["poison"] > 0
    scores = {name: figures(column, poison) for name, column in columns.items()}
    return {"cell": cell.settings, "made": cell.digest, **made.record, "scores": scores}


def table(results: Path) -> None:
    """Print recall against cost."""
    print(f"{'attack':8} {'model':6} {'from':7} {'epochs':>6} {'CPU-s':>7} {'accuracy':>8} {'success':>8}", end="")
    print(f" {'AUROC':>7} {'AP':>6} {'recall at 5 %':>14}   (suspicion)")
    for line in load(results):
        cell, found = line["cell"], line["scores"]["suspicion"]
        start = "encoder" if cell["base"] else "random"
        print(f"{cell['attack']:8} {cell['model']:6} {start:7} {cell['epochs']:>6} {line['train_cpu_s']:>7.1f}", end="")
        print(f" {line['accuracy']:>8.3f} {success_of(line):>8.3f}", end="")
        print(f" {found['auroc']:>7.3f} {found['ap']:>6.3f} {found['recall_0.05']:>14.3f}")


def main() -> None:
    parser = parser_of(__doc__, "encoders.jsonl")
    options = parser.parse_args()
    if not options.table:
        require_data(parser, options)
        done = Cells(options.results, scoring_digest())
        jobs = [(cell, options.data, options.cache) for cell in cells() if not done.find(made=cell.digest)]
        print(f"{len(jobs)} cells to do", flush=True)
        for line in done.run(run_cell, jobs, processes=options.processes):
            print(line["cell"]["attack"], line["cell"]["model"], line["cell"]["epochs"], line["scores"]["suspicion"])
    table(options.results)


if __name__ == "__main__":
    main()
