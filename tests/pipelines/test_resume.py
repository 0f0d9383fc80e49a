"""SIGKILL of the driver in the middle of each pass: the same command ends with the same rows and bytes."""

import os
import random
import signal
import subprocess
import time

import pyarrow.parquet as pq
import pytest

from tests.pipelines.runs import clean, contents, records, wait_for

PASSES = {
    "embed.detect": 1,  # kill once so many records of the pass are there
    "reference": 1,
    "density": 1,
    "score": 1,
    "flag": 1,
    "write": 1,
    "report": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_killed_driver(undisturbed, name):
    out = undisturbed / name
    child = subprocess.Popen(clean(undisturbed / "dump", out, undisturbed / "enc.pt"), start_new_session=True)
    wait_for(child, out, "write" if name == "report" else name, 8 if name == "report" else PASSES[name])
    time.sleep(random.Random(name).uniform(0, 0.3))
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = {p: records(out, p) for p in (*PASSES, "enriched")}
    subprocess.run(clean(undisturbed / "dump", out, undisturbed / "enc.pt"), check=True, timeout=300)
    after = {p: records(out, p) for p in before}
    for passed, entries in before.items():  # no committed shard is done again by its pass
        assert entries == {shard: after[passed][shard] for shard in entries}, passed
    assert contents(out) == contents(undisturbed / "whole")
    assert (out / "report.html").exists()
    assert sum(len(pq.read_table(p)) for p in (out / "flags").glob("*.parquet")) == 480
