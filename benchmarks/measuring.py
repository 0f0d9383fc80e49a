"""What the benchmarks share: results continued and keyed by a digest of code, shards, a look at other processes."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import platform
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TARSIFT = Path(sys.executable).parent / "tarsift"
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("clip_detect", "operators", "pipelines")

Stat = list[str]  # the fields of /proc/<pid>/stat behind the name: state, parent, ...


def code_digest(*files: Path) -> str:
    """Return 12 hex digits of the sources of tarsift and of `files`: the benchmark's own."""
    digest = hashlib.sha256()
    packages = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    for path in (*files, *packages):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Cells:
    """A file with one JSON line per finished cell; those of other code are left in it and passed over.

    Args:
        path: made when the first cell is added.
        code: digest of all that the figures depend on; a function of the cell where that differs between cells.
    """

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [r for r in map(json.loads, lines) if r.get("code") == code]

    def find(self, **cell: Any) -> list[dict[str, Any]]:
        """Return the records of these settings."""
        return [r for r in self.records if all(r.get(name) == value for name, value in cell.items())]

    def add(self, **record: Any) -> dict[str, Any]:
        """Write a finished cell down."""
        record["code"] = self.code
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def run(
        self, work: Callable[[Any], dict[str, Any]], jobs: Sequence[Any], *, processes: int
    ) -> Iterator[dict[str, Any]]:
        """Do jobs in several processes, and write down and yield the record of each as it is finished."""
        with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=8) as pool:
            for record in pool.imap_unordered(work, jobs):
                yield self.add(**record)


def soft_pictures(samples: int, *, side: int, quality: int, seed: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield JPEGs of low frequencies, all different, each with a caption."""
    rng = np.random.default_rng(seed)
    for i in range(samples):
        small = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8))
        sink = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=quality)
        yield sink.getvalue(), b"a photo of thing %d" % (i % 997)


def write_shards(folder: Path, samples: Iterable[tuple[bytes, bytes]], *, per_shard: int) -> list[Path]:
    """Write JPEGs with their captions as shards below `folder`, and return these."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, first, shards = iter(samples), 0, []
    while chunk := list(islice(waiting, per_shard)):
        shards.append(folder / f"{first // per_shard:05d}.tar")
        with tarfile.open(shards[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, sample in enumerate(chunk, first):
                for suffix, data in zip(("jpg", "txt"), sample, strict=True):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        first += len(chunk)
    return shards


def stats() -> dict[int, Stat]:
    """Return what /proc says of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            found[int(entry.name)] = text[text.rindex(")") + 2 :].split()
    return found


def family(roots: Iterable[int], known: dict[int, Stat] | None = None) -> set[int]:
    """Return processes and all below them."""
    known = stats() if known is None else known
    found, grown = set(roots), True
    while grown:
        more = {pid for pid, fields in known.items() if int(fields[1]) in found} - found
        found |= more
        grown = bool(more)
    return found


def title(pid: int) -> str:
    """Return the command line of a process, as which Ray's workers tell what they do; "" if it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


class CpuMeter:
    """User + system seconds of a process and of all ever seen below it, looked up several times a second.

    Ray's daemon does not wait for the workers that it ends, so that the system's own sums forget them. What a
    process used after the last look before its end is missed: a tenth of a second at most, for every contender.
    """

    def __init__(self, root: int, every_s: float = 0.1) -> None:
        self.root, self.every_s = root, every_s
        self.ticks: dict[tuple[int, str], int] = {}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuMeter:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def seconds(self) -> float:
        self._look()
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")

    def _watch(self) -> None:
        while not self.stop.wait(self.every_s):
            self._look()

    def _look(self) -> None:
        known = stats()
        for pid in family([self.root], known) & known.keys():
            fields = known[pid]
            self.ticks[pid, fields[19]] = int(fields[11]) + int(fields[12])  # known by its number and its start


def hardware(*modules: Any) -> dict[str, Any]:
    """Return processor, number of CPUs, and versions of `modules`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {module.__name__: module.__version__ for module in modules}
    return {"cpu": model[0] if model else platform.machine(), "cpus": os.cpu_count(), "versions": versions}
