"""The Ray that tarsift starts: who does not know its token is refused, and it has no dashboard."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

import pytest

from tarsift.pipelines.session import _local_options

pytestmark = pytest.mark.usefixtures("ray_session")

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
            with suppress(psutil.Error):  # it may have ended meanwhile
                if part in " ".join(child.cmdline()):
                    opened = child.net_connections(kind="inet")
                    listening[part] += [str(c.laddr) for c in opened if c.status == psutil.CONN_LISTEN]
    assert listening["gcs_server"]  # its children are found, and what they listen on
    assert not listening["dashboard/dashboard.py"]  # a process of that name collects what Ray logs
