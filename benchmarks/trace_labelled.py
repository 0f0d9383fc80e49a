"""Is what a classifier says wrongly traced to the samples behind it, and does unlearning take it away?

A set is poisoned and a small network trained on it (see victims.py); of test pictures with the trigger that it takes
for the target, the training samples behind that are traced among all of the set. Then what was traced is unlearned, by
each method, and what other detectors find is left out of a training from the start. Appends one JSON line per finished
cell to `--results`; one that is there already is not done again. Networks and what was found are kept in `--cache`.

    python benchmarks/trace_labelled.py --data DATA --part tuning    # what settings were chosen on
    python benchmarks/trace_labelled.py --data DATA --part trace     # other seeds
    python benchmarks/trace_labelled.py --data DATA --part repair    # of what was traced there
    python benchmarks/trace_labelled.py --data DATA --part speed     # of one query among 10,000, on all cores
    python benchmarks/trace_labelled.py --table

Sets: scikit-learn's digits (1,400 of 8 x 8 pixels, 2 % poisoned), and 10,000 pictures of CIFAR-10 (1.5 %). Accuracy and
success are of test pictures that no detector was shown.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detect import parser_of, require_data
from measuring import Cells, hardware
from victims import (
    ATTACKS,
    NETWORK,
    TARGET,
    Cell,
    Victim,
    digest_of_code,
    guess,
    pictures_of,
    pixels,
    samples_of,
    trained,
    untrained,
    victim_of,
)

from tarsift.clip_detect import metrics
from tarsift.sifters.baselines import sift_by
from tarsift.sifters.delta_influence import Traced, cutoff_of, judge
from tarsift.sifters.frequency import FrequencyDetector
from tarsift.sifters.influence import Factors
from tarsift.sifters.result import clean_base_set
from tarsift.sifters.settings import BaselineConfig, LabelTraceConfig, UnlearnConfig
from tarsift.sifters.tracing import ask_classifier, fit_curvature, layers_of, trace
from tarsift.sifters.unlearn import METHODS, WITHOUT_FORGOTTEN, labelled, unlearn

SEEDS = {
    "tuning": {"digits": (100, 101), "cifar10": (100,)},
    "trace": {"digits": (0, 1, 2, 3, 4), "cifar10": (1, 2, 3)},
}
QUERIES = (1, 5, 10)
TAUS, TOLERATED = (-1.0, -10.0), (0, 1, 2, 3)  # beside the default, 0
BUDGET = UnlearnConfig(batch_size=128, steps=1000, exact_steps=1100, augmented=False)  # a training is 1,100 steps
PUBLISHED = LabelTraceConfig(length="largest", spared=0, relative=0.5)
BASE_SET = 1000  # samples that ibau is given
BASE_SETS = ("base_clean", "base_random", "base_sifted")  # known to be clean, any, or by mean diluted loss
OF_SIFTERS = BaselineConfig(network=NETWORK)
OTHERS = ("activation_clustering", "spectral_signatures", "frequency")


def figures(mask: np.ndarray, poison: np.ndarray) -> dict[str, float]:
    return {
        "found": int(mask.sum()),
        "precision": round(float(poison[mask].mean()), 4) if mask.any() else 0.0,
        "tpr": round(float(mask[poison].mean()), 4),
    }


def ranked(score: np.ndarray, poison: np.ndarray) -> float:
    return round(metrics.average_precision(np.asarray(score, np.float64), poison), 4)


def of_asked(found: Traced, poison: np.ndarray) -> dict[str, Any]:
    """Return what the given queries say without echoes: by the paper's rule, the relative score, influence alone."""
    counts, influence = found.counts, found.influence
    out: dict[str, Any] = {
        "relative_ap": ranked(found.score, poison),
        "relative_half": figures(found.score >= 0.5, poison),
        "count_ap": ranked(counts.mean(axis=0), poison),
        "influence_ap": ranked(influence.mean(axis=0), poison),
        "positive": figures((influence > 0).sum(axis=0) >= max(1, len(influence) - 1), poison),
    }
    for tolerated in TOLERATED:
        out[f"count_{tolerated}"] = figures(counts.min(axis=0) >= PUBLISHED.transforms - tolerated, poison)
    return out


