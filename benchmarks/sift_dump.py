"""Does sifting find more of the poison in a dump than density alone? On the cells of detect.py, by recall.

A cell's samples are routed by their captions as its witness sees them, and sifted on the witness's features with three
diluted views, in problems as `tarsift sift` makes them. Beside the density's recall at some fractions removed stands
that of both verdicts together (`suspicion_sifted`) for several weights, what each sifter's rank finds by itself, and
what the witness finds without any training: SafeCLIP's mixture, and the entropy of its guess among the classes.

    python benchmarks/sift_dump.py --data DATA --part tuning        # the weight and the sifter are chosen here
    python benchmarks/sift_dump.py --data DATA --part reporting
    python benchmarks/sift_dump.py --table

Appends one JSON line per cell and sifter to `--results`, keyed by the cell and the code.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from detect import PARTS, cells, figures, load, parser_of, require_data, score
from measuring import ROOT, Cells
from zoo import Cell, find_source, make, with_templates, witness_of

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators.encoder import ClipEncoder
from tarsift.operators.images import hash_images
from tarsift.operators.schema import matrix
from tarsift.operators.shards import ReadShard, list_shards
from tarsift.operators.sift_settings import SiftConfig
from tarsift.operators.sifter import SIFTED, JoinVerdicts, choose_classes, problem_seed, ranks_within
from tarsift.pipelines.poison import poison_here
from tarsift.sifters.baselines import clip_entropy
from tarsift.sifters.methods import sift
from tarsift.sifters.problems import ClassRule, classes_by_caption, make_problems
from tarsift.sifters.settings import RoutingConfig, SifterConfig, SifterName

SIFTERS: tuple[SifterName, ...] = ("diluted-loss", "meta-sift", "ispl", "dcm", "loss-scan", "self-if")
WEIGHTS = (0.5, 1.0, 2.0)
VIEWS = 3
# Classes of a small dump are small.
ROUTING = RoutingConfig(class_size=500, smallest=100, largest=2000)


def views_of(cell: Cell, data: Path, cache: Path) -> np.ndarray:
    """Return the witness's embeddings of a cell's pictures, plain and diluted, (1 + VIEWS, n, d) float32."""
    file = cache / f"{cell.digest}-views.npy"
    if not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            source = find_source(cell, data, Path(folder))
            planted = poison_here(
                source.dump, out=str(Path(folder) / "dump"), config=with_templates(cell.poison(), source)
            )
            encode = ClipEncoder(str(witness_of(cell, source, cache)), precision="fp32", views=VIEWS, towers=("image",))
            parts = []
            for shard in list_shards(planted.shards):
                for table in ReadShard()(shard):
                    table = encode(hash_images(table))
                    plain, views = (matrix(table[name])[0] for name in ("image_embedding", "view_embeddings"))
                    parts.append(np.concatenate([plain, views], axis=1).reshape(len(plain), 1 + VIEWS, -1))
        np.save(file, np.concatenate(parts).transpose(1, 0, 2).astype(np.float16))
    return np.load(file).astype(np.float32)


def run_cell(job: tuple[Cell, SifterName, Path, Path]) -> dict[str, Any]:
    """Sift one cell by one sifter."""
    cell, sifter, data, cache = job
    torch.set_num_threads(1)
    made = make(cell, data, cache)
    poison = made.arrays["poison"] > 0
    columns = score(made.arrays)
    density = columns["suspicion"]
    start = time.process_time()
    rule, labels = route(made.arrays)
    table = sifted_table(made.arrays, density, views_of(cell, data, cache), rule, labels, sifter)
    rank = np.nan_to_num(np.asarray(table["sift_rank"].to_numpy(zero_copy_only=False)), nan=0.5)
    entropy = np.full(len(labels), np.nan)
    routed = labels >= 0
    entropy[routed] = clip_entropy(made.arrays["witness_images"][routed], rule.centers, labels[routed]).score
    found = {"density": figures(density, poison), "rank": figures(rank, poison)}
    found |= {"safeclip": figures(columns["safeclip"], poison), "clip_entropy": figures(entropy, poison)}
    for weight in WEIGHTS:
        found[f"both_{weight:g}"] = figures(both(density, rank, weight), poison)
    status = table["sift_status"].to_pylist()
    told = {name: status.count(name) for name in sorted(set(status))}
    of_poison = {name: int(sum(p for p, s in zip(poison, status, strict=True) if s == name)) for name in told}
    record = {name: made.record[name] for name in ("samples", "poisoned", "success", "accuracy")}
    return {
        "cell": {**cell.settings, "sifter": sifter}, "made": cell.digest, **record, "status": told,
        "status_of_poison": of_poison, "scores": found, "cpu_s": round(time.process_time() - start, 1),
    }  # fmt: skip


def both(density: np.ndarray, rank: np.ndarray, weight: float) -> np.ndarray:
    """Return `suspicion_sifted` for a weight (see `JoinVerdicts`)."""
    return density + np.maximum(density, 0) * weight * np.maximum(2 * rank - 1, 0)


def route(arrays: dict[str, np.ndarray]) -> tuple[ClassRule, np.ndarray]:
    """Return the classes that captions fall into, and that of each sample, -1 for none."""
    captions = unit_norm(arrays["witness_texts"])
    rule = classes_by_caption(captions, len(captions), ROUTING)
    return rule, rule.assign(captions)[0]


def sifted_table(
    arrays: dict[str, np.ndarray],
    density: np.ndarray,
    views: np.ndarray,
    rule: ClassRule,
    labels: np.ndarray,
    sifter: SifterName,
) -> pa.Table:
    """Sift routed samples, as the passes of `tarsift.pipelines.sift` do; return what `JoinVerdicts` makes of it."""
    config = SiftConfig(routing=ROUTING, method=SifterConfig(sifter=sifter))
    classes = len(rule.centers)
    suspect = density >= np.quantile(density, 1 - config.suspect_fraction)
    ids, counts = np.unique(arrays["ids"], return_counts=True)
    copies = counts[np.searchsorted(ids, arrays["ids"])] > 1

    def count(mask: np.ndarray) -> np.ndarray:
        return np.bincount(labels[(labels >= 0) & mask], minlength=classes)

    samples = count(np.ones(len(labels), bool))
    status = choose_classes(samples, count(suspect), count(copies), config)
    left_out = [label for label, said in enumerate(status) if said != SIFTED]
    rows, ranks = [], []
    for problem in make_problems(rule.centers, samples, ROUTING, leave_out=left_out):
        mine = np.flatnonzero(np.isin(labels, problem.classes))
        result = sift(views[:, mine], labels[mine], config.method, seed=problem_seed(problem, config.seed))
        rows.append(mine)
        ranks.append(ranks_within(result.score, labels[mine]))
    verdicts = pa.table({"row": np.concatenate(rows).astype(np.int32), "rank": np.concatenate(ranks)})
    table = pa.table({"row": np.arange(len(labels), dtype=np.int32), "class": labels, "suspicion": density})
    return JoinVerdicts(verdicts, status, weight=1.0)(table)


def code() -> str:
    """Twelve hex digits of the code that routes, sifts and scores."""
    digest = hashlib.sha256()
    folders = (ROOT / "sifters", ROOT / "clip_detect")
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    for path in (*files, ROOT / "operators" / "sifter.py", ROOT / "operators" / "dilution.py", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def table(results: Path) -> None:
    """Print, per part and sifter, what both verdicts find beside the density alone."""
    for part, seeds in PARTS.items():
        by_sifter: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in load(results):
            if line["cell"]["seed"] in seeds:
                by_sifter[line["cell"]["sifter"]].append(line)
        for sifter, lines in by_sifter.items():
            print(f"\n{part}, {sifter}: recall at 1 / 5 % removed, and average precision")
            for line in sorted(lines, key=lambda line: str(line["cell"])):
                cell, found = line["cell"], line["scores"]
                what = f"{cell['corpus']:9} {cell['attack']:18} {cell['rate']:<6g} {line['poisoned']:>4}"
                figures_ = "  ".join(
                    f"{name} {f['recall_0.01']:.2f} {f['recall_0.05']:.2f} {f['ap']:.2f}" for name, f in found.items()
                )
                print(f"{what}  {figures_}")
            for name in lines[0]["scores"]:
                lower = sum(
                    line["scores"][name]["recall_0.05"] < line["scores"]["density"]["recall_0.05"] for line in lines
                )
                mean = np.mean([line["scores"][name]["recall_0.05"] for line in lines])
                ap = np.mean([line["scores"][name]["ap"] for line in lines])
                print(f"{name:10} mean recall at 5 % {mean:.3f}, AP {ap:.3f}, below density in {lower} of {len(lines)}")


def main() -> None:
    parser = parser_of(__doc__, "sift_dump.jsonl")
    parser.add_argument("--part", choices=list(PARTS))
    parser.add_argument("--sifter", nargs="*", default=SIFTERS)
    parser.add_argument("--corpus", nargs="*")
    parser.add_argument("--seed", type=int, nargs="*")
    parser.add_argument("--rate", type=float, nargs="*")
    options = parser.parse_args()
    if options.part:
        require_data(parser, options)
        chosen = [
            cell
            for cell in cells(options.part)
            if cell.attack
            and (not options.corpus or cell.corpus in options.corpus)
            and (not options.seed or cell.seed in options.seed)
            and (not options.rate or cell.rate in options.rate)
        ]
        done = Cells(options.results, code())
        jobs = [(cell, sifter, options.data, options.cache) for cell in chosen for sifter in options.sifter]
        jobs = [job for job in jobs if not done.find(cell={**job[0].settings, "sifter": job[1]}, made=job[0].digest)]
        print(f"{len(jobs)} cells to do", flush=True)
        for line in done.run(run_cell, jobs, processes=options.processes):
            cell = line["cell"]
            print(cell["corpus"], cell["attack"], cell["rate"], cell["sifter"], line["scores"], flush=True)
    if options.table:
        table(options.results)


if __name__ == "__main__":
    main()
