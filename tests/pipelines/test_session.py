"""Which Ray a session uses: one that is there is joined and left running, else a local one, which strangers cannot."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray._private import services
from ray.exceptions import AuthenticationError

from tarsift.operators.errors import Interrupted, UsageError
from tarsift.pipelines.session import ACTOR_OPTIONS, REACH_S, _local_options, known_address, session


class Started(Exception):
    """In place of a Ray."""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What `ray.init` is given, in a session of a machine on which `ray start` once ran."""
    given = {}

    def init(**options):
        given.update(options)
        raise Started

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("192.0.2.1:6379\n")

    def start():
        given.clear()
        with pytest.raises(Started), session(num_cpus=3):
            pass
        return given

    return start


def running(monkeypatch, *addresses: str) -> None:
    """Have these addresses be those of Ray processes of this machine."""
    monkeypatch.setattr(services, "_find_address_from_flag", lambda flag: set(addresses))
    services.find_gcs_addresses.cache_clear()


def test_what_ray_start_runs_is_joined_without_options_of_a_local_one(started, monkeypatch):
    running(monkeypatch, "192.0.2.1:6379", "192.0.2.1:1")
    assert known_address() == "192.0.2.1:6379"
    given = started()
    assert given["address"] is None
    assert not given.keys() & {"num_cpus", "_system_config", "include_dashboard"}


@pytest.mark.parametrize("addresses", [(), ("192.0.2.1:1",)])
def test_an_address_that_a_dead_ray_left_behind_is_passed_over(started, monkeypatch, addresses):
    """Nor is another program's local Ray joined."""
    running(monkeypatch, *addresses)
    assert known_address() is None
    given = started()
    assert given["address"] == "local"
    assert given["num_cpus"] == 3
    assert "_system_config" in given


@pytest.fixture
def somebody() -> Iterator[str]:
    """An address at which connections are taken."""
    with socket.create_server(("", 0)) as server:  # Ray takes 127.0.0.1 for an address of the machine
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_ray_address_comes_first(started, monkeypatch, somebody):
    running(monkeypatch, "192.0.2.1:6379")
    for told, local in ((somebody, False), ("local", True)):
        monkeypatch.setenv("RAY_ADDRESS", told)
        given = started()
        assert given["address"] == told
        assert ("_system_config" in given) == local


def refusal(kind: type[Exception]) -> str:
    with pytest.raises(kind) as told, session():
        pass
    return str(told.value)


def test_a_ray_that_is_not_there_is_told_at_once(started, monkeypatch, tmp_path):
    running(monkeypatch)
    start, port = time.monotonic(), free_ports(1)[0]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert re.search(rf"no Ray answers at \S+:{port}", refusal(Interrupted))  # its head may be on its way
    monkeypatch.setenv("RAY_ADDRESS", "a-name")
    assert "RAY_ADDRESS=a-name is no address" in refusal(UsageError)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    left_behind = tmp_path / "ray" / "ray_current_cluster"
    left_behind.write_text(f"127.0.0.1:{port}\n")
    assert re.search(rf"RAY_ADDRESS=auto: no Ray answers at \S+:{port}", refusal(Interrupted))
    left_behind.unlink()
    assert "no Ray runs on this machine" in refusal(UsageError)
    assert time.monotonic() - start < REACH_S


