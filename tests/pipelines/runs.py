"""`tarsift clean` as a process of its own, to be disturbed, and what it left behind to be compared."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = ("embeddings/detect", "density", "scores", "flags", "clean", "removed", "errored")
_CODE = "import sys; from tarsift.pipelines.cli import program; sys.argv[0] = 'tarsift'; program()"


def tarsift(*arguments: str) -> list[str]:
    """Return the command line of a tarsift command."""
    return [sys.executable, "-c", _CODE, *arguments]


def clean(dump: Path | str, out: Path | str, encoder: str, *more: str) -> list[str]:
    """Return the command line of a small `clean` in which every pass has several steps."""
    small = ("--set", "suspicion.published_ks=[8, 16]", "--set", "resources.wave_shards=4")
    return tarsift("clean", str(dump), "--out", str(out), "--encoder", f"detect={encoder}", *small, "-q", *more)


def records(out: Path, name: str) -> dict[str, int]:
    """Return when each record of a pass was put, by file name."""
    return {p.name: p.stat().st_mtime_ns for p in (out / "ledger" / name).glob("*.json")}


def contents(out: Path) -> dict[str, bytes]:
    """Return all results of a run, by path."""
    files = [p for folder in RESULTS for p in (out / folder).rglob("*") if p.is_file() and ".parts" not in p.parts]
    return {str(p.relative_to(out)): p.read_bytes() for p in [*files, out / "keep.parquet"]}


def wait_for(child: subprocess.Popen[Any], out: Path, name: str, count: int = 1) -> None:
    """Wait until a run has committed so many shards of a pass."""
    deadline = time.monotonic() + 300
    while len(records(out, name)) < count:
        assert child.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)
