"""SIGKILL of the driver in the middle of each pass: the same command ends with the same rows and bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import make_dump

PASSES = {
    "embed.detect": 1,  # kill once so many records of the pass are there
    "reference": 1,
    "density": 1,
    "score": 1,
    "flag": 1,
    "write": 1,
    "report": 0,
}
RESULTS = ("embeddings/detect", "density", "scores", "flags", "clean", "removed", "errored")


def command(dump: Path, out: Path, encoder: str) -> list[str]:
    code = "import sys; from tarsift.pipelines.cli import main; sys.argv[0] = 'tarsift'; main()"
    small = ("--set", "suspicion.published_ks=[8, 16]", "--set", "resources.wave_shards=4")
    run = [sys.executable, "-c", code, "clean", str(dump), "--out", str(out)]
    return [*run, "--encoder", f"detect={encoder}", *small, "-q"]


def records(out: Path, name: str) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "ledger" / name).glob("*.json")}


def contents(out: Path) -> dict[str, bytes]:
    files = [p for folder in RESULTS for p in (out / folder).rglob("*") if p.is_file() and ".parts" not in p.parts]
    return {str(p.relative_to(out)): p.read_bytes() for p in [*files, out / "keep.parquet"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("resume")
    make_dump(folder / "dump", shards=8, samples=60)
    subprocess.run(command(folder / "dump", folder / "whole", encoder), check=True, timeout=300)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_killed_driver(undisturbed, encoder, name):
    out = undisturbed / name
    child = subprocess.Popen(command(undisturbed / "dump", out, encoder), start_new_session=True)
    deadline = time.monotonic() + 300
    ready = "write" if name == "report" else name
    wanted = 8 if name == "report" else PASSES[name]
    while len(records(out, ready)) < wanted:
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.Random(name).uniform(0, 0.3))
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = {p: records(out, p) for p in (*PASSES, "enriched")}
    subprocess.run(command(undisturbed / "dump", out, encoder), check=True, timeout=300)
    after = {p: records(out, p) for p in before}
    for passed, entries in before.items():  # no committed shard is done again by its pass
        assert entries == {shard: after[passed][shard] for shard in entries}, passed
    assert contents(out) == contents(undisturbed / "whole")
    assert (out / "report.html").exists()
    assert sum(len(pq.read_table(p)) for p in (out / "flags").glob("*.parquet")) == 480