def test_what_ray_says_against_joining_is_one_sentence(started, monkeypatch, somebody):
    monkeypatch.setenv("RAY_ADDRESS", somebody)

    def refuse(error: Exception) -> None:
        def init(**_: object) -> None:
            raise error

        monkeypatch.setattr(ray, "init", init)

    refuse(RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\n    Python: 3.9"))
    told = refusal(UsageError)
    assert f"the Ray at {somebody} cannot be joined: Version mismatch" in told
    assert "\n" not in told
    refuse(AuthenticationError("Token authentication is enabled but no authentication token was found."))
    assert "asks for a token" in refusal(UsageError)
    refuse(ConnectionError("Failed to connect"))
    assert "does not answer (Failed to connect)" in refusal(Interrupted)


@pytest.mark.slow
def test_a_ray_that_refuses_the_token_says_so(ray_session):
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        pytest.skip("RAY_AUTH_MODE=disabled, so Ray asks for no token")
    usual = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = usual | {"RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}
    for stranger in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        command = [sys.executable, "-c", LOOK]
        looked = subprocess.run(command, env=environment | stranger, capture_output=True, text=True, timeout=120)
        assert looked.returncode != 0
        assert "asks for a token, and this process has none or another one" in looked.stderr


LOOK = (
    "import ray; from tarsift.pipelines.session import session\n"
    "with session(num_cpus=2): print(ray.cluster_resources().get('ours', 0), ray.cluster_resources()['CPU'])"
)


def free_ports(number: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc to find processes by")
def test_a_ray_that_is_started_joined_and_killed():
    folder = tempfile.mkdtemp(dir="/tmp")  # sockets have short names
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}

    def look() -> str:
        looked = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, timeout=120)
        assert looked.returncode == 0, looked.stderr.decode()
        return looked.stdout.decode().strip()

    names = ("port", "dashboard-agent-listen-port")
    ports = [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
    options = ["--head", "--num-cpus=1", '--resources={"ours": 1}', "--include-dashboard=false", *ports]
    try:
        start = [str(Path(sys.executable).parent / "ray"), "start", *options]
        subprocess.run(start, env=environment, check=True, capture_output=True, timeout=120)
        assert look() == "1.0 1.0"
        assert look() == "1.0 1.0"  # it was left running
    finally:
        kill_all(f"RAY_TMPDIR={folder}".encode())
    assert Path(folder, "ray", "ray_current_cluster").exists()  # a Ray that is killed leaves its address behind
    assert look() == "0 2.0"
    shutil.rmtree(folder)


def kill_all(setting: bytes) -> None:
    """Kill the processes that were started with a setting in their environment, and wait for their end."""
    deadline = time.monotonic() + 60
    while found := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if setting in environ(pid)]:
        assert time.monotonic() < deadline, found
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


# Ray's own client of its head, which needs no session of this process.
ASK = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).internal_kv_get(b'x', None))"


def ask(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    usual = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", ASK, address]
    return subprocess.run(command, env=usual | environment, capture_output=True, text=True, timeout=120)


def test_a_client_without_the_token_is_refused(ray_session):
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        pytest.skip("RAY_AUTH_MODE=disabled, so Ray asks for no token")
    address = ray_session.get_runtime_context().gcs_address
    assert ask(address, RAY_AUTH_MODE="token").returncode == 0  # with the token of this user, in ~/.ray
    for stranger in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = ask(address, **stranger)
        assert refused.returncode != 0
        assert "InvalidAuthToken" in refused.stderr


def test_no_dashboard_listens(ray_session):
    assert _local_options(2)["include_dashboard"] is False  # there could be one only where ray[default] is installed
    psutil = pytest.importorskip("psutil")  # comes with Ray
    listening: dict[str, list[str]] = {"gcs_server": [], "dashboard/dashboard.py": []}
    for child in psutil.Process().children(recursive=True):
        for part in listening:
            with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                if part in " ".join(child.cmdline()):
                    opened = child.net_connections(kind="inet")
                    listening[part] += [str(c.laddr) for c in opened if c.status == psutil.CONN_LISTEN]
    assert listening["gcs_server"]  # its children are found, and what they listen on
    assert not listening["dashboard/dashboard.py"]  # a process of that name collects what Ray logs


class DiesWhileLoading:
    """An actor of which the first two end before they are ready, as where the machine's memory is out."""

    def __init__(self, folder: str) -> None:
        for death in range(2):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{folder}/{death}", os.O_CREAT | os.O_EXCL))
                os._exit(1)

    def __call__(self, table: pa.Table) -> pa.Table:
        return table


def test_an_actor_that_dies_while_it_loads_is_started_again(ray_session, tmp_path):
    with session():
        rows = ray_session.data.from_arrow(pa.table({"x": [1, 2, 3]})).map_batches(
            DiesWhileLoading,
            fn_constructor_args=(str(tmp_path),),
            compute=ray_session.data.ActorPoolStrategy(size=1),
            **ACTOR_OPTIONS,
        )
        assert rows.count() == 3
    assert len(list(tmp_path.iterdir())) == 2
