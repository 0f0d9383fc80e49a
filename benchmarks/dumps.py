"""Real dumps end to end: poison, pretrain, clean, evaluate, and check every byte of the result.

`--data FOLDER` holds folders of WebDataset shards (`.tar` or `.tar.gz`), one per `--sets` name. Per set and
container (`tar`, `tar.gz`) the first `--shards` shards are poisoned with a patch, an encoder is trained on them, the
main job runs, and the result is checked: conservation, every member byte-identical to its source, GNU tar,
webdataset and Ray read the shards, polars and DuckDB the Parquet files. Whether the attack succeeded is measured on
a test set or, where there is none, on two shards that are held out. Appends one JSON line per cell to `--results`; a
cell that is there already (same settings and code) is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import RESULTS, TARSIFT, Cells, code_digest


def tarsift(*arguments: str) -> str:
    """Run the command line and return what it printed."""
    done = subprocess.run([str(TARSIFT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"tarsift {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def members(path: Path) -> dict[str, str]:
    """Name to digest of every member of a shard; nothing for a shard that does not exist."""
    if not path.exists():
        return {}
    with tarfile.open(path) as tar:
        return {m.name: hashlib.sha256(tar.extractfile(m).read()).hexdigest() for m in tar if m.isfile()}  # pyright: ignore


def check(source: list[Path], out: Path) -> dict[str, Any]:
    """Check conservation, bytes and readability of a result."""
    import duckdb
    import polars
    import ray.data
    from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue]

    from tarsift.pipelines.session import session

    counts = json.loads((out / "run.json").read_text())["counts"]
    assert counts["read"] == counts["kept"] + counts["removed"] + counts["errored"]
    checked = identical = samples = 0
    for shard in source:
        name = shard.name.split(".")[0]
        parts = [members(out / home / f"{name}.tar") for home in ("clean", "removed", "errored")]
        wanted = members(shard)
        assert sum(map(len, parts)) == len(wanted), shard
        assert {k: v for part in parts for k, v in part.items()} == wanted, shard
        checked += len(wanted)
        clean = out / "clean" / f"{name}.tar"
        raw = gzip.decompress(shard.read_bytes()) if shard.suffix == ".gz" else shard.read_bytes()
        identical += clean.read_bytes() == raw
        subprocess.run(["tar", "tf", clean], check=True, capture_output=True)
        samples += sum(1 for _ in WebDataset(str(clean), shardshuffle=False))
    assert samples == counts["kept"]
    with session():
        in_ray = ray.data.read_webdataset(str(out / "clean"), decoder=None, suffixes=["jpg", "txt"]).count()
    assert in_ray == counts["kept"]
    scores = polars.read_parquet(out / "scores" / "*.parquet")
    found = duckdb.sql(f"select count(*) from '{out}/scores/*.parquet' where suspicion is not null")
    rows = found.fetchall()[0][0] if found else 0
    assert len(scores) == counts["read"]
    return {
        **counts,
        "members_checked": checked,
        "identical_shards": identical,
        "ray_rows": in_ray,
        "duckdb_scored": rows,
    }


def cell(data: Path, container: str, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run one cell."""
    start = time.monotonic()
    sources = shards_in(data)[: settings["shards"]]
    held_out = shards_in(settings["test"]) if settings["test"] else [sources.pop(), sources.pop()]
    planted = work / "planted"
    tarsift(
        "poison", *map(str, sources), "--attack", "patch", "--rate", str(settings["rate"]), "--out", str(planted), "-q"
    )
    if container == "tar.gz":
        for shard in sorted(planted.glob("*.tar")):
            shard.with_name(shard.name + ".gz").write_bytes(gzip.compress(shard.read_bytes(), 6, mtime=0))
            shard.unlink()
    shards = sorted([*planted.glob("*.tar"), *planted.glob("*.tar.gz")])
    trained = time.monotonic()
    encoder = work / "enc.pt"
    train = ("--epochs", str(settings["epochs"]), "--threads", "2")
    tarsift("pretrain", *map(str, shards), "--model", "tiny", *train, "--out", str(encoder), "-q")
    cleaned = time.monotonic()
    out = work / "out"
    tarsift("clean", *map(str, shards), "--encoder", f"detect={encoder}", "--out", str(out), "-q")
    ended = time.monotonic()
    evaluation = json.loads(tarsift("evaluate", str(out), "--truth", str(planted / "truth.parquet"), "--json"))
    run = json.loads((out / "run.json").read_text())
    return {
        **check(shards, out),
        "poisoned": evaluation["poisoned"],
        "suspicion": evaluation["scores"]["suspicion"],
        "others": {n: s["auroc"] for n, s in evaluation["scores"].items()},
        "regime": run["encoders"]["detect"]["regime"]["code"],
        "attack_success": attack_success(encoder, held_out, settings["classes"]),
        "pretrain_s": round(cleaned - trained, 1),
        "clean_s": round(ended - cleaned, 1),
        "cell_s": round(time.monotonic() - start, 1),
    }


