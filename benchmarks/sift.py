"""Do the sifters find clean samples, and is poison dropped? CIFAR-10 under attacks, on a CPU.

Appends one JSON line per finished cell (see sift_cell.py for what is measured) to `--results`; a cell that is there
already (same settings, same code of sifters/, sift_sets.py and sift_cell.py) is not run again.

    python benchmarks/sift.py --data DATA --part tuning       # seeds of its own: choose settings here
    python benchmarks/sift.py --data DATA --part meta-sift    # how clean is what is ranked cleanest?
    python benchmarks/sift.py --data DATA --part sizes        # by size, number of sifters, with and without dilution
    python benchmarks/sift.py --data DATA --part low          # where little is poisoned
    python benchmarks/sift.py --data DATA --part ispl         # attack success after training on what ISPL keeps
    python benchmarks/sift.py --table                         # what is there

`--data` is the folder with `cifar10-train` and `cifar10-test` as WebDataset shards; a set (see sift_sets.py) is 10,000
pictures, 5,000, or, for ISPL's scenarios, 25,000. Sifters train `tiny-cnn` on pictures or, where it says so, `head` on
frozen features of a witness.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from measuring import RESULTS, ROOT, Cells
from sift_cell import SIZES, run_cell
from sift_sets import SAMPLES, Cell, code_digest

SEEDS, TUNING_SEEDS = (1, 2, 3), (0, 5)
MORE, FEWER, TINY_SAMPLES = 25_000, 5_000, 150  # of 10,000 a few pixels are not learned, and nothing is to defend
SHARES = {"badnets": 1 / 3, "targeted_flip": 1 / 6}  # of what bears the target's label afterwards: 5 % and 2 % of all
LOW_SHARES = {"badnets": 1 / 11, "targeted_flip": 1 / 21}  # 1 % and half a percent
SHOWN = (0.01, 0.02, 0.05)
SCENARIOS = (  # and seeds, by which the colour is drawn: those of which a model learns if nothing is sifted
    ("dlbd_x", 0, 2, 12), ("dlbd_l", 1, 3, 2), ("dlbd_l", 9, 2, 12), ("dlbd_x", 8, 6, 4)
)  # fmt: skip
EPSILON = 0.1  # share of the source that is poisoned in these
ISPL_ON_PICTURES = {"repeats": 1}  # a third of the published cost
ABLATIONS: tuple[dict[str, Any], ...] = (  # of five sifters with dilution
    {}, {"sifters": 3}, {"sifters": 1}, {"diluted": False}, {"sifters": 3, "diluted": False},
    {"sifters": 1, "diluted": False},
)  # fmt: skip
FINAL_EPOCHS, WITNESS_EPOCHS = 15, 20
TRIED: dict[str, tuple[dict[str, Any], ...]] = {
    "meta_sift": ({}, {"warmup_epochs": 1}, {"weight_rate": 0.05}, {"rate": 1e-3}, {"dilutions": 1}),
    "diluted_loss": ({}, {"diluted_epochs": 2}),
}
TINY: dict[str, dict[str, Any]] = {
    "meta_sift": {"batch_size": 4, "sifters": 2},
    "ispl": {
        "repeats": 1, "rounds": 2, "share": 0.4, "warmup_epochs": 1, "epochs": 1, "voter_epochs": 1, "self_rounds": 1,
        "self_epochs": 1, "fit": {"batch_size": 16},
    },
    "baseline": {
        "epochs": 1, "early_epochs": 1, "models": 1, "diluted_epochs": 1, "trims": 1, "inversion_steps": 2,
        "fit": {"batch_size": 16},
    },
}  # fmt: skip


def protocol(method: str, seeds: tuple[int, ...], shares: Mapping[str, float] = SHARES, **options: Any) -> list[Cell]:
    """Return the cells by which methods that rank are compared."""
    return [Cell(method, attack, share, seed, **options) for seed in seeds for attack, share in shares.items()]


def meta_sift_cells() -> list[Cell]:
    out = []
    for method in ("meta_sift", "diluted_loss"):
        out += protocol(method, SEEDS)
        out += protocol(method, SEEDS, samples=FEWER)
        out += protocol(method, SEEDS, samples=FEWER, witness_epochs=WITNESS_EPOCHS)
    return out


def sizes_cells() -> list[Cell]:
    share = SHARES["badnets"]
    return [Cell("meta_sift", "badnets", share, seed, settings=chosen) for seed in SEEDS for chosen in ABLATIONS]


def low_cells() -> list[Cell]:
    methods = ("meta_sift", "diluted_loss", "loss_scan")
    return [cell for method in methods for cell in protocol(method, SEEDS, LOW_SHARES)]


def ispl_cells() -> list[Cell]:
    out = []
    for place, (attack, source, target, seed) in enumerate(SCENARIOS):
        scenario = Cell(
            "none", attack, EPSILON, seed, samples=MORE, source=source, target=target, final_epochs=FINAL_EPOCHS
        )
        on_features = replace(scenario, witness_epochs=WITNESS_EPOCHS)
        out += [
            scenario,
            replace(scenario, method="ispl", settings=ISPL_ON_PICTURES),
            replace(on_features, method="ispl"),
        ]
        if place == 0:
            adaptive = replace(on_features, adaptive=True)
            out += [adaptive, replace(adaptive, method="ispl")]
    return out


def tuning_cells() -> list[Cell]:
    return [
        cell
        for method, tried in TRIED.items()
        for settings in tried
        for samples, witness_epochs in ((SAMPLES, 0), (FEWER, 0), (FEWER, WITNESS_EPOCHS))
        for cell in protocol(method, TUNING_SEEDS, samples=samples, settings=settings, witness_epochs=witness_epochs)
    ]


PARTS = {
    "tuning": tuning_cells,
    "meta-sift": meta_sift_cells,
    "sizes": sizes_cells,
    "low": low_cells,
    "ispl": ispl_cells,
}


def tiny(cells: list[Cell]) -> list[Cell]:
    """Return cells of the first seed that take seconds each."""
    out: list[Cell] = []
    for cell in cells:
        kind = "ispl" if cell.adaptive else cell.method if cell.method in TINY else "baseline"
        small = replace(
            cell,
            samples=TINY_SAMPLES,
            settings=TINY[kind] | cell.settings if cell.method != "none" or cell.adaptive else {},
            witness_epochs=min(1, cell.witness_epochs),
            final_epochs=min(1, cell.final_epochs),
        )
        if cell.seed == cells[0].seed and small not in out:
            out.append(small)
    return out


def run(chosen: list[Cell], data: Path, cache: Path, results: Path, *, processes: int) -> None:
    """Do what is not there yet, in several processes."""
    done = Cells(results, code_digest())
    jobs = [(cell, data, cache) for cell in chosen if not done.find(cell=asdict(cell))]
    print(f"{len(jobs)} of {len(chosen)} cells to do", flush=True)
    for line in done.run(run_cell, jobs, processes=processes):
        print(f"{name_of(line['cell'])}, seed {line['cell']['seed']}: {row_of([line])}", flush=True)


def name_of(cell: dict[str, Any]) -> str:
    """Return what a cell is, but for its seed."""
    what = f"{cell['method']:22} {cell['attack']:13} {cell['samples']:>6}"
    sees = " features" if cell["witness_epochs"] else " pictures"
    settings = "".join(f" {name}={value}" for name, value in cell["settings"].items())
    return what + sees + (" adaptive" if cell["adaptive"] else "") + settings


def row_of(lines: list[dict[str, Any]], sizes: tuple[float, ...] = SHOWN) -> str:
    """Render the cells of several seeds: means, and the worst NCR in brackets."""
    parts = []
    if "ncr" in lines[0]:
        for size in sizes:
            found = [line["ncr"][f"{size:g}"] for line in lines]
            parts.append(f"NCR {100 * size:g} %: {statistics.mean(found):5.1f} ({max(found):.1f})")
        for name in ("false", "missed", "poisoned", "epochs", "cpu_s"):
            parts.append(f"{name} {statistics.mean(line[name] for line in lines):.0f}")
    for defence in lines[0].get("after", {}):
        found = [line["after"][defence] for line in lines]
        success, accuracy = (statistics.mean(f[name] for f in found) for name in ("success", "accuracy"))
        parts.append(f"{defence}: success {success:.3f} accuracy {accuracy:.3f}")
    return "  ".join(parts)


def table(results: Path) -> None:
    """Print every part: the latest line of each cell, whatever code it was run with."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for part, cells in PARTS.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for cell in map(asdict, cells()):
            found = [line for line in lines if line["cell"] == cell]
            name = name_of(cell) + (f" {cell['source']}->{cell['target']}" if part == "ispl" else "")
            name += f" {cell['share']:.3f}" if part == "low" else ""
            groups.setdefault(name, []).extend(found[-1:])
        print(f"\n{part}")
        for name, found in groups.items():
            if found:
                print(f"{name}, seeds: {len(found)}: {row_of(found, SIZES if part == 'sizes' else SHOWN)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TARSIFT_DATA"), help="folder of the corpora")
    parser.add_argument("--cache", type=Path, default=ROOT / "scratch" / "sift", help="where witnesses are kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "sift.jsonl")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--method", nargs="*", help="of the part's cells only these")
    parser.add_argument("--seed", type=int, nargs="*", help="of the part's cells only these")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="150 pictures: check that it runs; measures nothing")
    options = parser.parse_args()
    if options.part:
        if options.data is None:
            parser.error("--data, or TARSIFT_DATA in the environment, must name the folder of the corpora")
        if options.tiny and options.results == parser.get_default("results"):
            parser.error("--tiny measures nothing: give it --results of its own")
        chosen = [
            cell
            for cell in PARTS[options.part]()
            if (not options.method or cell.method in options.method) and (not options.seed or cell.seed in options.seed)
        ]
        chosen = tiny(chosen) if options.tiny else chosen
        run(chosen, Path(options.data), options.cache, options.results, processes=options.processes)
    if options.table:
        table(options.results)


if __name__ == "__main__":
    main()
