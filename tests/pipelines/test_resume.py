"""SIGKILL of the driver in the middle of each pass, one after the other: the last run ends with the same bytes."""

import os
import random
import signal
import subprocess
import time

import pyarrow.parquet as pq
import pytest

from tests.pipelines.runs import clean, contents, records, wait_for

SHARDS = 8
PASSES = {"embed.detect": SHARDS, "reference": 1, "density": SHARDS, "score": SHARDS, "flag": SHARDS, "write": SHARDS}
RECORDED = (*PASSES, "enriched")


@pytest.mark.slow
def test_killed_drivers(undisturbed):
    out, killed = undisturbed / "killed", 0
    command = clean(undisturbed / "dump", out, undisturbed / "enc.pt")
    before: dict[str, dict[str, int]] = {}
    for name, whole in (*PASSES.items(), ("report", 0)):
        there = len(records(out, name))
        if there == whole and name != "report":  # done before the run that was to be killed in an earlier pass was
            continue
        child = subprocess.Popen(command, start_new_session=True)
        wait_for(child, out, *(("write", SHARDS) if name == "report" else (name, there + 1)))
        time.sleep(random.Random(name).uniform(0, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        killed += 1
        before = not_done_again(out, before)
    subprocess.run(command, check=True, timeout=300)
    not_done_again(out, before)
    assert killed >= 4
    assert contents(out) == contents(undisturbed / "whole")
    assert (out / "report.html").exists()
    assert sum(len(pq.read_table(p)) for p in (out / "flags").glob("*.parquet")) == 480


def not_done_again(out, before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Return what is committed; no committed shard was done again by its pass."""
    after = {name: records(out, name) for name in RECORDED}
    for name, entries in before.items():
        assert entries == {shard: after[name].get(shard) for shard in entries}, name
    return after
