"""Is poison found that nobody knows of? Every score on every attack, by rate, corpus and seed.

Cells (see zoo.py) are made once and kept in `--cache`; scoring them again takes seconds. Settings of the rules are
chosen on the cells of the part `tuning` and judged on those of `reporting`, which have other pictures, other
targets and other seeds. Appends one JSON line per scored cell to `--results`; a cell that is there already (same
settings, same code that makes and scores it) is not scored again.

    python benchmarks/detect.py --data DATA --part ladder        # which strength of a trigger is learned at all?
    python benchmarks/detect.py --data DATA --part tuning        # make and score
    python benchmarks/detect.py --data DATA --part reporting     # the core of about four hours on two cores
    python benchmarks/detect.py --table                          # what is there, and the bars

Cells whose attack was not learned (success below 0.5) are listed apart; a cell *qualifies* with a success of at
least 0.9 and 20 poisoned samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, ROOT, Cells
from zoo import KEY, Cell, evidence, make

from tarsift.clip_detect import metrics
from tarsift.clip_detect.baselines import BASELINES, Evidence, baseline_scores
from tarsift.clip_detect.mismatch import fit_mismatch
from tarsift.clip_detect.sampling import keyed_hash
from tarsift.clip_detect.suspicion import suspicion
from tarsift.clip_detect.triggers import ATTACKS
from tarsift.clip_detect.verdict import fit_verdict

# Strengths that are tried on the ladder, the weakest first, and at which rate.
LADDER: dict[str, dict[str, tuple[float, ...]]] = {
    "cifar10": {
        "patch": (0.1, 0.2), "blend": (0.1, 0.2, 0.3), "sig": (0.1, 0.2, 0.3), "wanet": (0.06, 0.1, 0.15),
        "filter": (1, 1.5, 2),
    },
    "flickr8k": {"patch": (0.1, 0.2, 0.3), "blend": (0.2, 0.3), "sig": (0.2, 0.3), "wanet": (0.1,), "filter": (1, 2)},
    "digits": {"blend": (0.1, 0.2), "filter": (0.5, 1)},
}  # fmt: skip
LADDER_RATE = {"cifar10": 0.02, "flickr8k": 0.02, "digits": 0.003}
# Of these the weakest that is learned at the lowest rate that counts, or else nearly so; a trigger that is not here
# has the published one. In Flickr8k neither the patch nor WaNet is learned at any strength.
STRENGTHS: dict[str, dict[str, float]] = {
    "cifar10": {"blend": 0.3, "sig": 0.3, "wanet": 0.15, "filter": 2},
    "flickr8k": {"blend": 0.3, "sig": 0.3, "filter": 2},
    "digits": {"blend": 0.2, "filter": 1},
}
TRIGGERED = ("patch", "blend", "sig", "wanet", "filter", "multi-trigger", "multi-target")
TRIED: dict[str, tuple[str, ...]] = {
    "cifar10": TRIGGERED,
    "flickr8k": ("blend", "sig", "filter"),
    "digits": ("patch", "blend", "filter"),
}
RATES: dict[str, tuple[float, ...]] = {
    "cifar10": (0.01, 0.02, 0.03, 0.05), "flickr8k": (0.01, 0.03), "digits": (0.001, 0.003)
}  # fmt: skip
APART = ("patch-clean-label", "one-image", "mismatch", "campaign")
TARGETS = ("kettle", "volcano", "lemon")  # of the seeds of the reporting part, one after the other
IN_VOCABULARY = {"cifar10": "truck", "flickr8k": "dog", "digits": "three"}
PARTS = {"tuning": (0, 5), "reporting": (1, 2, 3)}
SHOWN = (
    "suspicion", "suspicion_image", "multiscale_slof", "dao_k16", "dao_as_published", "slof_as_published",
    "neighbor_disagreement", "caption_mismatch", "both_sides", "isolation_forest", "abl", "clip_similarity",
    "cognitive_distillation",
)  # fmt: skip
QUALIFIES, LEARNED, FEWEST = 0.9, 0.5, 20
SLOW = ("cognitive_distillation", "dao_captions_as_published", "slof_captions_as_published")  # on some cells only
RATE_OF_SLOW = 0.01


def cells(part: str) -> list[Cell]:
    """Return the cells of a part, the most telling first; the ladder's are cells of the tuning part."""
    if part == "ladder":
        return [
            Cell(corpus, trigger, LADDER_RATE[corpus], PARTS["tuning"][0], "banana", {trigger: strength})
            for corpus, triggers in LADDER.items()
            for trigger, strengths in triggers.items()
            for strength in strengths
        ]
    seeds = PARTS[part]
    out: list[Cell] = []
    for seed in seeds:
        target = "banana" if part == "tuning" else TARGETS[seeds.index(seed)]
        for corpus in ("cifar10", "flickr8k", "digits"):
            for attack in TRIED[corpus]:
                out += [cell(corpus, attack, rate, seed, target) for rate in RATES[corpus]]
            out.append(cell(corpus, None, 0.0, seed, target))
        out += [cell("cifar10", attack, 0.01, seed, in_vocabulary(attack, "cifar10", target)) for attack in APART]
        out.append(cell("cifar10", "patch", 0.01, seed, IN_VOCABULARY["cifar10"]))
        out.append(cell("flickr8k", "mismatch", 0.01, seed, target))
    return out


