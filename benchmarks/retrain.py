"""Does removing what was found repair the model? Training again on what is left, with as many steps.

For a random third of the qualifying cells of the reporting part (see detect.py), a new encoder is trained on

suspicion  the poisoned dump without the share of highest `suspicion`
random     the poisoned dump without as many samples drawn at random: the control
clean      the dump as it was before it was poisoned, less as many random samples: what accuracy can be had

and attack success and accuracy are measured (on Flickr8k recall@5: is a held-out picture's caption among the five
nearest of about a hundred?). The default policy removes 5 %; `--fractions` gives more. Appends one JSON
line per training to `--results`; one that is there already (same cell, same code) is not done again.

    python benchmarks/retrain.py --data DATA
    python benchmarks/retrain.py --table
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detect import (
    FEWEST,
    QUALIFIES,
    TRIGGERED,
    cells,
    load,
    parser_of,
    require_data,
    scoring_digest,
    success_of,
)
from measuring import RESULTS, Cells
from zoo import KEY, Cell, Source, find_source, make, measure, training, with_templates

from tarsift.clip_detect.suspicion import suspicion
from tarsift.operators.flag import HOMES
from tarsift.operators.models import LoadedEncoder, load_encoder
from tarsift.operators.planting import poison_images
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.shards import ReadShard, list_shards
from tarsift.operators.writer import split_shard
from tarsift.pipelines.poison import poison_here
from tarsift.pipelines.pretrain import pretrain_here
from tarsift.pipelines.zeroshot import classify, to_mean_direction

DEFAULT = 0.05
WAYS = ("suspicion", "random", "clean")


def remove(shards: list[str], drop: np.ndarray, out: Path) -> list[str]:
    """Write the shards without the rows (n,) that are marked, byte for byte as `tarsift write` does; return them."""
    first, written = 0, []
    for shard in list_shards(shards):
        rows = sum(len(table) for table in ReadShard()(shard))
        homes = ["removed" if gone else "clean" for gone in drop[first : first + rows]]
        outputs = {home: str(out / home / f"{shard.name}.tar") for home in HOMES}
        split_shard(shard, homes, outputs)
        written.append(outputs["clean"])
        first += rows
    if first != len(drop):
        raise SystemExit(f"{len(drop)} rows were scored, and {first} are there")
    return written


def dropped(way: str, fraction: float, cell: Cell, made: dict[str, np.ndarray]) -> np.ndarray:
    """Return which rows are left out."""
    n = len(made["ids"])
    count = int(np.ceil(fraction * n))
    if way == "suspicion":
        images, texts = (made[name].astype(np.float32) for name in ("images", "texts"))
        order = np.argsort(-suspicion(images, made["ids"], texts, key=KEY)["suspicion"], kind="stable")
    else:
        order = np.random.default_rng([cell.seed, 7]).permutation(n)
    drop = np.zeros(n, bool)
    drop[order[:count]] = True
    return drop


def recall_at_5(encoder: LoadedEncoder, source: Source, plan: PoisonConfig) -> float:
    """Return the share of test pictures whose own caption is among the five nearest."""
    plain = poison_images(source.test, [f"test:{i}" for i in range(len(source.test))], plan, trigger=None)
    columns: list[np.ndarray] = []

    def kept(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        columns.append(to_mean_direction(images, captions))
        return columns[-1]

    classify(encoder, plain, source.prompts, similarity=kept)
    near = np.stack(columns, axis=1)
    return float(np.mean((near > np.diag(near)[:, None]).sum(axis=1) < 5))


def finished(lines: list[dict[str, Any]]) -> bool:
    return any("recall_at_5" in line or line["cell"]["corpus"] != "flickr8k" for line in lines)


def run_training(job: tuple[Cell, str, float, Path, Path]) -> dict[str, Any]:
    """Train once and measure."""
    cell, way, fraction, data, cache = job
    start = time.process_time()
    made = make(cell, data, cache)
    torch.set_num_threads(1)
    drop = dropped(way, fraction, cell, made.arrays)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = find_source(cell, data, work)
        attack = with_templates(cell.poison(), source)
        plan = (
            with_templates(replace(cell, attack=None, rate=0.0, strengths={}).poison(), source)
            if way == "clean"
            else attack
        )
        planted = poison_here(source.dump, out=str(work / "dump"), config=plan)
        left = remove(planted.shards, drop, work / "left")
        again = training(replace(cell, seed=cell.seed + 1000)).model_copy(update={"steps": made.record["steps"]})
        pretrain_here(left, out=str(work / "enc.pt"), config=again)
        encoder = load_encoder(str(work / "enc.pt"))
        found = measure(cell, encoder, source, attack)
        if source.labels is None:
            found["recall_at_5"] = recall_at_5(encoder, source, attack)
    survived = int(((made.arrays["poison"] > 0) & ~drop).sum())
    line = {"cell": cell.settings, "made": cell.digest, "way": way, "fraction": fraction, "survived": survived}
    before = {"success_before": success_of(made.record), "accuracy_before": made.record["accuracy"]}
    return {**line, **before, **found, "cpu_s": round(time.process_time() - start, 1)}


def qualifying(scored: Path, share: float) -> list[Cell]:
    """Return a random share of the qualifying cells of the reporting part; always the same."""
    lines = {line["made"]: line for line in load(scored)}
    good = [
        cell
        for cell in cells("reporting")
        if cell.attack in TRIGGERED
        and cell.digest in lines
        and success_of(lines[cell.digest]) >= QUALIFIES
        and lines[cell.digest]["poisoned"] >= FEWEST
    ]
    return random.Random(1).sample(good, round(share * len(good)))


def utility(line: dict[str, Any]) -> float:
    """Return what the bar is about: recall@5 where there are no classes, accuracy elsewhere."""
    return line.get("recall_at_5", line["accuracy"])


def table(results: Path) -> None:
    """Print every training, and what the bars say."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    by_cell: dict[str, dict[tuple[str, float], dict[str, Any]]] = {}
    for line in lines:
        by_cell.setdefault(line["made"], {})[line["way"], line["fraction"]] = line
    repaired, kept = [], []
    for found in by_cell.values():
        first = next(iter(found.values()))
        cell = first["cell"]
        print(f"{cell['corpus']:9} {cell['attack']:14} {cell['rate']:<6g} {cell['seed']} {cell['target']:8}", end="")
        print(f" before {first['success_before']:.2f} {first['accuracy_before']:.3f}", end="")
        for (way, fraction), line in sorted(found.items()):
            print(f"  {way} {fraction:g}: {success_of(line):.2f} {utility(line):.3f} ({line['survived']})", end="")
        print()
        mine, clean = found.get(("suspicion", DEFAULT)), found.get(("clean", DEFAULT))
        if mine and clean:
            repaired.append(max(part[0] for part in mine["success"]) < 0.1)
            kept.append(utility(clean) - utility(mine) <= 0.02)
    if repaired:
        print(f"attack success below 0.1 in {np.mean(repaired):.2f} of {len(repaired)} cells; ", end="")
        print(f"accuracy within 2 points of the clean corpus in {np.mean(kept):.2f}")


