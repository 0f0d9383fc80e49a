"""The setting of the detection paper (arXiv 2502.01385) on CC3M, for those who have its pictures and a network.

One cell is one attack: its poison is planted in CC3M, an encoder embeds the dump, and the paper's detectors
(k-distance, LID, SLOF and DAO, k = 16, against 2,048 samples) rank it: by their definitions, and as the code released
with the paper computes them. `suspicion` stands beside them. Finished cells are kept, one JSON line each, and the same
command goes on where it stopped.

    CC3M='cc3m/{00000..00331}.tar'
    python examples/reproduce_cc3m.py --shards "$CC3M" --work WORK                      # with published checkpoints
    python examples/reproduce_cc3m.py --shards "$CC3M" --work WORK --encoder trained    # one trained for each attack
    python examples/reproduce_cc3m.py --stand-in --work WORK    # the plumbing on digits; its figures mean nothing
    python examples/reproduce_cc3m.py --table                   # examples/reproduce_cc3m.md

CC3M is fetched with img2dataset, by its own rules. What differs from the paper, also where everything has run: poison
is planted in samples of its own choice, not in those that a published checkpoint was trained on, and the checkpoint
is asked with the preprocessing that its configuration states. Where a trigger is built another way here (`own
pattern`: a cartoon, a noise file, a filter and a warp take others' places), only an encoder that is trained here can
have learned it. BLTO is left out: its generators are not published.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tarsift import clean, evaluate, load_config, poison, pretrain
from tarsift.clip_detect.as_published import BATCH_SIZE, K
from tarsift.clip_detect.baselines import Evidence, baseline_scores
from tarsift.clip_detect.metrics import figures, rank, sweep
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.schema import matrix
from tarsift.pipelines.pretrain import PretrainConfig
from tarsift.pipelines.training import TrainConfig

HERE = Path(__file__).resolve().parent
PAGE = HERE / "reproduce_cc3m.md"
RESULTS = HERE.parent / "benchmarks" / "results" / "reproduce_cc3m.jsonl"
REFERENCE = BATCH_SIZE  # 4 GPUs with 512 samples each
DEFINED = ("k_distance", "lid", "slof", "dao")
SHOWN = (*(f"{name}_k{K}" for name in DEFINED), *(f"{name}_as_published" for name in DEFINED), "suspicion")
FRACTIONS = (0.01, 0.05, 0.1)  # the paper removes 10 %; 1 % is said to do for the patch, 5 % for other triggers


@dataclass(frozen=True)
class Cell:
    """One row of the paper's table.

    Attributes:
        paper: what the paper calls the attack; attack: what it is called here.
        rate: share of CC3M that is poisoned.
        checkpoint: published with the paper, on the Hugging Face hub; None: there is none of that name.
        same_trigger: whether the trigger here is built as there, so that the checkpoint has learned it.
    """

    paper: str
    attack: str
    rate: float
    checkpoint: str | None
    same_trigger: bool


def _published(name: str) -> str:
    return f"hf-hub:hanxunh/clip_backdoor_rn50_cc3m_{name}"


CELLS = {
    cell.paper: cell
    for cell in (
        Cell("badnets", "patch", 0.0001, _published("badnets"), True),
        Cell("clean_label", "patch-clean-label", 0.001, _published("clean_label"), True),
        Cell("blend", "blend", 0.001, _published("blend"), False),
        Cell("sig", "sig", 0.001, _published("sig"), False),
        Cell("nashville", "filter", 0.001, _published("nashville"), False),
        Cell("wanet", "wanet", 0.001, _published("wanet"), False),
        Cell("multi_trigger", "multi-trigger", 0.001, None, False),
        Cell("multi_multi", "multi-target", 0.001, None, False),
        Cell("single_image", "one-image", 0.0001, None, True),
    )
}

# AdamW with a rate of 1e-3 and a decay of 0.2, batches of 1,024, 30 epochs. `pretrain` warms up for a tenth of all
# steps at most, three epochs; the paper's configurations say 4.25.
TRAINING = PretrainConfig(
    model="RN50", epochs=30, batch_size=1024, train=TrainConfig(lr=1e-3, weight_decay=0.2, warmup_steps=10_000)
)


@dataclass(frozen=True)
class Scale:
    """What a stand-in makes smaller; as it is, it is the paper's setting."""

    training: PretrainConfig = TRAINING
    reference: int = REFERENCE
    rate: float | None = None
    templates: tuple[str, ...] | None = None  # of poisoned captions; None: the prompts for ImageNet
    stand_in: bool = False


