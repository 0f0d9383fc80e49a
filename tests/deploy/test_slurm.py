"""The Slurm script against stand-ins of srun, scontrol, ray and tarsift: what it starts, ends, and asks Slurm for."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tarsift.operators.errors import EXIT_CODES
from tests.deploy.found import DEPLOY

SCRIPT = DEPLOY / "slurm" / "tarsift.sbatch"
NODES = ["node7", "node8", "node9"]

# A step runs until it is ended; whatever happens is a line of the log.
STUBS = {
    "srun": """#!/bin/bash
sleep 300 >/dev/null 2>&1 &
trap 'echo "ended $$" >> "$LOG"; kill %1; exit 143' TERM
echo "srun $$ token=${RAY_AUTH_TOKEN:0:8} mode=$RAY_AUTH_MODE $*" >> "$LOG"
wait
""",
    "scontrol": """#!/bin/bash
echo "scontrol $*" >> "$LOG"
[ "$1 $2" != "show hostnames" ] || printf '%s\\n' node7 node8 node9
""",
    "hostname": "#!/bin/bash\necho '10.0.0.7 172.17.0.1 '\n",
    "tarsift": """#!/bin/bash
sleep "$HANGS" >/dev/null 2>&1 &
trap 'sleep 0.2; echo "tarsift asked to stop" >> "$LOG"; kill %1; exit 75' TERM
echo "tarsift address=$RAY_ADDRESS $*" >> "$LOG"
wait
exit "$CODE"
""",
}
# What `wait_for` needs of Ray: it answers once a head runs, and has the nodes that run, NODES at most.
RAY = """
import os
import time
_sleep = time.sleep
time.sleep = lambda seconds: _sleep(seconds / 100)
there = False
def steps():
    return [line for line in open(os.environ["LOG"]) if line.startswith("srun ")]
def is_initialized():
    return there
def init(log_to_driver):
    global there
    assert os.environ["RAY_ADDRESS"]
    if os.environ.get("HEAD") == "lost" or not any("--head" in step for step in steps()):
        raise ConnectionError("nothing there")
    there = True
def nodes():
    return [{"Alive": True}] * min(int(os.environ.get("NODES", 3)), len(steps())) + [{"Alive": False}]
