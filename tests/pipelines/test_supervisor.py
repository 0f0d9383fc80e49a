"""The command and its child: what is said is the exit code, what is not said is an interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = (
    "import os, signal, sys, time; from tarsift.pipelines.supervisor import supervised; "
    "sys.exit(supervised(lambda: {}))"
)


def run(work: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE.format(work)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("work", "code", "told"),
    [
        ("print('done')", 0, ""),
        ("sys.exit(4)", 4, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("os._exit(1)", 75, "was ended by Ray, whose daemon is gone; what was committed is kept; run the same"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 75, "was ended by signal 9"),
    ],
)
def test_exit_codes(work, code, told):
    ended = run(work)
    assert ended.returncode == code
    assert told in ended.stderr
    assert bool(told) == bool(ended.stderr)
    assert ended.stdout == ("done\n" if "print" in work else "")


def child_of(parent: int) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.01)
    raise TimeoutError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_to_stop_reach_the_child(number):
    # A signal that comes when a sleep is about to begin does not cut it short: many short ones.
    sleeps = "[time.sleep(0.01) for _ in range(6000)]"
    work = f"[signal.signal({number:d}, lambda *_: sys.exit(75)), print('ready', flush=True), {sleeps}]"
    process = subprocess.Popen([sys.executable, "-c", CODE.format(work)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == 75


IN_HAND = """
import sys, time
from tarsift.pipelines.stopping import patient, stop_on_signals
from tarsift.pipelines.supervisor import supervised

def work():
    stop_on_signals()
    try:
        with patient() as asked:
            print("ready", flush=True)
            while not asked():
                time.sleep(0.01)
            time.sleep(0.5)  # in which what the parent hands on comes
            print("finished", flush=True)
    except KeyboardInterrupt:
        sys.exit(75)

sys.exit(supervised(work))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_work_in_hand_is_finished_where_the_whole_process_group_is_signalled(number):
    """As `timeout`, systemd and Slurm do; parent and child get the signal, and the parent hands it on."""
    process = subprocess.Popen([sys.executable, "-c", IN_HAND], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"ready\n"
    os.killpg(process.pid, number)
    told, _ = process.communicate(timeout=30)
    assert told == b"finished\n"
    assert process.returncode == 75


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the child goes on alone")
def test_the_child_does_not_outlive_the_command():
    work = "[print('ready', flush=True), time.sleep(60)]"
    process = subprocess.Popen([sys.executable, "-c", CODE.format(work)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    child = child_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("the child is still there")
