"""The main job on a cluster of two nodes: the same rows and bytes as on one, and both have worked."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.pipelines.runs import clean, contents


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


@pytest.mark.slow
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
