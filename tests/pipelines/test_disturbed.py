"""Whole runs that are killed in each pass, asked to stop, begun twice at once, or spread over two nodes: same bytes."""

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tarsift.pipelines.lock import last_holder
from tests.conftest import make_dump, make_encoder
from tests.pipelines.runs import clean, contents, records, wait_for

pytestmark = pytest.mark.slow
SHARDS = 8
PASSES = {"embed.detect": SHARDS, "reference": 1, "density": SHARDS, "score": SHARDS, "flag": SHARDS, "write": SHARDS}
RECORDED = (*PASSES, "enriched")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with `dump`, its `enc.pt`, and `whole`: what an undisturbed `clean` made of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_dump(folder / "dump", shards=SHARDS, samples=60)
    own = make_encoder(folder / "enc.pt", folder / "dump")
    subprocess.run(clean(folder / "dump", folder / "whole", own), check=True, timeout=300)
    return folder


def test_killed_drivers(undisturbed, joined):
    out, killed = undisturbed / "killed", 0
    command = clean(undisturbed / "dump", out, undisturbed / "enc.pt")
    before: dict[str, dict[str, int]] = {}
    for name, whole in (*PASSES.items(), ("report", 0)):
        there = len(records(out, name))
        if there == whole and name != "report":  # done before the run that was to be killed in an earlier pass was
            continue
        child = subprocess.Popen(command, env=joined, start_new_session=True)
        wait_for(child, out, *(("write", SHARDS) if name == "report" else (name, there + 1)))
        time.sleep(random.Random(name).uniform(0, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        killed += 1
        before = not_done_again(out, before)
    subprocess.run(command, env=joined, check=True, timeout=300)
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


def test_asked_to_stop_and_run_twice_at_once(undisturbed, joined):
    """At first with a Ray of its own, which ends with it."""
    out, before, environment = undisturbed / "stopped", {}, None
    command = clean(undisturbed / "dump", out, undisturbed / "enc.pt")
    for name, number in (("embed.detect", signal.SIGTERM), ("score", signal.SIGINT), ("write", signal.SIGTERM)):
        child = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE)
        wait_for(child, out, name)
        child.send_signal(number)
        _, told = child.communicate(timeout=60)
        assert child.returncode == 75, told.decode()
        assert b"run the same command again" in told
        assert b"Traceback" not in told
        for passed, entries in before.items():
            assert entries == {shard: records(out, passed)[shard] for shard in entries}, passed
        before[name], environment = records(out, name), joined
    holder = last_holder(str(out))
    last = subprocess.Popen(command, env=joined, start_new_session=True)
    while last_holder(str(out)) == holder:  # it is held before Ray is there
        assert last.poll() is None
        time.sleep(0.01)
    refused = subprocess.run(command, env=joined, capture_output=True, timeout=120)
    assert refused.returncode == 75
    assert b"is being worked on by process" in refused.stderr
    assert last.wait(timeout=300) == 0
    for passed, entries in before.items():
        assert entries == {shard: records(out, passed)[shard] for shard in entries}, passed
    assert contents(out) == contents(undisturbed / "whole")


def busy_names(raylet: int) -> set[str]:
    """What the workers of a node's raylet are called; those at work are called after their work."""
    names = set()
    for task in Path(f"/proc/{raylet}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                name = Path(f"/proc/{child}/cmdline").read_text().partition("\0")[0]
            except OSError:
                continue
            if name.startswith("ray::") and not name.startswith("ray::IDLE"):
                names.add(name)
    return names


def test_two_nodes_give_the_same_rows_as_one(undisturbed):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        worked: list[set[str]] = [set(), set()]
        out = undisturbed / "two-nodes"
        command = clean(undisturbed / "dump", out, str(undisturbed / "enc.pt"))
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                for names, raylet in zip(worked, raylets, strict=True):
                    names |= busy_names(raylet)
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert child.wait(timeout=300) == 0
        finally:
            done.set()
            watcher.join()
    finally:
        cluster.shutdown()
    assert all(worked), worked
    assert contents(out) == contents(undisturbed / "whole")