def of_default(asked: list[np.ndarray], poison: np.ndarray, *, by_layer: bool = True) -> dict[str, Any]:
    """Return what the default score says of given queries, without echoes."""
    config = LabelTraceConfig(by_layer=by_layer)
    score = judge(asked, config, groups=layers_of(asked, config)).score
    return figures(score >= cutoff_of(score, config.relative, config.of_best), poison) | {"ap": ranked(score, poison)}


def trace_cell(job: tuple[Cell, Path, Path]) -> dict[str, Any]:
    """Trace one cell in all ways, and let the other detectors judge."""
    cell, data, cache = job
    torch.set_num_threads(1)
    victim = victim_of(cell, data, cache)
    samples, poison = samples_of(victim), victim.made.poison
    line: dict[str, Any] = {"part": "trace", "cell": asdict(cell), "poisoned": int(poison.sum())}
    line |= victim.measure(victim.net)
    taken = np.flatnonzero(guess(victim.net, victim.asked[0]) == TARGET)
    if not len(taken):
        return {**line, "learned": False}
    pictures, config, start = victim.asked[0][taken], LabelTraceConfig(), time.process_time()
    curvature = fit_curvature(victim.net, samples, config)
    line |= {"learned": True, "curvature_cpu_s": round(time.process_time() - start, 1)}
    start = time.process_time()
    found = trace(victim.net, samples, pictures[:1], TARGET, config=config, curvature=curvature)
    line["traced"] = figures(found.traced, poison) | {
        "ap": ranked(found.score, poison),
        "cutoff": round(found.cutoff, 4),
    }
    line["traced"] |= {"echoes_right": round(float(poison[found.echoes].mean()), 4)} if len(found.echoes) else {}
    line["traced"] |= {"cpu_s": round(time.process_time() - start, 1)}
    start = time.process_time()
    asked = asked_of(victim, pictures[: max(QUERIES)], curvature)
    line["asked_cpu_s"] = round(time.process_time() - start, 1)
    for queries in QUERIES:
        if len(asked) >= queries:
            line[f"queries_{queries}"] = of_asked(judge(asked[:queries], PUBLISHED), poison) | {
                "by_layer": of_default(asked[:queries], poison),
                "layers_summed": of_default(asked[:queries], poison, by_layer=False),
            }
    for tau in TAUS:
        line[f"tau_{tau:g}"] = of_asked(judge(asked[:1], PUBLISHED.model_copy(update={"threshold": tau})), poison)
    for change in ("label", "picture"):
        line[change] = of_asked(judge(asked_of(victim, pictures[:1], curvature, change), PUBLISHED), poison)
    published = judge(asked[:1], PUBLISHED)
    masks = {"traced": found.traced, "count": published.by_count, "positive": published.influence[0] > 0}
    if cell.corpus == "cifar10":
        for name, (score, mask) in others(cell, victim).items():
            line[name], masks[name] = figures(mask, poison) | {"ap": ranked(score, poison)}, mask
    for name, mask in masks.items():
        np.save(cache / cell.name / f"{name}.npy", mask)
    return line


def asked_of(victim: Victim, pictures: np.ndarray, curvature: Factors, change: str = "both") -> list[np.ndarray]:
    """Return the influence of all samples on pictures and their copies."""
    return ask_classifier(
        victim.net, samples_of(victim), pictures, TARGET, config=PUBLISHED, curvature=curvature, change=change
    )