def run_cell(
    cell: Cell, shards: str | Sequence[str], work: Path, *, encoder: str, scale: Scale | None = None, seed: int = 0
) -> dict[str, Any]:
    """Plant, embed, score and measure one attack; each step goes on where an earlier call stopped.

    Args:
        shards: the clean dump.
        work: a folder for the poisoned copy, the encoder and the result folder.
        encoder: `published`, `trained`, or an encoder file.
        scale: the paper's where None.
        seed: of the choice of samples and places.

    Returns:
        What is written down: settings, and AUROC, average precision and recall by score.
    """
    scale = scale or Scale()
    rate = cell.rate if scale.rate is None else scale.rate
    folder = work / f"{cell.paper}-{seed}"
    templates = {} if scale.templates is None else {"templates": scale.templates}
    truth = folder / "dump" / "truth.parquet"
    if not truth.exists():
        poison(
            shards,
            out=str(folder / "dump"),
            config=PoisonConfig(attacks=(cell.attack,), rate=rate, seed=seed, **templates),
        )
    planted = str(folder / "dump")
    spec = _encoder(cell, encoder, planted, folder, scale)
    settings = [
        f"encoders.detect.spec={spec}", f"suspicion.reference_size={scale.reference}", f"suspicion.published_ks=[{K}]",
        "write.shards=false",
    ]  # fmt: skip
    out = str(folder / f"out-{Path(encoder).stem}")
    clean(planted, out, config=load_config(settings=settings))
    found = evaluate(out, str(truth))
    scores = {name: _figures(found.scores[name]) for name in SHOWN if name in found.scores} | released(out, str(truth))
    return {
        "cell": cell.paper, "attack": cell.attack, "rate": rate, "encoder": encoder, "seed": seed,
        "samples": found.samples, "poisoned": found.poisoned, "reference": scale.reference, "k": K,
        "stand_in": scale.stand_in, "scores": scores,
    }  # fmt: skip


def _encoder(cell: Cell, encoder: str, planted: str, folder: Path, scale: Scale) -> str:
    if encoder == "published":
        if cell.checkpoint is None:
            raise SystemExit(f"{cell.paper}: no checkpoint is published; give --encoder trained.")
        if not cell.same_trigger:
            raise SystemExit(
                f"{cell.paper}: the published checkpoint has learned another pattern than {cell.attack} plants; give "
                "--encoder trained."
            )
        return cell.checkpoint
    if encoder != "trained":
        return encoder
    file = folder / "trained.pt"
    if not file.exists():
        pretrain(planted, out=str(file), config=scale.training)
    return str(file)