def shards_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith((".tar", ".tar.gz")))


def attack_success(encoder: Path, held_out: list[Path], classes: Sequence[str]) -> dict[str, float]:
    """Share of held-out pictures taken for the target with and without the patch.

    Among the names of the classes, or, where there are none, among the captions of all held-out pictures; the target
    is what the poison's captions say, on the average.
    """
    import numpy as np
    from PIL import Image

    from tarsift.clip_detect.triggers import patch
    from tarsift.operators.models import load_encoder
    from tarsift.operators.poison import imagenet_templates
    from tarsift.operators.shards import ReadShard, list_shards
    from tarsift.pipelines.zeroshot import attack_success as success

    rows = [row for shard in list_shards(list(map(str, held_out))) for t in ReadShard()(shard) for row in t.to_pylist()]
    side = Image.open(io.BytesIO(rows[0]["image"])).size
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(r["image"])).convert("RGB").resize(side)) for r in rows])
    names = [row["uid"] for row in rows]
    prompts = [f"a photo of a {name}" for name in classes] or sorted({row["caption"] for row in rows})
    found = success(
        load_encoder(str(encoder)),
        pictures,
        lambda x: patch(x, names, seed=1),
        class_prompts=[[prompt] for prompt in prompts],
        target_prompts=[template.format("banana") for template in imagenet_templates()],
    )
    return {"triggered": found.triggered, "untriggered": found.untriggered, "choices": len(prompts) + 1}


CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SETS = {"cifar10-train": {"epochs": 6, "test": "cifar10-test", "classes": CIFAR_CLASSES}, "flickr8k": {"epochs": 15}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--containers", nargs="*", default=["tar", "tar.gz"])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--results", type=Path, default=RESULTS / "dumps.jsonl")
    options = parser.parse_args()
    cells = Cells(options.results, code_digest(Path(__file__)))
    for name in options.sets:
        for container in options.containers:
            known = SETS.get(name, {"epochs": 10})
            settings = {"shards": options.shards, "rate": options.rate, "epochs": known["epochs"]}
            if cells.find(set=name, container=container, **settings):
                print(f"{name} {container}: done before")
                continue
            test = known.get("test")
            extra = {"test": options.data / test if test else None, "classes": known.get("classes", ())}
            with tempfile.TemporaryDirectory() as folder:
                result = cell(options.data / name, container, {**settings, **extra}, Path(folder))
            cells.add(set=name, container=container, **settings, **result)
            found = result["suspicion"]
            print(
                f"{name} {container}: AUROC {found['auroc']:.3f}, AP {found['average_precision']:.3f}, recall at 5 % "
                f"{found['recall_at_0.05']:.3f}, attack success {result['attack_success']}, "
                f"{result['members_checked']:,} members identical, {result['cell_s']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