def others(cell: Cell, victim: Victim) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what other detectors say: scores, and which samples they take for poison."""
    made = victim.made
    clusters = sift_by("activation_clustering", made.images, made.labels, config=OF_SIFTERS, seed=cell.seed).score
    spectra = sift_by("spectral_signatures", made.images, made.labels, config=OF_SIFTERS, seed=cell.seed).score
    most = round(1.5 * made.poison.sum())  # as published: 1.5 times what is planted, in each class
    foremost = np.zeros(len(spectra), bool)
    for label in range(10):
        mine = np.flatnonzero(made.labels == label)
        foremost[mine[np.argsort(-spectra[mine])[:most]]] = True
    frequency = FrequencyDetector(victim.shown, seed=cell.seed).score(made.images)
    return {
        "activation_clustering": (clusters, clusters > 0),
        "spectral_signatures": (spectra, foremost),
        "frequency": (frequency, frequency >= 0.5),
    }


def repair_cell(job: tuple[Cell, str, str, Path, Path]) -> dict[str, Any]:
    """Unlearn what one detector found by one method."""
    cell, method, by, data, cache = job
    torch.set_num_threads(1)
    victim = victim_of(cell, data, cache)
    line = {"part": "repair", "cell": asdict(cell), "method": method, "by": by, "before": victim.measure(victim.net)}
    images, labels, poison = victim.made.images, victim.made.labels, victim.made.poison
    if by == "clean":
        return line | victim.measure(trained(cell, *victim.clean))
    masks = {file.stem: np.load(file) for file in (cache / cell.name).glob("*.npy")}
    masks |= {"poison": poison, "missed": poison & ~masks["traced"]}
    start = time.process_time()
    gone = ~base_set(by, cell, victim) if method in WITHOUT_FORGOTTEN else masks[by]
    if not gone.any():
        return line | {"nothing": True}
    if method == "eu":
        net = trained(cell, images[~gone], labels[~gone])
    else:
        net = unlearn(victim.net, samples_of(victim), gone, method, config=BUDGET, seed=cell.seed)
    line |= {"forgot": int(gone.sum()), "poison_kept": int((poison & ~gone).sum())}
    return line | victim.measure(net) | {"cpu_s": round(time.process_time() - start, 1)}


def base_set(name: str, cell: Cell, victim: Victim) -> np.ndarray:
    """Return which samples ibau is given, (n,) bool."""
    poison, out = victim.made.poison, np.zeros(len(victim.made.poison), bool)
    count = min(BASE_SET, len(poison) // 10)
    if name == "base_sifted":
        score = sift_by("diluted_loss", victim.made.images, victim.made.labels, config=OF_SIFTERS, seed=cell.seed).score
        out[clean_base_set(score, victim.made.labels, count)] = True
    else:
        among = np.flatnonzero(~poison) if name == "base_clean" else np.arange(len(poison))
        out[np.random.default_rng([cell.seed, 3]).choice(among, count, replace=False)] = True
    return out


def time_query(data: Path) -> dict[str, Any]:
    """Time one query and its copies, among all samples; of a network that has learned nothing, which costs the same."""
    cell = Cell("cifar10", "four_pixels", SEEDS["tuning"]["cifar10"][0])
    images, labels, *_ = pictures_of(cell, data)
    net, samples, config = untrained(cell.corpus, 0).eval(), labelled(pixels(images), labels), LabelTraceConfig()
    weights = sum(parameter.numel() for parameter in net.parameters())
    begun = time.monotonic()
    curvature = fit_curvature(net, samples, config)
    fitted = time.monotonic()
    ask_classifier(net, samples, images[:1], TARGET, config=config, curvature=curvature)
    asked = time.monotonic()
    line = {"part": "speed", "weights": weights, "candidates": len(images), "queries": 1 + config.transforms}
    line |= {
        "threads": torch.get_num_threads(),
        "curvature_s": round(fitted - begun, 1),
        "asked_s": round(asked - fitted, 1),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return line | {"peak_gb": round(peak * 1024 / 1e9, 2), **hardware(torch)}


def repairs(cell: Cell) -> list[tuple[str, str]]:
    """Return methods, and by whom what they are to forget was found."""
    forgetting = [method for method in METHODS if method not in WITHOUT_FORGOTTEN]
    out = [("eu", by) for by in ("clean", "poison", "missed", "count")]
    out += [(method, "traced") for method in forgetting] + [("ibau", name) for name in BASE_SETS]
    return out + [("eu", by) for by in ("positive", *OTHERS) if cell.corpus == "cifar10"]


def cells_of(part: str) -> list[Cell]:
    seeds = SEEDS["trace" if part == "repair" else part]
    return [
        Cell(corpus, attack, seed)
        for corpus, attacks in ATTACKS.items()
        for attack in attacks
        for seed in seeds[corpus]
    ]


def shown(found: dict[str, float]) -> str:
    return f"{found['precision']:.2f}/{found['tpr']:.2f}"


def row_of(line: dict[str, Any]) -> str:
    cell = line["cell"]
    out = [f"{cell['corpus']:8} {cell['attack']:18} {cell['seed']:3}"]
    if line["part"] == "repair":
        before = line["before"]
        out.append(f"{line['method']:6} of {line['by']:22}")
        for name in ("success", "accuracy"):
            if name in line:
                out.append(f"{name} {before[name]:.3f} -> {line[name]:.3f}")
        return " ".join(out)
    out.append(f"success {line['success']:.2f} accuracy {line['accuracy']:.3f}")
    if not line["learned"]:
        return " ".join([*out, "not learned"])
    traced = line["traced"]
    out.append(f"traced {shown(traced)} AP {traced['ap']:.2f} {traced['cpu_s']:.0f} s")
    for name in (*(f"queries_{queries}" for queries in QUERIES), "label", "picture"):
        if found := line.get(name):
            out.append(f"{name} count {shown(found['count_1'])} relative {shown(found['relative_half'])}")
    out += [f"{name} {shown(line[name])}" for name in OTHERS if name in line]
    return " | ".join(out)


def main() -> None:
    parser = parser_of(__doc__, "trace_labelled.jsonl")
    parser.add_argument("--part", choices=["tuning", "trace", "repair", "speed"])
    parser.add_argument("--corpus", nargs="*", default=list(ATTACKS))
    parser.add_argument("--attack", nargs="*")
    parser.add_argument("--seed", type=int, nargs="*")
    parser.add_argument("--method", nargs="*", help="of the part `repair` only these")
    options = parser.parse_args()
    if options.part:
        require_data(parser, options)
        done = Cells(options.results, digest_of_code())
        places = (options.data, options.cache)
        if options.part == "speed":
            print(json.dumps(done.add(**time_query(options.data))))
            return
        wanted = [c for c in cells_of(options.part) if c.corpus in options.corpus]
        wanted = [c for c in wanted if not options.attack or c.attack in options.attack]
        wanted = [c for c in wanted if not options.seed or c.seed in options.seed]
        if options.part == "repair":
            learned = [c for c in wanted if any(r["learned"] for r in done.find(part="trace", cell=asdict(c)))]
            pairs = [(c, method, by) for c in learned for method, by in repairs(c)]
            pairs = [pair for pair in pairs if not options.method or pair[1] in options.method]
            jobs: list[Any] = [
                (*pair, *places)
                for pair in pairs
                if not done.find(part="repair", cell=asdict(pair[0]), method=pair[1], by=pair[2])
            ]
        else:
            jobs = [(c, *places) for c in wanted if not done.find(part="trace", cell=asdict(c))]
        print(f"{len(jobs)} cells to do", flush=True)
        work = repair_cell if options.part == "repair" else trace_cell
        for line in done.run(work, jobs, processes=options.processes):
            print(row_of(line), flush=True)
    if options.table and options.results.exists():
        lines = [json.loads(line) for line in options.results.read_text().splitlines()]
        for line in sorted((line for line in lines if "cell" in line), key=row_of):
            print(row_of(line))


if __name__ == "__main__":
    main()