def released(out: str, truth: str, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Measure what the released code would have scored, from the embeddings that are stored; all are in memory."""
    columns = ["shard", "row", "image_embedding"]
    tables = [
        pq.read_table(file, columns=columns) for file in sorted(Path(out, "embeddings", "detect").rglob("*.parquet"))
    ]
    stored = pa.concat_tables(tables)
    stored = stored.filter(stored["image_embedding"].is_valid())
    places = zip(stored["shard"].to_pylist(), stored["row"].to_pylist(), strict=True)
    planted = pq.read_table(truth, columns=["shard", "row"])
    poisoned = set(zip(planted["shard"].to_pylist(), planted["row"].to_pylist(), strict=True))
    is_poison = np.array([place in poisoned for place in places])
    evidence = Evidence(image_embeddings=matrix(stored["image_embedding"])[0].astype(np.float32))
    names = [f"{name}_as_published" for name in DEFINED]
    found = baseline_scores(evidence, names, seed=seed)
    return {name: _figures(figures(sweep(rank(values), is_poison), FRACTIONS)) for name, values in found.items()}


def _figures(measured: Mapping[str, float]) -> dict[str, float]:
    names = ("auroc", "average_precision", *(f"recall_at_{fraction:g}" for fraction in FRACTIONS))
    return {name: round(float(measured[name]), 5) for name in names}


def stand_in(work: Path, names: Iterable[str], *, samples: int = 1500, epochs: int = 12) -> list[dict[str, Any]]:
    """Run cells on captioned digits with a tiny encoder: every step is taken, and the figures mean nothing for CC3M."""
    from tarsift.pipelines.demo_corpus import TARGET_TEMPLATES, make_corpus

    corpus = make_corpus(work / "corpus", samples=samples)
    small = PretrainConfig(epochs=epochs)
    scale = Scale(small, reference=256, rate=0.02, templates=TARGET_TEMPLATES, stand_in=True)
    return [run_cell(CELLS[name], corpus.shards, work, encoder="trained", scale=scale) for name in names]


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """Write the page: AUROC of every score in every cell, and what was not run. Stand-ins are no results.

    Raises:
        ValueError: for the record of a stand-in.
    """
    known: dict[tuple[str, str], Mapping[str, Any]] = {}
    for record in records:
        if record["stand_in"]:
            raise ValueError(f"the record of {record['cell']} is that of a stand-in, which says nothing of CC3M.")
        known[record["cell"], record["encoder"]] = record
    head = f"""# The detection paper's setting on CC3M

Written by `python examples/reproduce_cc3m.py --table`. RN50, k = {K}, {REFERENCE:,} samples as the reference; AUROC.
A cell that says *not run* was not run: no figure of the paper is repeated here, and none is claimed. `own pattern`: the
trigger is built another way than in the paper, so that its checkpoint has not learned it.
"""
    names = " | ".join(f"`{name}`" for name in SHOWN)
    lines = [head, f"| attack | rate | encoder | trigger | {names} |", "|---" * (len(SHOWN) + 4) + "|"]
    for cell in CELLS.values():
        usable = [*(["published"] if cell.checkpoint and cell.same_trigger else []), "trained"]
        for encoder in usable:
            record = known.get((cell.paper, encoder))
            said = ["not run"] * len(SHOWN)
            if record is not None:
                measured = record["scores"]
                said = [f"{measured[name]['auroc']:.3f}" if name in measured else "–" for name in SHOWN]
            trigger = "as in the paper" if cell.same_trigger else "own pattern"
            lines.append(f"| {cell.paper} | {cell.rate:.2%} | {encoder} | {trigger} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def recorded(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Read the finished cells; none where there is no file."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="CC3M as WebDataset shards: paths, globs, brace patterns, URLs")
    parser.add_argument("--work", type=Path, help="a folder with room for a copy of the dump per attack")
    parser.add_argument(
        "--attack", action="append", choices=CELLS, help="several times; all that the encoder allows where absent"
    )
    parser.add_argument("--encoder", default="published", choices=("published", "trained"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stand-in", action="store_true", help="the plumbing on digits, into WORK/stand-in.jsonl")
    parser.add_argument("--table", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args(arguments)
    if given.table:
        PAGE.write_text(table(recorded()))
        return
    if given.work is None or (given.shards is None and not given.stand_in):
        parser.error("give --work, and --shards or --stand-in")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    if given.stand_in:
        for record in stand_in(given.work, given.attack or ["badnets"]):
            _append(given.work / "stand-in.jsonl", record)
        return
    usable = [
        name for name, cell in CELLS.items() if given.encoder == "trained" or (cell.checkpoint and cell.same_trigger)
    ]
    for name in given.attack or usable:
        done = {(record["cell"], record["encoder"], record["seed"]) for record in recorded()}
        if (name, given.encoder, given.seed) not in done:
            record = run_cell(CELLS[name], given.shards, given.work, encoder=given.encoder, seed=given.seed)
            _append(RESULTS, record)


def _append(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