def batches(cells: list[Cell], size: int) -> list[list[Cell]]:
    return [cells[start : start + size] for start in range(0, len(cells), size)]


def main() -> None:
    parser = parser_of(__doc__, "retrain.jsonl")
    parser.add_argument("--scored", type=Path, default=RESULTS / "detect.jsonl")
    parser.add_argument("--share", type=float, default=1 / 3)
    parser.add_argument("--fractions", type=float, nargs="*", default=[DEFAULT])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--most", type=int, help="cells at most; those that are in the cache come first")
    options = parser.parse_args()
    if options.table:
        table(options.results)
        return
    require_data(parser, options)
    done = Cells(options.results, scoring_digest())
    wanted = sorted(
        qualifying(options.scored, options.share), key=lambda cell: not (options.cache / f"{cell.digest}.npz").exists()
    )
    jobs = [
        (cell, way, fraction, options.data, options.cache)
        for together in batches(
            wanted[: options.most], options.processes
        )  # each makes a cell of its own, then all reuse it
        for fraction in options.fractions
        for way in options.ways
        for cell in together
        if not finished(done.find(made=cell.digest, way=way, fraction=fraction))
    ]
    print(f"{len(jobs)} trainings to do", flush=True)
    for line in done.run(run_training, jobs, processes=options.processes):
        print(line["made"], line["way"], line["fraction"], line["success"], line["accuracy"], flush=True)


if __name__ == "__main__":
    main()
