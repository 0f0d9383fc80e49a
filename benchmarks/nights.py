"""Ten nights of ingestion: does a night with new poison stand out, and is a night without any left in peace?

CIFAR-10's training shards in random order, five a night. The witness and the first encoder are trained on its test
shards. In the sixth night, and in no other, poison is planted at 1 %:

mismatched   a patch at a random place, the caption is one for another subject (`patch`)
clean-label  the same patch on samples whose caption is left as it is (`patch-clean-label`)
control      nothing

Every picture of every night is encoded anew, as those are that a patch is put on, so that JPEG gives nothing away.
Limits of drift and findings are chosen on seed 100, and drift's rule was changed after seed 1, in whose fourth night,
without any poison, it told of drift (`--part tuning`). What is reported comes from seeds 2 and 3.

`--part fixed`: with encoders that stand still, what ten nights cost in CPU beside one run over all shards, and whether
the reference and, against it, all scores and flags are the same. Counted is the CPU time of all processes of a command,
less that of the same command over two shards of 50 samples: what starting Ray and, on two cores, workers that load
packages takes.

Appends one JSON line per night to `--results`; a night that is there already (same seed, kind and code) is not run
again where its state is still in `--work`.

    python benchmarks/nights.py --part tuning --data DATA
    python benchmarks/nights.py --table
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import RESULTS, TARSIFT, Cells, code_digest

from tarsift.clip_detect import metrics
from tarsift.operators.folds import DrawnRows
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.schema import places_of
from tarsift.pipelines.config import load_config
from tarsift.pipelines.ingest import NightResult, ingest
from tarsift.pipelines.ingest_settings import IngestConfig
from tarsift.pipelines.poison import poison_here
from tarsift.pipelines.pretrain import pretrain_here
from tarsift.pipelines.session import session
from tarsift.pipelines.train_job import PretrainConfig

NIGHTS, PER_NIGHT, PLANTED = 10, 5, 6
KINDS = {"control": None, "mismatched": "patch", "clean-label": "patch-clean-label"}
RATE = 0.01
PARTS = {"tuning": (100, 1), "reporting": (2, 3)}
TARGETS = {100: "volcano", 1: "kettle", 2: "lemon", 3: "teapot"}
LABEL = "truck"  # whose samples a clean-label patch is put on
EPOCHS = 20  # of the witness and of the first encoder
SMALL, SMALL_SHARDS = 100, 2
WATCHED = ("suspicion", "suspicion_density", "caption_mismatch")


def plan(seed: int, kind: str) -> PoisonConfig:
    """Return what is planted in the sixth night."""
    attack = KINDS[kind]
    target = LABEL if kind == "clean-label" else TARGETS[seed]
    return PoisonConfig(attacks=(attack or "patch",), rate=RATE if attack else 0.0, seed=seed, target=target)


def nights_of(data: Path, seed: int) -> list[list[str]]:
    """Return the shards of every night."""
    shards = sorted(map(str, (data / "cifar10-train").glob("*.tar.gz")))
    order = np.random.default_rng([seed, 11]).permutation(len(shards))
    return [[shards[i] for i in order[n * PER_NIGHT : (n + 1) * PER_NIGHT]] for n in range(NIGHTS)]


def encoders(data: Path, work: Path) -> dict[str, str]:
    """Train the witness and the first encoder, unless they are there."""
    test = sorted(map(str, (data / "cifar10-test").glob("*.tar.gz")))
    made = {}
    for role, seed in (("detect", 7), ("witness", 8)):
        file = work / f"{role}.pt"
        if not file.exists():
            temporary = file.with_suffix(".new.pt")
            config = PretrainConfig(epochs=EPOCHS, batch_size=64, seed=seed, snapshot_s=3600)
            pretrain_here(test, out=str(temporary), config=config)
            temporary.replace(file)
        made[role] = str(file)
    return made


def settings(made: dict[str, str], *, train: bool, epochs: int) -> IngestConfig:
    roles = [f"encoders.{role}.spec={file}" for role, file in made.items()]
    return IngestConfig(
        clean=load_config(settings=[*roles, "write.shards=false"]), train=train, epochs=epochs,
        pretrain=PretrainConfig(batch_size=64),
    )  # fmt: skip


def arrive(nights: list[list[str]], seed: int, kind: str, night: int, folder: Path) -> str | None:
    """Let the shards of all nights up to one lie in a folder; return the truth of the last one where it has poison."""
    shutil.rmtree(folder, ignore_errors=True)
    truths = [_arrive(shards, seed, kind, n, folder) for n, shards in enumerate(nights[:night], 1)]
    return truths[-1]


def _arrive(shards: list[str], seed: int, kind: str, night: int, folder: Path) -> str | None:
    planted = kind if night == PLANTED else "control"
    place = folder.parent / "planted" / f"{seed}-{night:02d}-{planted}"
    if not place.exists():
        temporary = place.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        poison_here(shards, out=str(temporary), config=plan(seed, planted))
        temporary.rename(place)
    folder.mkdir(parents=True, exist_ok=True)
    for path in place.rglob("*.tar*"):
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
    return str(place / "truth.parquet") if planted != "control" else None


def measured(result: NightResult, truth: str | None) -> dict[str, Any]:
    """Return what a night found, and how well its scores find what was planted."""
    state = json.loads((Path(f"{result.out}").parents[1] / "records" / f"{result.night:04d}.json").read_text())
    figures: dict[str, Any] = {
        "findings": [[f["value"], f["members"], f["captions"][:2]] for f in state["findings"]],
        "highest": state["highest"],
        "drift": state["drift"],
        "seconds": state["seconds"],
    }
    if truth is None:
        return figures
    planted = {(row["shard"], row["row"]) for row in pq.read_table(truth).to_pylist()}
    columns: dict[str, list[float]] = {name: [] for name in WATCHED}
    poison: list[bool] = []
    for file in sorted((Path(f"{result.out}") / "scores").glob("*.parquet")):
        table = pq.read_table(file)
        poison += [row in planted for row in places_of(table)]
        for name, values in columns.items():
            values += table[name].to_pylist()
    if sum(poison) != len(planted):
        raise SystemExit(f"{len(planted)} samples were planted, and {sum(poison)} found in the night's shards")
    figures["planted"] = len(planted)
    for name, values in columns.items():
        score = np.nan_to_num(np.array(values, np.float64), nan=-np.inf)
        flags = np.array(poison)
        figures[name] = {
            "auroc": round(metrics.auroc(score, flags), 4),
            "ap": round(metrics.average_precision(score, flags), 4),
            "recall_0.05": round(metrics.recall_at(score, flags, 0.05), 4),
        }
    return figures


def run(
    part: str, kinds: list[str], data: Path, work: Path, cells: Cells, *, seeds: list[int], epochs: int, last: int
) -> None:
    """Run the nights of a part: those before the poison once for all kinds."""
    made = encoders(data, work)
    for seed in seeds:
        nights = nights_of(data, seed)
        shared = work / f"{seed}-{epochs}-before"
        for kind in kinds:
            place = work / f"{seed}-{epochs}-{kind}"
            for night in range(1, last + 1):
                here = shared if night < PLANTED else place
                if night == PLANTED and not place.exists():
                    shutil.copytree(shared, place)
                arrivals = shared / "arrivals"  # of all kinds: a state keeps the folder that it began with
                truth = arrive(nights, seed, kind, night, arrivals)
                about = {"part": part, "seed": seed, "epochs": epochs, "night": night}
                about["kind"] = "before" if night < PLANTED else kind
                if (here / "state" / "records" / f"{night:04d}.json").exists():
                    continue
                with session(num_cpus=2):
                    config = settings(made, train=True, epochs=epochs)
                    result = ingest(str(arrivals), str(here / "state"), config=config)
                assert result.night == night, result
                told = cells.add(**about, **measured(result, truth))
                print({name: told[name] for name in told if name not in ("code", "seconds")}, flush=True)


def small_dump(shard: str, folder: Path) -> Path:
    """Write the first samples of a shard, in turns, into two shards; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    keys: dict[str, int] = {}
    with ExitStack() as stack:
        source = stack.enter_context(tarfile.open(shard))
        sinks = [stack.enter_context(tarfile.open(folder / f"small-{i}.tar", "w")) for i in range(SMALL_SHARDS)]
        for member in source:
            turn = keys.setdefault(member.name.partition(".")[0], len(keys))
            if turn == SMALL:
                break
            sinks[turn % len(sinks)].addfile(member, source.extractfile(member))
    return folder


