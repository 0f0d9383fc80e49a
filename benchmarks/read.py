"""Reading shards: tarsift's reader beside tarfile and webdataset, for speed and for what each loses without a word.

Speed: every contender reads key, image bytes and caption of all samples of the same shards, in one thread, in turn;
the figures are CPU seconds (files are in the page cache). tarsift checks every header, notes byte ranges, digests
the whole file with SHA-256 and makes Arrow tables; the others do not, and `sha256 alone` says what that is worth.

Loss: shards are cut at random bytes before the end of their second zero block. Samples that are whole before the
cut are no loss when they are read; what counts is whether a reader says that something is missing.

    python benchmarks/read.py --json benchmarks/results/read.json
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import webdataset as wds
from measuring import hardware, soft_pictures, write_shards

from tarsift.operators.shards import ReadShard, Shard


def make_shard(path: Path, samples: int, *, side: int, seed: int) -> None:
    """Write a shard of JPEGs with captions, and a gzipped copy of it."""
    pictures = soft_pictures(samples, side=side, quality=90, seed=seed)
    [shard] = write_shards(path.with_suffix(""), pictures, per_shard=samples)
    shard.replace(path)
    path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes(), 6))


def by_tarsift(path: Path) -> tuple[int, bool]:
    """Return the number of samples read, and whether the reader said that something is wrong."""
    rows = 0
    for table in ReadShard(receipts=True)(Shard(name=path.name, url=str(path), size=0)):
        if table["row"][0].as_py() == -1:
            return rows, bool(json.loads(table["key"][0].as_py())["problems"])
        rows += len(table) - table["error"].to_pylist().count("truncated_member")
    raise AssertionError("no end of shard")


def by_tarfile(path: Path) -> tuple[int, bool]:
    rows, key = 0, ""
    held: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is None:
                    continue
                stem, _, suffix = member.name.rpartition(".")
                if stem != key:
                    rows += {"jpg", "txt"} <= held.keys()
                    key, held = stem, {}
                held[suffix] = file.read()
    except (tarfile.TarError, EOFError, OSError):
        return rows, True
    return rows + ({"jpg", "txt"} <= held.keys()), False


def by_webdataset(path: Path) -> tuple[int, bool]:
    rows = 0
    try:
        for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False):  # pyright: ignore[reportAttributeAccessIssue]
            rows += {"jpg", "txt"} <= sample.keys()
    except Exception:
        return rows, True
    return rows, False


def sha256_alone(path: Path) -> tuple[int, bool]:
    hashlib.sha256(path.read_bytes())
    return 0, False


CONTENDERS: dict[str, Callable[[Path], tuple[int, bool]]] = {
    "tarsift": by_tarsift,
    "tarfile": by_tarfile,
    "webdataset": by_webdataset,
    "sha256 alone": sha256_alone,
}


def speed(path: Path, samples: int, repeats: int) -> dict[str, Any]:
    """Return the median CPU seconds of each contender, and their medians as ratios to tarsift's in the same turn."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, read in CONTENDERS.items():
            start = time.process_time()
            rows, _ = read(path)
            seconds[name].append(time.process_time() - start)
            assert rows in (samples, 0), (name, rows)
    ratios = {
        name: statistics.median(t / ours for t, ours in zip(times, seconds["tarsift"], strict=True))
        for name, times in seconds.items()
    }
    medians = {name: round(statistics.median(times), 4) for name, times in seconds.items()}
    return {
        "cpu_s": medians,
        "of_tarsift": {name: round(r, 3) for name, r in ratios.items()},
        "samples_per_cpu_s": round(samples / medians["tarsift"]),
        "mb_per_cpu_s": round(path.stat().st_size / 1e6 / medians["tarsift"]),
    }


def loss(path: Path, samples: int, cuts: int, work: Path) -> dict[str, dict[str, int]]:
    """Cut a shard at random; count the cuts of which a reader says nothing, and the samples that were missing then."""
    data = path.read_bytes()
    whole = len(data)
    if path.suffix != ".gz":
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        whole = -(-(last.offset_data + last.size) // 512) * 512 + 1024  # the end of the second zero block
    rng = random.Random(1)
    silent = {name: {"cuts_unnoticed": 0, "samples_missing_unnoticed": 0} for name in CONTENDERS if "alone" not in name}
    for _ in range(cuts):
        cut = work / f"cut{''.join(path.suffixes)}"
        cut.write_bytes(data[: rng.randrange(1, whole)])
        for name, found in silent.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows, told = CONTENDERS[name](cut)
            found["cuts_unnoticed"] += not told
            found["samples_missing_unnoticed"] += 0 if told else samples - rows
    return silent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--side", type=int, default=256, help="pixels along the side of the JPEGs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cuts", type=int, default=500)
    parser.add_argument("--json", type=Path, help="file for hardware and figures")
    args = parser.parse_args()
    result: dict[str, Any] = {"hardware": hardware(np, pa, wds), "speed": {}, "loss": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_shard(work / "large.tar", args.samples, side=args.side, seed=0)
        make_shard(work / "small.tar", args.samples, side=16, seed=1)  # a thumbnail each: headers weigh most
        make_shard(work / "cut-me.tar", 60, side=32, seed=2)
        for suffix in (".tar", ".tar.gz"):
            for size in ("large", "small"):
                result["speed"][size + suffix] = speed(work / (size + suffix), args.samples, args.repeats)
            result["loss"][suffix] = loss(work / f"cut-me{suffix}", 60, args.cuts, work)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
