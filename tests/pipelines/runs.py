"""`tarsift clean` as a process of its own, to be disturbed, and what it left behind to be compared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = ("embeddings/detect", "density", "scores", "flags", "clean", "removed", "errored")
_CODE = "import sys; from tarsift.pipelines.cli import program; sys.argv[0] = 'tarsift'; program()"


def tarsift(*arguments: str) -> list[str]:
    """Return the command line of a tarsift command."""
    return [sys.executable, "-c", _CODE, *arguments]


def clean(dump: Path | str, out: Path | str, encoder: str, *more: str) -> list[str]:
    """Return the command line of a small `clean` in which every pass has several steps."""
    small = ("--set", "suspicion.published_ks=[8, 16]", "--set", "resources.wave_shards=4")
    return tarsift("clean", str(dump), "--out", str(out), "--encoder", f"detect={encoder}", *small, "-q", *more)


@contextmanager
def ray_head(environment: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Run a Ray of two CPUs that commands join; yields the environment by which they do, with what is given.

    To start a Ray of its own takes a command longer than most of what tests have it do. Workers inherit the
    environment of the head, not that of the command.
    """
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 512 << 20}
    with mock.patch.dict(os.environ, environment or {}):
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            yield os.environ | {"RAY_ADDRESS": str(cluster.address)}
        finally:
            cluster.shutdown()


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
        assert child.poll() is None, f"the run ended too early, with {child.returncode}: {child.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