def in_vocabulary(attack: str, corpus: str, target: str) -> str:
    """Return the target: that of a clean-label attack must be named by captions."""
    return IN_VOCABULARY[corpus] if ATTACKS[attack].label == "clean" else target


def cell(corpus: str, attack: str | None, rate: float, seed: int, target: str) -> Cell:
    """Return a cell with the strengths of its corpus."""
    used = {part.trigger for part in ATTACKS[attack].parts} if attack else set()
    strengths = {name: value for name, value in STRENGTHS[corpus].items() if name in used}
    return Cell(corpus, attack, rate, seed, target, strengths)


def score(made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every score of a made cell, higher = more suspicious, (n,) each."""
    images, texts, ids = made["images"].astype(np.float32), made["texts"].astype(np.float32), made["ids"]
    witness = [made[f"witness_{tower}"].astype(np.float32) for tower in ("images", "texts")]
    columns = suspicion(images, ids, texts, witness[0], key=KEY)
    hashes = keyed_hash(ids.view(np.uint8).reshape(len(ids), 8), KEY, "reference")
    _, first = np.unique(ids, return_index=True)
    rule = fit_mismatch(witness[0][first], witness[1][first], ids[first], hashes[first])
    captions = rule.score(witness[0], witness[1], ids)
    parts = [columns["suspicion"], captions["caption_mismatch"], columns["neighbor_disagreement"]]
    verdict = fit_verdict(*(part[first] for part in parts))
    columns |= captions | {"both_sides": verdict.score(*parts)}
    names = [name for name in BASELINES if name not in SLOW]
    return columns | baseline_scores(Evidence(images, texts, made["losses"]), names)


def figures(column: np.ndarray, poison: np.ndarray) -> dict[str, float]:
    """Measure one score."""
    values = np.nan_to_num(column.astype(np.float64), nan=-np.inf)
    found = {"auroc": metrics.auroc(values, poison), "ap": metrics.average_precision(values, poison)}
    found |= {f"recall_{f:g}": metrics.recall_at(values, poison, f) for f in (0.01, 0.05, 0.1)}
    return {name: round(value, 4) for name, value in found.items()}


def run_cell(job: tuple[Cell, Path, Path]) -> dict[str, Any]:
    """Make and score one cell."""
    cell, data, cache = job
    made = make(cell, data, cache)
    poison = made.arrays["poison"] > 0
    line = {"cell": cell.settings, "made": cell.digest, **made.record}
    if poison.any():
        columns = score(made.arrays)
        if cell.corpus == "cifar10" and cell.rate == RATE_OF_SLOW and cell.seed == PARTS["reporting"][0]:
            columns |= baseline_scores(evidence(cell, made, data, cache), SLOW)
        line["scores"] = {name: figures(column, poison) for name, column in columns.items()}
    return line


def scoring_digest() -> str:
    """Twelve hex digits of the code that scores a cell."""
    digest = hashlib.sha256()
    for path in (*sorted((ROOT / "clip_detect").glob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def load(path: Path) -> list[dict[str, Any]]:
    """Return the latest line of every cell, whatever code it was scored with."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({json.dumps(line["cell"], sort_keys=True): line for line in lines}.values())


def run(chosen: Iterable[Cell], data: Path, cache: Path, results: Path, *, processes: int) -> None:
    """Make and score what is not there yet, in several processes."""
    done = Cells(results, scoring_digest())
    jobs = [(cell, data, cache) for cell in chosen if not done.find(made=cell.digest)]
    print(f"{len(jobs)} cells to do", flush=True)
    for line in done.run(run_cell, jobs, processes=processes):
        print(row_of(line), flush=True)


def parser_of(doc: str | None, results: str) -> argparse.ArgumentParser:
    """Return a parser of the options that the benchmarks on these cells share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TARSIFT_DATA"), help="folder of the corpora")
    parser.add_argument("--cache", type=Path, default=ROOT / "scratch" / "zoo")
    parser.add_argument("--results", type=Path, default=RESULTS / results)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    return parser


def require_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a sentence if it is not said where the corpora are."""
    if options.data is None:
        parser.error("--data, or TARSIFT_DATA in the environment, must name the folder of the corpora")


def success_of(line: dict[str, Any]) -> float:
    """Return the attack's success: the mean over its parts, since a poisoned picture carries one of them."""
    parts = [part[0] for part in line.get("success", [])]
    return sum(parts) / len(parts) if parts else 0.0


def row_of(line: dict[str, Any]) -> str:
    """Render one cell."""
    cell, scores = line["cell"], line.get("scores", {})
    what = f"{cell['corpus']:9} {cell['attack'] or '-':18} {cell['rate']:<6g} {cell['seed']:<3} {cell['target']:8}"
    success = "/".join(f"{part[0]:.2f}" for part in line.get("success", []))
    found = "  ".join(
        f"{scores[name]['auroc']:.3f}/{scores[name]['ap']:.2f}" if name in scores else " " * 10 for name in SHOWN
    )
    return f"{what} {line['poisoned']:>5} {line['accuracy']:.2f} {success:15} {found}"


def part_of(line: dict[str, Any]) -> str:
    """Return the part a cell belongs to."""
    return next((part for part, seeds in PARTS.items() if line["cell"]["seed"] in seeds), "-")


def table(results: Path) -> None:
    """Print all cells of each part, and what the bars say of those that qualify."""
    lines = load(results)
    for part in PARTS:
        mine = sorted((line for line in lines if part_of(line) == part), key=row_of)
        if not mine:
            continue
        print(f"\n{part}: AUROC/AP of {', '.join(SHOWN)}")
        for line in mine:
            print(row_of(line))
        bars([line for line in mine if line["cell"]["attack"] in TRIGGERED])


def bars(lines: list[dict[str, Any]]) -> None:
    """Print the figures that the bars are set for, over the cells that qualify."""
    good = [line for line in lines if success_of(line) >= QUALIFIES and line["poisoned"] >= FEWEST]
    print(f"\n{len(good)} of {len(lines)} cells of triggers under false captions qualify")
    rates: dict[str, set[float]] = defaultdict(set)
    for line in good:
        rates[f"{line['cell']['attack']} in {line['cell']['corpus']}"].add(line["cell"]["rate"])
    print("rates:", "; ".join(f"{name}: {len(found)}" for name, found in sorted(rates.items())))
    if not good:
        return
    for name in SHOWN:
        found = [line["scores"][name] for line in good if name in line["scores"]]
        if found:
            ap, auroc = ([f[key] for f in found] for key in ("ap", "auroc"))
            recall = np.mean([f["recall_0.05"] for f in found])
            print(
                f"{name:20} mean AP {np.mean(ap):.3f}  median {np.median(ap):.3f}  mean AUROC {np.mean(auroc):.3f}  "
                f"worst {min(auroc):.3f}  recall at 5 % {recall:.3f}"
            )
    pairs = [(line["scores"]["suspicion"]["ap"], line["scores"]["multiscale_slof"]["ap"]) for line in good]
    print(f"suspicion's AP at most .01 below multiscale_slof's in {np.mean([a >= b - 0.01 for a, b in pairs]):.2f}")


def main() -> None:
    parser = parser_of(__doc__, "detect.jsonl")
    parser.add_argument("--part", choices=["ladder", *PARTS])
    parser.add_argument("--corpus", nargs="*")
    parser.add_argument("--attack", nargs="*")
    parser.add_argument("--seed", type=int, nargs="*")
    parser.add_argument("--sample", type=float, default=1.0, help="a random share of the cells, the same every time")
    options = parser.parse_args()
    if options.part:
        require_data(parser, options)
        chosen = [
            cell
            for cell in cells(options.part)
            if (not options.corpus or cell.corpus in options.corpus)
            and (not options.attack or (cell.attack or "clean") in options.attack)
            and (not options.seed or cell.seed in options.seed)
        ]
        if options.sample < 1:
            chosen = random.Random(0).sample(chosen, max(1, round(options.sample * len(chosen))))
        run(chosen, options.data, options.cache, options.results, processes=options.processes)
    if options.table:
        table(options.results)


if __name__ == "__main__":
    main()
