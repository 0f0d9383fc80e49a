"""Is what a CLIP says wrongly traced to the samples behind it, and does unlearning take it away?

Cells are those of detect.py (see zoo.py): a poisoned dump and an encoder trained on it. Of each, test pictures with the
trigger of which the encoder says the target are traced as `tarsift trace` does, without Ray: candidates are the most
suspicious samples, those whose captions are most like what is said, and random ones. Then what was traced is unlearned
by each method, and attack success and accuracy are measured before and after, beside a model that was trained on the
clean dump. Appends one JSON line per finished cell to `--results`; one that is there already is not done again.

    python benchmarks/trace.py --data DATA --part tuning       # what settings were chosen on
    python benchmarks/trace.py --data DATA --part reporting    # other seeds, targets and pictures
    python benchmarks/trace.py --data DATA --part repair       # of the cells that were reported
    python benchmarks/trace.py --table

Only cells whose attack was learned (success of at least 0.9) are traced. The target is a word that no other caption
has, which looking for the caption finds as well, or `truck`, which a tenth of the clean captions are about, in the same
words. Beside what is traced: candidates ranked by how like what is said their captions are to the model (`caption_ap`),
by how like the queries their pictures are, and by the sum of both.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from detect import QUALIFIES, cell, parser_of, require_data, success_of
from measuring import ROOT, Cells
from zoo import KEY, Cell, encoder_of, find_source, make, measure, training, with_templates

from tarsift.clip_detect import metrics
from tarsift.clip_detect.neighbors import unit_norm
from tarsift.clip_detect.suspicion import suspicion
from tarsift.clip_detect.triggers import ATTACKS
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.models import LoadedEncoder, build_model, load_encoder, save_checkpoint
from tarsift.operators.planting import poison_images
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.repair_settings import RepairConfig
from tarsift.operators.repairer import UnlearnPairs
from tarsift.operators.schema import places_of
from tarsift.operators.shards import ReadShard, Shard, list_shards
from tarsift.operators.towers import encode_images
from tarsift.operators.trace_settings import TracingConfig
from tarsift.operators.trace_verdict import RANDOM, Question, ask_in_rounds
from tarsift.operators.tracer import (
    FitCurvature,
    TraceSlice,
    concepts_of,
    echo_of,
    embed_captions,
    taken_for,
)
from tarsift.pipelines.poison import poison_here
from tarsift.pipelines.pretrain import pretrain_here
from tarsift.sifters.delta_influence import cutoff_of
from tarsift.sifters.unlearn import METHODS

SEEDS = {"tuning": (0, 1), "reporting": (3, 4)}
TARGETS = {0: "banana", 1: "kettle", 3: "lemon", 4: "anchor"}
TRIED = {
    "cifar10": {"patch": (0.02, 0.05), "blend": (0.02,), "sig": (0.02,), "wanet": (0.03,), "filter": (0.02,)},
    "digits": {"patch": (0.003,), "blend": (0.003,), "filter": (0.003,)},
}
IN_VOCABULARY = "truck"  # with the attacks of CIFAR-10
AS_OTHERS = (  # how captions of that corpus are worded; those of CLIP, which poison has elsewhere, are told apart
    "a photo of a {}", "this is a {}", "here is a {}", "an image of a {}", "one {}", "just a {}", "the {}",
    "look at this {}", "a photo of my {}", "an old photo of a {}", "a good photo of a {}", "a bright photo of a {}",
    "a cropped photo of a {}", "a close-up photo of a {}", "a pixelated photo of a {}", "a snapshot of a {}",
    "the image shows a {}", "the picture contains a {}", "{} - free image", "{} picture", "a {} seen up close",
)  # fmt: skip
QUERIES = (1, 5)
SHARES = (0.0, 0.2, 0.3, 0.5)  # of the best, beside the default: what else the cutoff could have been
MODULES = (  # that a cell depends on
    "operators/trace_settings.py", "operators/tracer.py",
    "operators/trace_verdict.py", "operators/repair_settings.py", "operators/repairer.py",
    "sifters/delta_influence.py", "sifters/image_text.py", "sifters/influence.py", "sifters/transforms.py",
    "sifters/unlearn.py", "benchmarks/trace.py",
)  # fmt: skip
PLACE = ("shard", "row", "key", "image_offset", "image_size", "caption")


@dataclass(frozen=True)
class Disguised(Cell):
    """A cell whose poison has captions such as clean samples have."""

    worded: tuple[str, ...] = AS_OTHERS

    def poison(self) -> PoisonConfig:
        """Return what `tarsift poison` is told."""
        return super().poison().model_copy(update={"templates": self.worded})


def chosen(part: str) -> list[Cell]:
    """Return the cells of a part."""
    out = []
    for seed in SEEDS[part]:
        for corpus, attacks in TRIED.items():
            tried = [(name, rate) for name, rates in attacks.items() for rate in rates]
            out += [cell(corpus, name, rate, seed, TARGETS[seed]) for name, rate in tried]
            if corpus == "cifar10":
                named = [cell(corpus, name, rate, seed, IN_VOCABULARY) for name, rate in tried]
                out += [Disguised(**each.settings) for each in named]
    return out


class Traced:
    """A made cell with its dump, ready to be asked."""

    def __init__(self, cell: Cell, data: Path, cache: Path, work: Path, config: TracingConfig) -> None:
        torch.set_num_threads(1)
        self.cell, self.config, self.work = cell, config, work
        self.made = make(cell, data, cache)
        self.spec = str(encoder_of(cell, cache))
        self.encoder: LoadedEncoder = load_encoder(self.spec)
        self.source = find_source(cell, data, work)
        self.plan = with_templates(cell.poison(), self.source)
        self.planted = poison_here(self.source.dump, out=str(work / "dump"), config=self.plan)
        self.shards: dict[str, Shard] = {shard.name: shard for shard in list_shards(self.planted.shards)}
        tables = (table.select(list(PLACE)) for shard in self.shards.values() for table in ReadShard()(shard))
        self.rows = pa.concat_tables(tables)
        self.poison = self.made.arrays["poison"] > 0
        self.says = self.plan.templates[0].format(cell.target)
        self.draw = np.random.default_rng([cell.seed, 6])

    def question(self, queries: int) -> Question | None:
        """Return the first test pictures with a trigger of which the encoder says the target; None: there are few."""
        trigger = ATTACKS[str(self.cell.attack)].parts[0].trigger
        names = [f"test:{i}" for i in range(len(self.source.test))]
        triggered = poison_images(self.source.test, names, self.plan, trigger=trigger)
        drawn = self.draw.permutation(len(self.rows))[:4096]
        captions = self.rows["caption"].take(pa.array(drawn)).to_pylist()
        asked = Question(triggered, concepts_of(self.encoder, self.says, captions, self.config))
        taken = np.flatnonzero(taken_for(self.encoder, asked))
        if self.source.labels is not None:  # of pictures that show the target it is right
            named = [i for i, group in enumerate(self.source.prompts) if self.cell.target in group[0]]
            taken = taken[~np.isin(self.source.labels[taken], named)]
        return replace(asked, pictures=triggered[taken[:queries]]) if len(taken) >= queries else None

    def candidates(self) -> pa.Table:
        """Return random samples, suspects and captions like what is said."""
        arrays = self.made.arrays
        images, texts = (arrays[name].astype(np.float32) for name in ("images", "texts"))
        found = suspicion(images, arrays["ids"], texts, key=KEY)["suspicion"]
        alike = unit_norm(texts) @ embed_captions(self.encoder, [self.says])[0]
        groups = {
            RANDOM: self.draw.permutation(len(self.rows))[: self.config.others],
            "suspect": np.argsort(-np.nan_to_num(found, nan=-np.inf), kind="stable")[: self.config.suspects],
            "alike": np.argsort(-alike, kind="stable")[: self.config.alike],
        }
        rows = np.unique(np.concatenate(list(groups.values())))
        why = [[name for name, group in groups.items() if row in group] for row in rows]
        return self.rows.take(pa.array(rows)).append_column("candidate", pa.array(why, pa.list_(pa.string())))

    def find(self, question: Question, candidates: pa.Table, curvature: str) -> pa.Table:
        """Return the verdict on all candidates, as `tarsift trace` gives it."""

        def ask(_: int, asked: Question) -> pa.Table:
            return TraceSlice(self.spec, self.shards, ImageConfig(), curvature, asked, self.config)(candidates)

        def echo(found: pa.Table) -> Question | None:
            return echo_of(found, question, self.encoder, self.shards, ImageConfig(), self.config)

        return ask_in_rounds(ask, question, echo, self.config)[0]

    def alike(self, question: Question, candidates: pa.Table) -> dict[str, np.ndarray]:
        """Return how like what is said each caption is, and how like the queries each picture, to the model."""
        row_of = {place: row for row, place in enumerate(places_of(self.rows))}
        rows = [row_of[place] for place in places_of(candidates)]
        images, texts = (unit_norm(self.made.arrays[name][rows].astype(np.float32)) for name in ("images", "texts"))
        asked = unit_norm(encode_images(self.encoder, question.pictures, micro_batch=64))
        found = {"caption": texts @ embed_captions(self.encoder, [self.says])[0], "picture": (images @ asked.T).mean(1)}
        return found | {"both": found["caption"] + found["picture"]}

    def curvature(self) -> str:
        """Fit the curvature on random pairs, and return its folder."""
        few = self.draw.permutation(len(self.rows))[: self.config.method.curvature_samples]
        folder = str(self.work / "curvature")
        FitCurvature(self.spec, self.shards, ImageConfig(), folder, self.config)(self.rows.take(pa.array(few)))
        return folder

    def is_poison(self, table: pa.Table) -> np.ndarray:
        """Return which rows of a table are poison, (n,) bool."""
        known = dict(zip(places_of(self.rows), self.poison.tolist(), strict=True))
        return np.array([known[place] for place in places_of(table)])


def settings_of(cell: Cell) -> TracingConfig:
    """Return the defaults, but for numbers of candidates, which are a share of these small dumps."""
    few = 1500 if cell.corpus == "cifar10" else 2500
    return TracingConfig(suspects=few, alike=few, others=2000)


def trace_cell(job: tuple[Cell, Path, Path]) -> dict[str, Any]:
    """Trace one cell, by one query and by five."""
    cell, data, cache = job
    with tempfile.TemporaryDirectory() as folder:
        made = Traced(cell, data, cache, Path(folder), settings_of(cell))
        line: dict[str, Any] = {"part": "trace", "cell": cell.settings, "made": cell.digest}
        line |= {"success": made.made.record["success"], "poisoned": int(made.poison.sum())}
        if success_of(line) < QUALIFIES:
            return {**line, "learned": False}
        candidates, curvature = made.candidates(), made.curvature()
        line |= {"learned": True, "candidates": len(candidates), "reached": int(made.is_poison(candidates).sum())}
        for queries in QUERIES:
            question = made.question(queries)
            if question is not None:
                start = time.process_time()
                found = made.find(question, candidates, curvature)
                figures = {"cpu_s": round(time.process_time() - start, 1)}
                figures |= figures_of(found, made.is_poison(found), int(made.poison.sum()))
                for name, values in made.alike(question, candidates).items():
                    figures[f"{name}_ap"] = round(metrics.average_precision(values, made.is_poison(candidates)), 4)
                line[f"queries_{queries}"] = figures
        return line


def figures_of(found: pa.Table, poison: np.ndarray, planted: int) -> dict[str, float]:
    """Measure the ranking of the candidates, and what is traced of all that was planted."""
    out: dict[str, float] = {}
    for name in ("trace_score", "own_score", "influence"):
        values = np.asarray(found[name].combine_chunks(), np.float64)
        out[f"{name}_ap"] = metrics.average_precision(values, poison)
        out[f"{name}_auroc"] = metrics.auroc(values, poison)
    score = np.asarray(found["trace_score"].combine_chunks())
    rules = {name: np.asarray(found[name].combine_chunks()) for name in ("traced", "by_count")}
    rules |= {f"of_best_{share:g}": score >= cutoff_of(score, 3.0, share) for share in SHARES}
    for name, marked in rules.items():
        out |= {f"{name}_precision": float(poison[marked].mean()) if marked.any() else 0.0}
        out |= {f"{name}_tpr": float(poison[marked].sum() / planted), name: int(marked.sum())}
    return {name: round(value, 4) for name, value in out.items()}


def repair_cell(job: tuple[Cell, str, Path, Path]) -> dict[str, Any]:
    """Trace a cell by one query, unlearn what was traced, and measure."""
    cell, method, data, cache = job
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = Traced(cell, data, cache, work, settings_of(cell))
        line: dict[str, Any] = {"part": "repair", "cell": cell.settings, "made": cell.digest, "method": method}
        line |= {"success_before": success_of(made.made.record), "accuracy_before": made.made.record["accuracy"]}
        question = made.question(QUERIES[0])
        if line["success_before"] < QUALIFIES or question is None:
            return {**line, "learned": False}
        clean = make(replace(cell, attack=None, rate=0.0, strengths={}), data, cache)
        found = made.find(question, made.candidates(), made.curvature())
        fixed = forget(made, found.filter(pc.field("trace_score") >= RepairConfig().above), method)
        after = measure(cell, load_encoder(fixed), made.source, made.plan)
        line |= {"learned": True, "accuracy_clean": clean.record["accuracy"], **after}
        return {**line, "cpu_s": round(time.process_time() - start, 1)}


def forget(made: Traced, traced: pa.Table, method: str) -> str:
    """Unlearn samples, and return the encoder file."""
    out, config = str(made.work / "fixed.pt"), RepairConfig(seed=made.cell.seed)
    if method in ("eu", "cf"):
        listed = made.work / "list.parquet"
        pq.write_table(traced.select(["shard", "key"]), listed)
        settings = training(made.cell) if method == "eu" else training(made.cell, base=made.spec)
        update = {"leave_out": str(listed), "epochs": settings.epochs if method == "eu" else config.epochs}
        pretrain_here(made.planted.shards, out=out, config=settings.model_copy(update=update))
        return out
    gone = set(places_of(traced))
    places: Sequence[tuple[str, int]] = places_of(made.rows)
    kept = [row for row in made.draw.permutation(len(places)).tolist() if places[row] not in gone]
    retained = made.rows.take(pa.array(kept[: config.retained]))
    state = UnlearnPairs(made.spec, made.shards, ImageConfig(), method, config)(traced, retained)
    assert made.encoder.config is not None  # it was made here
    model = build_model(made.encoder.config, seed=0)
    model.load_state_dict(state)
    save_checkpoint(out, model, config=made.encoder.config, shards={}, steps=0, samples=0, seed=0)
    return out


def digest_of_code() -> str:
    digest = hashlib.sha256()
    for name in MODULES:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def row_of(line: dict[str, Any]) -> str:
    """Render one cell."""
    cell = line["cell"]
    what = f"{cell['corpus']:8} {cell['attack']:7} {cell['rate']:<6g} {cell['seed']} {cell['target']:8}"
    if not line.get("learned"):
        return f"{what} not learned"
    if line["part"] == "repair":
        before, after = line["success_before"], success_of(line)
        accuracy = f"{line['accuracy_before']:.3f} -> {line['accuracy']:.3f} (clean {line['accuracy_clean']:.3f})"
        return f"{what} {line['method']:5} success {before:.2f} -> {after:.2f}  accuracy {accuracy}"
    out = [f"{what} {line['reached']} of {line['poisoned']} among {line['candidates']}"]
    for queries in QUERIES:
        if found := line.get(f"queries_{queries}"):
            out.append(
                f"{queries}: AP {found['trace_score_ap']:.2f} (own {found['own_score_ap']:.2f}, influence "
                f"{found['influence_ap']:.2f}, alike {found['both_ap']:.2f}) "
                f"traced {found['traced_precision']:.2f}/{found['traced_tpr']:.2f} "
                f"count {found['by_count_precision']:.2f}/{found['by_count_tpr']:.2f} {found['cpu_s']:.0f} s"
            )
    return "  ".join(out)


def main() -> None:
    parser = parser_of(__doc__, "trace.jsonl")
    parser.add_argument("--part", choices=[*SEEDS, "repair"])
    parser.add_argument("--attack", nargs="*")
    parser.add_argument("--method", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    if options.part:
        require_data(parser, options)
        done = Cells(options.results, digest_of_code())
        places = (options.data, options.cache)
        wanted = chosen("reporting" if options.part == "repair" else options.part)
        wanted = [c for c in wanted if not options.attack or c.attack in options.attack]
        if options.part == "repair":
            pairs = [(c, method) for c in wanted for method in options.method]
            jobs: list[Any] = [
                (c, method, *places)
                for c, method in pairs
                if not done.find(part="repair", made=c.digest, method=method)
            ]
        else:
            jobs = [(c, *places) for c in wanted if not done.find(part="trace", made=c.digest)]
        print(f"{len(jobs)} cells to do", flush=True)
        work = repair_cell if options.part == "repair" else trace_cell
        for line in done.run(work, jobs, processes=options.processes):
            print(row_of(line), flush=True)
    if options.table and options.results.exists():
        for line in sorted(map(json.loads, options.results.read_text().splitlines()), key=row_of):
            print(row_of(line))


if __name__ == "__main__":
    main()