"""


class Run:
    """The script as Slurm would start it, in a folder of its own."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        programs, modules = folder / "bin", folder / "modules"
        programs.mkdir()
        modules.mkdir()
        for name, text in STUBS.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # starts faster
        (programs / "python").chmod(0o755)
        (modules / "ray.py").write_text(RAY)
        self.log = folder / "log"
        self.log.write_text("")
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_"))},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(modules),
            "LOG": str(self.log),
            "CODE": "0",
            "HANGS": "0",
            "NODES_WAIT_S": "60",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[7-9]",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURM_GPUS_ON_NODE": "2",
            **environment,
        }
        self.process = subprocess.Popen(
            [SCRIPT, *arguments], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def until(self, text: str) -> None:
        until = time.monotonic() + 30
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def end(self, within_s: float = 60) -> tuple[int, list[str], str]:
        """Exit code, lines of the log, and what was printed."""
        printed, _ = self.process.communicate(timeout=within_s)
        return self.process.returncode, self.log.read_text().splitlines(), printed


def steps(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("srun ")]


def all_ended(lines: list[str]) -> bool:
    started = {line.split()[1] for line in steps(lines)}
    return started == {line.split()[1] for line in lines if line.startswith("ended ")}


def test_it_starts_a_head_and_workers_runs_the_command_and_ends_what_it_started(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as bystander:
        code, lines, printed = Run(tmp_path).end()
        assert bystander.poll() is None
        bystander.kill()
    assert code == 0, printed
    head, *workers = steps(lines)
    workers.sort(key=lambda step: re.findall(r"--nodelist=\w+", step))  # they start side by side
    for step, node in zip([head, *workers], NODES, strict=True):
        words = step.split()
        assert f"--nodelist={node}" in words
        assert {"--nodes=1", "--ntasks=1", "--cpus-per-task=16", "--block", "--num-gpus=2"} <= set(words)
    assert "--head" in head.split()
    assert "--num-cpus=15" in head.split()
    assert "--dashboard-host=127.0.0.1" in head.split()
    (port,) = re.findall(r"--port=(\d+)", head)
    for worker in workers:
        assert f"--address=10.0.0.7:{port}" in worker.split()
        assert "--num-cpus=16" in worker.split()
    assert all_ended(lines)
    (command,) = [line for line in lines if line.startswith("tarsift ")]
    assert command.startswith(f"tarsift address=10.0.0.7:{port} clean s3://bucket/cc3m/{{00000..00331}}.tar --encoder ")
    assert all(lines.index(step) < lines.index(command) for step in [head, *workers])
    assert all(lines.index(line) > lines.index(command) for line in lines if line.startswith("ended "))
    assert "3 of 3 nodes" in printed
    assert not [line for line in lines if line.startswith("scontrol requeue")]


def test_another_command_can_be_given(tmp_path):
    _, lines, _ = Run(tmp_path, "tarsift", "audit", "a b").end()
    assert [line.split(" ", 2)[2] for line in lines if line.startswith("tarsift ")] == ["audit a b"]


def test_a_token_of_its_own_guards_it(tmp_path):
    tokens = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _, lines, printed = Run(tmp_path / name).end()
        (of_run,) = {re.findall(r"token=(\w+) mode=token", line)[0] for line in steps(lines)}
        assert len(of_run) == 8
        # Only in the environment: others see arguments.
        assert not [line for line in lines if f" {of_run}" in line or f"={of_run}" in line.replace("token=", "", 1)]
        assert of_run not in printed
        tokens.append(of_run)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("code", [code for code in EXIT_CODES.values() if code not in (0, 75)])
def test_other_exit_codes_end_the_job(tmp_path, code):
    got, lines, _ = Run(tmp_path, CODE=str(code)).end()
    assert got == code
    assert all_ended(lines)
    assert "scontrol requeue 4711" not in lines


def test_75_goes_back_to_the_queue(tmp_path):
    code, lines, _ = Run(tmp_path, CODE="75").end()
    assert code == 75
    assert all_ended(lines)
    assert lines[-1] == "scontrol requeue 4711"  # when nothing of it runs any more


def test_75_does_not_go_back_for_ever(tmp_path):
    code, lines, printed = Run(tmp_path, CODE="75", SLURM_RESTART_COUNT="20").end()
    assert code == 75
    assert "scontrol requeue 4711" not in lines
    assert "after 20 restarts" in printed


def test_when_time_is_up_the_command_is_asked_to_stop_first(tmp_path):
    """Slurm's `--signal=B:TERM@300` reaches the script alone."""
    run = Run(tmp_path, HANGS="300")
    run.until("tarsift address")
    run.process.send_signal(signal.SIGTERM)
    code, lines, printed = run.end()
    assert code == 75, printed
    stopped = lines.index("tarsift asked to stop")
    assert all(lines.index(line) > stopped for line in lines if line.startswith("ended "))
    assert all_ended(lines)
    assert lines[-1] == "scontrol requeue 4711"


def test_asked_to_stop_while_nodes_are_waited_for(tmp_path):
    run = Run(tmp_path, NODES="0", NODES_WAIT_S="60")
    run.until("srun ")
    run.process.send_signal(signal.SIGTERM)
    code, lines, _ = run.end(within_s=30)  # what waits for nodes would have kept the output open for a minute
    assert code == 75
    assert all_ended(lines)
    assert not [line for line in lines if line.startswith("tarsift ")]
    assert lines[-1] == "scontrol requeue 4711"


def test_a_head_that_does_not_come_up(tmp_path):
    code, lines, printed = Run(tmp_path, HEAD="lost", NODES_WAIT_S="0.2").end()
    assert code == 75
    assert "Ray does not answer" in printed
    assert len(steps(lines)) == 1
    assert all_ended(lines)
    assert not [line for line in lines if line.startswith("tarsift ")]


def test_it_goes_on_with_the_nodes_that_came(tmp_path):
    code, lines, printed = Run(tmp_path, NODES="2", NODES_WAIT_S="3").end()
    assert code == 0
    assert "2 of 3 nodes" in printed
    assert [line for line in lines if line.startswith("tarsift ")]


def test_what_it_asks_slurm_for():
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["signal"].startswith("B:TERM@")
    assert {"requeue", "exclusive"} <= options.keys()
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"
    assert options.keys() <= {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time",
                              "exclusive", "requeue", "open-mode", "signal"}  # fmt: skip


def test_the_shell_takes_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert "ray stop" not in SCRIPT.read_text()  # that would end the Ray of other jobs too


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    subprocess.run(["shellcheck", SCRIPT], check=True)