def cpu_of(*arguments: str) -> float:
    """Run a tarsift command and return the CPU seconds of all processes in its session, Ray's daemons and workers too.

    They are looked at ten times a second: what a process spends after the last look at it is lost. (What the kernel
    adds up of children leaves out those that nobody waits for, which Ray's workers are.)
    """
    environment = {**os.environ, "RAY_ADDRESS": "local", **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [TARSIFT, *arguments], env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=said
        )
        spent: dict[tuple[str, str], int] = {}
        while child.poll() is None:
            spent |= ticks_of(child.pid)
            time.sleep(0.1)
        while left := ticks_of(child.pid):  # Ray's daemons end a little later
            spent |= left
            time.sleep(0.1)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"tarsift {' '.join(arguments)} ended with {child.returncode}: {said.read()[-2000:]!r}")
    return sum(spent.values()) / os.sysconf("SC_CLK_TCK")


def ticks_of(session: int) -> dict[tuple[str, str], int]:
    """Return the CPU time of every living process of a session, by process id and time of start."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found[folder.name, fields[19]] = int(fields[11]) + int(fields[12])
    return found


def fixed(data: Path, work: Path, cells: Cells) -> None:
    """Compare ten nights with one run."""
    made = encoders(data, work)
    place = work / "fixed"
    shutil.rmtree(place, ignore_errors=True)
    roles = [f"--encoder={role}={file}" for role, file in made.items()]
    nights = nights_of(data, 1)
    small = small_dump(nights[0][0], place / "small")
    few = ["--set", "suspicion.reference_size=64", "--set", "suspicion.published_ks=[8]"]
    start = {
        "night": cpu_of("ingest", str(small), "--state", str(place / "small-state"), "--fixed", "-q", *roles, *few),
        "clean": cpu_of("clean", str(small), "--out", str(place / "small-out"), "-q", *roles, *few),
    }
    state, arrivals = place / "state", place / "arrivals"
    arrivals.mkdir()
    spent = []
    for shards in nights:
        for shard in shards:
            shutil.copy2(shard, arrivals)
        spent.append(cpu_of("ingest", str(arrivals), "--state", str(state), "--fixed", "-q", *roles))
        print(f"night {len(spent)}: {spent[-1]:.1f} CPU-s", flush=True)
    key = json.loads((state / "state.json").read_text())["key"]
    one = cpu_of("clean", str(arrivals), "--out", str(place / "one"), "-q", *roles, "--set", f"reference.key={key}")
    stands = state / "reference" / f"{NIGHTS:04d}"
    against = ["--set", f"reference.key={key}", "--set", f"reference.standing={stands}"]
    cpu_of("clean", str(arrivals), "--out", str(place / "against"), "-q", *roles, *against)
    differ = [
        f"{folder}/{file.name}"
        for folder in ("scores", "flags")
        for file in sorted((place / "one" / folder).glob("*.parquet"))
        if not pq.read_table(file).equals(pq.read_table(place / "against" / folder / file.name))
    ]
    operators = {"nights": sum(spent) - NIGHTS * start["night"], "one": one - start["clean"]}
    runs = [json.loads((state / "nights" / f"{n:04d}" / "run.json").read_text()) for n in range(1, NIGHTS + 1)]
    line = cells.add(
        part="fixed", start_cpu_s=start, nights_cpu_s=spent, one_cpu_s=one, operators_cpu_s=operators,
        ratio=operators["nights"] / operators["one"], rules=[run["reference"]["rules"] for run in runs],
        rows=same_rows(place, stands, key), differ=differ,
    )  # fmt: skip
    print({name: value for name, value in line.items() if name != "nights_cpu_s"})


def same_rows(place: Path, stands: Path, key: str) -> dict[str, Any]:
    """Compare the standing reference with the rows of smallest hash among all that one run has embedded."""
    own = hashlib.sha256(key.encode()).digest()
    found = {}
    for role in ("detect", "witness"):
        rows = pq.read_table(stands / role / "rows.parquet")
        columns = ["shard", "row", "image_sha256", "error", "image_embedding", "text_embedding"]
        table = pa.concat_tables(
            [pq.read_table(f, columns=columns) for f in sorted((place / "one" / "embeddings" / role).glob("*.parquet"))]
        )
        fold = DrawnRows(2**64 - 1, key=own, columns=tuple(columns))
        drawn = fold.finish(fold.add(fold.init(), table))
        assert drawn is not None
        first = drawn.slice(0, len(rows))
        found[role] = {"rows": len(rows), "same": rows.select(first.column_names).cast(first.schema).equals(first)}
    return found


def table(results: Path) -> None:
    """Print the latest line of every night."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    latest = {(x["part"], x["seed"], x["epochs"], x["kind"], x["night"]): x for x in lines if "night" in x}
    for (part, seed, epochs, kind, night), line in sorted(latest.items()):
        found = f"{len(line['findings'])} findings, highest {line['highest']:.2f}, {len(line['drift'])} drift"
        scores = " ".join(
            f"{name} {line[name]['auroc']:.3f}/{line[name]['ap']:.2f}/{line[name]['recall_0.05']:.2f}"
            for name in WATCHED
            if name in line
        )
        print(f"{part:9} {seed:4} {epochs:2} {kind:12} {night:2}  {found}  {scores}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "fixed"])
    parser.add_argument("--data", type=Path, default=os.environ.get("TARSIFT_DATA"), help="folder of the corpora")
    parser.add_argument("--work", type=Path, default=RESULTS.parent.parent / "scratch" / "nights")
    parser.add_argument("--results", type=Path, default=RESULTS / "nights.jsonl")
    parser.add_argument("--seed", type=int, nargs="*", help="those of the part that are run; all by default")
    parser.add_argument("--kind", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--epochs", type=int, default=8, help="of each night's training")
    parser.add_argument("--last", type=int, default=NIGHTS, help="the last night that is run")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.part and options.data is None:
        parser.error("--data is needed: the folder with cifar10-train and cifar10-test")
    if options.part:
        options.work.mkdir(parents=True, exist_ok=True)
        cells = Cells(options.results, code_digest(Path(__file__)))
        if options.part == "fixed":
            fixed(options.data, options.work.resolve(), cells)
            return
        run(
            options.part, options.kind, options.data, options.work.resolve(), cells,
            seeds=[seed for seed in PARTS[options.part] if options.seed is None or seed in options.seed],
            epochs=options.epochs, last=options.last,
        )  # fmt: skip
    if options.table:
        table(options.results)


if __name__ == "__main__":
    main()
