"""The ways in which the fault benchmark hits a run: what each does, and the surroundings that it needs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import ROOT, family, stats, title

sys.path.insert(0, str(ROOT))

from tests.pipelines.store import Store, files_of, s3_server

HANG_S = 300.0
EATEN = 6 << 30


@dataclass
class Case:
    """A run that is about to be hit."""

    process: subprocess.Popen[bytes]
    out: Path
    rng: random.Random
    store: Store | None = None
    cluster: Any = None
    frozen: int | None = None  # a process that does not move until it is killed

    def thaw(self) -> None:
        """Kill what was frozen: neither Ray's end nor its request reaches it."""
        if self.frozen is not None:
            with suppress(ProcessLookupError):
                os.kill(self.frozen, signal.SIGKILL)

    def records(self) -> dict[str, float]:
        """Return when each record was put, by `<pass>/<shard>`."""
        if self.store:
            files = files_of(self.store)
            found = files.find("bucket/out/ledger", detail=True) if files.exists("bucket/out/ledger") else {}
            return {path.partition("ledger/")[2]: info["LastModified"].timestamp() for path, info in found.items()}
        return {str(p.relative_to(self.out / "ledger")): p.stat().st_mtime for p in self.out.glob("ledger/*/*.json")}

    def driver(self) -> int:
        """Return the process that drives Ray, which is the command's only child."""
        children = [pid for pid, fields in stats().items() if int(fields[1]) == self.process.pid]
        if not children:
            raise TooLate
        return children[0]

    def merging(self) -> bool:
        return any(self.out.glob("embeddings/detect/.*.tmp"))

    def processes(self) -> dict[int, str]:
        """Return pid and title of the processes below the driver's, or below those of a cluster."""
        roots = [self.process.pid]
        if self.cluster:
            roots += [p.process.pid for node in self.cluster.list_all_nodes() for p in _raylets(node)]
        return {pid: title(pid) for pid in family(roots) - set(roots)}

    def wait_for_process(self, wanted: Callable[[str], bool], seconds: float = 20) -> int:
        """Return a process of that title, chosen at random, as soon as there is one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            found = sorted(pid for pid, title in self.processes().items() if wanted(title))
            if found:
                return self.rng.choice(found)
            time.sleep(0.01)
        raise TooLate


class TooLate(Exception):
    """The run had ended, or left the pass, before it could be hit."""


def _raylets(node: Any) -> list[Any]:
    return node.all_processes.get("raylet", [])


def is_worker(title: str) -> bool:
    """Tell whether a worker runs a task of tarsift's, of which there are these; encoders are none of them."""
    tasks = ("MapBatches", "_fold_some", "write_shard", "fit_", "_fit_", "_merge_and_tidy")
    return title.startswith("ray::") and any(task in title for task in tasks) and not is_encoder(title)


def is_encoder(title: str) -> bool:
    return title.startswith("ray::MapBatches(encode)")


# Kinds of faults: each does its harm and returns what was hit.


def kill_command(case: Case) -> str:
    """Kill the command, as a scheduler does; what drives Ray is below it."""
    case.process.kill()
    return "command"


def kill_driver(case: Case) -> str:
    """Kill the process that drives Ray, as the system does when memory runs out."""
    os.kill(case.driver(), signal.SIGKILL)
    return "driver"


def stop(case: Case) -> str:
    case.process.send_signal(signal.SIGTERM)
    return "driver"


def kill_raylet(case: Case) -> str:
    os.kill(case.wait_for_process(lambda title: title.split(" ")[0].endswith("/raylet")), signal.SIGKILL)
    return "raylet"


def kill_worker(case: Case) -> str:
    pid = case.wait_for_process(is_worker)
    title = case.processes().get(pid, "?")
    os.kill(pid, signal.SIGKILL)
    return title


def freeze_worker(case: Case) -> str:
    """Stop a worker without ending it, as a mount that does not answer does."""
    case.frozen = case.wait_for_process(is_worker)
    os.kill(case.frozen, signal.SIGSTOP)
    return title(case.frozen)


def kill_encoder(case: Case) -> str:
    os.kill(case.wait_for_process(is_encoder), signal.SIGKILL)
    return "encoder"


def lose_node(case: Case) -> str:
    """Kill the second node of the cluster at once, with all that runs on it."""
    (node,) = case.cluster.worker_nodes
    case.cluster.remove_node(node, allow_graceful=False)
    return "node"


def eat_memory(case: Case) -> str:
    """Take memory until Ray's monitor has killed a worker, as it does where workers take too much."""
    before = {pid for pid, title in case.processes().items() if title.startswith("ray::")}
    code = f"import time; x = bytearray({EATEN}); x[::4096] = b'1' * len(x[::4096]); time.sleep(60)"
    eater = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and case.process.poll() is None:
            if before - set(case.processes()):
                return f"{len(before - set(case.processes()))} workers"
            time.sleep(0.05)
    finally:
        eater.kill()
        eater.wait()
    raise TooLate


def fill_disk(case: Case) -> str:
    """Fill the disk that holds the results to the last byte."""
    with (case.out.parent / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1 << 16))
            except OSError:
                break
    return "disk"


def outage(case: Case) -> str:
    assert case.store
    case.store.away_until = time.monotonic() + 60
    return "store away for 60 s"


def second_run(case: Case) -> str:
    """Start the same command beside the first one; it must be refused.

    The first one's driver is held until then, since a command takes longer to start than these passes take.
    """
    driver = case.driver()
    os.kill(driver, signal.SIGSTOP)
    try:
        second = subprocess.run(case.process.args, capture_output=True, timeout=HANG_S)
    finally:
        os.kill(driver, signal.SIGCONT)
    return f"second run exited with {second.returncode}"


@contextmanager
def surroundings(kind: str, folder: Path) -> Iterator[tuple[dict[str, str], Path, Any]]:
    """Make what a kind of fault needs: environment of the run, its result folder, and a store or a cluster."""
    # A Ray of its own: it would join the cluster of a node's loss that is measured beside it.
    environment: dict[str, str] = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    if kind == "store":
        with s3_server() as store:
            files = files_of(store)
            files.mkdir("bucket")
            files.put(str(folder / "dump"), "bucket/dump", recursive=True)
            yield environment | store.environment, folder / "unused", store
    elif kind == "node":
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            yield environment | {"RAY_ADDRESS": str(cluster.address)}, folder / "out", cluster
        finally:
            cluster.shutdown()
    elif kind == "disk":
        disk = folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
        try:
            yield environment, disk / "out", None
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    elif kind == "memory":
        info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(info[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        threshold = (total - free + EATEN * 0.75) / total
        options = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
        yield environment | options, folder / "out", None
    else:
        yield environment, folder / "out", None
