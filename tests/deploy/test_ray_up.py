"""`ray up` with the image: Ray's own code says what it calls in a container; no cloud and no container is at hand."""

import re
import shlex
import subprocess
from typing import Any

import pytest
from ray.autoscaler._private.command_runner import DockerCommandRunner

from tests.deploy.found import DEPLOY, document
from tests.deploy.test_docker import FILES, environment_of, instructions

CONFIG = document("ray/aws.yaml")
HOME = "/home/tarsift"
LOGIN_PATH = "/usr/local/bin:/usr/bin:/bin"  # that /etc/profile of Debian sets, before it reads /etc/profile.d


class Recorded:
    """What stands for processes: says what Ray asks of a container that runs, and notes every command."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def check_call(self, command: list[str] | str, *_: Any, **__: Any) -> None:
        self.commands.append(command if isinstance(command, str) else command[-1])

    def check_output(self, command: list[str] | str, *_: Any, **__: Any) -> bytes:
        self.check_call(command)
        return b"true" if "State.Running" in self.commands[-1] else HOME.encode()


class Machine:
    """A provider of one machine."""

    def external_ip(self, _: str) -> str:
        return "192.0.2.1"

    internal_ip = external_ip


@pytest.fixture
def launcher() -> tuple[DockerCommandRunner, Recorded]:
    recorded = Recorded()
    common = {"log_prefix": "", "node_id": "head", "provider": Machine(), "auth_config": CONFIG["auth"],
              "cluster_name": CONFIG["cluster_name"], "process_runner": recorded, "use_internal_ip": False}  # fmt: skip
    return DockerCommandRunner(CONFIG["docker"], **common), recorded


def system_of(name: str) -> str:
    """The step of a Dockerfile that is about the system."""
    return next(value for word, value in instructions(name) if word == "RUN")


def installed(name: str) -> list[str]:
    (listed,) = re.findall(r"apt-get install [^&]*", system_of(name))
    return [word for word in listed.split()[2:] if not word.startswith("-")]


def test_files_go_into_the_container_by_a_program_that_is_there(launcher):
    runner, recorded = launcher
    for target, source in CONFIG["file_mounts"].items():
        runner.run_rsync_up(source, target)
    inside = [command for command in recorded.commands if "exec -i" in command]
    assert any(re.search(rf"rsync -e .*exec -i.* {CONFIG['docker']['container_name']}:{HOME}/", c) for c in inside)
    for name in FILES:
        # And from the head, which is a container too, to other nodes; a command that is detached is one of tmux.
        assert {"rsync", "openssh-client", "tmux"} <= set(installed(name))


def test_ray_is_found_in_the_shell_that_calls_it(launcher, tmp_path):
    runner, recorded = launcher
    start = CONFIG["head_start_ray_commands"][-1]
    assert " ray start --head" in start
    runner.run(start)
    assert "bash --login " in recorded.commands[-1]
    for name in FILES:
        venv, _, rest = environment_of(name)["PATH"].partition(":")
        assert rest == "$PATH"
        (step,) = [part for part in system_of(name).split("&&") if "/etc/profile.d/" in part]
        (tmp_path / name / "etc" / "profile.d").mkdir(parents=True)
        subprocess.run(["sh", "-c", step.replace("/etc/", f"{tmp_path}/{name}/etc/")], check=True)
        (file,) = (tmp_path / name / "etc" / "profile.d").iterdir()
        assert file.suffix == ".sh"
        login = ["sh", "-c", f". {shlex.quote(str(file))}; echo $PATH"]
        told = subprocess.run(login, env={"PATH": LOGIN_PATH}, check=True, capture_output=True, text=True).stdout
        assert told.strip() == f"{venv}:{LOGIN_PATH}"


def test_every_node_asks_for_the_token():
    """It lies where Ray looks for it, on this machine as on the nodes, and no node starts without asking for it."""
    assert CONFIG["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in CONFIG["docker"]["run_options"]
    assert "ray get-auth-token --generate" in (DEPLOY / "ray" / "aws.yaml").read_text()


def test_the_image_has_what_starts_machines():
    for name in FILES:
        (install,) = [value for word, value in instructions(name) if word == "RUN" and "uv pip" in value]
        (extras,) = re.findall(r"\.\[([\w,]+)\]", install)
        assert CONFIG["provider"]["type"] in extras.split(",")
